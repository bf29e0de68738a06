#include "pool.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fused_preact::cpu {

namespace {

using Clock = std::chrono::steady_clock;

// AddressSanitizer sees what is used after it was freed: there nothing waits.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeep = false;
#else
constexpr bool kKeep = true;
#endif

constexpr size_t kHugePage = size_t{2} << 20;

// Eight sizes for each power of two: blocks serve tensors up to an eighth smaller than they are.
size_t size_class(size_t bytes) {
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes < kHugePage ? 64 : kHugePage); }

void* allocate(size_t bytes) {
  void* data = ::operator new(bytes, alignment(bytes));
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice: may be refused
#endif
  return data;
}

void release(void* data, size_t bytes) { ::operator delete(data, alignment(bytes)); }

struct Idle {
  void* data;
  Clock::time_point since;
};

}  // namespace

struct ActivationPool::State {
  std::mutex mutex;
  std::map<size_t, std::vector<Idle>> idle;  // by size, the longest idle first
  size_t idle_bytes = 0, used_bytes = 0, most_used_bytes = 0;
  Clock::time_point checked = Clock::now();

  void* take_idle(size_t size) {
    const auto found = idle.find(size);
    if (found == idle.end() || found->second.empty()) return nullptr;
    void* const data = found->second.back().data;
    found->second.pop_back();
    idle_bytes -= size;
    return data;
  }

  void add_idle(void* data, size_t size, Clock::time_point now) {
    idle[size].push_back({data, now});
    idle_bytes += size;
  }

  void add_used(size_t size) {
    used_bytes += size;
    most_used_bytes = std::max(most_used_bytes, used_bytes);
  }

  void drop_before(Clock::time_point time) {
    for (auto& [size, blocks] : idle) {
      const auto end =
          std::find_if(blocks.begin(), blocks.end(), [&](const Idle& block) { return block.since > time; });
      for (auto block = blocks.begin(); block != end; ++block) release(block->data, size), idle_bytes -= size;
      blocks.erase(blocks.begin(), end);
    }
  }

  void drop_longest_idle() {
    const auto since = [](const auto& sized) {
      return sized.second.empty() ? Clock::time_point::max() : sized.second.front().since;
    };
    drop_before(since(*std::min_element(idle.begin(), idle.end(),
                                        [&](const auto& a, const auto& b) { return since(a) < since(b); })));
  }
};

ActivationPool::ActivationPool() : state_(*new State) {
#if defined(__linux__)
  // A forked child has no other thread than the one that forked: a lock that another held would stay locked in it.
  static std::mutex& mutex = state_.mutex;
  pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
#endif
}

ActivationPool& ActivationPool::instance() {
  static ActivationPool& pool = *new ActivationPool;
  return pool;
}

void* ActivationPool::take(size_t bytes) {
  const size_t size = size_class(bytes);
  if (!kKeep) return allocate(size);
  {
    const std::lock_guard lock(state_.mutex);
    state_.add_used(size);
    if (void* const data = state_.take_idle(size)) return data;
  }
  try {
    return allocate(size);
  } catch (const std::bad_alloc&) {
    const std::lock_guard lock(state_.mutex);
    state_.drop_before(Clock::time_point::max());
    state_.used_bytes -= size;
  }
  void* const data = allocate(size);
  const std::lock_guard lock(state_.mutex);
  state_.add_used(size);
  return data;
}

void ActivationPool::give_back(void* data, size_t bytes) noexcept {
  const size_t size = size_class(bytes);
  if (!kKeep) return release(data, size);
  const std::lock_guard lock(state_.mutex);
  const Clock::time_point now = Clock::now();
  state_.used_bytes -= size;
  try {
    state_.add_idle(data, size, now);
  } catch (const std::bad_alloc&) {
    return release(data, size);
  }
  while (state_.idle_bytes > kMostIdle * state_.most_used_bytes) state_.drop_longest_idle();
  if (now - state_.checked < std::chrono::seconds(1)) return;
  state_.checked = now;
  state_.drop_before(now - std::chrono::seconds(kMostIdleSeconds));
}

}  // namespace fused_preact::cpu
