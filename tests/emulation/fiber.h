// A stack of its own to run on, and the change from one to the other. Sanitizers are told of every change.
//
// This file is compiled without instrumentation; EMULATION_ASAN or EMULATION_TSAN says that the
// rest of the program has it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

#ifdef EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace fused_preact::emulation {

#if defined(EMULATION_ASAN) || defined(EMULATION_TSAN)
inline constexpr bool kSanitized = true;  // frames are larger, and sanitizers do not bear a jump to another stack
#else
inline constexpr bool kSanitized = false;
#endif

class Context {
 public:
  // The thread that runs already.
  Context() {
#ifdef EMULATION_TSAN
    thread_ = __tsan_get_current_fiber();
#endif
  }

  // Runs body() on a stack of its own as soon as it is switched to; body never returns.
  explicit Context(void (*body)()) : stack_(new std::byte[kStack]) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_ = stack_.get();
    context_.uc_stack.ss_size = size_ = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, body, 0);
#ifdef EMULATION_TSAN
    thread_ = __tsan_create_fiber(0);
#endif
  }

  Context(const Context&) = delete;

  ~Context() {
#ifdef EMULATION_ASAN
    if (stack_) __asan_unpoison_memory_region(stack_.get(), kStack);
#endif
#ifdef EMULATION_TSAN
    if (stack_) __tsan_destroy_fiber(thread_);
#endif
  }

  // Called by body() before anything else.
  static void entered(Context& from) {
#ifdef EMULATION_ASAN
    __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&from.bottom_), &from.size_);
#else
    (void)from;
#endif
  }

  void switch_to(Context& to) {
#ifdef EMULATION_ASAN
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
#ifdef EMULATION_TSAN
    __tsan_switch_to_fiber(to.thread_, __tsan_switch_to_fiber_no_sync);
#endif
    if (kSanitized) {
      swapcontext(&context_, &to.context_);
    } else if (_setjmp(jump_) == 0) {
      // makecontext's own start is needed once; a jump costs a tenth of the system call in swapcontext.
      if (!to.started_ && to.stack_) {
        to.started_ = true;
        setcontext(&to.context_);
      }
      _longjmp(to.jump_, 1);
    }
#ifdef EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kStack = kSanitized ? 256 << 10 : 64 << 10;

  std::unique_ptr<std::byte[]> stack_;
  ucontext_t context_;
  jmp_buf jump_;
  bool started_ = false;
  void* bottom_ = nullptr;
  size_t size_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] void* thread_ = nullptr;
};

// What orders memory between fibers, and what a fiber does to memory in uninstrumented code, for ThreadSanitizer.
#ifdef EMULATION_TSAN
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
inline void publish(void* object) { __tsan_release(object); }
inline void observe(void* object) { __tsan_acquire(object); }
inline void note_read(const void* data, size_t bytes) { __tsan_read_range(const_cast<void*>(data), bytes); }
inline void note_write(void* data, size_t bytes) { __tsan_write_range(data, bytes); }

// While one exists, what is allocated, moved and freed is of the emulation itself, whose memory all fibers share.
struct Bookkeeping {
  Bookkeeping() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Bookkeeping() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
#else
inline void publish(void*) {}
inline void observe(void*) {}
inline void note_read(const void*, size_t) {}
inline void note_write(void*, size_t) {}
struct Bookkeeping {
  Bookkeeping() {}
};
#endif

}  // namespace fused_preact::emulation
