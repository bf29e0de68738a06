#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

#include "workspace.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fused_preact::cpu {

namespace {

// How a thread rounds, and whether it takes the smallest numbers for zero, which torch.set_flush_denormal sets for the
// thread that calls it alone: a result is not to depend on which thread has made it.
#if defined(__x86_64__)
using Rounding = unsigned;
Rounding rounding() { return _mm_getcsr() & ~unsigned{_MM_EXCEPT_MASK}; }
void set_rounding(Rounding value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
using Rounding = uint64_t;
Rounding rounding() {
  Rounding value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_rounding(Rounding value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
using Rounding = int;
Rounding rounding() { return 0; }
void set_rounding(Rounding) {}
#endif

// Lets a thread round as another one does, for a while.
class RoundingOf {
 public:
  explicit RoundingOf(Rounding wanted) : own_(rounding()), differs_(own_ != wanted) {
    if (differs_) set_rounding(wanted);
  }
  RoundingOf(const RoundingOf&) = delete;
  ~RoundingOf() {
    if (differs_) set_rounding(own_);
  }

 private:
  const Rounding own_;
  const bool differs_;
};

}  // namespace

void parallel_for(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context) {
  const Rounding wanted = rounding();
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr failure;  // torch would say that something failed, and not what
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const RoundingOf caller(wanted);
    try {
      body(context, begin, end);
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
    release_thread_scratch();
  });
  if (failure) std::rethrow_exception(failure);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace fused_preact::cpu
