// gradients: dgrad and wgrad of one convolution, in turns, so that what both read comes from memory once.
//
// A job is a run of wgrad's groups and of dgrad's groups over the same pixels; the one that has done the smaller part
// of its tiles goes on. Groups, tiles and sums are those of the two kernels alone, and so is every bit of the results.
// Bytes: dy (or dz' and x'), x and add read once, dz written once, dW written and read once a group.
#include "walk.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

// The filter and its gradient are both to stay in the second level cache, beside the tiles.
constexpr int64_t kMostFilterBytes = 1 << 17;

// The tiles of a job's groups, one by one.
class Turns {
 public:
  Turns(const Walk& walk, int64_t jobs, int64_t job)
      : walk_(walk), group_(part_begin(walk.groups, jobs, job)), begin_(walk.first_tile(group_)), tile_(begin_) {
    end_ = walk.first_tile(part_begin(walk.groups, jobs, job + 1));
    if (!is_done()) walk_.start(walk_.call, group_, 0);
  }

  bool is_done() const { return tile_ == end_; }

  // Whether this has done no more than the same part of its tiles.
  bool is_behind(const Turns& other) const {
    return (tile_ - begin_) * (other.end_ - other.begin_) <= (other.tile_ - other.begin_) * (end_ - begin_);
  }

  void step() {
    if (tile_ == walk_.first_tile(group_ + 1)) walk_.start(walk_.call, ++group_, 0);
    walk_.run(walk_.call, group_, 0, tile_++);
  }

 private:
  const Walk& walk_;
  int64_t group_, begin_, tile_, end_;
};

void walk_together(const Walk& wgrad, const Walk& dgrad) {
  const int64_t jobs = minimum(wgrad.groups, dgrad.groups);
  parallel(jobs, [&](int64_t job) {
    Turns w(wgrad, jobs, job), d(dgrad, jobs, job);
    while (!w.is_done() || !d.is_done()) (w.is_done() || (!d.is_done() && !w.is_behind(d)) ? d : w).step();
  });
}

}  // namespace

void gradients(const Conv& conv, Dtype dtype, const Gradient& dy, const Weight& weight, const Activation& x,
               const void* add, void* dz, const NormGrad& grad, const WeightGrad& dweight, void* dbias,
               Workspace& workspace) {
  const int64_t filter_bytes = conv.K * conv.C * conv.R * conv.S * int64_t{sizeof(float)};
  if (conv.stride_h > 1 || conv.stride_w > 1 || filter_bytes > kMostFilterBytes) {
    wgrad(conv, dtype, dy, x, dweight, dbias, workspace);
    return dgrad(conv, dtype, dy, weight, x, add, dz, grad, workspace);
  }
  prepare_wgrad(conv, dtype, dy, x, dweight, dbias, workspace, [&](const Walk& w) {
    prepare_dgrad(conv, dtype, dy, weight, x, add, dz, grad, workspace, [&](const Walk& d) {
      if (w.splits == 1 && d.splits == 1) return walk_together(w, d);
      walk_alone(w);
      walk_alone(d);
    });
  });
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
