// NEON with the dot product (ARMv8.2): the integer product; the rest is portable.cpp's, which compilers vectorise.
//
// The panel's bytes, at most 24, are non-negative as signed bytes too, so one signed dot product serves both kinds.
#include "floats.h"
#include "spelling.h"
#include "target.h"

#ifdef SVDQUANT_ARM64
#include <arm_neon.h>
#if defined(__clang__)
SVDQUANT_TARGET("dotprod")
#else
SVDQUANT_TARGET("arch=armv8.2-a+dotprod")
#endif

namespace svdquant::cpu {
namespace {

// Four rows of four 32-bit words, transposed.
SVDQUANT_INLINE void transpose(uint32x4_t (&v)[4]) {
  const uint32x4_t a0 = vtrn1q_u32(v[0], v[1]), a1 = vtrn2q_u32(v[0], v[1]);
  const uint32x4_t b0 = vtrn1q_u32(v[2], v[3]), b1 = vtrn2q_u32(v[2], v[3]);
  const auto low = [](uint32x4_t a, uint32x4_t b) { return vcombine_u32(vget_low_u32(a), vget_low_u32(b)); };
  const auto high = [](uint32x4_t a, uint32x4_t b) { return vcombine_u32(vget_high_u32(a), vget_high_u32(b)); };
  v[0] = low(a0, b0);
  v[1] = low(a1, b1);
  v[2] = high(a0, b0);
  v[3] = high(a1, b1);
}

void unpack(const uint8_t* rows, int64_t stride, int64_t blocks, const CodeTable& table, uint8_t* panel,
            const uint8_t*) {
  const uint8x16_t values = vld1q_u8(table.weight), low = vdupq_n_u8(15);
  for (int64_t half = 0; half < blocks * 2; ++half) {  // 32 columns, 16 bytes
    for (int64_t quarter = 0; quarter < 4; ++quarter) {
      uint32x4_t v[4];
      for (int i = 0; i < 4; ++i) v[i] = vreinterpretq_u32_u8(vld1q_u8(rows + (quarter * 4 + i) * stride + half * 16));
      transpose(v);
      uint8_t* to = panel + half * 32 * kPanel + quarter * 16;
      for (int i = 0; i < 4; ++i, to += 128) {
        const uint8x16_t bytes = vreinterpretq_u8_u32(v[i]);
        vst1q_u8(to, vqtbl1q_u8(values, vandq_u8(bytes, low)));
        vst1q_u8(to + 64, vqtbl1q_u8(values, vshrq_n_u8(bytes, 4)));
      }
    }
  }
}

template <int kRows>
void multiply_rows(const Tile& t, int64_t row, int64_t steps) {
  const int64_t k = t.groups * steps * 4;
  for (int64_t g = 0; g < t.groups; ++g) {
    const uint8_t* panel = t.panel + g * steps * 64;
    const int8_t* acts = t.acts + row * k + g * steps * 4;
    int32x4_t sums[kRows][4];
    for (int m = 0; m < kRows; ++m)
      for (int j = 0; j < 4; ++j) sums[m][j] = vdupq_n_s32(t.starts[(row + m) * t.groups + g]);
    for (int64_t s = 0; s < steps; ++s) {
      int8x16_t w[4];
      for (int j = 0; j < 4; ++j) w[j] = vreinterpretq_s8_u8(vld1q_u8(panel + s * 64 + 16 * j));
      for (int m = 0; m < kRows; ++m) {
        int32_t word;
        std::memcpy(&word, acts + m * k + s * 4, 4);
        const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(word));
        for (int j = 0; j < 4; ++j) sums[m][j] = vdotq_s32(sums[m][j], w[j], a);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      const float scale = t.scales[(row + m) * t.groups + g];
      for (int j = 0; j < 4; ++j) {
        float* out = t.out + (row + m) * t.out_stride + 4 * j;
        const float32x4_t weight_scales = vld1q_f32(t.weight_scales + g * kPanel + 4 * j);
        const float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(sums[m][j]), weight_scales);
        vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), scaled, scale));
      }
    }
  }
}

void multiply(const Tile& t, int64_t group) {
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) multiply_rows<4>(t, row, group / 4);
  for (; row < t.rows; ++row) multiply_rows<1>(t, row, group / 4);
}

bool supported() { return has_dotprod(); }

}  // namespace

const Spelling* neon() {
  static const Spelling spelling = [] {
    Spelling s = *portable();
    s.name = "neon";
    s.supported = supported;
    s.unpack = unpack;
    s.multiply = multiply;
    return s;
  }();
  return &spelling;
}

}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

#else
const svdquant::cpu::Spelling* svdquant::cpu::neon() { return nullptr; }
#endif
