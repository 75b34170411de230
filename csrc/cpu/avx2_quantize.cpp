// AVX2: floats of any size, activations to codes, the first half of the low-rank branch.
#include "avx2.h"

#ifdef SVDQUANT_X86
SVDQUANT_TARGET("avx2,fma,f16c")

namespace svdquant::cpu {
namespace {

// ---- floats ----

__m256 from_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }

// The three magnitude bits below the exponent move into place and the exponent is raised; a subnormal is an integer
// count of 2^-9, and the largest code is NaN.
__m256 from_e4m3(__m128i codes) {
  const __m256i code = _mm256_cvtepu8_epi32(codes), magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  const __m256 tiny = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  const __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  const __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  const __m256 value = _mm256_blendv_ps(_mm256_castsi256_ps(normal), tiny, _mm256_castsi256_ps(is_tiny));
  const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(code, magnitude), 24);
  return _mm256_or_ps(_mm256_or_ps(value, _mm256_castsi256_ps(is_nan)), _mm256_castsi256_ps(sign));
}

template <DType kDType>
__m256 widen8(const char* p) {
  if (kDType == DType::kF32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  if (kDType == DType::kE4M3) return from_e4m3(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return kDType == DType::kBF16 ? from_bf16(h) : _mm256_cvtph_ps(h);
}

template <DType kDType>
void widen_as(const void* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, widen8<kDType>(static_cast<const char*>(from) + i * size_of(kDType)));
  }
  for (; i < count; ++i) to[i] = load(from, kDType, i);
}

void widen(const void* from, DType dtype, float* to, int64_t count) {
  switch (dtype) {
    case DType::kF32: return widen_as<DType::kF32>(from, to, count);
    case DType::kBF16: return widen_as<DType::kBF16>(from, to, count);
    case DType::kF16: return widen_as<DType::kF16>(from, to, count);
    default: return widen_as<DType::kE4M3>(from, to, count);
  }
}

__m256 round_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(-0x10000)));
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  return _mm256_blendv_ps(rounded, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

template <DType kDType>
__m256 round_to(__m256 v) {
  if (kDType == DType::kBF16) return round_bf16(v);
  if (kDType == DType::kF16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return v;
}

// Sixteen bits of each float, in order.
__m128i pack(__m256i v) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0xd8);
  return _mm256_castsi256_si128(words);
}

__m128i to_bf16(__m256 v) { return pack(_mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16)); }

// Saturating; NaN is the second operand, which both instructions then return.
__m128i to_f16(__m256 v) {
  v = _mm256_max_ps(_mm256_set1_ps(-65504.0f), _mm256_min_ps(_mm256_set1_ps(65504.0f), v));
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

void narrow(const float* from, int64_t count, DType dtype, void* to) {
  int64_t i = 0;
  for (; dtype != DType::kF32 && i + 8 <= count; i += 8) {
    const __m256 v = _mm256_loadu_ps(from + i);
    const __m128i half = dtype == DType::kBF16 ? to_bf16(v) : to_f16(v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + i), half);
  }
  for (; i < count; ++i) store_saturated(to, dtype, i, from[i]);
}

template <DType kDType>
void smooth_as(const float* x, const float* smooth, bool shifted, float shift, float* to, int64_t k) {
  for (int64_t i = 0; i < k; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    if (shifted) v = round_to<kDType>(_mm256_add_ps(v, _mm256_set1_ps(shift)));
    _mm256_storeu_ps(to + i, round_to<kDType>(_mm256_div_ps(v, _mm256_loadu_ps(smooth + i))));
  }
}

void smooth(const float* x, const float* smooth, bool shifted, float shift, DType dtype, float* to, int64_t k) {
  switch (dtype) {
    case DType::kBF16: return smooth_as<DType::kBF16>(x, smooth, shifted, shift, to, k);
    case DType::kF16: return smooth_as<DType::kF16>(x, smooth, shifted, shift, to, k);
    default: return smooth_as<DType::kF32>(x, smooth, shifted, shift, to, k);
  }
}

// ---- activations to codes ----

// As in portable.cpp: the integer maximum of the magnitudes' bits keeps NaN.
float absmax(const float* x, int64_t count) {
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8) {
    top = _mm256_max_epu32(top, _mm256_and_si256(load_bytes(x + i), _mm256_set1_epi32(0x7fffffff)));
  }
  __m128i half = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
  return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(half)));
}

__m256i int_codes(__m256 v, __m256 divisor, __m256 low, __m256 high) {
  __m256 q = _mm256_round_ps(_mm256_div_ps(v, divisor), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 number = _mm256_cmp_ps(q, q, _CMP_ORD_Q);
  q = _mm256_min_ps(_mm256_max_ps(q, low), high);
  return _mm256_cvtps_epi32(_mm256_and_ps(q, number));
}

// 16 integers stored as 16 bytes in order: packing works in 128-bit halves, the permutation mends it.
void store_as_bytes(void* p, __m256i a, __m256i b) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
}

void codes_int(const float* xs, int64_t groups, int64_t size, int q_max, int q_min, int8_t* codes, float* alpha) {
  const __m256 high = _mm256_set1_ps(static_cast<float>(q_max)), low = _mm256_set1_ps(static_cast<float>(q_min));
  for (int64_t g = 0; g < groups; ++g) {
    alpha[g] = absmax(xs + g * size, size) * (1.0f / static_cast<float>(q_max));
    const __m256 divisor = _mm256_set1_ps(alpha[g] == 0.0f ? 1.0f : alpha[g]);
    for (int64_t i = g * size; i < (g + 1) * size; i += 16) {
      const __m256i first = int_codes(_mm256_loadu_ps(xs + i), divisor, low, high);
      store_as_bytes(codes + i, first, int_codes(_mm256_loadu_ps(xs + i + 8), divisor, low, high));
    }
  }
}

// As in portable.cpp: a true comparison is -1.
__m256i e2m1_codes(__m256 v) {
  const __m256 a = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
  const auto above = [a](float at) { return _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_set1_ps(at), _CMP_NLE_UQ)); };
  const auto from = [a](float at) { return _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_set1_ps(at), _CMP_NLT_UQ)); };
  __m256i count = _mm256_add_epi32(_mm256_add_epi32(above(0.25f), from(0.75f)), above(1.25f));
  count = _mm256_add_epi32(_mm256_add_epi32(count, from(1.75f)), above(2.5f));
  count = _mm256_add_epi32(_mm256_add_epi32(count, from(3.5f)), above(5.0f));
  const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(_mm256_castps_si256(v), 31), 3);
  return _mm256_sub_epi32(sign, count);
}

void codes_e2m1(const float* xs, int64_t groups, uint8_t* codes, float* alpha) {
  for (int64_t g = 0; g < groups; ++g) {
    const float a = absmax(xs + g * 16, 16) * (1.0f / 6.0f);
    alpha[g] = a > 448.0f ? 448.0f : a;
    const __m256 reciprocal = _mm256_set1_ps(alpha[g] == 0.0f ? 0.0f : 1.0f / alpha[g]);
    const __m256i first = e2m1_codes(_mm256_mul_ps(_mm256_loadu_ps(xs + g * 16), reciprocal));
    const __m256i second = e2m1_codes(_mm256_mul_ps(_mm256_loadu_ps(xs + g * 16 + 8), reciprocal));
    store_as_bytes(codes + g * 16, first, second);
  }
}

// ---- the low-rank branch ----

template <int kRows, int kColumns>
void project_tile(const float* x, const float* down, int64_t k, int64_t r, float* hidden) {
  __m256 sums[kRows][kColumns];
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kColumns; ++j) sums[m][j] = _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i += 8) {
    for (int m = 0; m < kRows; ++m)
      for (int j = 0; j < kColumns; ++j) {
        sums[m][j] = _mm256_fmadd_ps(_mm256_loadu_ps(x + m * k + i), _mm256_loadu_ps(down + j * k + i), sums[m][j]);
      }
  }
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kColumns; ++j) hidden[m * r + j] = sum(sums[m][j]);
}

template <int kRows>
void project_rows(const float* x, const float* down, int64_t k, int64_t r, float* hidden) {
  int64_t j = 0;
  for (; j + 3 <= r; j += 3) project_tile<kRows, 3>(x, down + j * k, k, r, hidden + j);
  if (r - j == 2) project_tile<kRows, 2>(x, down + j * k, k, r, hidden + j);
  if (r - j == 1) project_tile<kRows, 1>(x, down + j * k, k, r, hidden + j);
}

void project(const float* x, int64_t rows, const float* down, int64_t k, int64_t r, float* hidden) {
  switch (rows) {
    case 4: return project_rows<4>(x, down, k, r, hidden);
    case 3: return project_rows<3>(x, down, k, r, hidden);
    case 2: return project_rows<2>(x, down, k, r, hidden);
    default: return project_rows<1>(x, down, k, r, hidden);
  }
}

}  // namespace
}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

void svdquant::cpu::add_avx2_quantize(Spelling& s) {
  s.widen = widen;
  s.narrow = narrow;
  s.smooth = smooth;
  s.codes_int = codes_int;
  s.codes_e2m1 = codes_e2m1;
  s.project = project;
}
#endif
