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
  ProductCut(const Window& w, int64_t outer) : Cut<E>(w, outer, pixels(w, outer)) {}

  int64_t groups() const { return minimum(this->tiles(), kMostGroups); }

 private:
  static int64_t pixels(const Window& w, int64_t outer) {
    if (filter_leaves_cache<E>(w, outer)) return kMostPixels;
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
        panels_at_once_(filter_leaves_cache<E>(cut.w, filter.outer) ? ceil_div(panels.count(), splits) : 1),
        matrix_depth_(matrix_depth<E>(cut.w, images_by_position<E>(cut.w) > 0)),
        packed_(packed(filter, workspace)) {}

  // The first panel of a part, and of the one behind the last the end.
  int64_t first_panel(int64_t part) const { return part_begin(panels.count(), splits, part); }

  // The operand of one tile, in the scratch memory of the thread, for the panels of a part.
  class Strip {
   public:
    template <class Source>
    Strip(const Product& product, const Tile& tile, const Source& source, int64_t part)
        : product_(product),
          tile_(tile),
          first_panel_(product.first_panel(part)),
          last_panel_(product.first_panel(part + 1)),
          scratch_(product.tiling, product.block_size() + product.quads_size()),
          shape_(product.is(Method::kMatrices) ? minimum(kMatrixRows, line_of(tile)) : 0, product.matrix_depth_) {
      read(source);
    }

    int64_t* outputs() const { return scratch_.outputs; }

    // The product with one panel, each in its turn: sink as for correlate.
    template <class Sink>
    FUSED_PREACT_INLINE void times(int64_t panel, Sink& sink) const {
      const E* const weights = product_.packed_ + product_.panels.offset(panel);
      const int64_t columns = product_.panels.columns(panel);
      if constexpr (std::is_same_v<E, T>)
        if (product_.is(Method::kQuads)) {
          const int64_t i = (panel - first_panel_) % product_.panels_at_once_;
          if (i == 0) multiply_panels(panel, minimum(panel + product_.panels_at_once_, last_panel_));
          return finish_quads(tile_, columns, products(i), scratch_.block, sink);
        }
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

    // Those of quads with panels [first, last): of several, one position of all before the next.
    void multiply_panels(int64_t first, int64_t last) const {
      const auto multiply = [&](int64_t panel, int64_t s, int64_t end, const T* next) {
        multiply_positions(scratch_.operand, whole_quads(tile_).pixels() / 4, product_.w.C, s, end, position(panel, 0),
                           product_.panels.columns(panel), products(panel - first), next);
      };
      if (last - first == 1) return multiply(first, 0, kPositions, nullptr);
      for (int64_t s = 0; s < kPositions; ++s)
        for (int64_t panel = first; panel < last; ++panel)
          multiply(panel, s, s + 1, panel + 1 < last ? position(panel + 1, s) : position(first, s + 1));
    }

    const T* position(int64_t panel, int64_t s) const {
      const Panels<T>& panels = product_.panels;
      return product_.packed_ + panels.offset(panel) + s * position_rows(product_.w.C) * panels.width(panel);
    }

    T* products(int64_t i) const { return scratch_.block + product_.block_size() + i * product_.products_size(); }
    T* quads() const { return products(product_.panels_at_once_); }

    const Product& product_;
    const Tile& tile_;
    const int64_t first_panel_, last_panel_;
    TileScratch<E> scratch_;
    const MatrixShape shape_;
  };

 private:
  int64_t block_size() const { return this->tiling.most_pixels() * kColumns * kLanes<T>; }
  int64_t products_size() const { return this->tiling.most_pixels() / 4 * quad_stride<T>(kColumns * kLanes<T>); }
  int64_t quads_size() const {
    if (!this->is(Method::kQuads)) return 0;
    return panels_at_once_ * products_size() + this->tiling.most_pixels() / 4 * quad_stride<T>(this->w.C);
  }

  template <class S>
  const E* packed(const FilterView<const S*>& filter, Workspace& workspace) const {
    if constexpr (std::is_same_v<E, T>)
      if (this->is(Method::kQuads)) return pack_positions(filter, workspace);
    return pack<E>(filter, workspace);
  }

  const int64_t panels_at_once_;  // that the quads of a tile are multiplied by
  const int64_t matrix_depth_;
  const E* const packed_;
};

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
