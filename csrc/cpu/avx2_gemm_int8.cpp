// AVX2: the 8-bit product. Products of 8-bit codes need 16 bits, and a sum 32: bytes are widened, and madd adds pairs.
#include "avx2.h"

#ifdef SVDQUANT_X86
SVDQUANT_TARGET("avx2,fma,f16c")

namespace svdquant::cpu {
namespace {

constexpr int64_t kColumns = 512;  // a chunk, of which some tokens in 16 bits fit the first-level cache

// Words of four bytes b0 b1 b2 b3 to words b0 b2 and b1 b3 of two times 16 bits. Fewer than eight are not met: K is
// filled up to that.
void widen_codes(const int8_t* from, int64_t count, int8_t* even, int8_t* odd) {
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i v = load_bytes(from + i);
    store_bytes(even + i, _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
    store_bytes(odd + i, _mm256_srai_epi16(v, 8));
  }
}

// Two columns of sixteen rows.
template <int kRows>
SVDQUANT_INLINE void half_step(__m256i w0, __m256i w1, const int8_t* acts, __m256i (&sums)[kRows][2]) {
  for (int m = 0; m < kRows; ++m) {
    const __m256i a = broadcast4(acts + m * kColumns);
    sums[m][0] = _mm256_add_epi32(sums[m][0], _mm256_madd_epi16(w0, a));
    sums[m][1] = _mm256_add_epi32(sums[m][1], _mm256_madd_epi16(w1, a));
    SVDQUANT_SETTLE(sums[m][0]);
    SVDQUANT_SETTLE(sums[m][1]);
  }
}

// A chunk: sums leave memory for its length.
template <int kRows>
void add_chunk(const uint8_t* panel, const int8_t* even, const int8_t* odd, int64_t count,
               __m256i (&totals)[kRows][2]) {
  const __m256i low = _mm256_set1_epi16(0xff);
  __m256i sums[kRows][2];
  for (int m = 0; m < kRows; ++m) sums[m][0] = totals[m][0], sums[m][1] = totals[m][1];
  for (int64_t i = 0; i < count; i += 4, panel += 64) {
    const __m256i w0 = load_bytes(panel), w1 = load_bytes(panel + 32);
    half_step(_mm256_and_si256(w0, low), _mm256_and_si256(w1, low), even + i, sums);
    half_step(_mm256_srli_epi16(w0, 8), _mm256_srli_epi16(w1, 8), odd + i, sums);
  }
  for (int m = 0; m < kRows; ++m) totals[m][0] = sums[m][0], totals[m][1] = sums[m][1];
}

template <int kRows>
void multiply_rows(const Tile& t, int64_t row, int64_t k) {
  alignas(32) int8_t even[kRows * kColumns], odd[kRows * kColumns];
  __m256i sums[kRows][2];
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm256_set1_epi32(t.starts[row + m]);
  for (int64_t first = 0; first < k; first += kColumns) {
    const int64_t count = k - first < kColumns ? k - first : kColumns;
    for (int m = 0; m < kRows; ++m) {
      widen_codes(t.acts + (row + m) * k + first, count, even + m * kColumns, odd + m * kColumns);
    }
    add_chunk(t.panel + first * kPanel, even, odd, count, sums);
  }
  for (int m = 0; m < kRows; ++m) {
    const __m256 scale = _mm256_broadcast_ss(t.scales + row + m);
    for (int j = 0; j < 2; ++j) {
      const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[m][j]), _mm256_loadu_ps(t.weight_scales + 8 * j));
      float* out = t.out + (row + m) * t.out_stride + 8 * j;
      _mm256_storeu_ps(out, _mm256_fmadd_ps(scaled, scale, _mm256_loadu_ps(out)));
    }
  }
}

void multiply_int8(const Tile& t, int64_t k) {
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) multiply_rows<4>(t, row, k);
  for (; row < t.rows; ++row) multiply_rows<1>(t, row, k);
}

}  // namespace
}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

void svdquant::cpu::add_avx2_gemm_int8(Spelling& s) { s.multiply_int8 = multiply_int8; }
#endif
