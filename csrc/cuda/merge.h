// Sums over the blocks of a launch, in a fixed order and in the same launch.
//
// Each group of pixels has a slot of partial results in global memory. Groups stand in teams; the last block of a team
// to arrive merges its slots into the first of them, and the last team to be merged merges those. Who is last does not
// change the order in which slots are merged, so results are the same bits every time.
#pragma once
#include <stdexcept>

#include "values.h"

namespace fused_preact::cuda {

struct Teams {
  int groups = 1, size = 1;

  Teams() = default;
  // Slots of `bytes`. Few are one team: to find out who is last takes as long as to read them. Of many the square root
  // makes both steps equally long.
  Teams(int64_t of, int64_t bytes) : groups(static_cast<int>(of)) {
    constexpr int64_t kFew = 64, kFewBytes = 256 * 1024;
    if (groups <= kFew && groups * bytes <= kFewBytes)
      size = groups;
    else
      while (size * size < groups) ++size;
  }
  __host__ __device__ int count() const { return ceil_div(groups, size); }
  __host__ __device__ int counters() const { return groups > 1 ? 1 + count() : 0; }
};

// Tiles in equal runs, one for each group of pixels, of which `columns` blocks take a part each: as many as
// `blocks` at once have, or tiles.
struct Runs {
  int tiles = 0, length = 1;

  Runs() = default;
  Runs(int64_t tile_count, int64_t columns, int64_t blocks) {
    if (tile_count > INT32_MAX) throw std::runtime_error("too many pixels for the CUDA kernels");
    tiles = static_cast<int>(tile_count);
    length = static_cast<int>(ceil_div(tile_count * columns, blocks));
  }
  int count() const { return ceil_div(tiles, length); }
  __device__ int begin(int group) const { return group * length; }
  __device__ int end(int group) const { return minimum(begin(group) + length, tiles); }
};

// The counters of `columns` independent sums over the groups, behind the first `taken`.
inline uint32_t* take_counters(Workspace& workspace, const Teams& teams, int64_t columns, int64_t taken = 0) {
  if (taken + teams.counters() * columns > kCounters)
    throw std::runtime_error("too many channels for the CUDA kernels");
  return workspace.counters() + taken;
}

// Whether this is the last of `members` blocks to get here; what they wrote before is then visible. The counter is zero
// before and, after the last one, zero again.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, int members) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) last = arrive(counter, members - 1) == static_cast<uint32_t>(members - 1);
  return __syncthreads_or(last) != 0;
}

// Calls merge(first, count, step, finish) in the blocks that merge the slots first, first + step, ... (`count` of
// them), into the first of them or, where finish, into the result. Every block calls this when its slot is written.
template <class Merge>
__device__ __forceinline__ void merge_groups(uint32_t* counters, const Teams& teams, int group, const Merge& merge) {
  const int team = group / teams.size;
  int first = team * teams.size, count = minimum(teams.size, teams.groups - first), step = 1;
  if (teams.groups == 1)
    __syncthreads();
  else if (!last_to_arrive(counters + 1 + team, count))
    return;
  for (bool finish = teams.count() == 1;; finish = true) {
    merge(first, count, step, finish);
    if (finish || !last_to_arrive(counters, teams.count())) return;
    first = 0, count = teams.count(), step = teams.size;
  }
}

// Adds up `count` members of every channel of [begin, end), at most Threads of them: channel by channel, or several
// threads a channel where there are more threads. open(c) makes a channel, which may load what it will need at the end:
// its add(sum, i) adds member i to the `Values` sums, and finish(sum) takes what has come of all. `shared` holds
// Threads*Values doubles; the order is always the same.
template <int Values, int Threads, class Open>
__device__ __forceinline__ void sum_members(double* shared, int begin, int end, int count, const Open& open) {
  int width = 16;  // channels that stand side by side; so at most Threads/16 sums are added up by one thread
  while (width < end - begin) width *= 2;
  const int lane = threadIdx.x & (width - 1), part = threadIdx.x / width, parts = Threads / width, c = begin + lane;
  const auto channel = open(minimum(c, end - 1));
  double sum[Values] = {};
  if (c < end) {
#pragma unroll 8
    for (int i = part; i < count; i += parts) channel.add(sum, i);
  }
  if (parts > 1) {
#pragma unroll
    for (int v = 0; v < Values; ++v) shared[(part * Values + v) * width + lane] = sum[v];
    __syncthreads();
    if (part > 0) return;
#pragma unroll 4
    for (int other = 1; other < parts; ++other)
#pragma unroll
      for (int v = 0; v < Values; ++v) sum[v] += shared[(other * Values + v) * width + lane];
  }
  if (c < end) channel.finish(sum);
}

// Sums `Values` values over the lanes that share them: those whose numbers differ by multiples of `stride`.
template <int Values>
__device__ __forceinline__ void sum_lanes(float (&v)[Values], int stride) {
#pragma unroll
  for (int i = 0; i < Values; ++i)
    for (int offset = stride; offset < 32; offset *= 2) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
}

}  // namespace fused_preact::cuda
