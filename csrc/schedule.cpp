#include "schedule.h"

#include <algorithm>

namespace fused_preact {

namespace {

Launch::Affine affine(const Chain& chain, const Norms& norms, size_t i) {
  const ScalarType type = accumulation_type(chain.type);
  return {contiguous(norms.weight[i], type), contiguous(norms.bias[i], type), norms.eps[i]};
}

bool any_before(const std::vector<bool>& needs, size_t end) {
  return std::any_of(needs.begin(), needs.begin() + end, [](bool need) { return need; });
}

Tensor nothing(const Tensor& like, ScalarType type) { return empty(like, type, {0}); }

std::vector<Tensor> nothing(size_t n, const Tensor& like, ScalarType type) {
  std::vector<Tensor> result;
  result.reserve(n);
  for (size_t i = 0; i < n; ++i) result.push_back(nothing(like, type));
  return result;
}

Launch::Gradient plain(const Tensor& dy) { return {dy, std::nullopt, std::nullopt, std::nullopt}; }

}  // namespace

Tensor norm_rows(const Launch& kernels, const Chain& chain, const Norms& norms, size_t i, const Tensor& x) {
  if (chain.training[i]) return kernels.statistics(x, affine(chain, norms, i));
  const ScalarType type = accumulation_type(chain.type);
  return kernels.running(contiguous(norms.running_mean[i], type), contiguous(norms.running_var[i], type),
                         affine(chain, norms, i));
}

ForwardResult forward(const Launch& kernels, const Chain& chain, const Norms& norms, const Tensor& x,
                      std::optional<Tensor> residual, const std::vector<Tensor>& bias, const Tensor& rows) {
  const size_t n = chain.units();
  ForwardResult result{x, {}, {rows}};
  Tensor& h = result.y;
  for (size_t i = 0; i < n; ++i) {
    const bool last = i == n - 1;
    const Launch::Activation a{h, result.rows[i]};
    if (i == 0 && chain.shortcut == Shortcut::identity) residual = x;
    if (i == 0 && (chain.shortcut == Shortcut::activated || chain.shortcut == Shortcut::raw)) {
      const Launch::Activation source{x, chain.shortcut == Shortcut::activated ? a.norm : std::nullopt};
      residual =
          kernels.forward(chain.conv[n], source, chain.weight[n], std::nullopt, std::nullopt, std::nullopt).first;
    }
    std::optional<Launch::Affine> next;
    if (!last && chain.training[i + 1]) next = affine(chain, norms, i + 1);
    auto [y, next_rows] =
        kernels.forward(chain.conv[i], a, chain.weight[i], bias.empty() ? std::nullopt : std::optional(bias[i]),
                        last ? residual : std::nullopt, next);
    h = y;
    if (!last) {
      result.hidden.push_back(h);
      result.rows.push_back(next ? *next_rows : norm_rows(kernels, chain, norms, i + 1, h));
    }
  }
  return result;
}

BackwardResult backward(const Launch& kernels, const Chain& chain, const Tensor& dy, const Tensor& x,
                        const std::vector<Tensor>& hidden, const std::vector<Tensor>& rows, const Needs& needs) {
  const size_t n = chain.units();
  const ScalarType type = chain.type, row_type = accumulation_type(type);
  BackwardResult result{nothing(x, type),        nothing(n, x, type),     nothing(n, x, type),
                        nothing(n, x, row_type), nothing(n, x, row_type), nothing(x, type)};

  const auto shortcut_dgrad = [&] {
    const Launch::Activation input{x, std::nullopt};
    return kernels.dgrad(chain.conv[n], plain(dy), chain.weight[n], input, std::nullopt, false).g;
  };
  const auto shortcut_wgrad = [&](const Launch::Activation& a) {
    if (needs.shortcut_weight)
      result.dshortcut_weight = kernels.wgrad(chain.conv[n], plain(dy), a, chain.weight[n], false).first;
  };

  Launch::Gradient g = plain(dy);
  std::optional<Tensor> add;
  for (size_t i = n; i-- > 0;) {
    const Launch::Activation a{i == 0 ? x : hidden[i - 1], rows[i]};
    // Whether anything at or before batch norm i wants a gradient.
    const bool wanted =
        needs.x || any_before(needs.norm, i + 1) || any_before(needs.weight, i) || any_before(needs.bias, i);
    if (i == 0 && chain.shortcut == Shortcut::activated) {
      shortcut_wgrad(a);
      if (wanted) add = shortcut_dgrad();
    }
    if (needs.weight[i] || needs.bias[i]) {
      auto [dweight, dbias] = kernels.wgrad(chain.conv[i], g, a, chain.weight[i], needs.bias[i]);
      if (needs.weight[i]) result.dweight[i] = dweight;
      if (needs.bias[i]) result.dbias[i] = *dbias;
    }
    if (!wanted) continue;
    g = kernels.dgrad(chain.conv[i], g, chain.weight[i], a, add, chain.training[i]);
    if (needs.norm[i]) {
      result.dbn_weight[i] = kernels.row(*g.grad, kDgamma);
      result.dbn_bias[i] = kernels.row(*g.grad, kDbeta);
    }
  }
  if (chain.shortcut == Shortcut::raw) shortcut_wgrad({x, std::nullopt});
  if (needs.x) {
    if (chain.shortcut == Shortcut::identity)
      add = dy;
    else if (chain.shortcut == Shortcut::raw)
      add = shortcut_dgrad();
    else
      add = std::nullopt;
    result.dx = kernels.dx(g, add);
  }
  return result;
}

}  // namespace fused_preact
