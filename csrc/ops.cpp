// The operators of docs/design.md on every device that has a table of kernels: what they expect of their arguments, and
// their implementation. fused_preact/ops.py and running.py have their schemas.
//
// Anyone can reach them through torch.ops, so the facts that keep a kernel inside its memory are checked here again;
// messages for people come from fused_preact/checks.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "expect.h"
#include "running.h"
#include "schedule.h"

namespace fused_preact {

namespace {

using Pointers = std::vector<Tensor*>;

constexpr size_t kGeometry = 7;                      // integers a convolution
constexpr int64_t kMostGeometry = int64_t{1} << 31;  // keeps the arithmetic on the padded input from overflowing
constexpr int64_t kMostLibraryBytes = int64_t{1} << 31;
constexpr int64_t kLanes = 16;  // most output channels of a vector, by which packed filters are padded

// Parameters and running statistics of batch norm: [C] in the type of the stage or in the accumulation type.
void expect_norm(const char* name, const Tensors& tensors, const Stage& stage) {
  expect_tensors(name, tensors, stage.units());
  const ScalarType rows = accumulation_type(stage.type);
  for (const Chain& chain : stage.blocks)
    for (size_t i = 0; i < chain.units; ++i) {
      const Tensor& tensor = tensors[chain.first + i];
      expect_tensor(item(name, chain.first + i), tensor, tensor.scalar_type() == stage.type ? stage.type : rows,
                    {chain.conv[i].C});
    }
}

Shortcut parse_shortcut(int64_t code) {
  expect(code >= 0 && code <= static_cast<int64_t>(Shortcut::raw),
         "shortcut: expected 0 (none), 1 (identity), 2 (activated) or 3 (raw), got ", code);
  return static_cast<Shortcut>(code);
}

Memory parse_memory(int64_t code) {
  expect(code >= 0 && code <= static_cast<int64_t>(Memory::none),
         "memory: expected 0 (fast), 1 (lean), 2 (min) or 3 (none), got ", code);
  return static_cast<Memory>(code);
}

// Whether so many values of up to 8 bytes can be counted, and a few times as many.
bool is_countable(std::initializer_list<int64_t> sizes) {
  int64_t bytes = int64_t{1} << 8;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes)) return false;
  return true;
}

Sizes output_sizes(const Conv& conv) { return {conv.N, conv.K, conv.P, conv.Q}; }

// The convolution of an input of N, C, H, W by `weight`, from its seven integers of geometry.
Convolution convolution(const Item& name, const Sizes& x, const Tensor& weight, const int64_t* geometry) {
  const int64_t *stride = geometry, *pad = geometry + 2, *dilation = geometry + 4, groups = geometry[6];
  for (size_t i = 0; i < kGeometry; ++i)
    expect(geometry[i] >= (i == 2 || i == 3 ? 0 : 1) && geometry[i] < kMostGeometry,
           "geometry: expected strides, dilations and groups from 1 and paddings from 0, got ", geometry[i]);
  expect(weight.dim() == 4, name, ": expected 4 dimensions, got ", weight.dim());
  const auto w = weight.sizes();
  expect(x[1] % groups == 0 && w[0] % groups == 0, name, ": expected ", groups, " groups of whole channels, got ", x[1],
         " in and ", w[0], " out");
  expect_parameter(name, weight, {w[0], x[1] / groups, w[2], w[3]});
  expect(w[0] > 0 && w[2] > 0 && w[3] > 0, name, ": expected no empty dimension, got ", text(w));
  expect(is_countable({x[0], x[1], x[2], x[3]}) && is_countable({w[0], w[1], w[2], w[3]}), name,
         ": expected an input and a filter that memory can hold, got ", text(x), " and ", text(w));
  const int64_t rows = x[2] + 2 * pad[0], cols = x[3] + 2 * pad[1];
  // What kernels make of the two: a strip of padded rows, or phases of them, and a packed filter.
  expect(is_countable({rows + stride[0], cols + stride[1], std::max(x[1], w[0])}) &&
             is_countable({w[0] + kLanes, w[1] + 1, w[2] + 1, w[3] + 1}),
         name, ": expected a padded input and a packed filter that memory can hold, got ", rows, " x ", cols, " and ",
         text(w));
  expect(is_countable({dilation[0], w[2]}) && is_countable({dilation[1], w[3]}), name,
         ": expected a filter that can be counted, got ", w[2], " x ", w[3], " with dilations of ", dilation[0],
         " and ", dilation[1]);
  const int64_t R = dilation[0] * (w[2] - 1) + 1, S = dilation[1] * (w[3] - 1) + 1;
  expect(R <= rows && S <= cols, name, ": expected a filter within the padded input of ", rows, " x ", cols, ", got ",
         R, " x ", S);
  const Convolution conv{{x[0], x[2], x[3], x[1], (rows - R) / stride[0] + 1, (cols - S) / stride[1] + 1, w[0], w[2],
                          w[3], stride[0], stride[1], pad[0], pad[1]},
                         dilation[0],
                         dilation[1],
                         groups};
  expect(is_countable({conv.N, conv.K, conv.P, conv.Q}), name, ": expected a result that memory can hold, got ",
         text(output_sizes(conv)));
  // Convolutions that are torch's: oneDNN counts the bytes of a padded row, up to eight a value, in 32 bits, and
  // crashes beyond them.
  const auto fits = [&](int64_t extent) { return extent <= kMostLibraryBytes / 8 / std::max(x[1], w[0]); };
  expect(has_kernel(conv) || (fits(2 * pad[0] + stride[0] + R) && fits(2 * pad[1] + stride[1] + S)), name,
         ": expected strides, paddings and a filter that torch's own convolution can count, got ", stride[0], " and ",
         stride[1], ", ", pad[0], " and ", pad[1], ", and ", R, " x ", S);
  return conv;
}

// The stage of an input x from what both operators are told of it.
class StageParser {
 public:
  StageParser(const Tensor& x, const Tensors& weight, const Tensors& bias, const Tensors& shortcut_weight,
              const std::vector<bool>& training, const Sizes& geometry, const Sizes& units, const Sizes& shortcut,
              ScalarType dtype, int64_t memory)
      : weight_(weight), shortcut_weight_(shortcut_weight), geometry_(geometry) {
    expect(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
               dtype == (x.is_cuda() ? ScalarType::Half : ScalarType::Double),
           "dtype: expected float32, bfloat16 or ", x.is_cuda() ? "float16" : "float64", ", got ",
           torch::headeronly::toString(dtype));
    stage_.type = dtype;
    stage_.memory = parse_memory(memory);
    stage_.training = training;
    expect_tensors("weight", weight, training.size());
    expect(!units.empty() && units.size() == shortcut.size(), "units: expected one value for each shortcut, got ",
           units.size(), " for ", shortcut.size());
    expect(x.dim() == 4, "x: expected 4 dimensions, got ", x.dim());
    sizes_ = Sizes(x.sizes().begin(), x.sizes().end());
    const bool wider = stage_.memory != Memory::fast && x.scalar_type() == ScalarType::Float &&
                       element_size(dtype) == 2;  // a stream of float32, which `join` adds branches of 16 bits to
    expect_tensor("x", x, wider ? ScalarType::Float : dtype, sizes_);
    expect(sizes_[1] > 0 && sizes_[2] > 0 && sizes_[3] > 0, "x: expected no empty dimension but the first, got ",
           text(sizes_));
    for (size_t k = 0; k < units.size(); ++k) {
      const Shortcut across = parse_shortcut(shortcut[k]);
      expect(units.size() == 1 || across != Shortcut::none,
             "shortcut: expected 0 (none) in a stage of one block alone, got it in one of ", units.size());
      add_block(units[k], across);
    }
    expect(unit_ == weight.size() && projection_ == shortcut_weight.size() && read_ == geometry.size(),
           "geometry: expected weights, shortcut weights and geometry of ", unit_, ", ", projection_, " and ", read_,
           " values, got ", weight.size(), ", ", shortcut_weight.size(), " and ", geometry.size());
    if (!bias.empty()) expect_tensors("bias", bias, training.size());
    for (const Chain& chain : stage_.blocks)
      for (size_t i = 0; !bias.empty() && i < chain.units; ++i) {
        const Tensor& b = bias[chain.first + i];
        expect_parameter(item("bias", chain.first + i), b, {chain.conv[i].K});
        stage_.bias.push_back(contiguous(b, dtype));
      }
  }

  // The stage, for a device whose kernels want the weights in its type.
  Stage take(const Launch& kernels) && {
    Pointers weights;
    for (Chain& chain : stage_.blocks)
      for (Tensor& weight : chain.weight) weights.push_back(&weight);
    kernels.convert(weights, stage_.type);
    return std::move(stage_);
  }

 private:
  void add_block(int64_t units, Shortcut shortcut) {
    expect(units > 0 && static_cast<size_t>(units) <= weight_.size() - unit_, "units: expected from 1 to ",
           weight_.size() - unit_, " units, got ", units);
    Chain chain{unit_, static_cast<size_t>(units), shortcut, {}, {}};
    const Sizes input = sizes_;
    for (int64_t i = 0; i < units; ++i, ++unit_) {
      add(chain, item("weight", unit_), sizes_, weight_[unit_]);
      sizes_ = output_sizes(chain.conv.back());
    }
    if (shortcut == Shortcut::activated || shortcut == Shortcut::raw) {
      const Item name = item("shortcut_weight", projection_);
      expect(projection_ < shortcut_weight_.size(), name, ": expected a tensor, got none");
      add(chain, name, input, shortcut_weight_[projection_++]);
      const Sizes output = output_sizes(chain.conv.back());
      expect(output == sizes_, name, ": expected an output of ", text(sizes_), ", got ", text(output));
    }
    expect(shortcut != Shortcut::identity || input == sizes_, "shortcut: identity expects an output of ", text(input),
           ", got ", text(sizes_));
    stage_.blocks.push_back(std::move(chain));
  }

  void add(Chain& chain, const Item& name, const Sizes& input, const Tensor& weight) {
    expect(read_ + kGeometry <= geometry_.size(), "geometry: expected ", kGeometry,
           " integers for each convolution, got ", geometry_.size());
    chain.conv.push_back(convolution(name, input, weight, &geometry_[read_]));
    read_ += kGeometry;
    chain.weight.push_back(weight);
  }

  const Tensors &weight_, &shortcut_weight_;
  const Sizes& geometry_;
  Stage stage_;
  Sizes sizes_;  // of the stream behind the blocks so far
  size_t unit_ = 0, projection_ = 0, read_ = 0;
};

bool contains(const std::vector<bool>& values, bool value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

std::tuple<Tensor, Tensors, Tensors> run_forward(const Tensor& x, const std::optional<Tensor>& residual,
                                                 const Tensors& weight, const Tensors& bias, const Tensors& bn_weight,
                                                 const Tensors& bn_bias, const Tensors& running_mean,
                                                 const Tensors& running_var, const Tensors& shortcut_weight,
                                                 const std::vector<bool>& training, const std::vector<double>& eps,
                                                 const Sizes& geometry, const Sizes& units, const Sizes& shortcut,
                                                 ScalarType dtype, int64_t memory, bool tf32) {
  SameDevice{x}("residual", residual)("weight", weight)("bias", bias)("bn_weight", bn_weight)("bn_bias", bn_bias)(
      "running_mean", running_mean)("running_var", running_var)("shortcut_weight", shortcut_weight);
  StageParser parsed(x, weight, bias, shortcut_weight, training, geometry, units, shortcut, dtype, memory);
  const Launch kernels(device_of(x), dtype, tf32 && x.is_cuda());
  const Stage stage = std::move(parsed).take(kernels);
  const size_t n = stage.units();
  expect(x.size(0) > 0 || !contains(training, true), "x: expected at least one image where a unit is training, got ",
         text(x.sizes()));
  expect(!residual || stage.blocks[0].shortcut == Shortcut::none, "residual: expected none beside a shortcut");
  if (residual) expect_tensor("residual", *residual, dtype, output_sizes(stage.blocks[0].conv.back()));
  expect_norm("bn_weight", bn_weight, stage);
  expect_norm("bn_bias", bn_bias, stage);
  const bool frozen = contains(training, false);
  if (frozen || !running_mean.empty()) expect_norm("running_mean", running_mean, stage);
  if (frozen || !running_var.empty()) expect_norm("running_var", running_var, stage);
  expect(eps.size() == n, "eps: expected ", n, " numbers, got ", eps.size());

  const Norms norms{bn_weight, bn_bias, running_mean, running_var, eps};
  auto [y, kept, rows] = forward(kernels, stage, norms, kernels.dense_nhwc(x),
                                 residual ? std::optional(kernels.dense_nhwc(*residual)) : residual);
  return {kernels.laid_out_like(x, y), kept, rows};
}

// The tensors of the blocks' shapes that forward keeps, made dense.
Tensors expect_kept(const Tensors& kept, const Stage& stage, ScalarType stream) {
  Tensors dense;
  const auto expect_next = [&](ScalarType type, const Sizes& sizes) {
    const size_t i = dense.size();
    expect(i < kept.size(), "kept: expected more than ", i, " tensors");
    expect_tensor(item("kept", i), kept[i], type, sizes);
    dense.push_back(dense_nhwc(kept[i]));
  };
  for (size_t k = 0; k < stage.blocks.size(); ++k) {
    const Chain& chain = stage.blocks[k];
    const Conv& conv = chain.conv[0];
    if (k > 0 && stage.keeps_input(k)) expect_next(stream, {conv.N, conv.C, conv.H, conv.W});
    for (size_t i = 0; i + 1 < chain.units; ++i)
      if (stage.keeps_hidden(k, i)) expect_next(stage.type, output_sizes(chain.conv[i]));
  }
  expect_tensors("kept", kept, dense.size());
  return dense;
}

// By unit and by block; the operator is told of those alone that have a bias or a projection.
Needs parse_needs(const std::vector<bool>& needs, const Stage& stage) {
  const size_t n = stage.units(), biases = stage.bias.size();
  const size_t projections = std::count_if(stage.blocks.begin(), stage.blocks.end(), projects);
  const size_t size = 1 + 2 * n + biases + projections;
  expect(needs.size() == size, "needs: expected ", size, " values, got ", needs.size());
  auto next = needs.begin();
  const auto take = [&](size_t count) {
    const auto first = next;
    next += count;
    return std::vector<bool>(first, next);
  };
  Needs result{*next++, take(n), take(biases), take(n), {}};
  result.bias.resize(n, false);
  for (const Chain& chain : stage.blocks) result.shortcut_weight.push_back(projects(chain) && *next++);
  return result;
}

// Gradients in the types of what they are the gradients of; those that were not asked for are empty.
void convert_like(const Launch& kernels, std::initializer_list<std::pair<Tensors*, const Tensors*>> gradients) {
  std::map<ScalarType, Pointers> by_type;
  for (const auto& [made, like] : gradients)
    for (size_t i = 0; i < made->size(); ++i) by_type[(*like)[i].scalar_type()].push_back(&(*made)[i]);
  for (const auto& [type, tensors] : by_type) kernels.convert(tensors, type);
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors> run_backward(
    const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y, const Tensors& kept, const Tensors& rows,
    const Tensors& weight, const Tensors& bias, const Tensors& shortcut_weight, const std::vector<bool>& training,
    const Sizes& geometry, const Sizes& units, const Sizes& shortcut, ScalarType dtype, int64_t memory, bool tf32,
    const std::vector<bool>& needs) {
  SameDevice{x}("dy", dy)("y", y)("kept", kept)("rows", rows)("weight", weight)("bias", bias)("shortcut_weight",
                                                                                              shortcut_weight);
  StageParser parsed(x, weight, bias, shortcut_weight, training, geometry, units, shortcut, dtype, memory);
  const Launch kernels(device_of(x), dtype, tf32 && x.is_cuda());
  const Stage stage = std::move(parsed).take(kernels);
  const size_t n = stage.units();
  const Chain& last = stage.blocks.back();
  const ScalarType stream = x.scalar_type(), row_type = accumulation_type(dtype);
  const Sizes output = output_sizes(last.conv[last.units - 1]);
  expect_tensor("dy", dy, stream, output);
  expect(stage.memory != Memory::none, "memory: expected what forward kept for backward, got none");
  const bool needs_y = stage.needs_y();
  expect(!needs_y || y, "y: expected a tensor where the last block does not keep its input, got none");
  if (needs_y) expect_tensor("y", *y, stream, output);
  expect_tensors("rows", rows, n);
  Tensors dense_rows;
  for (const Chain& chain : stage.blocks)
    for (size_t i = 0; i < chain.units; ++i) {
      const size_t unit = chain.first + i;
      expect_tensor(item("rows", unit), rows[unit], row_type, {kNormRows, chain.conv[i].C});
      dense_rows.push_back(contiguous(rows[unit], row_type));
    }
  auto [dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight] =
      backward(kernels, stage, kernels.dense_nhwc(dy), kernels.dense_nhwc(x),
               needs_y ? std::optional(kernels.dense_nhwc(*y)) : std::nullopt, expect_kept(kept, stage, stream),
               dense_rows, parse_needs(needs, stage));
  convert_like(kernels, {{&dweight, &weight}, {&dbias, &bias}, {&dshortcut_weight, &shortcut_weight}});
  return {needs.front() ? kernels.laid_out_like(x, dx) : dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight};
}

// Compute capabilities that the CUDA kernels were compiled for; none where they were left out.
std::vector<std::string> cuda_architectures() {
#if defined(FUSED_PREACT_CUDA)
#define ARCHITECTURE(name) #name,
  return {FUSED_PREACT_CUDA};
#undef ARCHITECTURE
#else
  return {};
#endif
}

// The one in use, all that are built, and those of them that this machine supports.
std::tuple<std::string, std::vector<std::string>, std::vector<std::string>> cpu_isas() {
  std::vector<std::string> built, supported;
  for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
    built.emplace_back(set.name);
    if (set.supported) supported.emplace_back(set.name);
  }
  return {cpu::isa(), built, supported};
}

void empty_cache() { cpu::TensorPool::instance().drop_idle(); }

std::string set_cpu_isa(const std::string& name) {
  const std::string before = cpu::isa();
  cpu::set_isa(name);
  return before;
}

}  // namespace

}  // namespace fused_preact

STABLE_TORCH_LIBRARY(fused_preact, m) {
  m.def("_cuda_architectures() -> str[]");
  m.def("_cpu_isas() -> (str chosen, str[] built, str[] supported)");
  m.def("_set_cpu_isa(str isa) -> str");
  m.def("_empty_cache() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("forward", TORCH_BOX(&fused_preact::run_forward));
  m.impl("backward", TORCH_BOX(&fused_preact::run_backward));
  m.impl("_update_running", TORCH_BOX(&fused_preact::update_running));
}

#if defined(FUSED_PREACT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fused_preact, CUDA, m) {
  m.impl("forward", TORCH_BOX(&fused_preact::run_forward));
  m.impl("backward", TORCH_BOX(&fused_preact::run_backward));
  m.impl("_update_running", TORCH_BOX(&fused_preact::update_running));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(fused_preact, CompositeExplicitAutograd, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&fused_preact::cuda_architectures));
  m.impl("_cpu_isas", TORCH_BOX(&fused_preact::cpu_isas));
  m.impl("_set_cpu_isa", TORCH_BOX(&fused_preact::set_cpu_isa));
  m.impl("_empty_cache", TORCH_BOX(&fused_preact::empty_cache));
}
