// A small kernel of the kind that csrc/cuda has, sound or with one known bug planted: what the emulation is tested on.
//
// c [M, N] = a [M, K] * b [K, N], all row-major, a and b of __half, K and N multiples of 8; and the sum of all c. A
// block of two warps makes 32 x 16 values of c, 16 of K at a time through two stages of shared memory. The last block
// sums up what each block has summed, in a fixed order.
#include "gemm.h"
#include "ptx.h"

namespace fused_preact::planted {

namespace {

using namespace cuda;

constexpr int kM = 32, kN = 16, kK = 16, kThreads = 64;

struct Stage {
  __half a[kM][kK];
  __half b[kK][kN];
};

struct Memory {
  Stage stage[2];
  float sums[kThreads / 32];
};

struct Arguments {
  int M, N, K;
  const __half *a, *b;
  float* c;
  float* sums;        // of each block
  unsigned* arrived;  // blocks, zero before and after
  float* total;
};

__device__ void copy_stage(Stage& stage, const Arguments& x, int row, int column, int k) {
  const int thread = threadIdx.x;
  const int i = thread / 2, j = thread % 2 * 8;
  const bool inside = row + i < x.M && k + j < x.K;
  cp_async(&stage.a[i][j], x.a + (inside ? int64_t{row + i} * x.K + k + j : 0), inside);
  if (thread < kK * 2) {
    const bool within = k + i < x.K && column + j < x.N;
    cp_async(&stage.b[i][j], x.b + (within ? int64_t{k + i} * x.N + column + j : 0), within);
  }
  cp_async_commit();
}

__device__ void multiply_stage(float (&d)[2][4], const Stage& stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t a[4], b[4];
  ldmatrix_x4(a, &stage.a[16 * warp + lane % 16][lane / 16 * 8]);
  ldmatrix_x4_trans(b, &stage.b[lane % 16][lane / 16 * 8]);
  for (int j = 0; j < 2; ++j) mma_m16n8k16<__half>(d[j], a, {b[2 * j], b[2 * j + 1]});
}

// Sum over the block, in thread 0.
__device__ float block_sum(float value, float* sums) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float result = 0;
  for (int i = 0; i < kThreads / 32; ++i) result += sums[i];
  return result;
}

template <Bug bug>
__global__ void __launch_bounds__(kThreads) gemm_kernel(Arguments x) {
  if (bug != Bug::no_turn) take_turn();
  Memory& memory = *reinterpret_cast<Memory*>(shared_memory());
  const int row = blockIdx.x * kM, column = blockIdx.y * kN;
  float d[2][4] = {};

  copy_stage(memory.stage[0], x, row, column, 0);
  for (int k = 0; k < x.K; k += kK) {
    const int stage = k / kK % 2;
    if (bug != Bug::no_barrier_before_overwrite) __syncthreads();
    copy_stage(memory.stage[1 - stage], x, row, column, k + kK);
    cp_async_wait<bug == Bug::weak_wait ? 2 : 1>();
    if (bug == Bug::divergent_barrier && threadIdx.x >= 32) {
      __syncthreads();
    }
    if (bug != Bug::no_barrier_after_wait) __syncthreads();
    multiply_stage(d, memory.stage[stage]);
  }

  float sum = 0;
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, pair = 2 * (threadIdx.x % 4);
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int m = row + 16 * warp + group + i / 2 * 8, n = column + 8 * j + pair + i % 2;
      if (m < x.M && n < x.N) {
        x.c[int64_t{m} * x.N + n] = d[j][i];
        sum += d[j][i];
      }
    }
  }
  sum = block_sum(sum, memory.sums);

  const int blocks = gridDim.x * gridDim.y;
  bool last = false;
  if (threadIdx.x == 0) {
    x.sums[blockIdx.x + blockIdx.y * gridDim.x] = sum;
    const uint32_t before =
        bug == Bug::no_fence ? emulation::count_up(x.arrived, blocks - 1) : arrive(x.arrived, blocks - 1);
    last = before == static_cast<uint32_t>(blocks - 1);
    if (bug == Bug::first_block_sums_up) last = blockIdx.x + blockIdx.y == 0;
  }
  if (!__syncthreads_or(last)) return;
  float total = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) total += x.sums[i];
  total = block_sum(total, memory.sums);
  if (threadIdx.x == 0) *x.total = total;
}

__global__ void idle_kernel(bool takes_turn) {
  if (takes_turn) take_turn();
}

template <Bug bug>
void run_gemm(const Arguments& x) {
  const dim3 grid((x.M + kM - 1) / kM, (x.N + kN - 1) / kN);
  const size_t missing = bug == Bug::little_shared_memory ? sizeof(Memory) - offsetof(Memory, sums) : 0;
  cuda::launch(gemm_kernel<bug>, grid, kThreads, sizeof(Memory) - missing, nullptr, x);
}

}  // namespace

void idle(bool takes_turn) { cuda::launch(idle_kernel, 2, kThreads, 0, nullptr, takes_turn); }

void gemm(Bug bug, int M, int N, int K, const void* a, const void* b, float* c, float* sums, unsigned* arrived,
          float* total) {
  constexpr void (*kRun[])(const Arguments&) = {
      run_gemm<Bug::none>,      run_gemm<Bug::no_barrier_after_wait>, run_gemm<Bug::no_barrier_before_overwrite>,
      run_gemm<Bug::weak_wait>, run_gemm<Bug::little_shared_memory>,  run_gemm<Bug::divergent_barrier>,
      run_gemm<Bug::no_fence>,  run_gemm<Bug::first_block_sums_up>,   run_gemm<Bug::no_turn>,
  };
  kRun[static_cast<int>(bug)](
      {M, N, K, static_cast<const __half*>(a), static_cast<const __half*>(b), c, sums, arrived, total});
}

}  // namespace fused_preact::planted
