#include "workspace.h"

#include <new>
#include <utility>

namespace fused_preact::cpu {

namespace {

constexpr size_t kAlignment = 64;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Block::Block(size_t bytes)
    : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment)))), bytes_(bytes) {}

Block::Block(Block&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Block::~Block() { ::operator delete(data_, std::align_val_t(kAlignment)); }

void* BlockScratch::take(size_t bytes) {
  bytes = aligned(bytes);
  if (blocks_.empty() || blocks_.back().bytes() - used_ < bytes) {
    blocks_.emplace_back(bytes);
    used_ = 0;
  }
  void* piece = blocks_.back().data() + used_;
  used_ += bytes;
  return piece;
}

void BlockScratch::release() {
  used_ = 0;
  size_t total = 0;
  for (const Block& block : blocks_) total += block.bytes();
  if (blocks_.size() > 1 || total > kMostKept) {
    blocks_.clear();
    if (total <= kMostKept) blocks_.emplace_back(total);
  }
}

Scratch& scratch() {
  thread_local BlockScratch own;
  return own;
}

}  // namespace fused_preact::cpu
