// What the files of AVX2 share. Each fills in its part of the spelling.
#pragma once

#include "floats.h"
#include "spelling.h"
#include "target.h"

#ifdef SVDQUANT_X86
#include <immintrin.h>

namespace svdquant::cpu {
void add_avx2_quantize(Spelling& spelling);
void add_avx2_gemm(Spelling& spelling);
void add_avx2_gemm_int8(Spelling& spelling);
void add_avx2_gemv(Spelling& spelling);
}  // namespace svdquant::cpu

SVDQUANT_TARGET("avx2,fma,f16c")
namespace svdquant::cpu {

static inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline void store_bytes(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

static inline __m256i broadcast2(const void* p) {
  int16_t word;
  std::memcpy(&word, p, 2);
  return _mm256_set1_epi16(word);
}

static inline __m256i broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// Eight rows of eight 32-bit words, transposed.
SVDQUANT_INLINE static void transpose(__m256i (&v)[8]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

// Has `lines` cache lines brought; returns what lies behind them. Sixteen rows at once are too many streams for the
// hardware to foresee: it gets the next panel in a straight line.
SVDQUANT_INLINE static const uint8_t* fetch(const uint8_t* from, int lines) {
  for (int i = 0; i < lines; ++i, from += 64) _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
  return from;
}

static inline float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace svdquant::cpu
SVDQUANT_TARGET_END
#endif
