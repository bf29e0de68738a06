// What the lanes of a warp do together.
#include <bit>

#include "emulation.h"

namespace fused_preact::emulation {

void ldmatrix_x4(uint32_t* d, const void* shared, bool transposed, const Where& where) {
  constexpr size_t kRow = 16;
  struct Slot {
    uint16_t row[kRow / 2];
    uint32_t* d;
    bool transposed;
  } slot{{}, d, transposed};
  read_shared(slot.row, shared, kRow, where);
  collective(
      &slot,
      [](void* const* posted) {
        const auto slot = [&](int i) { return static_cast<Slot*>(posted[i]); };
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane / 4, pair = 2 * (lane % 4);
          for (int i = 0; i < 4; ++i) {
            const bool transposed = slot(lane)->transposed;
            const auto element = [&](int row, int column) -> uint32_t { return slot(8 * i + row)->row[column]; };
            slot(lane)->d[i] = transposed ? element(pair, group) | element(pair + 1, group) << 16
                                          : element(group, pair) | element(group, pair + 1) << 16;
          }
        }
      },
      where);
}

// The values of a register: two of 16 bits, or one.
template <Operand operand>
struct Register;

template <>
struct Register<Operand::half> {
  static constexpr int kValues = 2;
  static float value(uint32_t bits, int i) { return __half(__half_raw{static_cast<uint16_t>(bits >> 16 * i)}); }
};

template <>
struct Register<Operand::bfloat16> {
  static constexpr int kValues = 2;
  static float value(uint32_t bits, int i) { return std::bit_cast<float>(bits >> 16 * i << 16); }
};

template <>
struct Register<Operand::tf32> {
  static constexpr int kValues = 1;
  static float value(uint32_t bits, int) { return std::bit_cast<float>(bits & ~0x1fffu); }
};

template <Operand operand>
void multiply(const Product& product, const Where& where) {
  Product mine = product;
  collective(
      &mine,
      [](void* const* posted) {
        constexpr int kValues = Register<operand>::kValues, kDepth = 8 * kValues;
        float a[16][kDepth], b[kDepth][8], d[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Product& p = *static_cast<Product*>(posted[lane]);
          const int g = lane / 4, t = kValues * (lane % 4);
          for (int i = 0; i < kValues; ++i) {
            for (int j = 0; j < 4; ++j)
              a[g + 8 * (j % 2)][t + kDepth / 2 * (j / 2) + i] = Register<operand>::value(p.a[j], i);
            for (int j = 0; j < 2; ++j) b[t + kDepth / 2 * j + i][g] = Register<operand>::value(p.b[j], i);
          }
          for (int j = 0; j < 4; ++j) d[g + 8 * (j / 2)][2 * (lane % 4) + j % 2] = p.d[j];
        }
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
        for (int lane = 0; lane < 32; ++lane)
          for (int j = 0; j < 4; ++j)
            static_cast<Product*>(posted[lane])->d[j] = d[lane / 4 + 8 * (j / 2)][2 * (lane % 4) + j % 2];
      },
      where);
}

template void multiply<Operand::half>(const Product&, const Where&);
template void multiply<Operand::bfloat16>(const Product&, const Where&);
template void multiply<Operand::tf32>(const Product&, const Where&);

}  // namespace fused_preact::emulation
