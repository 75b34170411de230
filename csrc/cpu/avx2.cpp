// AVX2, FMA and F16C: eight floats or 32 bytes at a time. Every x86 processor since 2013 (Intel) and 2015 (AMD).
//
// The product: maddubs multiplies unsigned by signed bytes and adds pairs into 16 bits, where a whole group fits:
// 64 products of at most 15 * 15 stay below 2^14. One madd, one conversion and one fma then close the group for
// eight outputs.
#include "floats.h"
#include "spelling.h"
#include "target.h"

#ifdef SVDQUANT_X86
#include <immintrin.h>
SVDQUANT_TARGET("avx2,fma,f16c")

namespace svdquant::cpu {
namespace {

__m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store_bytes(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

__m256i broadcast4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

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
  return _mm256_blendv_ps(rounded, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

template <DType kDType>
__m256 round_to(__m256 v) {
  if (kDType == DType::kBF16) return round_bf16(v);
  if (kDType == DType::kF16) return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  return v;
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
  for (; j + 2 <= r; j += 2) project_tile<kRows, 2>(x, down + j * k, k, r, hidden + j);
  if (j < r) project_tile<kRows, 1>(x, down + j * k, k, r, hidden + j);
}

void project(const float* x, int64_t rows, const float* down, int64_t k, int64_t r, float* hidden) {
  switch (rows) {
    case 4: return project_rows<4>(x, down, k, r, hidden);
    case 3: return project_rows<3>(x, down, k, r, hidden);
    case 2: return project_rows<2>(x, down, k, r, hidden);
    default: return project_rows<1>(x, down, k, r, hidden);
  }
}

template <int kRows>
void branch_rows(const float* hidden, int64_t r, const float* up, const float* bias, float* out, int64_t stride) {
  __m256 sums[kRows][2];
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < 2; ++j) sums[m][j] = _mm256_loadu_ps(bias + 8 * j);
  for (int64_t i = 0; i < r; ++i) {
    const __m256 u0 = _mm256_loadu_ps(up + i * kPanel), u1 = _mm256_loadu_ps(up + i * kPanel + 8);
    for (int m = 0; m < kRows; ++m) {
      const __m256 h = _mm256_broadcast_ss(hidden + m * r + i);
      sums[m][0] = _mm256_fmadd_ps(h, u0, sums[m][0]);
      sums[m][1] = _mm256_fmadd_ps(h, u1, sums[m][1]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < 2; ++j) _mm256_storeu_ps(out + m * stride + 8 * j, sums[m][j]);
}

void branch(const float* hidden, int64_t rows, int64_t r, const float* up, const float* bias, float* out,
            int64_t out_stride) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) branch_rows<4>(hidden + m * r, r, up, bias, out + m * out_stride, out_stride);
  for (; m < rows; ++m) branch_rows<1>(hidden + m * r, r, up, bias, out + m * out_stride, out_stride);
}

// ---- the integer product ----

// Sums of 16 columns each, of 64: bytes to 16-bit pairs, to 32-bit fours, to sixteens.
__m128i sums_of_16(__m256i first, __m256i second) {
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  const __m256i a = _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, first), ones16);
  const __m256i b = _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, second), ones16);
  const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_setzero_si256());
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

void arrange(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to, int32_t* starts) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m128i zero = _mm_set1_epi32(-table.zero);
  for (int64_t b = 0; b < blocks; ++b, codes += kBlock, to += kBlock) {
    __m256i v[2] = {load_bytes(codes), load_bytes(codes + 32)};
    for (int j = 0; j < 2; ++j) {
      if (table.activation) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.activation));
        v[j] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), v[j]);
      }
      store_bytes(to + 32 * j, _mm256_shuffle_epi8(v[j], order));
    }
    __m128i sums = _mm_mullo_epi32(sums_of_16(v[0], v[1]), zero);
    if (table.group == 16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(starts + 4 * b), sums);
    } else {
      sums = _mm_hadd_epi32(sums, sums);
      starts[b] = _mm_cvtsi128_si32(_mm_hadd_epi32(sums, sums));
    }
  }
}

// Eight rows of eight 32-bit words, transposed.
SVDQUANT_INLINE void transpose(__m256i (&v)[8]) {
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

void unpack(const uint8_t* rows, int64_t stride, int64_t blocks, const CodeTable& table, uint8_t* panel) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.weight));
  const __m256i bytes = _mm256_broadcastsi128_si256(values), low = _mm256_set1_epi8(15);
  const char* next = reinterpret_cast<const char*>(rows + kPanel * stride);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t half = 0; half < 2; ++half) {
      // Sixteen rows at once are too many streams for the hardware to foresee: the next panel, in a straight line.
      for (int i = 0; i < 4; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
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

void interleave(const void* from, int64_t stride, void* to) {
  const char* words = static_cast<const char*>(from);
  char* columns = static_cast<char*>(to);
  for (int64_t j = 0; j < stride; j += 8) {
    for (int64_t half = 0; half < 2; ++half) {
      __m256i v[8];
      for (int i = 0; i < 8; ++i) v[i] = load_bytes(words + ((half * 8 + i) * stride + j) * 4);
      transpose(v);
      for (int i = 0; i < 8; ++i) store_bytes(columns + ((j + i) * kPanel + half * 8) * 4, v[i]);
    }
  }
}

template <int kRows, int kSteps>
void multiply_rows(const Tile& t, int64_t row) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int64_t k = t.groups * kSteps * 4;
  for (int64_t g = 0; g < t.groups; ++g) {
    const uint8_t* panel = t.panel + g * kSteps * 64;
    const int8_t* acts = t.acts + row * k + g * kSteps * 4;
    __m256i sums[kRows][2];
    for (int m = 0; m < kRows; ++m) {
      const int32_t start = t.starts[(row + m) * t.groups + g];
      sums[m][0] = sums[m][1] = _mm256_set1_epi32(start & 0xffff);  // one of the two 16-bit sums of an output
    }
    SVDQUANT_UNROLL(2)  // all sixteen steps at once make GCC keep products on the stack
    for (int s = 0; s < kSteps; ++s) {
      const __m256i w0 = load_bytes(panel + s * 64), w1 = load_bytes(panel + s * 64 + 32);
      for (int m = 0; m < kRows; ++m) {
        const __m256i a = broadcast4(acts + m * k + s * 4);
        sums[m][0] = _mm256_add_epi16(sums[m][0], _mm256_maddubs_epi16(w0, a));
        sums[m][1] = _mm256_add_epi16(sums[m][1], _mm256_maddubs_epi16(w1, a));
      }
    }
    for (int m = 0; m < kRows; ++m) {
      const __m256 scale = _mm256_broadcast_ss(t.scales + (row + m) * t.groups + g);
      for (int j = 0; j < 2; ++j) {
        float* out = t.out + (row + m) * t.out_stride + 8 * j;
        const __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[m][j], ones));
        const __m256 scaled = _mm256_mul_ps(total, _mm256_loadu_ps(t.weight_scales + g * kPanel + 8 * j));
        _mm256_storeu_ps(out, _mm256_fmadd_ps(scaled, scale, _mm256_loadu_ps(out)));
      }
    }
  }
}

template <int kSteps>
void multiply_steps(const Tile& t) {
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) multiply_rows<4, kSteps>(t, row);
  switch (t.rows - row) {
    case 3: return multiply_rows<3, kSteps>(t, row);
    case 2: return multiply_rows<2, kSteps>(t, row);
    case 1: return multiply_rows<1, kSteps>(t, row);
  }
}

void multiply(const Tile& t, int64_t group) { group == 16 ? multiply_steps<4>(t) : multiply_steps<16>(t); }

__m256i widen16(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Eight rows of a panel. Products of 8-bit codes need 16 bits, and a sum 32: bytes are widened, and madd adds pairs, so
// that a row has two sums.
template <int kRows>
void multiply_int8_rows(const Tile& t, int64_t row, int64_t first, int64_t k) {
  const uint8_t* panel = t.panel + first * 4;
  __m256i sums[kRows][2];
  for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < k; i += 4, panel += 4 * kPanel) {
    const __m256i w0 = widen16(panel), w1 = widen16(panel + 16);
    for (int m = 0; m < kRows; ++m) {
      const __m256i a = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(broadcast4(t.acts + (row + m) * k + i)));
      sums[m][0] = _mm256_add_epi32(sums[m][0], _mm256_madd_epi16(w0, a));
      sums[m][1] = _mm256_add_epi32(sums[m][1], _mm256_madd_epi16(w1, a));
    }
  }
  for (int m = 0; m < kRows; ++m) {
    const __m256i rows01452367 = _mm256_hadd_epi32(sums[m][0], sums[m][1]);
    const __m256i total = _mm256_permute4x64_epi64(rows01452367, 0xd8);
    const __m256i sum = _mm256_add_epi32(total, _mm256_set1_epi32(t.starts[row + m]));
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(t.weight_scales + first));
    float* out = t.out + (row + m) * t.out_stride + first;
    _mm256_storeu_ps(out, _mm256_fmadd_ps(scaled, _mm256_broadcast_ss(t.scales + row + m), _mm256_loadu_ps(out)));
  }
}

void multiply_int8(const Tile& t, int64_t k) {
  for (int64_t first = 0; first < kPanel; first += 8) {
    int64_t row = 0;
    for (; row + 4 <= t.rows; row += 4) multiply_int8_rows<4>(t, row, first, k);
    for (; row < t.rows; ++row) multiply_int8_rows<1>(t, row, first, k);
  }
}

// `dot4` has a block's sums in eight words, each of eight columns: the first two for columns 0 to 15, then 32 to 47,
// 16 to 31 and 48 to 63. This spreads a group's number over its words.
template <int64_t kGroup>
__m256 spread(const float* of_block) {
  if (kGroup == 64) return _mm256_broadcast_ss(of_block);
  const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(of_block));
  return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 2, 2, 1, 1, 3, 3));
}

// A row's nibbles are masked and shifted where they lie. For that the activations' words of even and of odd columns are
// taken apart, which leaves the middle quarters exchanged, as the row's are on loading.
template <int64_t kGroup>
void dot4_groups(const uint8_t* rows, int64_t stride, const float* weight_scales, const CodeTable& table, const Tile& t,
                 float* to) {
  constexpr int64_t kGroups = kBlock / kGroup;  // a block
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.weight));
  const __m256i bytes = _mm256_broadcastsi128_si256(values), low = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_set1_epi16(static_cast<int16_t>(-table.zero));
  __m256 totals[4];
  for (int i = 0; i < 4; ++i) totals[i] = _mm256_setzero_ps();
  const char* next = reinterpret_cast<const char*>(rows + 8 * stride);  // in a straight line, as in `unpack`
  for (int64_t block = 0; block < t.groups / kGroups; ++block) {
    for (int i = 0; i < 2; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    const __m256 a0 = _mm256_castsi256_ps(load_bytes(t.acts + block * kBlock));
    const __m256 a1 = _mm256_castsi256_ps(load_bytes(t.acts + block * kBlock + 32));
    const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a0, a1, 0x88));
    const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(a0, a1, 0xdd));
    // the zero taken out of every word by itself: what is added up over K must not be large for nothing
    const __m256i ones8 = _mm256_set1_epi8(1);
    const __m256i act_sums = _mm256_add_epi16(_mm256_maddubs_epi16(ones8, even), _mm256_maddubs_epi16(ones8, odd));
    const __m256i starts = _mm256_mullo_epi16(act_sums, zero);
    const __m256 scales = spread<kGroup>(t.scales + block * kGroups);
    for (int i = 0; i < 4; ++i) {
      const __m256i v = _mm256_permute4x64_epi64(load_bytes(rows + i * stride + block * 32), 0xd8);
      const __m256i w0 = _mm256_shuffle_epi8(bytes, _mm256_and_si256(v, low));
      const __m256i w1 = _mm256_shuffle_epi8(bytes, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
      const __m256i products = _mm256_add_epi16(_mm256_maddubs_epi16(w0, even), _mm256_maddubs_epi16(w1, odd));
      const __m256 sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_add_epi16(products, starts), ones));
      const __m256 scaled = _mm256_mul_ps(sums, spread<kGroup>(weight_scales + i * t.groups + block * kGroups));
      totals[i] = _mm256_fmadd_ps(scaled, scales, totals[i]);
    }
  }
  for (int i = 0; i < 4; ++i) to[i] += sum(totals[i]);
}

void dot4(const uint8_t* rows, int64_t stride, const float* weight_scales, const CodeTable& table, const Tile& token,
          float* to) {
  table.group == 16 ? dot4_groups<16>(rows, stride, weight_scales, table, token, to)
                    : dot4_groups<64>(rows, stride, weight_scales, table, token, to);
}

// ---- AWQ ----

// Lane l of a block holds columns 8l .. 8l+7 as one 32-bit word. Its nibble i is masked where it stands, not shifted
// down, so the code comes out 16^(i mod 4) times too large, which x pays for beforehand: exact, a power of two.
void order_awq(const float* x, int64_t blocks, float* to, float* sums) {
  const float shrink[4] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f};
  for (int64_t b = 0; b < blocks; ++b, x += kBlock, to += kBlock, sums += kAwqSums) {
    for (int lane = 0; lane < 8; ++lane) {
      float total = 0.0f;
      for (int i = 0; i < 8; ++i) {
        total += x[lane * 8 + i];
        to[i * 8 + lane] = x[lane * 8 + i] * shrink[i % 4];
      }
      sums[lane] = total;
    }
  }
}

// A lane's sum of a block is finished as scale * (x . codes) + zero * (sum of x): what is left after the two cancel
// is all that is ever added up.
template <int kRows>
void dot_rows(const uint8_t* codes, int64_t blocks, int64_t per_group, const float* scales, const float* zeros,
              const float* ordered, const float* sums, float* out) {
  __m256 totals[kRows];
  for (int m = 0; m < kRows; ++m) totals[m] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    const __m256i words = load_bytes(codes + b * 32), upper = _mm256_srli_epi32(words, 16);
    __m256 parts[kRows];
    for (int m = 0; m < kRows; ++m) parts[m] = _mm256_setzero_ps();
    for (int i = 0; i < 8; ++i) {
      const __m256i nibble = _mm256_and_si256(i < 4 ? words : upper, _mm256_set1_epi32(15 << i % 4 * 4));
      const __m256 w = _mm256_cvtepi32_ps(nibble);
      for (int m = 0; m < kRows; ++m) {
        parts[m] = _mm256_fmadd_ps(w, _mm256_loadu_ps(ordered + (m * blocks + b) * kBlock + 8 * i), parts[m]);
      }
    }
    const __m256 scale = _mm256_broadcast_ss(scales + b / per_group), zero = _mm256_broadcast_ss(zeros + b / per_group);
    for (int m = 0; m < kRows; ++m) {
      const __m256 offset = _mm256_mul_ps(zero, _mm256_loadu_ps(sums + (m * blocks + b) * kAwqSums));
      totals[m] = _mm256_add_ps(totals[m], _mm256_fmadd_ps(parts[m], scale, offset));
    }
  }
  for (int m = 0; m < kRows; ++m) out[m] = sum(totals[m]);
}

void dot_awq(const uint8_t* codes, int64_t blocks, int64_t per_group, const float* scales, const float* zeros,
             const float* ordered, const float* sums, int64_t rows, float* out) {
  switch (rows) {
    case 4: return dot_rows<4>(codes, blocks, per_group, scales, zeros, ordered, sums, out);
    case 3: return dot_rows<3>(codes, blocks, per_group, scales, zeros, ordered, sums, out);
    case 2: return dot_rows<2>(codes, blocks, per_group, scales, zeros, ordered, sums, out);
    default: return dot_rows<1>(codes, blocks, per_group, scales, zeros, ordered, sums, out);
  }
}

bool supported() { return has_avx2(); }

}  // namespace

const Spelling* avx2() {
  static const Spelling spelling = {
      "avx2", supported, widen, smooth, codes_int, codes_e2m1, project, arrange, unpack, interleave, multiply,
      multiply_int8, dot4, branch, order_awq, dot_awq};
  return &spelling;
}

}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

#else
const svdquant::cpu::Spelling* svdquant::cpu::avx2() { return nullptr; }
#endif
