// The operators of docs/design.md: their schemas, what they expect of their arguments, and the CPU's implementation.
//
// Anyone can reach them through torch.ops, so the facts that keep a kernel inside its memory are checked here again;
// messages for people come from fused_preact/checks.py.
#include <torch/csrc/stable/library.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "schedule.h"

namespace fused_preact {

namespace {

using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr size_t kGeometry = 7;                      // integers a convolution
constexpr int64_t kMostGeometry = int64_t{1} << 31;  // keeps the arithmetic on sizes from overflowing

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class Range>
std::string text(const Range& sizes) {
  std::ostringstream out;
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "[" : ", ") << sizes[i];
  return sizes.size() == 0 ? "[]" : out.str() + "]";
}

template <class Name>
void expect_tensor(const Name& name, const Tensor& x, ScalarType type, const Sizes& sizes) {
  const auto got = x.sizes();
  const bool fits =
      x.is_cpu() && x.scalar_type() == type && std::equal(got.begin(), got.end(), sizes.begin(), sizes.end());
  expect(fits, name, ": expected ", torch::headeronly::toString(type), " of shape ", text(sizes), " on the CPU, got ",
         torch::headeronly::toString(x.scalar_type()), " of shape ", text(got), x.is_cpu() ? "" : " on another device");
}

std::string item(const char* name, size_t i) { return name + ("[" + std::to_string(i)) + "]"; }

void expect_tensors(const char* name, const Tensors& tensors, size_t n) {
  expect(tensors.size() == n, name, ": expected ", n, " tensors, got ", tensors.size());
}

// Parameters and running statistics of batch norm: [C] in the type of x or in the accumulation type.
void expect_norm(const char* name, const Tensors& tensors, const Chain& chain) {
  expect_tensors(name, tensors, chain.units());
  for (size_t i = 0; i < chain.units(); ++i) {
    const ScalarType rows = accumulation_type(chain.type);
    expect_tensor(item(name, i), tensors[i], tensors[i].scalar_type() == chain.type ? chain.type : rows,
                  {chain.conv[i].C});
  }
}

Shortcut parse_shortcut(const std::string& name) {
  if (name == "none") return Shortcut::none;
  if (name == "identity") return Shortcut::identity;
  if (name == "activated") return Shortcut::activated;
  expect(name == "raw", "shortcut: expected none, identity, activated or raw, got ", name);
  return Shortcut::raw;
}

// The convolution of an input of N, C, H, W by `weight`, from its seven integers of geometry.
Conv convolution(const std::string& name, const Sizes& x, const Tensor& weight, ScalarType type,
                 const int64_t* geometry) {
  expect(weight.dim() == 4, name, ": expected 4 dimensions, got ", weight.dim());
  const auto w = weight.sizes();
  expect_tensor(name, weight, type, {w[0], x[1], w[2], w[3]});
  expect(w[0] > 0 && w[2] > 0 && w[3] > 0, name, ": expected no empty dimension, got ", text(w));
  const int64_t *stride = geometry, *pad = geometry + 2, *dilation = geometry + 4, groups = geometry[6];
  for (size_t i = 0; i < kGeometry; ++i)
    expect(geometry[i] >= (i == 2 || i == 3 ? 0 : 1) && geometry[i] < kMostGeometry,
           "geometry: expected strides, dilations and groups from 1 and paddings from 0, got ", geometry[i]);
  expect(dilation[0] == 1 && dilation[1] == 1 && groups == 1, "geometry: expected dilation and groups of 1, got ",
         dilation[0], ", ", dilation[1], " and ", groups);
  const int64_t P = (x[2] + 2 * pad[0] - w[2]), Q = (x[3] + 2 * pad[1] - w[3]);
  expect(P >= 0 && Q >= 0, name, ": expected a filter within the padded input of ", x[2] + 2 * pad[0], " x ",
         x[3] + 2 * pad[1], ", got ", w[2], " x ", w[3]);
  return {x[0],      x[2],      x[3],   x[1],  P / stride[0] + 1, Q / stride[1] + 1, w[0], w[2], w[3],
          stride[0], stride[1], pad[0], pad[1]};
}

Chain parse_chain(const Tensor& x, const Tensors& weight, const std::optional<Tensor>& shortcut_weight,
                  const std::vector<bool>& training, const Sizes& geometry, const std::string& shortcut,
                  const std::string& backend) {
  expect(backend == "cpu", "backend: expected cpu, got ", backend);
  const ScalarType type = x.scalar_type();
  expect(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Double,
         "x: expected float32, bfloat16 or float64, got ", torch::headeronly::toString(type));
  const size_t n = training.size();
  expect(n > 0, "training: expected one value for each unit, got none");
  expect_tensors("weight", weight, n);
  Chain chain{type, {}, weight, training, parse_shortcut(shortcut)};
  const bool projection = chain.shortcut == Shortcut::activated || chain.shortcut == Shortcut::raw;
  expect(projection == shortcut_weight.has_value(), "shortcut_weight: expected ", projection ? "a tensor" : "none",
         " for the shortcut ", shortcut);
  if (projection) chain.weight.push_back(*shortcut_weight);
  expect(geometry.size() == kGeometry * chain.weight.size(), "geometry: expected ", kGeometry * chain.weight.size(),
         " integers, got ", geometry.size());

  expect(x.dim() == 4, "x: expected 4 dimensions, got ", x.dim());
  const Sizes input(x.sizes().begin(), x.sizes().end());
  expect(input[1] > 0 && input[2] > 0 && input[3] > 0, "x: expected no empty dimension but the first, got ",
         text(input));
  Sizes sizes = input;
  for (size_t i = 0; i < chain.weight.size(); ++i) {
    const bool branch = i < n;
    const Conv conv = convolution(branch ? item("weight", i) : "shortcut_weight", branch ? sizes : input,
                                  chain.weight[i], chain.type, &geometry[i * kGeometry]);
    const Sizes output = {conv.N, conv.K, conv.P, conv.Q};
    expect(branch || output == sizes, "shortcut_weight: expected an output of ", text(sizes), ", got ", text(output));
    if (branch) sizes = output;
    chain.conv.push_back(conv);
  }
  expect(chain.shortcut != Shortcut::identity || input == sizes, "shortcut: identity expects an output of ",
         text(input), ", got ", text(sizes));
  return chain;
}

Sizes output_sizes(const Conv& conv) { return {conv.N, conv.K, conv.P, conv.Q}; }

std::tuple<Tensor, Tensors, Tensors> forward_cpu(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensors& weight, const Tensors& bias,
    const Tensors& bn_weight, const Tensors& bn_bias, const Tensors& running_mean, const Tensors& running_var,
    const std::optional<Tensor>& shortcut_weight, const std::vector<bool>& training, const std::vector<double>& eps,
    const Sizes& geometry, const std::string& shortcut, const std::string& backend) {
  const Chain chain = parse_chain(x, weight, shortcut_weight, training, geometry, shortcut, backend);
  const size_t n = chain.units();
  const bool batch = std::find(training.begin(), training.end(), false) == training.end();
  expect(x.size(0) > 0 || std::find(training.begin(), training.end(), true) == training.end(),
         "x: expected at least one image where a unit is training, got ", text(x.sizes()));
  expect(!residual || chain.shortcut == Shortcut::none, "residual: expected none beside the shortcut ", shortcut);
  if (residual) expect_tensor("residual", *residual, chain.type, output_sizes(chain.conv[n - 1]));
  if (!bias.empty()) expect_tensors("bias", bias, n);
  for (size_t i = 0; i < bias.size(); ++i) expect_tensor(item("bias", i), bias[i], chain.type, {chain.conv[i].K});
  expect_norm("bn_weight", bn_weight, chain);
  expect_norm("bn_bias", bn_bias, chain);
  if (!batch || !running_mean.empty()) expect_norm("running_mean", running_mean, chain);
  if (!batch || !running_var.empty()) expect_norm("running_var", running_var, chain);
  expect(eps.size() == n, "eps: expected ", n, " numbers, got ", eps.size());

  const Launch kernels(cpu::device(), chain.type);
  const Norms norms{bn_weight, bn_bias, running_mean, running_var, eps};
  Tensors dense_bias;
  for (const Tensor& b : bias) dense_bias.push_back(contiguous(b, chain.type));
  const Tensor input = dense_nhwc(x);
  auto [y, hidden, rows] =
      forward(kernels, chain, norms, input, residual ? std::optional(dense_nhwc(*residual)) : residual, dense_bias,
              norm_rows(kernels, chain, norms, 0, input));
  return {laid_out_like(x, y), hidden, rows};
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensor> backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensors& hidden, const Tensors& rows, const Tensors& weight,
    const std::optional<Tensor>& shortcut_weight, const std::vector<bool>& training, const Sizes& geometry,
    const std::string& shortcut, const std::vector<bool>& needs, const std::string& backend) {
  const Chain chain = parse_chain(x, weight, shortcut_weight, training, geometry, shortcut, backend);
  const size_t n = chain.units();
  expect_tensor("dy", dy, chain.type, output_sizes(chain.conv[n - 1]));
  expect_tensors("hidden", hidden, n - 1);
  expect_tensors("rows", rows, n);
  expect(needs.size() == 3 * n + 2, "needs: expected ", 3 * n + 2, " values, got ", needs.size());

  Tensors dense_hidden, dense_rows;
  const ScalarType row_type = accumulation_type(chain.type);
  for (size_t i = 0; i < n; ++i) {
    if (i > 0) {
      expect_tensor(item("hidden", i - 1), hidden[i - 1], chain.type, output_sizes(chain.conv[i - 1]));
      dense_hidden.push_back(dense_nhwc(hidden[i - 1]));
    }
    expect_tensor(item("rows", i), rows[i], row_type, {kNormRows, chain.conv[i].C});
    dense_rows.push_back(contiguous(rows[i], row_type));
  }
  const auto unit_needs = [&](size_t kind) {
    return std::vector<bool>(needs.begin() + 1 + kind * n, needs.begin() + 1 + (kind + 1) * n);
  };
  auto [dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight] =
      backward(Launch(cpu::device(), chain.type), chain, dense_nhwc(dy), dense_nhwc(x), dense_hidden, dense_rows,
               {needs.front(), unit_needs(0), unit_needs(1), unit_needs(2), needs.back()});
  return {needs.front() ? laid_out_like(x, dx) : dx, dweight, dbias, dbn_weight, dbn_bias, dshortcut_weight};
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

std::string set_cpu_isa(const std::string& name) {
  const std::string before = cpu::isa();
  cpu::set_isa(name);
  return before;
}

}  // namespace

}  // namespace fused_preact

STABLE_TORCH_LIBRARY(fused_preact, m) {
  m.def(
      "forward(Tensor x, Tensor? residual, Tensor[] weight, Tensor[] bias, Tensor[] bn_weight, Tensor[] bn_bias, "
      "Tensor[] running_mean, Tensor[] running_var, Tensor? shortcut_weight, bool[] training, float[] eps, "
      "int[] geometry, str shortcut, str backend) -> (Tensor y, Tensor[] hidden, Tensor[] rows)");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor[] hidden, Tensor[] rows, Tensor[] weight, Tensor? shortcut_weight, "
      "bool[] training, int[] geometry, str shortcut, bool[] needs, str backend) -> (Tensor dx, Tensor[] dweight, "
      "Tensor[] dbias, Tensor[] dbn_weight, Tensor[] dbn_bias, Tensor dshortcut_weight)");
  m.def("_cpu_isas() -> (str chosen, str[] built, str[] supported)");
  m.def("_set_cpu_isa(str isa) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("forward", TORCH_BOX(&fused_preact::forward_cpu));
  m.impl("backward", TORCH_BOX(&fused_preact::backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fused_preact, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isas", TORCH_BOX(&fused_preact::cpu_isas));
  m.impl("_set_cpu_isa", TORCH_BOX(&fused_preact::set_cpu_isa));
}
