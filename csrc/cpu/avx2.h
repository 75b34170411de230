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

static inline __m256i broadcast4(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

static inline float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace svdquant::cpu
SVDQUANT_TARGET_END
#endif
