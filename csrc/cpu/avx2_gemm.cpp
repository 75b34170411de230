// AVX2: the 4-bit product.
#include "avx2.h"

#ifdef SVDQUANT_X86
SVDQUANT_TARGET("avx2,fma,f16c")

namespace svdquant::cpu {
namespace {

// ---- activations in the order of a panel ----

// Sums of 16 columns each, of 64, from 16-bit sums of pairs of theirs in two times 16 lanes.
__m128i sums_of_16(__m256i first, __m256i second) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i fours = _mm256_hadd_epi32(_mm256_madd_epi16(first, ones), _mm256_madd_epi16(second, ones));
  const __m256i halves = _mm256_hadd_epi32(fours, _mm256_setzero_si256());
  return _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// A start holds the products of neighbours too, see below, and is for lanes of 16 bits.
void arrange(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to, int32_t* starts) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(table.zero));
  for (int64_t b = 0; b < blocks; ++b, codes += kBlock, to += kBlock) {
    __m256i pairs[2];
    for (int j = 0; j < 2; ++j) {
      __m256i v = load_bytes(codes + 32 * j);
      if (table.activation) {
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.activation));
        v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), v);
      }
      store_bytes(to + 32 * j, _mm256_shuffle_epi8(v, order));
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
      const __m256i sums = _mm256_mullo_epi16(_mm256_add_epi16(even, odd), zero);
      pairs[j] = _mm256_add_epi16(sums, _mm256_mullo_epi16(even, odd));
    }
    __m128i sums = sums_of_16(pairs[0], pairs[1]);
    const int64_t count = kBlock / table.group;
    if (count == 1) {
      sums = _mm_hadd_epi32(sums, sums);
      sums = _mm_hadd_epi32(sums, sums);
    }
    int32_t four[4];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(four), sums);
    for (int64_t i = 0; i < count; ++i) starts[b * count + i] = -four[i] & 0xffff;
  }
}

// ---- weights in panels ----

// Eight rows, `stride` bytes apart, of eight 32-bit words, transposed.
SVDQUANT_INLINE void load_transposed(const uint8_t* rows, int64_t stride, __m256i (&words)[8]) {
  for (int half = 0; half < 2; ++half, rows += 16) {
    __m256i v[4], a[4];
    for (int i = 0; i < 4; ++i) {
      const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * stride));
      const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (i + 4) * stride));
      v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(upper), lower, 1);
    }
    for (int i = 0; i < 4; i += 2) {
      a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
      a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      words[4 * half + 2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
      words[4 * half + 2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    }
  }
}

// Two panels side by side, of 32 rows, in steps of four columns: columns 0 2 of rows 0 8 1 9 .. 7 15 and of the second
// panel's rows in the same order, then columns 1 3. So a lane of 16 bits is one row's.
void unpack(const uint8_t* rows, int64_t stride, int64_t blocks, const CodeTable& table, uint8_t* panel,
            const uint8_t* next) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.weight));
  const __m256i bytes = _mm256_broadcastsi128_si256(values), low = _mm256_set1_epi8(15);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t j = 0; j < 2; ++j) {
      if (next) next = fetch(next, 8);
      const uint8_t* from = rows + j * kPanel * stride + block * 32;
      uint8_t* to = panel + (block * kBlock * 2 + j * 2) * kPanel;
      __m256i upper[8], lower[8];
      load_transposed(from, stride, upper);
      load_transposed(from + 8 * stride, stride, lower);
      for (int i = 0; i < 8; ++i) {
        const __m256i pairs[2] = {_mm256_blend_epi16(upper[i], _mm256_slli_epi32(lower[i], 16), 0xaa),
                                  _mm256_blend_epi16(_mm256_srli_epi32(upper[i], 16), lower[i], 0xaa)};
        for (int half = 0; half < 2; ++half, to += 128) {
          const __m256i odd = _mm256_srli_epi16(pairs[half], 4);
          store_bytes(to, _mm256_shuffle_epi8(bytes, _mm256_and_si256(pairs[half], low)));
          store_bytes(to + 64, _mm256_shuffle_epi8(bytes, _mm256_and_si256(odd, low)));
        }
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

// ---- the product ----
//
// maddubs multiplies unsigned by signed bytes and adds pairs of products into 16 bits. By Winograd's inner product
// (1968) each multiplication serves two columns, of weights w and activations a:
//
//     w0 a0 + w1 a1 = (w0 + a1) (w1 + a0) - w0 w1 - a0 a1
//
// Processors add bytes in twice or three times as many units as they multiply them in. The products of neighbours are
// taken out where a sum starts: `arrange` has those of activations in `starts`, those of weights are found here, once
// for all tokens. With its zero a weight is never smaller than an activation is negative. A lane's sums may pass 16
// bits and come back: what is left of a group's 64 columns in the end, at most 64 * 8 * 15, does not.

constexpr int64_t kChunk = 6;  // blocks, of which 32 rows fit the first-level cache

// Sums of a chunk's w0 w1 in the lanes in which `multiply_rows` has its own, by group.
template <int kSteps>
using Neighbours = __m256i[kChunk * kBlock / 4 / kSteps][2];

template <int kSteps>
void sum_neighbours(const uint8_t* panel, int64_t count, Neighbours<kSteps>& neighbours) {
  for (int64_t g = 0; g < count; ++g) {
    for (int j = 0; j < 2; ++j) {
      const uint8_t* from = panel + g * kSteps * 128 + 32 * j;
      __m256i sum = _mm256_setzero_si256();
      for (int s = 0; s < kSteps; ++s, from += 128) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(load_bytes(from), load_bytes(from + 64)));
      }
      neighbours[g][j] = sum;
    }
  }
}

// Four columns.
template <int kRows>
SVDQUANT_INLINE void step(const uint8_t* panel, const int8_t* acts, int64_t k, __m256i (&sums)[kRows][2]) {
  const __m256i even[2] = {load_bytes(panel), load_bytes(panel + 32)};
  const __m256i odd[2] = {load_bytes(panel + 64), load_bytes(panel + 96)};
  for (int m = 0; m < kRows; ++m) {
    const __m256i act_even = broadcast2(acts + m * k), act_odd = broadcast2(acts + m * k + 2);
    for (int j = 0; j < 2; ++j) {
      const __m256i left = _mm256_add_epi8(even[j], act_odd), right = _mm256_add_epi8(odd[j], act_even);
      sums[m][j] = _mm256_add_epi16(sums[m][j], _mm256_maddubs_epi16(left, right));
    }
    SVDQUANT_SETTLE(sums[m][0]);
    SVDQUANT_SETTLE(sums[m][1]);
  }
}

// Sums of 16 rows, scaled, onto their outputs: lower halves are rows 0 .. 7, upper ones 8 .. 15.
SVDQUANT_INLINE void finish(__m256i sums, const float* weight_scales, __m256 scale, float* out) {
  const __m256i halves[2] = {_mm256_srai_epi32(_mm256_slli_epi32(sums, 16), 16), _mm256_srai_epi32(sums, 16)};
  for (int i = 0; i < 2; ++i, weight_scales += 8, out += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(halves[i]), _mm256_loadu_ps(weight_scales));
    _mm256_storeu_ps(out, _mm256_fmadd_ps(scaled, scale, _mm256_loadu_ps(out)));
  }
}

template <int kRows, int kSteps>
void multiply_rows(const Tile& tile, int64_t row, const Neighbours<kSteps>& neighbours) {
  const Tile t = tile;  // which stores through `out` cannot change
  const int64_t k = t.groups * kSteps * 4;
  const bool fetching = t.next && row < 2 * kSteps;  // by then all is there
  for (int64_t g = 0; g < t.count; ++g) {
    const int64_t at = row * t.groups + g;
    if (fetching) fetch(t.next + (row / 2 * t.count + 2 * g) * 64, 2);
    __m256i sums[kRows][2];
    for (int m = 0; m < kRows; ++m) {
      const __m256i start = _mm256_set1_epi16(static_cast<int16_t>(t.starts[at + m * t.groups]));
      for (int j = 0; j < 2; ++j) sums[m][j] = _mm256_sub_epi16(start, neighbours[g][j]);
    }
    SVDQUANT_UNROLL(16)
    for (int s = 0; s < kSteps; ++s) step(t.panel + (g * kSteps + s) * 128, t.acts + (at * kSteps + s) * 4, k, sums);
    for (int m = 0; m < kRows; ++m) {
      const __m256 scale = _mm256_broadcast_ss(t.scales + at + m * t.groups);
      for (int j = 0; j < 2; ++j) {
        const float* weight_scales = t.weight_scales + (j * t.groups + g) * kPanel;
        finish(sums[m][j], weight_scales, scale, t.out + (row + m) * t.out_stride + j * kPanel);
      }
    }
  }
}

template <int kSteps>
void multiply_steps(const Tile& t) {
  Neighbours<kSteps> neighbours;
  sum_neighbours<kSteps>(t.panel, t.count, neighbours);
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) multiply_rows<4, kSteps>(t, row, neighbours);
  switch (t.rows - row) {
    case 3: return multiply_rows<3, kSteps>(t, row, neighbours);
    case 2: return multiply_rows<2, kSteps>(t, row, neighbours);
    case 1: return multiply_rows<1, kSteps>(t, row, neighbours);
  }
}

void multiply(const Tile& t, int64_t group) { group == 16 ? multiply_steps<4>(t) : multiply_steps<16>(t); }

// ---- the low-rank branch ----

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

}  // namespace
}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

void svdquant::cpu::add_avx2_gemm(Spelling& s) {
  s.panels = 2;
  s.chunk = kChunk;
  s.arrange = arrange;
  s.unpack = unpack;
  s.interleave = interleave;
  s.multiply = multiply;
  s.branch = branch;
}
#endif
