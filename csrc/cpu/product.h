// The product that forward and each class of dgrad are: a window's strips times a packed filter, panel by panel; of
// taps (correlate.h), of quads (winograd.h) or of matrices (matrices.h).
#pragma once
#include "cut.h"
#include "pack.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// A product's tile: as many pixels as make a strip of kTileBytes, within limits. Tiles are worked on in at most
// kMostGroups groups, each with sums of its own.
constexpr int64_t kTileBytes = 1 << 15, kLeastPixels = 64, kMostPixels = 256, kMostGroups = 64;

template <class E>
struct ProductCut : Cut<E> {
  ProductCut(const Window& w, int64_t outer) : Cut<E>(w, outer, pixels(w)) {}

  int64_t groups() const { return minimum(this->tiles(), kMostGroups); }

 private:
  static int64_t pixels(const Window& w) {
    const int64_t of_strip = kTileBytes / maximum<int64_t>(w.C * int64_t{sizeof(E)}, 1);
    return minimum(maximum(of_strip, kLeastPixels), kMostPixels);
  }
};

// A packed filter, and how the window that it meets is cut. A job makes the Strip of a tile, and multiplies it by
// one panel after the other.
template <class E>
class Product : public ProductCut<E> {
  using T = Accumulate<E>;

 public:
  const Panels<T> panels;
  const int64_t splits;  // of each group's panels, so that every thread has work

  template <class S>
  Product(const ProductCut<E>& cut, const FilterView<const S*>& filter, Workspace& workspace)
      : ProductCut<E>(cut),
        panels{filter.outer, cut.depth()},
        splits(splits_for(cut.groups(), panels.count(), cut.tiling.most_pixels() * panels.size())),
        matrix_depth_(matrix_depth<E>(cut.w, images_by_position<E>(cut.w) > 0)),
        packed_(packed(filter, workspace)) {}

  // The operand of one tile, in the scratch memory of the thread.
  class Strip {
   public:
    template <class Source>
    Strip(const Product& product, const Tile& tile, const Source& source)
        : product_(product),
          tile_(tile),
          scratch_(product.tiling, product.block_size() + product.quads_size()),
          shape_(product.is(Method::kMatrices) ? minimum(kMatrixRows, line_of(tile)) : 0, product.matrix_depth_) {
      read(source);
    }

    int64_t* outputs() const { return scratch_.outputs; }

    // The product with one panel: sink as for correlate.
    template <class Sink>
    FUSED_PREACT_INLINE void times(int64_t panel, Sink& sink) const {
      const E* const weights = product_.packed_ + product_.panels.offset(panel);
      const int64_t columns = product_.panels.columns(panel);
      if constexpr (std::is_same_v<E, T>)
        if (product_.is(Method::kQuads))
          return correlate_quads(scratch_.operand, tile_, product_.w.C, weights, columns,
                                 scratch_.block + product_.block_size(), scratch_.block, sink);
      if constexpr (kHasMatrices && std::is_same_v<E, BFloat16>)
        if (product_.is(Method::kMatrices))
          return correlate_matrices(scratch_.operand, product_.w, tile_, product_.matrix_depth_, weights, columns,
                                    scratch_.block, sink);
      correlate(scratch_.operand, product_.w, tile_, weights, columns, scratch_.block, sink);
    }

   private:
    template <class Source>
    void read(const Source& source) {
      if constexpr (std::is_same_v<E, T>)
        if (product_.is(Method::kQuads))
          return gather_quads(quads(), scratch_.operand, scratch_.strip, product_.w, tile_, source);
      gather(scratch_.operand, scratch_.strip, product_.w, tile_, source);
    }

    T* quads() const { return scratch_.block + product_.block_size() + product_.products_size(); }

    const Product& product_;
    const Tile& tile_;
    TileScratch<E> scratch_;
    const MatrixShape shape_;
  };

 private:
  int64_t block_size() const { return this->tiling.most_pixels() * kColumns * kLanes<T>; }
  int64_t products_size() const { return this->tiling.most_pixels() / 4 * quad_stride<T>(kColumns * kLanes<T>); }
  int64_t quads_size() const {
    return this->is(Method::kQuads) ? products_size() + this->tiling.most_pixels() / 4 * quad_stride<T>(this->w.C) : 0;
  }

  template <class S>
  const E* packed(const FilterView<const S*>& filter, Workspace& workspace) const {
    if constexpr (std::is_same_v<E, T>)
      if (this->is(Method::kQuads)) return pack_positions(filter, workspace);
    return pack<E>(filter, workspace);
  }

  const int64_t matrix_depth_;
  const E* const packed_;
};

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
