// Memory that is kept from call to call: what a fresh allocation costs is not malloc but the page faults after it.
#pragma once
#include <vector>

#include "../device.h"

namespace fused_preact::cpu {

// An owned, 64-byte aligned, uninitialised piece of memory.
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

// Hands out pieces of its block. Asked for more than that, it takes further blocks, and at release merges them into
// one, so that the same call finds everything in one place the next time. It keeps at most kMostKept bytes.
class BlockScratch final : public Scratch {
 public:
  static constexpr size_t kMostKept = size_t{64} << 20;

  void* take(size_t bytes) override;
  void release() override;

 private:
  std::vector<Block> blocks_;
  size_t used_ = 0;  // of the last block
};

// The calling thread's own.
Scratch& scratch();

}  // namespace fused_preact::cpu
