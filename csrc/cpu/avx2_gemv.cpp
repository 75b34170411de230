// AVX2: products of one token, and of AWQ, straight from the nibbles.
#include "avx2.h"

#ifdef SVDQUANT_X86
SVDQUANT_TARGET("avx2,fma,f16c")

namespace svdquant::cpu {
namespace {

// ---- one token ----

// An int4 code plus 8 is its nibble with the first bit turned, which needs no table.
int zero_of(const CodeTable& table) { return table.group == 16 ? table.zero : 8; }

// A block as its nibbles lie in a row, even columns in the low ones: 32 codes of even columns, 32 of odd ones, and
// -zero times the sum of every four, in 16 bits. So the zero is taken out of every word by itself: what is added up
// over K must not be large for nothing.
void order_token(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to) {
  const int zero = zero_of(table);
  for (int64_t i = 0; i < blocks * kBlock; ++i) {
    const int8_t value = table.activation ? table.activation[codes[i]] : codes[i];
    to[i / kBlock * kTokenBytes + i % 2 * 32 + i % kBlock / 2] = value;
  }
  for (int64_t b = 0; b < blocks; ++b, to += kTokenBytes) {
    for (int i = 0; i < 32; i += 2) {
      const int sum = to[i] + to[i + 1] + to[32 + i] + to[33 + i];
      const int16_t start = static_cast<int16_t>(-zero * sum);
      std::memcpy(to + 64 + i, &start, 2);
    }
  }
}

// A block's sums are eight words, each of eight columns. This spreads a group's number over its words.
template <int64_t kGroup>
SVDQUANT_INLINE __m256 spread(const float* of_block) {
  if (kGroup == 64) return _mm256_broadcast_ss(of_block);
  const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(of_block));
  return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}

template <int64_t kGroup>
void dot4_groups(const uint8_t* rows, int64_t blocks, const CodeTable& table, const int8_t* token, const float* scales,
                 float* to) {
  constexpr int64_t kGroups = kBlock / kGroup;  // a block
  const int64_t stride = blocks * kBlock / 2;
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.weight));
  const __m256i bytes = _mm256_broadcastsi128_si256(values), low = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1), turn = _mm256_set1_epi8(-0x78);
  __m256 totals[4];
  for (int i = 0; i < 4; ++i) totals[i] = _mm256_setzero_ps();
  const char* next = reinterpret_cast<const char*>(rows + 4 * stride);  // in a straight line, as in `unpack`
  for (int64_t block = 0; block < blocks; ++block, token += kTokenBytes) {
    for (int i = 0; i < 2; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    for (int i = 0; i < 4; ++i) {
      __m256i v = load_bytes(rows + i * stride + block * 32);
      if (kGroup == 64) v = _mm256_xor_si256(v, turn);
      __m256i even = _mm256_and_si256(v, low), odd = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
      if (kGroup != 64) even = _mm256_shuffle_epi8(bytes, even), odd = _mm256_shuffle_epi8(bytes, odd);
      even = _mm256_maddubs_epi16(even, load_bytes(token));
      odd = _mm256_maddubs_epi16(odd, load_bytes(token + 32));
      const __m256i sums = _mm256_add_epi16(_mm256_add_epi16(even, odd), load_bytes(token + 64));
      const __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, ones));
      totals[i] = _mm256_fmadd_ps(total, spread<kGroup>(scales + (i * blocks + block) * kGroups), totals[i]);
    }
  }
  for (int i = 0; i < 4; ++i) to[i] += sum(totals[i]);
}

void dot4(const uint8_t* rows, int64_t blocks, const CodeTable& table, const int8_t* token, const float* scales,
          float* to) {
  table.group == 16 ? dot4_groups<16>(rows, blocks, table, token, scales, to)
                    : dot4_groups<64>(rows, blocks, table, token, scales, to);
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

}  // namespace
}  // namespace svdquant::cpu
SVDQUANT_TARGET_END

void svdquant::cpu::add_avx2_gemv(Spelling& s) {
  s.order_token = order_token;
  s.dot4 = dot4;
  s.order_awq = order_awq;
  s.dot_awq = dot_awq;
}
#endif
