// AVX-512 with VNNI: the integer product of 16 weight rows in one instruction a step; the rest is AVX2's.
//
// dpbusd multiplies unsigned by signed bytes and adds four products into 32 bits, so a group needs no care for
// overflow, and sums of floats stay in registers for a whole chunk of K.
#include "avx2.h"

#ifdef SVDQUANT_X86
SVDQUANT_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vnni")

namespace svdquant::cpu {
namespace {

__m512i broadcast4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

// As in portable.cpp. Sums of 64 columns come in sixteens of four.
void arrange(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to, int32_t* starts) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m512i zero = _mm512_set1_epi8(static_cast<int8_t>(table.zero));
  for (int64_t b = 0; b < blocks; ++b, codes += kBlock, to += kBlock) {
    __m512i v = _mm512_loadu_si512(codes);
    if (table.activation) {
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.activation));
      v = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), v);
    }
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(v, order));
    const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), zero, v);
    if (table.group == kBlock) {
      starts[b] = -_mm512_reduce_add_epi32(fours);
      continue;
    }
    for (int i = 0; i < 4; ++i) {
      starts[4 * b + i] = -_mm512_mask_reduce_add_epi32(static_cast<__mmask16>(15 << 4 * i), fours);
    }
  }
}

void unpack(const uint8_t* rows, int64_t stride, int64_t blocks, const CodeTable& table, uint8_t* panel,
            const uint8_t* next) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.weight));
  const __m256i bytes = _mm256_broadcastsi128_si256(values), low = _mm256_set1_epi8(15);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t half = 0; half < 2; ++half) {
      if (next) next = fetch(next, 4);
      __m256i v[8];
      for (int i = 0; i < 8; ++i) v[i] = load_bytes(rows + (half * 8 + i) * stride + block * 32);
      transpose(v);
      uint8_t* to = panel + block * kBlock * kPanel + half * 32;
      for (int i = 0; i < 8; ++i, to += 128) {
        store_bytes(to, _mm256_shuffle_epi8(bytes, _mm256_and_si256(v[i], low)));
        store_bytes(to + 64, _mm256_shuffle_epi8(bytes, _mm256_and_si256(_mm256_srli_epi16(v[i], 4), low)));
      }
    }
  }
}

// A group is `steps` steps: kSteps of them where that is not zero, and then the compiler knows it.
template <int kRows, int kSteps>
void multiply_rows(const Tile& t, int64_t row, int64_t any_steps) {
  const int64_t steps = kSteps ? kSteps : any_steps, k = t.groups * steps * 4;
  __m512 out[kRows];
  for (int m = 0; m < kRows; ++m) out[m] = _mm512_loadu_ps(t.out + (row + m) * t.out_stride);
  const bool fetching = t.next && row < 2 * kSteps;
  for (int64_t g = 0; g < t.groups; ++g) {
    if (fetching) fetch(t.next + (row / 4 * t.groups + kRows / 4 * g) * 64, kRows / 4);
    const uint8_t* panel = t.panel + g * steps * 64;
    const int8_t* acts = t.acts + row * k + g * steps * 4;
    __m512i sums[kRows];
    for (int m = 0; m < kRows; ++m) sums[m] = _mm512_set1_epi32(t.starts[(row + m) * t.groups + g]);
    for (int64_t s = 0; s < steps; ++s) {
      const __m512i w = _mm512_loadu_si512(panel + s * 64);
      for (int m = 0; m < kRows; ++m) {
        sums[m] = _mm512_dpbusd_epi32(sums[m], w, broadcast4(acts + m * k + s * 4));
      }
    }
    const __m512 weight_scales = _mm512_loadu_ps(t.weight_scales + g * kPanel);
    for (int m = 0; m < kRows; ++m) {
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[m]), weight_scales);
      out[m] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(t.scales[(row + m) * t.groups + g]), out[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) _mm512_storeu_ps(t.out + (row + m) * t.out_stride, out[m]);
}

template <int kSteps>
void multiply_steps(const Tile& t, int64_t steps) {
  int64_t row = 0;
  for (; row + 8 <= t.rows; row += 8) multiply_rows<8, kSteps>(t, row, steps);
  for (; row + 4 <= t.rows; row += 4) multiply_rows<4, kSteps>(t, row, steps);
  switch (t.rows - row) {
    case 3: return multiply_rows<3, kSteps>(t, row, steps);
    case 2: return multiply_rows<2, kSteps>(t, row, steps);
    case 1: return multiply_rows<1, kSteps>(t, row, steps);
  }
}

void multiply(const Tile& t, int64_t group) { group == 16 ? multiply_steps<4>(t, 4) : multiply_steps<16>(t, 16); }
void multiply_int8(const Tile& t, int64_t k) { multiply_steps<0>(t, k / 4); }

}  // namespace
}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

const svdquant::cpu::Spelling* svdquant::cpu::avx512() {
  static const Spelling spelling = [] {
    Spelling s = *avx2();
    s.name = "avx512";
    s.supported = has_avx512;
    s.panels = 1;
    s.chunk = 0;
    s.arrange = arrange;
    s.unpack = unpack;
    s.multiply = multiply;
    s.multiply_int8 = multiply_int8;
    return s;
  }();
  return &spelling;
}

#else
const svdquant::cpu::Spelling* svdquant::cpu::avx512() { return nullptr; }
#endif
