// What the kernels need beyond CUDA C++: copies in flight, matrix loads and products, shared memory, launches.
//
// nvcc takes this file, where each wrapper is one PTX instruction (names and operands as in the PTX manual). A plain
// C++ compiler takes the same names from tests/emulation/emulation.h, which runs the unchanged .cu files on the CPU in
// the tests. For both to work a kernel keeps to the following.
//
// - All shared memory is dynamic, cut from shared_memory() by the kernel; there are no __shared__ variables. So the
//   tests see every overrun, and every value that is read before it is written. 99 KiB is the most that serves
//   every architecture.
// - Barriers (__syncthreads, __syncthreads_or, __syncwarp), __shfl_xor_sync, threadIdx, blockIdx, blockDim and gridDim
//   keep their CUDA names. A warp is whole: a block has one dimension, a multiple of 32; masks are full.
// - cuda_fp16.h and cuda_bf16.h work on both sides as far as conversions go; arithmetic is done in float.
// - A block never waits for another one: blocks run one after the other, in any order. The last block of a launch is
//   found by write, barrier and arrive().
// - A kernel is started by launch(), never by <<<>>>. What it is given are values and pointers. It calls take_turn()
//   before it touches global memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifndef __CUDACC__
#include "emulation.h"
#else
#include <stdexcept>
#include <string>

namespace fused_preact::cuda {

// The start of the block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ std::byte* shared_memory() {
  extern __shared__ __align__(128) std::byte memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes to shared memory, zeros where not valid: then nothing is read. Both addresses are aligned to that.
// The bytes are there after the wait for their group, for other threads after the barrier behind that.
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  const int read = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read)
               : "memory");
}

// Makes the copies of this thread since its last commit a group, empty or not.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the Pending latest groups of this thread are under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ldmatrix.m8n8.b16: lanes 8i .. 8i+7 give the addresses of the eight 16-byte rows of matrix i (aligned to 16). Lane l
// gets in d[i] the four bytes 4*(l%4) .. of row l/4 of matrix i; with _trans the elements [2*(l%4)][l/4] and
// [2*(l%4)+1][l/4], of two bytes each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a * b by a warp: a 16x16 row-major, b 16x8 column-major, of T (__half or __nv_bfloat16), two to a register, the
// lower column (of b: the lower row) in the lower half. With g = lane/4 and t = lane%4:
//   a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..];
//   b[0] = B[2t..][g], b[1] = B[2t+8..][g];   d[0..1] = D[g][2t..], d[2..3] = D[g+8][2t..].
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for tf32, one to a register, each made by to_tf32: a 16x8, b 8x8, d as above.
//   a[0] = A[g][t], a[1] = A[g+8][t], a[2] = A[g][t+4], a[3] = A[g+8][t+4];   b[0] = B[t][g], b[1] = B[t+4][g].
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x with ten bits of mantissa, rounded to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// Adds one to the counter, or sets it to zero where it is `last`; gives what it was. What this thread can see, as after
// a barrier what its block wrote, is seen by those who come later; after it this thread sees what those before it saw.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return before;
}

// Waits until all that was queued before this launch is done and can be seen, then lets the next launch begin, whose
// blocks get ready in the places that those of this one leave: all of them are on the device when all have called this.
// From SM 9.0 on, elsewhere launches do not overlap. (CUDA programming guide, "Programmatic dependent launch".)
__device__ __forceinline__ void take_turn() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "an attribute of the device");
  return value;
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  return device;
}

// Streaming multiprocessors of the current device.
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, current_device()); }

// Whether the code that the current device runs waits in take_turn(): it is that of the latest architecture compiled
// for that the device has.
inline bool takes_turns() {
  constexpr int kCompiled[] = {__CUDA_ARCH_LIST__}, kFirst = 900;
  const int device = current_device(), own = 100 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                                             10 * attribute(cudaDevAttrComputeCapabilityMinor, device);
  for (const int architecture : kCompiled)
    if (architecture >= kFirst && architecture <= own) return true;
  return false;
}

// Queues kernel(arguments...) on a cudaStream_t; throws std::runtime_error where the device does not accept it.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  constexpr int kMost = 99 * 1024;  // the same for every launch: host threads may launch a kernel at the same time
  if (shared_bytes > kWithoutAsking)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kMost),
        "shared memory of a kernel");
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = takes_turns() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of a kernel");
}

}  // namespace fused_preact::cuda
#endif
