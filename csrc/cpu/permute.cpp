// permute: to[n][j][i] = from[n][i][j], which is what makes NHWC of NCHW and back.
//
// Layout: from [N][rows][columns], to [N][columns][rows], dense. Squares of as many rows and columns as a vector has
// lanes are turned in registers. One job is a run of the longer dimension, a square wide for each step, over all of the
// shorter: so reads or writes are whole rows, and the others as many streams as the shorter dimension has lines.
// Values are moved, not computed with: no bit changes, whatever type they are of.
// Bytes: each value read once and written once.
#include "jobs.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kRun = 64;

// A loaded vector holds values of two bytes in the upper halves of its lanes.
template <class S>
FUSED_PREACT_INLINE void put(S* to, Vec<Accumulate<S>> v, int64_t n) {
  if constexpr (std::is_same_v<S, Accumulate<S>>) {
    store_lanes(to, v, n);
  } else {
    const HalfBits bits = low_halves((Vec<uint32_t>)v >> 16);
    if (n == kLanes<Accumulate<S>>)
      store_as(&to->bits, bits);
    else
      store_first_bits(to, bits, n);
  }
}

// Turns a square, or at the ends of the dimensions what there is of one.
template <class S>
struct Square {
  static constexpr int64_t kSize = kLanes<Accumulate<S>>;
  int64_t rows, columns;  // of the whole

  FUSED_PREACT_INLINE void turn(const S* from, S* to, int64_t i, int64_t j) const {
    from += i * columns + j, to += j * rows + i;
    if (i + kSize <= rows && j + kSize <= columns)
      move(from, to, std::integral_constant<int64_t, kSize>{}, std::integral_constant<int64_t, kSize>{});
    else
      move(from, to, minimum(rows - i, kSize), minimum(columns - j, kSize));
  }

 private:
  template <class Rows, class Columns>
  FUSED_PREACT_INLINE void move(const S* from, S* to, Rows of_rows, Columns of_columns) const {
    Vec<Accumulate<S>> v[kSize] = {};
    for (int64_t i = 0; i < of_rows; ++i) {
      v[i] = load_lanes(from + i * columns, of_columns);
      prefetch_next(from + i * columns);
    }
    transpose<Accumulate<S>>(v);
    for (int64_t j = 0; j < of_columns; ++j) put(to + j * rows, v[j], of_rows);
  }

  // Of as many streams no hardware foresees the next lines.
  FUSED_PREACT_INLINE static void prefetch_next(const S* from) { __builtin_prefetch(from + 4 * kSize); }
};

template <class S>
void permute_of(int64_t N, int64_t rows, int64_t columns, const S* from, S* to) {
  const Square<S> square{rows, columns};
  constexpr int64_t kSize = Square<S>::kSize;
  const bool by_rows = rows >= columns;
  const int64_t longer = by_rows ? rows : columns, shorter = by_rows ? columns : rows, runs = ceil_div(longer, kRun);
  parallel(N * runs, [&](int64_t job) {
    const int64_t n = job / runs, first = job % runs * kRun, end = minimum(first + kRun, longer);
    const S* const image = from + n * rows * columns;
    S* const turned = to + n * rows * columns;
    for (int64_t l = first; l < end; l += kSize)
      for (int64_t s = 0; s < shorter; s += kSize) square.turn(image, turned, by_rows ? l : s, by_rows ? s : l);
  });
}

}  // namespace

void permute(int64_t value_bytes, int64_t N, int64_t rows, int64_t columns, const void* from, void* to, Workspace&) {
  const auto run = [&](auto s) {
    using S = decltype(s);
    permute_of(N, rows, columns, static_cast<const S*>(from), static_cast<S*>(to));
  };
  if (value_bytes == 2) run(BFloat16{});
  if (value_bytes == 4) run(float{});
  if (value_bytes == 8) run(double{});
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
