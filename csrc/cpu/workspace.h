// Memory that is kept from call to call: what a fresh allocation costs is not malloc but the page faults after it.
#pragma once
#include <vector>

#include "../device.h"

namespace fused_preact::cpu {

// AddressSanitizer sees what is used past the end of an allocation, and after it was freed: there every piece and every
// tensor is one, and nothing is kept.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// An owned, 64-byte aligned, uninitialised piece of memory: from the size of one on in huge pages, where there are any.
class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes);  // throws std::bad_alloc
  Block(Block&& other) noexcept;
  Block& operator=(Block&& other) noexcept;
  ~Block();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

// Hands out pieces of its block. Asked for more than that, it takes further blocks; after release the next block is as
// large as all of them, so that the same call finds everything in one place. It keeps at most kMostKept bytes: the most
// that a wgrad takes, and a filter as large.
class BlockScratch final : public Scratch {
 public:
  static constexpr size_t kMostKept = size_t{128} << 20;

  void* take(size_t bytes) override;
  void release() noexcept override;
  uint32_t* counters() override { return nullptr; }

 private:
  std::vector<Block> blocks_;
  size_t used_ = 0;  // of the last block
  size_t next_ = 0;  // least bytes of the next block
};

// The calling thread's own.
Scratch& scratch();

// Gives the calling thread's thread_scratch (parallel.h) back to the system if it is large, as after a call of very
// many channels: all threads would keep it.
void release_thread_scratch() noexcept;

}  // namespace fused_preact::cpu
