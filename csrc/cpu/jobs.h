// How the work of a kernel is cut into jobs, and which threads do them.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// Parts of [0, n): part i of `parts` is [part_begin(n, parts, i), part_begin(n, parts, i + 1)).
inline int64_t part_begin(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

// body(job) for each job of [0, jobs). A thread takes the jobs of its own share first, which from kernel to kernel is
// about the same part of the tensors, and so in its cache; then those that are left of the others', so that one that
// the system holds up does not keep the others waiting. Which thread does a job changes no result.
template <class Body>
void parallel(int64_t jobs, const Body& body) {
  constexpr int64_t kMostShares = 64;
  struct Queue {
    const Body& body;
    int64_t jobs, shares;
    int64_t next[kMostShares];
  } queue{body, jobs, minimum(minimum(jobs, num_threads()), kMostShares), {}};
  for (int64_t share = 0; share < queue.shares; ++share) queue.next[share] = part_begin(jobs, queue.shares, share);
  parallel_for(
      minimum(jobs, num_threads()),
      [](void* context, int64_t thread, int64_t) {
        Queue& shared = *static_cast<Queue*>(context);
        for (int64_t i = 0; i < shared.shares; ++i) {
          const int64_t share = (thread + i) % shared.shares, end = part_begin(shared.jobs, shared.shares, share + 1);
          for (int64_t job; (job = __atomic_fetch_add(&shared.next[share], 1, __ATOMIC_RELAXED)) < end;)
            shared.body(job);
        }
      },
      &queue);
}

// body(first, count) for runs of pixels that make up all of them.
constexpr int64_t kRunPixels = 64;
template <class Body>
void for_runs(int64_t pixels, const Body& body) {
  parallel(ceil_div(pixels, kRunPixels), [=](int64_t job) {
    const int64_t first = job * kRunPixels;
    body(first, minimum(kRunPixels, pixels - first));
  });
}

// Fewer multiply-adds take less time than to hand them to another thread and wait for it.
constexpr int64_t kLeastProducts = 1 << 17;

// Into how many parts the columns of each group, of so many multiply-adds, are cut so that every thread has work.
// Changes no result.
inline int64_t splits_for(int64_t groups, int64_t most, int64_t products) {
  const int64_t wanted = ceil_div(2 * num_threads(), maximum<int64_t>(groups, 1));
  return maximum<int64_t>(minimum(minimum(wanted, most), products / kLeastProducts), 1);
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
