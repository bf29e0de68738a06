// float32 for products of bf16: a value is the sum of three of bf16, each the rounded rest of those before it, which keeps
// all of its 24 bits. Of the nine products of two such values six are made,
//
//   a*b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1)
//
// which leaves out less than 2^-25 of it. The products are exact, and thirty-two are summed up before they are rounded to
// the sum of a pixel: the errors are those of float32, or smaller. A part below 2^-126 is zero, an infinity gives NaN.
#pragma once
#include "vec.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

constexpr int kSplitParts = 3;

// The parts of as many values as a vector has lanes: all third ones, then first and second ones, so that first lie beside
// second, and third beside first. Channels come in whole groups.
struct SplitFloat {
  uint16_t parts[3];
};

// As many rows of a packed filter, what these are multiplied by: pairs of second, second, first, first and third parts.
// First and third beside each other meet third and first of a SplitFloat, twice the first or second its first and second.
struct SplitWeight {
  uint16_t parts[5];
};

constexpr int64_t kSplitGroup = kLanes<float>;

template <>
struct VecOf<SplitFloat> {};
template <>
struct AccumulateOf<SplitFloat> {
  using type = float;
};

struct SplitVector {
  HalfBits parts[kSplitParts];
};

FUSED_PREACT_INLINE SplitVector split(Vec<float> v) {
  SplitVector result;
  for (int i = 0; i < kSplitParts; ++i) {
    result.parts[i] = rounded(v);
    v -= widened(result.parts[i]);
  }
  return result;
}

FUSED_PREACT_INLINE void store(SplitFloat* to, Vec<float> v) {
  const SplitVector s = split(v);
  uint16_t* const group = to->parts;
  store_as(group, s.parts[2]);
  store_as(group + kSplitGroup, s.parts[0]);
  store_as(group + 2 * kSplitGroup, s.parts[1]);
}

// Each lane a pair of one part, the first value of it in the low half.
FUSED_PREACT_INLINE Vec<uint32_t> paired(HalfBits first, HalfBits second) {
  return extend(first) | extend(second) << 16;
}

// Groups of SplitWeight from a packed panel of `depth` rows of `width` float.
inline void split_panel(SplitWeight* to, const float* from, int64_t depth, int64_t width) {
  uint16_t* group = to->parts;
  const int64_t half = kSplitGroup / 2 * width * 2;
  for (int64_t row = 0; row < depth; row += kSplitGroup, from += kSplitGroup * width, group += 5 * half)
    for (int64_t pair = 0; pair < kSplitGroup / 2; ++pair)
      for (int64_t k = 0; k < width; k += kLanes<float>) {
        const float* const weights = from + 2 * pair * width + k;
        const SplitVector a = split(load(weights)), b = split(load(weights + width));
        uint16_t* const at = group + (pair * width + k) * 2;
        const auto put = [&](int i, int part) __attribute__((always_inline)) {
          store_as(at + i * half, paired(a.parts[part], b.parts[part]));
        };
        put(0, 1), put(1, 1), put(2, 0), put(3, 0), put(4, 2);
      }
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
