#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "workspace.h"

namespace fused_preact::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// Blocks of one size are cut from slabs of so many bytes or blocks, whichever are fewer, or of one block; from two
// megabytes on a slab is in huge pages. In pages of 4 KB, of which a tensor by itself is made, a kernel that walks down
// a column of cache lines misses the TLB every few lines.
constexpr size_t kSlab = size_t{16} << 20, kMostBlocks = 64;

// Blocks are so many bytes apart, nine cache lines, and so are the first ones of slabs within a page. Kernels read and
// write several tensors in step: at the same place of a page they would share sets of the first level cache, and a
// load would wait for each store that it seems to overlap.
constexpr size_t kStagger = 576, kPage = 4096;

// Eight sizes for each power of two: blocks serve tensors up to an eighth smaller than they are.
size_t size_class(size_t bytes) {
  if (kSanitized) return bytes;
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

struct Slab {
  Block memory;
  size_t size, first, blocks;         // bytes of a block, where the first one begins, and how many there is room for
  size_t cut = 0, idle = 0;           // of these, those that were ever taken, and that wait
  Clock::time_point given_back = {};  // the last one

  static Slab of(size_t size, size_t blocks, size_t first) {
    return {Block(first + blocks * size + (blocks - 1) * kStagger), size, first, blocks};
  }

  bool is_idle() const { return idle == cut; }
  bool holds(const char* block) const { return memory.data() <= block && block < memory.data() + memory.bytes(); }
  char* cut_block() { return memory.data() + first + cut++ * (size + kStagger); }
};

// Those of one size that wait, the last one given back last, and the slab that more are cut from.
struct Blocks {
  std::vector<char*> idle;
  Slab* open = nullptr;
  size_t room = 0;  // in all slabs, and for all of them in `idle`
};

}  // namespace

struct TensorPool::State {
  std::mutex mutex;
  std::map<const char*, Slab> slabs;  // by where they begin
  std::map<size_t, Blocks> by_size;
  size_t idle_bytes = 0, used_bytes = 0, most_used_bytes = 0, turn = 0;
  Clock::time_point checked = Clock::now();

  // Where none waits, from a slab of up to `most` bytes, or of one block.
  void* take(size_t size, size_t most) {
    Blocks& blocks = by_size[size];
    char* block;
    if (blocks.idle.empty()) {
      if (blocks.open == nullptr) open_slab(blocks, size, std::clamp<size_t>(most / size, 1, kMostBlocks));
      block = blocks.open->cut_block();
      if (blocks.open->cut == blocks.open->blocks) blocks.open = nullptr;
    } else {
      block = blocks.idle.back();
      blocks.idle.pop_back();
      --slab_of(block).idle;
      idle_bytes -= size;
    }
    used_bytes += size;
    most_used_bytes = std::max(most_used_bytes, used_bytes);
    return block;
  }

  void give_back(char* block, size_t size, Clock::time_point now) {
    by_size[size].idle.push_back(block);  // for which there is room
    Slab& slab = slab_of(block);
    ++slab.idle;
    slab.given_back = now;
    idle_bytes += size;
    used_bytes -= size;
  }

  void drop_before(Clock::time_point time) {
    for (auto slab = slabs.begin(); slab != slabs.end();)
      slab = slab->second.is_idle() && slab->second.given_back <= time ? drop(slab) : std::next(slab);
  }

  // Whether there was one.
  bool drop_longest_idle() {
    const auto since = [](const auto& slab) {
      return slab.second.is_idle() ? slab.second.given_back : Clock::time_point::max();
    };
    const auto longest =
        std::min_element(slabs.begin(), slabs.end(), [&](const auto& a, const auto& b) { return since(a) < since(b); });
    if (longest == slabs.end() || !longest->second.is_idle()) return false;
    drop(longest);
    return true;
  }

 private:
  void open_slab(Blocks& blocks, size_t size, size_t count) {
    Slab slab = Slab::of(size, count, kSanitized ? 0 : turn % (kPage / kStagger) * kStagger);
    blocks.idle.reserve(blocks.room + count);
    const char* const begin = slab.memory.data();
    blocks.open = &slabs.emplace(begin, std::move(slab)).first->second;
    blocks.room += count;
    ++turn;
  }

  Slab& slab_of(const char* block) { return std::prev(slabs.upper_bound(block))->second; }

  std::map<const char*, Slab>::iterator drop(std::map<const char*, Slab>::iterator at) {
    const Slab& slab = at->second;
    Blocks& blocks = by_size[slab.size];
    const auto gone = [&](const char* block) { return slab.holds(block); };
    blocks.idle.erase(std::remove_if(blocks.idle.begin(), blocks.idle.end(), gone), blocks.idle.end());
    if (blocks.open == &slab) blocks.open = nullptr;
    blocks.room -= slab.blocks;
    idle_bytes -= slab.idle * slab.size;
    return slabs.erase(at);
  }
};

TensorPool::TensorPool() : state_(*new State) {
  // A forked child has no other thread than the one that forked: a lock that another held would stay locked in it.
  static std::mutex& mutex = state_.mutex;
  pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
}

TensorPool& TensorPool::instance() {
  static TensorPool& pool = *new TensorPool;
  return pool;
}

void* TensorPool::take(size_t bytes) {
  const size_t size = size_class(bytes);
  const std::lock_guard lock(state_.mutex);
  try {
    return state_.take(size, kSanitized ? 0 : kSlab);
  } catch (const std::bad_alloc&) {
    state_.drop_before(Clock::time_point::max());
    return state_.take(size, 0);
  }
}

void TensorPool::give_back(void* data, size_t bytes) noexcept {
  const std::lock_guard lock(state_.mutex);
  const Clock::time_point now = Clock::now();
  state_.give_back(static_cast<char*>(data), size_class(bytes), now);
  if (kSanitized) return state_.drop_before(now);
  while (state_.idle_bytes > kMostIdle * state_.most_used_bytes && state_.drop_longest_idle()) {
  }
  if (now - state_.checked < std::chrono::seconds(1)) return;
  state_.checked = now;
  state_.drop_before(now - std::chrono::seconds(kMostIdleSeconds));
}

void TensorPool::drop_idle() noexcept {
  const std::lock_guard lock(state_.mutex);
  state_.drop_before(Clock::time_point::max());
}

}  // namespace fused_preact::cpu
