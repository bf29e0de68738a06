#include "workspace.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

#include "parallel.h"
#include "pool.h"

namespace fused_preact::cpu {

namespace {

constexpr size_t kAlignment = 64, kHugePage = size_t{2} << 20;

// More than any call takes but those of very many channels.
constexpr size_t kMostThreadScratch = size_t{16} << 20;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

std::align_val_t alignment(size_t bytes) { return std::align_val_t(bytes < kHugePage ? kAlignment : kHugePage); }

// For which what waits in the pool makes room, where the system has no more memory.
Block scratch_block(size_t bytes) {
  try {
    return Block(bytes);
  } catch (const std::bad_alloc&) {
    TensorPool::instance().drop_idle();
    return Block(bytes);
  }
}

Block& thread_block() {
  thread_local Block block;
  return block;
}

}  // namespace

Block::Block(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, alignment(bytes)))), bytes_(bytes) {
  if (bytes >= kHugePage) madvise(data_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice: may be refused
}

Block::Block(Block&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Block& Block::operator=(Block&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Block::~Block() { ::operator delete(data_, alignment(bytes_)); }

void* BlockScratch::take(size_t bytes) {
  if (!kSanitized) bytes = aligned(bytes);
  if (kSanitized || blocks_.empty() || blocks_.back().bytes() - used_ < bytes) {
    blocks_.push_back(scratch_block(std::max(bytes, std::exchange(next_, 0))));
    used_ = 0;
  }
  void* piece = blocks_.back().data() + used_;
  used_ += bytes;
  return piece;
}

void BlockScratch::release() noexcept {
  used_ = 0;
  size_t total = 0;
  for (const Block& block : blocks_) total += block.bytes();
  if (kSanitized) return blocks_.clear();
  if (blocks_.size() > 1 || total > kMostKept) {
    blocks_.clear();
    if (total <= kMostKept) next_ = total;
  }
}

Scratch& scratch() {
  thread_local BlockScratch own;
  return own;
}

void* thread_scratch(size_t bytes) {
  Block& block = thread_block();
  if (kSanitized || block.bytes() < bytes) {
    block = Block();
    block = scratch_block(bytes);
  }
  return block.data();
}

void release_thread_scratch() noexcept {
  if (thread_block().bytes() > kMostThreadScratch) thread_block() = Block();
}

}  // namespace fused_preact::cpu
