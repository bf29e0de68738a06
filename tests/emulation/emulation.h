// CUDA on the CPU, for tests: csrc/cuda/ptx.h takes its names from here where the compiler is not nvcc.
//
// Each CUDA thread is a fiber; the fibers of a block run in turn on one CPU thread and change over only where they wait
// for one another: at barriers and at what a warp does together. The blocks of a launch run one after the other. In
// which order is the schedule's choice, so that a missing barrier shows as a wrong result in one schedule or another:
//
// - threads: in the order of their index, in the reverse, at random, or greedily (whoever completes a barrier goes on,
//   with its warp, until it must wait again: one warp is as far ahead of the others as barriers allow);
// - copies: cp.async copies when it is issued (eager), or when its group is waited for (lazy);
// - blocks: in the order of their index, in the reverse, or at random.
//
// Shared memory is filled with NaN, and so is a guard zone behind it, which must be the same when the block is
// over. What a thread does wrong (addresses, alignment, lanes that do not meet, barriers that not all reach) ends
// the launch with an Error that says which thread was where. The schedule is one for the process: kernels are
// launched by one CPU thread.
//
// Launches do not overlap; a thread that copies, or ends, before it has called take_turn() ends the launch.
//
// Not emulated: time, bank conflicts, weak memory order, blocks that wait for each other.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace fused_preact::emulation {

using Where = std::source_location;

enum class Order { forward, reverse, random, greedy };
enum class Copies { lazy, eager };

struct Schedule {
  Order threads = Order::forward;
  Order blocks = Order::forward;  // greedy is the same as forward
  Copies copies = Copies::lazy;
  uint64_t seed = 0;
  int multiprocessors = 2;  // that kernels are told of: of few the blocks have much to do
};

// That of the launches to come.
void set_schedule(const Schedule&);
int multiprocessors();
// What the latest launch asked for, in bytes, and how many pieces it copied without waiting.
size_t latest_shared();
size_t latest_copies();

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The built-in variables of the thread that runs.
struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern const Indices* indices;

std::byte* shared_memory();

// Ends the launch with an Error about the thread that runs.
[[noreturn]] void fail(const char* what, const Where&);

// Waits for all threads of the block that have not returned; how many of them came with a true predicate.
int block_barrier(bool predicate, const Where&);
// Waits for all lanes of the warp, then orders memory among them.
void warp_barrier(uint32_t mask, const Where&);

// Waits for all lanes of the warp; the last to come calls exchange on what the 32 lanes have posted, by
// lane. This orders no memory.
void collective(void* posted, void (*exchange)(void* const* posted), const Where&);

void cp_async(void* shared, const void* global, bool valid, const Where& = Where::current());
void cp_async_commit();
void cp_async_wait(int pending);
// A plain read of shared memory, checked.
void read_shared(void* to, const void* shared, size_t bytes, const Where&);

void ldmatrix_x4(uint32_t* d, const void* shared, bool transposed, const Where&);

enum class Operand { half, bfloat16, tf32 };

// An mma.sync of 16 x 8 results; its fragments as csrc/cuda/ptx.h describes them.
struct Product {
  float* d;
  const uint32_t *a, *b;
};
template <Operand>
void multiply(const Product&, const Where&);

// Orders what this thread has done and seen with what others do and see before and after theirs.
void thread_fence();
// Adds one to the counter, or sets it to zero where it is `last`; gives what it was. This orders no memory.
inline uint32_t count_up(uint32_t* counter, uint32_t last) {
  uint32_t before = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &before, before >= last ? 0 : before + 1, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return before;
}

void take_turn();

// Runs every block of a launch, each of its threads by a call of `thread`.
void run(const std::function<void()>& thread, dim3 grid, unsigned block, size_t shared_bytes);

// Every lane gets the value of the lane that it names.
template <class T>
T shuffle(uint32_t mask, T value, int lane, const Where& where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Slot {
    T value, result;
    int lane;
  } slot{value, value, lane};
  if (mask != ~0u) fail("a mask that is not full", where);
  collective(
      &slot,
      [](void* const* posted) __attribute__((no_sanitize("thread"))) {
        for (int i = 0; i < 32; ++i) {
          Slot& mine = *static_cast<Slot*>(posted[i]);
          mine.result = static_cast<Slot*>(posted[mine.lane])->value;
        }
      },
      where);
  return slot.result;
}

inline int lane() { return static_cast<int>(indices->thread.x % 32); }

}  // namespace fused_preact::emulation

// What CUDA C++ has without any header.

#define threadIdx (::fused_preact::emulation::indices->thread)
#define blockIdx (::fused_preact::emulation::indices->block)
#define blockDim (::fused_preact::emulation::indices->block_size)
#define gridDim (::fused_preact::emulation::indices->grid_size)

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__  // a kernel that uses it does not compile: see csrc/cuda/ptx.h

using EmulationWhere = ::fused_preact::emulation::Where;

inline void __syncthreads(EmulationWhere where = EmulationWhere::current()) {
  ::fused_preact::emulation::block_barrier(false, where);
}
inline int __syncthreads_or(bool predicate, EmulationWhere where = EmulationWhere::current()) {
  return ::fused_preact::emulation::block_barrier(predicate, where) > 0;
}
inline void __syncwarp(uint32_t mask = ~0u, EmulationWhere where = EmulationWhere::current()) {
  ::fused_preact::emulation::warp_barrier(mask, where);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, EmulationWhere where = EmulationWhere::current()) {
  return ::fused_preact::emulation::shuffle(mask, value, ::fused_preact::emulation::lane() ^ bits, where);
}

// The wrappers of csrc/cuda/ptx.h, where they are described.
namespace fused_preact::cuda {

using emulation::cp_async, emulation::cp_async_commit, emulation::multiprocessors, emulation::shared_memory;
using emulation::take_turn, emulation::Where;

template <int Pending>
void cp_async_wait() {
  emulation::cp_async_wait(Pending);
}

inline void ldmatrix_x4(uint32_t (&d)[4], const void* shared, Where where = Where::current()) {
  emulation::ldmatrix_x4(d, shared, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* shared, Where where = Where::current()) {
  emulation::ldmatrix_x4(d, shared, true, where);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr auto kOperand = std::is_same_v<T, __half> ? emulation::Operand::half : emulation::Operand::bfloat16;
  emulation::multiply<kOperand>({d, a, b}, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Where where = Where::current()) {
  emulation::multiply<emulation::Operand::tf32>({d, a, b}, where);
}

inline uint32_t arrive(uint32_t* counter, uint32_t last) {
  emulation::thread_fence();
  const uint32_t before = emulation::count_up(counter, last);
  emulation::thread_fence();
  return before;
}

// Half a unit of the last of ten bits is added to the magnitude, the rest cut off: ties go away from zero. A NaN stays.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (x != x ? bits : bits + 0x1000u) & ~0x1fffu;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes, void*,
            const Arguments&... arguments) {
  emulation::run([&] { kernel(arguments...); }, grid, block, shared_bytes);
}

}  // namespace fused_preact::cuda
