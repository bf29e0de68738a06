#include "schedule.h"

#include <algorithm>
#include <utility>

namespace fused_preact {

namespace {

bool any(const std::vector<bool>& values, size_t end) {
  return std::find(values.begin(), values.begin() + end, true) != values.begin() + end;
}

using Gradients = std::vector<std::optional<Tensor>>;

// With an empty tensor for each gradient that was not made.
std::vector<Tensor> filled(const Gradients& made, const Tensor& like, ScalarType type) {
  std::vector<Tensor> result;
  result.reserve(made.size());
  for (const std::optional<Tensor>& gradient : made) result.push_back(gradient ? *gradient : empty(like, type, {0}));
  return result;
}

class Forward {
 public:
  Forward(const Launch& kernels, const Stage& stage, const Norms& norms)
      : kernels_(kernels), stage_(stage), norms_(norms) {}

  ForwardResult run(const Tensor& x, const std::optional<Tensor>& residual) && {
    Tensor stream = x;
    for (size_t k = 0; k < stage_.blocks.size(); ++k) {
      if (k > 0 && stage_.keeps_input(k)) kept_.push_back(stream);
      stream = block(k, stream, residual);
    }
    return {stream, std::move(kept_), std::move(rows_)};
  }

 private:
  Tensor block(size_t k, const Tensor& stream, const std::optional<Tensor>& residual) {
    const Chain& chain = stage_.blocks[k];
    const Tensor x = narrowed_ ? *std::exchange(narrowed_, std::nullopt) : convert(stream, stage_.type);
    // The batch norm in front has its rows from the block before, unless there is none that read the same values.
    if (rows_.size() == chain.first) rows_.push_back(norm_rows(chain.first, x));
    std::optional<Tensor> across = residual;
    if (chain.shortcut == Shortcut::identity) across = stream;
    if (chain.shortcut == Shortcut::activated || chain.shortcut == Shortcut::raw) across = projection(chain, x);
    // A stream of another type than the convolutions' is joined apart.
    const bool apart = across && across->scalar_type() != stage_.type;

    Tensor h = x;
    for (size_t i = 0; i < chain.units; ++i) {
      const bool last = i == chain.units - 1;
      const size_t unit = chain.first + i;
      const std::optional<Launch::Affine> next = last && apart ? std::nullopt : affine_after(unit);
      auto [y, next_rows] = kernels_.forward(chain.conv[i], {h, rows_[unit]}, chain.weight[i], stage_.bias_of(unit),
                                             last && !apart ? across : std::nullopt, next);
      h = y;
      if (next)
        rows_.push_back(*next_rows);
      else if (!last)
        rows_.push_back(norm_rows(unit + 1, h));
      if (!last && stage_.keeps_hidden(k, i)) kept_.push_back(h);
    }
    const bool is_last = k + 1 == stage_.blocks.size();
    if (!apart) {
      if (!is_last) narrowed_ = h;
      return convert(h, stream.scalar_type());
    }
    const Launch::Joined joined =
        kernels_.join(*across, {h}, false, !is_last, affine_after(chain.first + chain.units - 1));
    narrowed_ = joined.narrowed;
    if (joined.rows) rows_.push_back(*joined.rows);
    return joined.stream;
  }

  Tensor projection(const Chain& chain, const Tensor& x) {
    std::optional<Tensor> norm;
    if (chain.shortcut == Shortcut::activated) norm = rows_[chain.first];
    const Launch::Activation source{x, norm};
    return kernels_.forward(chain.conv.back(), source, chain.weight.back(), std::nullopt, std::nullopt, std::nullopt)
        .first;
  }

  Launch::Affine affine(size_t unit) const {
    const ScalarType type = accumulation_type(stage_.type);
    return {contiguous(norms_.weight[unit], type), contiguous(norms_.bias[unit], type), norms_.eps[unit]};
  }

  // The batch norm that reads what a unit gives, where it uses batch statistics.
  std::optional<Launch::Affine> affine_after(size_t unit) const {
    if (unit + 1 >= stage_.units() || !stage_.training[unit + 1]) return std::nullopt;
    return affine(unit + 1);
  }

  Tensor norm_rows(size_t unit, const Tensor& x) const {
    if (stage_.training[unit]) return kernels_.statistics(x, affine(unit));
    const ScalarType type = accumulation_type(stage_.type);
    return kernels_.running(contiguous(norms_.running_mean[unit], type), contiguous(norms_.running_var[unit], type),
                            affine(unit));
  }

  const Launch& kernels_;
  const Stage& stage_;
  const Norms& norms_;
  std::optional<Tensor> narrowed_;  // the stream in the type of the convolutions
  std::vector<Tensor> kept_, rows_;
};

class Backward {
 public:
  Backward(const Launch& kernels, const Stage& stage, const std::vector<Tensor>& kept, const std::vector<Tensor>& rows,
           const Needs& needs)
      : kernels_(kernels),
        stage_(stage),
        kept_(kept),
        rows_(rows),
        needs_(needs),
        unread_(kept.size()),
        dweight_(stage.units()),
        dbias_(stage.bias.size()),
        dbn_weight_(stage.units()),
        dbn_bias_(stage.units()),
        dshortcut_weight_(std::count_if(stage.blocks.begin(), stage.blocks.end(), projects)),
        projection_(dshortcut_weight_.size()) {}

  BackwardResult run(const Tensor& dy, const Tensor& x, std::optional<Tensor> y) && {
    Tensor dstream = dy;
    for (size_t k = stage_.blocks.size(); k-- > 0;) {
      const bool need_x = needs_.x || wanted_before(k);
      if (!need_x && !wanted_before(k + 1)) break;
      projection_ -= projects(stage_.blocks[k]);
      const Tensor stream = restore(k, x, y);
      dstream = block(k, dstream, need_x);
      y = stream;
    }
    const ScalarType type = stage_.type, row_type = accumulation_type(type);
    return {needs_.x ? dstream : empty(x, x.scalar_type(), {0}),
            filled(dweight_, x, type),
            filled(dbias_, x, type),
            filled(dbn_weight_, x, row_type),
            filled(dbn_bias_, x, row_type),
            filled(dshortcut_weight_, x, type)};
  }

 private:
  // Whether a parameter of the blocks before block k wants a gradient.
  bool wanted_before(size_t k) const {
    const size_t end = k < stage_.blocks.size() ? stage_.blocks[k].first : stage_.units();
    return any(needs_.weight, end) || any(needs_.bias, end) || any(needs_.norm, end) || any(needs_.shortcut_weight, k);
  }

  // Fills inputs_, what each unit of block k read, and returns the stream in front of the block; y is the one behind.
  Tensor restore(size_t k, const Tensor& x, const std::optional<Tensor>& y) {
    const Chain& chain = stage_.blocks[k];
    const bool kept = k > 0 && stage_.keeps_input(k);
    size_t next = unread_ - kept;
    for (size_t i = 0; i + 1 < chain.units; ++i) next -= stage_.keeps_hidden(k, i);
    const size_t end = std::exchange(unread_, next);
    std::optional<Tensor> narrowed;
    const Tensor stream = k == 0 ? x : kept ? kept_[next++] : rebuild(chain, *y, kept_[end - 1], narrowed);
    inputs_ = {narrowed ? *narrowed : convert(stream, stage_.type)};
    for (size_t i = 0; i + 1 < chain.units; ++i)
      inputs_.push_back(stage_.keeps_hidden(k, i) ? kept_[next++]
                                                  : convolve(chain, i, inputs_[i], chain.weight[i],
                                                             stage_.bias_of(chain.first + i), std::nullopt));
    return stream;
  }

  // x = y - conv(a, W) - bias for the last convolution of a block whose shortcut is the identity. Where the
  // convolutions have another type, x in it too.
  Tensor rebuild(const Chain& chain, const Tensor& y, const Tensor& h, std::optional<Tensor>& narrowed) const {
    const size_t i = chain.units - 1;
    std::optional<Tensor> b = stage_.bias_of(chain.first + i);
    if (y.scalar_type() != stage_.type) {
      const Tensor branch = convolve(chain, i, h, chain.weight[i], b, std::nullopt);
      const Launch::Joined joined = kernels_.join(y, {branch}, true, true, std::nullopt);
      narrowed = joined.narrowed;
      return joined.stream;
    }
    if (b) b = negative(*b);
    return convolve(chain, i, h, negative(chain.weight[i]), b, y);
  }

  Tensor convolve(const Chain& chain, size_t i, const Tensor& h, const Tensor& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& residual) const {
    return kernels_.forward(chain.conv[i], {h, rows_[chain.first + i]}, weight, bias, residual, std::nullopt).first;
  }

  // The gradient of the stream in front of block k from the one behind it, where it is needed.
  Tensor block(size_t k, const Tensor& dstream, bool need_x) {
    const Chain& chain = stage_.blocks[k];
    const Tensor dy = narrowed_ ? *std::exchange(narrowed_, std::nullopt) : convert(dstream, stage_.type);
    const Tensor& x = inputs_[0];
    const auto of_shortcut = [&](const std::optional<Tensor>& norm, bool need_x, bool need_weight) {
      return kernels_.gradients(chain.conv.back(), {dy}, chain.weight.back(), {x, norm}, std::nullopt, false,
                                {need_x, need_weight, false});
    };
    const auto shortcut_dgrad = [&] { return of_shortcut(std::nullopt, true, false).of_x->g; };
    const auto shortcut_wgrad = [&](const std::optional<Tensor>& norm) {
      if (needs_.shortcut_weight[k]) dshortcut_weight_[projection_] = of_shortcut(norm, false, true).of_weight->dweight;
    };

    Launch::Gradient g{dy};
    for (size_t i = chain.units; i-- > 0;) {
      const bool wanted = need_x || wanted_within(chain, i);
      std::optional<Tensor> add;
      if (i == 0 && chain.shortcut == Shortcut::activated) {
        shortcut_wgrad(rows_[chain.first]);
        if (wanted) add = shortcut_dgrad();
      }
      g = unit(chain, i, g, add, wanted);
    }
    if (chain.shortcut == Shortcut::raw) shortcut_wgrad(std::nullopt);
    if (!need_x) return dstream;
    const bool identity = chain.shortcut == Shortcut::identity, apart = dstream.scalar_type() != stage_.type;
    if (identity && apart) {
      const Launch::Joined joined = kernels_.join(dstream, g, false, k > 0, std::nullopt);
      narrowed_ = joined.narrowed;
      return joined.stream;
    }
    std::optional<Tensor> add;
    if (identity) add = dy;
    if (chain.shortcut == Shortcut::raw) add = shortcut_dgrad();
    const Tensor dx = kernels_.dx(g, add);
    if (apart && k > 0) narrowed_ = dx;
    return convert(dx, dstream.scalar_type());
  }

  // Whether a parameter of the chain at or before the batch norm of unit i wants a gradient.
  bool wanted_within(const Chain& chain, size_t i) const {
    const size_t unit = chain.first + i;
    for (size_t j = chain.first; j < unit; ++j)
      if (needs_.norm[j] || needs_.weight[j] || needs_.bias[j]) return true;
    return needs_.norm[unit];
  }

  // The gradients of a unit's parameters, and, where `wanted`, that of what its ReLU read.
  Launch::Gradient unit(const Chain& chain, size_t i, const Launch::Gradient& dy, const std::optional<Tensor>& add,
                        bool wanted) {
    const size_t unit = chain.first + i;
    const bool need_bias = needs_.bias[unit], need_weight = need_bias || needs_.weight[unit];
    if (!wanted && !need_weight) return dy;
    const auto [of_x, of_weight] = kernels_.gradients(chain.conv[i], dy, chain.weight[i], {inputs_[i], rows_[unit]},
                                                      add, stage_.training[unit], {wanted, need_weight, need_bias});
    if (needs_.weight[unit]) dweight_[unit] = of_weight->dweight;
    if (need_bias) dbias_[unit] = of_weight->dbias;
    if (needs_.norm[unit]) {
      dbn_weight_[unit] = of_x->dgamma;
      dbn_bias_[unit] = of_x->dbeta;
    }
    return of_x ? *of_x : dy;
  }

  const Launch& kernels_;
  const Stage& stage_;
  const std::vector<Tensor>&kept_, &rows_;
  const Needs& needs_;
  size_t unread_;  // kept tensors of this block and those before
  std::vector<Tensor> inputs_;
  std::optional<Tensor> narrowed_;  // the stream's gradient in the type of the convolutions
  Gradients dweight_, dbias_, dbn_weight_, dbn_bias_, dshortcut_weight_;
  size_t projection_;  // that of this block, or the next of those behind
};

}  // namespace

bool Stage::keeps_input(size_t block) const {
  const bool rebuilt = blocks[block].shortcut == Shortcut::identity && blocks[block].units > 1;
  return memory == Memory::fast || (memory != Memory::none && !rebuilt);
}

bool Stage::keeps_hidden(size_t block, size_t unit) const {
  const size_t units = blocks[block].units;
  if (memory == Memory::fast) return block % kRepeating != kRepeating - 1 || unit > 0 || units < 3;
  return memory == Memory::lean || (memory == Memory::min && unit + 2 == units);
}

std::optional<Tensor> Stage::bias_of(size_t unit) const {
  return bias.empty() ? std::nullopt : std::optional(bias[unit]);
}

ForwardResult forward(const Launch& kernels, const Stage& stage, const Norms& norms, const Tensor& x,
                      const std::optional<Tensor>& residual) {
  return Forward(kernels, stage, norms).run(x, residual);
}

BackwardResult backward(const Launch& kernels, const Stage& stage, const Tensor& dy, const Tensor& x,
                        const std::optional<Tensor>& y, const std::vector<Tensor>& kept,
                        const std::vector<Tensor>& rows, const Needs& needs) {
  return Backward(kernels, stage, kept, rows, needs).run(dy, x, y);
}

}  // namespace fused_preact
