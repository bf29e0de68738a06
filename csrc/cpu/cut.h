// How the products of a window are made, and how it is cut into tiles.
#pragma once
#include "matrices.h"
#include "winograd.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// Of taps (gemm.h), of quads (winograd.h) or of matrices (amx.h).
enum class Method { kTaps, kQuads, kMatrices };

// For tiles of about `pixels` pixels and operands of type E. Depends on the shape alone.
template <class E>
struct Cut {
  Window w;
  Method method;
  Tiling tiling;

  Cut(const Window& window, int64_t outer, int64_t pixels)
      : w(window), method(method_for(w, outer)), tiling(w, pixels, images(w, method), is(Method::kQuads) ? 2 : 1) {}

  bool is(Method m) const { return method == m; }
  int64_t tiles() const { return tiling.count(); }
  // Rows of the packed filter.
  int64_t depth() const { return is(Method::kQuads) ? kPositions * position_rows(w.C) : w.depth(); }

 private:
  static Method method_for(const Window& w, int64_t outer) {
    if (takes_winograd<E>(w, outer)) return Method::kQuads;
    const bool of_matrices = matrix_depth<E>(w, images_by_position<E>(w) > 0) > 0 || matrix_rows<E>(w) > 0;
    return of_matrices ? Method::kMatrices : Method::kTaps;
  }

  // Quads and the grid of wgrad go image by image.
  static int64_t images(const Window& w, Method method) {
    if (method == Method::kQuads || (method == Method::kMatrices && matrix_rows<E>(w) > 0)) return 0;
    return images_by_position<E>(w);
  }
};

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
