// The fibers of a block, the order in which they run, and what they do together.
#include "emulation.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "fiber.h"
#include "shared.h"

namespace fused_preact::emulation {

const Indices* indices;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kMostShared = 99 << 10;  // bytes a block that every architecture has

struct Copy {
  static constexpr size_t kBytes = 16;
  std::byte* shared;
  const std::byte* global;
  bool valid;

  void perform() const {
    note_write(shared, kBytes);
    if (valid)
      note_read(global, kBytes), std::memcpy(shared, global, kBytes);
    else
      std::memset(shared, 0, kBytes);
  }
};

struct Barrier {
  unsigned live = 0, arrived = 0;
  int count = 0, result = 0;  // true predicates: so far, and of the last time that all arrived
  Where where;                // of those that have arrived
};

struct Thread {
  explicit Thread(void (*body)()) : context(body) {}

  Context context;
  Indices indices;
  Barrier* waits_for = nullptr;
  bool in_turn = false;        // it has waited for the launches before this one
  std::vector<Copy> copies;    // under way, in the order of issue
  std::vector<size_t> groups;  // for each committed one the number of copies up to its end
};

struct Warp {
  Barrier barrier;
  void* posted[kWarp];
};

std::string place(const Where& where) {
  std::ostringstream text;
  text << where.file_name() << ":" << where.line();
  return text.str();
}

std::string text(const Indices& indices) {
  std::ostringstream text;
  text << "thread " << indices.thread.x << " of block (" << indices.block.x << ", " << indices.block.y << ", "
       << indices.block.z << ")";
  return text.str();
}

bool same(const Where& a, const Where& b) {
  const char *file = a.file_name(), *other = b.file_name();
  return a.line() == b.line() && a.column() == b.column() && (file == other || std::strcmp(file, other) == 0);
}

Schedule schedule;

// The launch under way.
class Launch {
 public:
  Launch(const std::function<void()>& body, dim3 grid, unsigned block, size_t shared_bytes);
  ~Launch();
  void run();

  Thread& current() { return *current_; }
  Warp& warp() { return warps_[current_->indices.thread.x / kWarp]; }
  const Shared& shared() const { return *shared_; }

  void meet(Barrier&, size_t first, size_t last, const Where&);
  void meet_block(const Where& where) { meet(*barrier_, 0, threads_.size(), where); }
  void meet_warp(const Where&);
  Barrier& block_barrier() { return *barrier_; }
  [[noreturn]] void fail(const std::string& message);

 private:
  static void thread_main();
  void run_block(uint3 index);
  std::string deadlock() const;
  void start(uint3 index);
  void release(Barrier&, size_t first, size_t last);
  void leave();
  Thread* take_ready();
  void switch_to_next();

  const std::function<void()>& body_;
  dim3 grid_;
  size_t shared_bytes_;
  unsigned live_ = 0;
  std::string error_;
  Thread* current_ = nullptr;
  Context main_;
  // New ones for each block, so that ThreadSanitizer does not take one block's barrier for the next one's.
  std::unique_ptr<Barrier> barrier_;
  std::vector<Warp> warps_;
  std::vector<Thread*> threads_;
  std::deque<Thread*> ready_;
  std::unique_ptr<Shared> shared_;
  std::mt19937_64 random_;

  // Threads of launches before this one, to be used again.
  static std::vector<std::unique_ptr<Thread>> pool_;
};

std::vector<std::unique_ptr<Thread>> Launch::pool_;
Launch* launch;

Launch::Launch(const std::function<void()>& body, dim3 grid, unsigned block, size_t shared_bytes)
    : body_(body), grid_(grid), shared_bytes_(shared_bytes), threads_(block), random_(schedule.seed) {
  if (launch != nullptr) throw Error("a launch inside of a launch");
  if (block == 0 || block % kWarp != 0 || block > 1024) throw Error("a block of " + std::to_string(block) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) throw Error("a grid of no device");
  if (shared_bytes > kMostShared)
    throw Error("shared memory of " + std::to_string(shared_bytes) + " bytes, more than every architecture has");
  launch = this;
}

Launch::~Launch() {
  const Bookkeeping bookkeeping;
  shared_.reset(), barrier_.reset(), warps_ = std::vector<Warp>();
  // Threads that were stopped half way cannot start anew.
  if (live_ > 0) pool_.clear();
  launch = nullptr;
}

void Launch::run() {
  const size_t blocks = size_t{grid_.x} * grid_.y * grid_.z;
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = schedule.blocks == Order::reverse ? blocks - 1 - i : i;
  if (schedule.blocks == Order::random) std::shuffle(order.begin(), order.end(), random_);
  for (size_t i : order)
    run_block({static_cast<unsigned>(i % grid_.x), static_cast<unsigned>(i / grid_.x % grid_.y),
               static_cast<unsigned>(i / grid_.x / grid_.y)});
  observe(this);
}

void Launch::run_block(uint3 index) {
  start(index);
  switch_to_next();
  if (!error_.empty()) throw Error(error_);
  if (live_ > 0) throw Error(deadlock());
  if (shared().overrun())
    throw Error("a block wrote past the end of its " + std::to_string(shared().bytes) + " bytes of shared memory");
}

void Launch::start(uint3 index) {
  const Bookkeeping bookkeeping;
#ifdef EMULATION_TSAN
  pool_.clear();  // the threads of two blocks are different ones, on different stacks
#endif
  while (pool_.size() < threads_.size()) pool_.push_back(std::make_unique<Thread>(thread_main));
  for (unsigned i = 0; i < threads_.size(); ++i) {
    threads_[i] = pool_[i].get();
    threads_[i]->indices = {{i, 0, 0}, index, dim3(static_cast<unsigned>(threads_.size())), grid_};
  }
  shared_ = std::make_unique<Shared>(shared_bytes_);
  barrier_ = std::make_unique<Barrier>();
  live_ = barrier_->live = static_cast<unsigned>(threads_.size());
  warps_ = std::vector<Warp>(threads_.size() / kWarp);
  for (Warp& warp : warps_) warp.barrier.live = kWarp;
  ready_.assign(threads_.begin(), threads_.end());
  if (schedule.threads == Order::reverse) std::reverse(ready_.begin(), ready_.end());
  if (schedule.threads == Order::greedy) std::shuffle(ready_.begin(), ready_.end(), random_);
}

// Body of every fiber: a thread of one block after the other.
void Launch::thread_main() {
  Context::entered(launch->main_);
  for (;;) {
    launch->body_();
    launch->leave();
  }
}

void Launch::leave() {
  Thread& me = *current_;
  if (!std::exchange(me.in_turn, false)) fail(text(me.indices) + " did not wait for the launches before");
  me.copies.clear();
  me.groups.clear();
  publish(this);
  --live_;
  Barrier& mine = warp().barrier;
  --mine.live;
  if (mine.arrived > 0) fail(text(me.indices) + " returned while lanes of its warp wait at " + place(mine.where));
  --barrier_->live;
  if (barrier_->arrived > 0 && barrier_->arrived == barrier_->live) release(*barrier_, 0, threads_.size());
  switch_to_next();
}

void Launch::meet(Barrier& barrier, size_t first, size_t last, const Where& where) {
  Thread& me = *current_;
  if (barrier.arrived > 0 && !same(barrier.where, where))
    fail("divergent barrier: " + text(me.indices) + " is at " + place(where) + ", others wait at " +
         place(barrier.where));
  barrier.where = where;
  me.waits_for = &barrier;
  if (++barrier.arrived == barrier.live) {
    release(barrier, first, last);
    if (schedule.threads == Order::greedy) return;
  }
  switch_to_next();
}

void Launch::meet_warp(const Where& where) {
  if (warp().barrier.live != kWarp)
    fail(text(current_->indices) + ": lanes of its warp have returned, at " + place(where));
  const size_t first = current_->indices.thread.x / kWarp * kWarp;
  meet(warp().barrier, first, first + kWarp, where);
}

// Those who wait among the threads [first, last) may go on. Greedy goes on with the thread that
// runs, and then its warp.
void Launch::release(Barrier& barrier, size_t first, size_t last) {
  const Bookkeeping bookkeeping;
  barrier.arrived = 0;
  barrier.result = std::exchange(barrier.count, 0);
  const bool reverse = schedule.threads == Order::reverse, greedy = schedule.threads == Order::greedy;
  const unsigned warp = current_->indices.thread.x / kWarp;
  for (size_t i = first; i < last; ++i) {
    Thread* thread = threads_[reverse ? first + last - 1 - i : i];
    if (thread->waits_for != &barrier) continue;
    thread->waits_for = nullptr;
    if (!greedy)
      ready_.push_back(thread);
    else if (thread != current_)
      thread->indices.thread.x / kWarp == warp ? ready_.push_front(thread) : ready_.push_back(thread);
  }
}

void Launch::switch_to_next() {
  Context& from = current_ == nullptr ? main_ : current_->context;
  if (ready_.empty()) {
    current_ = nullptr;
    if (&from != &main_) from.switch_to(main_);
    return;
  }
  current_ = take_ready();
  indices = &current_->indices;
  if (&from != &current_->context) from.switch_to(current_->context);
}

Thread* Launch::take_ready() {
  const Bookkeeping bookkeeping;
  if (schedule.threads == Order::random) std::swap(ready_.front(), ready_[random_() % ready_.size()]);
  Thread* next = ready_.front();
  ready_.pop_front();
  return next;
}

void Launch::fail(const std::string& message) {
  error_ = message;
  Context& from = current_->context;
  current_ = nullptr;
  from.switch_to(main_);
  __builtin_unreachable();
}

std::string Launch::deadlock() const {
  std::ostringstream text;
  text << "deadlock: of " << threads_.size() << " threads " << threads_.size() - live_ << " returned";
  for (size_t i = 0; i < threads_.size();) {
    const Barrier* barrier = threads_[i]->waits_for;
    size_t end = i + 1;
    while (end < threads_.size() && threads_[end]->waits_for == barrier) ++end;
    if (barrier != nullptr) text << "; " << i << " to " << end - 1 << " wait at " << place(barrier->where);
    i = end;
  }
  return text.str();
}

void check_shared(const void* address, size_t bytes, const Where& where) {
  if (!launch->shared().holds(address, bytes)) fail("an address outside of shared memory", where);
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a misaligned address in shared memory", where);
}

}  // namespace

void set_schedule(const Schedule& given) { schedule = given; }

int multiprocessors() { return schedule.multiprocessors; }

void fail(const char* what, const Where& where) {
  launch->fail(std::string(what) + ": " + text(*indices) + " at " + place(where));
}

std::byte* shared_memory() { return launch->shared().memory.get(); }

int block_barrier(bool predicate, const Where& where) {
  Barrier& barrier = launch->block_barrier();
  barrier.count += predicate;
  publish(&barrier);
  launch->meet_block(where);
  observe(&barrier);
  return barrier.result;
}

void warp_barrier(uint32_t mask, const Where& where) {
  if (mask != ~0u) fail("a mask that is not full", where);
  Warp& warp = launch->warp();
  publish(&warp);
  launch->meet_warp(where);
  observe(&warp);
}

void collective(void* posted, void (*exchange)(void* const*), const Where& where) {
  Warp& warp = launch->warp();
  warp.posted[lane()] = posted;
  if (warp.barrier.arrived + 1 == kWarp) exchange(warp.posted);
  launch->meet_warp(where);
}

namespace {
struct {
  size_t shared, copies;
} latest;
}  // namespace

void cp_async(void* shared, const void* global, bool valid, const Where& where) {
  if (!launch->current().in_turn) fail("a copy before the launches before are over", where);
  check_shared(shared, Copy::kBytes, where);
  if (valid && reinterpret_cast<uintptr_t>(global) % Copy::kBytes != 0)
    fail("a misaligned address in global memory", where);
  ++latest.copies;
  const Copy copy{static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), valid};
  if (schedule.copies == Copies::eager) return copy.perform();
  const Bookkeeping bookkeeping;
  launch->current().copies.push_back(copy);
}

void cp_async_commit() {
  const Bookkeeping bookkeeping;
  launch->current().groups.push_back(launch->current().copies.size());
}

void cp_async_wait(int pending) {
  std::vector<Copy>& copies = launch->current().copies;
  std::vector<size_t>& groups = launch->current().groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const size_t complete = groups.size() - pending, end = groups[complete - 1];
  for (size_t i = 0; i < end; ++i) copies[i].perform();
  const Bookkeeping bookkeeping;
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + complete);
  for (size_t& group : groups) group -= end;
}

void read_shared(void* to, const void* shared, size_t bytes, const Where& where) {
  check_shared(shared, bytes, where);
  note_read(shared, bytes);
  std::memcpy(to, shared, bytes);
}

void thread_fence() {
  static char fence;
  publish(&fence);
  observe(&fence);
}

void take_turn() { launch->current().in_turn = true; }

size_t latest_shared() { return latest.shared; }

size_t latest_copies() { return latest.copies; }

void run(const std::function<void()>& thread, dim3 grid, unsigned block, size_t shared_bytes) {
  latest = {shared_bytes, 0};
  Launch(thread, grid, block, shared_bytes).run();
}

}  // namespace fused_preact::emulation
