// Activations to codes, scales and the branch's hidden values, reading x once.
//
//   x [M, K] fp32 | bf16 | fp16, smooth [K], down [R, K]  ->  codes [M, K] bytes, scales [M, G], hidden [M, R] fp32
//   means: core/reference.py quantize_int4, quantize_int4_unsigned, quantize_nvfp4, to the bit for codes and scales
//
// A block owns 16 tokens and all of K. Its warps take chunks of 64 columns in turn, and a lane 16 neighbours of two
// tokens:
//
//               columns  0..15    16..31   32..47   48..63
//     token g            t = 0    t = 1    t = 2    t = 3      lane 4g + t
//     token g + 8        t = 0    t = 1    t = 2    t = 3
//
// That is a cache line a token, an nvfp4 group a lane, an int4 group four lanes; and, as a sum over k has no order, also
// the A fragment of four m16n8k16, so that the registers that were just quantized multiply `down` as they are.
// Each warp sums hidden values over its chunks; at the end they are added in the order of the warps. No atomics: the
// same input gives the same bits.
#pragma once

#include <type_traits>

#include "floats.cuh"
#include "mma.cuh"

namespace svdquant::cuda {

constexpr int kTokens = 16;   // rows of one matrix product
constexpr int kWarps = 8;     // enough loads in the air to hide memory at two blocks an SM
constexpr int kChunk = 64;    // an int4 group: what a warp takes at a time
constexpr int kColumns = 16;  // an nvfp4 group: what a lane takes of it

struct QuantizeParams {
  Quantize args;
  float inverse;    // fp32(1 / largest code)
  float low, high;  // codes are clamped to these
};

// The lane's place: which tokens, which columns of a chunk.
struct Lane {
  int warp, g, t;
  __device__ Lane() : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

// The largest |v| as bits: the order of non-negative floats is that of their bits, and a NaN is above everything, so
// that it reaches the scale and is seen.
__device__ __forceinline__ unsigned largest(const float (&v)[kColumns]) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) most = larger_magnitude(most, v[i]);
  return as_bits(most) & 0x7fffffff;
}

// Whether the magnitude with these bits lies within 2^-90..2^90, so that nothing computed with it is lost at the ends of
// fp32's range. What is so small beside it that it could be, becomes the code 0.
__device__ __forceinline__ bool is_ordinary(unsigned bits) {
  constexpr unsigned kLow = (127u - 90) << 23, kHigh = (127u + 90) << 23;
  return bits - kLow < kHigh - kLow;
}

// a / b, given 1 / b within two units in the last place. Rounded as `divide` does or off by one unit, and that not where
// it would be seen: a 16-bit quotient of 16-bit numbers and a code, the nearest integer to a 16-bit number over a scale
// made of one, are the same for every pair of them (tests/kernels/test_quotients.py).
__device__ __forceinline__ float divide_by(float a, float b, float reciprocal) {
  const float quotient = multiply(a, reciprocal);
  return fused_multiply_add(fused_multiply_add(-b, quotient, a), reciprocal, quotient);
}

// What a lane reads at a time: 16 columns of token g and of token g + 8, zeros where there are none. kX is the type of x
// and of down, or kF32 for any pair of types.
template <DType kX>
struct Piece {
  static constexpr bool kTensor = kX != DType::kF32;

  int64_t token[2], column;
  bool exists[2];
  DType dtype;
  unsigned words[2][kTensor ? kColumns / 2 : kColumns] = {};  // as stored, two columns a word; or fp32

  __device__ __forceinline__ Piece(const Quantize& q, int64_t token0, int64_t column0, const Lane& lane)
      : column(column0 + lane.t * kColumns), dtype(kTensor ? kX : q.x.dtype) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      token[half] = token0 + lane.g + 8 * half;
      exists[half] = token[half] < q.m && column < q.k;
    }
  }

  __device__ __forceinline__ void read(const Quantize& q, int half) {
    if (!exists[half]) return;
    const int64_t at = token[half] * q.x.stride + column;
    if constexpr (kTensor) {
      load_words<2 * kColumns>(static_cast<const unsigned short*>(q.x.data) + at, words[half]);
    } else {
      float v[kColumns];
      load_floats(q.x.data, dtype, at, v);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) words[half][i] = as_bits(v[i]);
    }
  }

  __device__ __forceinline__ void read_both(const Quantize& q) { read(q, 0), read(q, 1); }

  __device__ __forceinline__ float value(int half, int i) const {
    if constexpr (kTensor) {
      return i % 2 ? high_half(words[half][i / 2], kX) : low_half(words[half][i / 2], kX);
    } else {
      return as_float(words[half][i]);
    }
  }

  // round_T(round_T(x + shift) / smooth)
  __device__ __forceinline__ void smooth(const Quantize& q, int half, float (&xs)[kColumns]) const {
    float by[kColumns];
    load_floats(q.smooth.data, q.smooth.dtype, column, by);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float x = value(half, i), shifted = q.shift != 0.0f ? round_to(add(x, q.shift), dtype) : x;
      xs[i] = round_to(divide(shifted, by[i]), dtype);
    }
  }
};

// The same of both tokens at once, as words of halves: a division costs a multiplication or three. False, and nothing is
// done, where smooth is of another type than x. A quotient may be wrong if its lane's largest is not ordinary.
template <DType kX>
struct Smoothed {
  unsigned words[2][kColumns / 2] = {};

  __device__ __forceinline__ bool make(const Quantize& q, const Piece<kX>& piece) {
    if (q.smooth.dtype != kX || piece.column >= q.k) return false;
    unsigned divisors[kColumns / 2];
    load_words<2 * kColumns>(static_cast<const unsigned short*>(q.smooth.data) + piece.column, divisors);
    shift(q, piece);
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const float low = low_half(divisors[i], kX), high = high_half(divisors[i], kX);
      const float reciprocals[2] = {approximate_reciprocal(low), approximate_reciprocal(high)};
      most = larger_magnitude(larger_magnitude(most, low), high);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[half][i] = join_halves(quotient(low_half(words[half][i], kX), low, reciprocals[0]),
                                     quotient(high_half(words[half][i], kX), high, reciprocals[1]), kX);
      }
    }
    return kX == DType::kF16 || as_bits(most) <= (127u + 126) << 23;  // else a reciprocal became zero
  }

  // round_T(x + shift)
  __device__ __forceinline__ void shift(const Quantize& q, const Piece<kX>& piece) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) words[i / 8][i % 8] = piece.words[i / 8][i % 8];
    if (q.shift == 0.0f) return;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      unsigned& word = words[i / 8][i % 8];
      word = join_halves(add(low_half(word, kX), q.shift), add(high_half(word, kX), q.shift), kX);
    }
  }

  // To be rounded to 16 bits. One product is enough for bf16: no quotient of 8 bits by 8 is nearer than 2^-17 of itself
  // to where rounding changes.
  static __device__ __forceinline__ float quotient(float x, float by, float reciprocal) {
    return kX == DType::kBF16 ? multiply(x, reciprocal) : divide_by(x, by, reciprocal);
  }
};

__device__ __forceinline__ void store_bytes(const Quantize& q, int64_t token, int64_t column,
                                            const unsigned (&words)[kColumns / 4]) {
  uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(q.codes) + token * q.k + column);
  st_global(to, uint4{words[0], words[1], words[2], words[3]});
}

// The low bytes of 16 words.
__device__ __forceinline__ void store_codes(const Quantize& q, int64_t token, int64_t column,
                                            const unsigned (&codes)[kColumns]) {
  unsigned words[kColumns / 4];
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    const unsigned* four = codes + 4 * i;
    words[i] = pick_bytes(pick_bytes(four[0], four[1], 0x0040), pick_bytes(four[2], four[3], 0x0040), 0x5410);
  }
  store_bytes(q, token, column, words);
}

// Of the four lanes of a token, whether or not it exists.
__device__ __forceinline__ unsigned largest_of_four(unsigned most) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const unsigned other = shuffle_xor(most, mask);
    most = other > most ? other : most;
  }
  return most;
}

// Integers as bits, kMagicBits more than they are. kShort: values of 16 bits, and a scale made of one.
template <bool kShort>
__device__ __forceinline__ void find_integers(const QuantizeParams& p, float alpha, const float (&xs)[kColumns],
                                              unsigned (&codes)[kColumns]) {
  if (kShort && is_ordinary(as_bits(alpha))) {  // then no quotient exceeds the largest code
    const float reciprocal = approximate_reciprocal(alpha);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      codes[i] = as_bits(add(larger(divide_by(xs[i], alpha, reciprocal), p.low), kMagic));
    }
  } else {
    const float divisor = alpha == 0.0f ? 1.0f : alpha;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float code = divide(xs[i], divisor), known = code != code ? 0.0f : code;
      codes[i] = as_bits(add(known < p.low ? p.low : known > p.high ? p.high : known, kMagic));
    }
  }
}

template <bool kShort>
__device__ __forceinline__ void encode_int(const QuantizeParams& p, int64_t token, int64_t column, float alpha,
                                           const float (&xs)[kColumns]) {
  unsigned codes[kColumns];
  find_integers<kShort>(p, alpha, xs, codes);
  store_codes(p.args, token, column, codes);
}

// Integers: four lanes share a group.
template <bool kShort>
__device__ __forceinline__ void encode_int_group(const QuantizeParams& p, DType dtype, int64_t token, int64_t column,
                                                 bool exists, unsigned largest_of_lane, const float (&xs)[kColumns]) {
  const unsigned most = largest_of_four(largest_of_lane);
  if (!exists) return;
  const float alpha = multiply(as_float(most), p.inverse);
  encode_int<kShort>(p, token, column, alpha, xs);
  if (column % kChunk == 0) store_one(p.args.scales, dtype, token * (p.args.k / kChunk) + column / kChunk, alpha);
}

// e2m1 to nearest, ties to the even code, the sign of zero kept: 0 .5 1 1.5 2 3 4 6. The low three bits of what is
// returned are the index: steps of a half up to 2, of one up to 4, then of two, and whichever counts least is meant.
__device__ __forceinline__ unsigned index_e2m1(float v) {
  const float a = magnitude(v), by_half = fused_multiply_add(a, 2.0f, kMagic), by_one = add(a, kMagic + 2.0f);
  const float by_two = fused_multiply_add(a, 0.5f, kMagic + 4.0f);
  return as_bits(smaller(smaller(by_half, by_one), smaller(by_two, kMagic + 7.0f)));
}

// Four codes, of which the sign is the fourth bit.
__device__ __forceinline__ unsigned join_e2m1(const float (&v)[4]) {
  unsigned i[4], bits[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) i[e] = v[e] == v[e] ? index_e2m1(v[e]) : 0, bits[e] = as_bits(v[e]);
  const unsigned indices = pick_bytes(pick_bytes(i[0], i[1], 0x0040), pick_bytes(i[2], i[3], 0x0040), 0x5410);
  const unsigned tops = pick_bytes(pick_bytes(bits[0], bits[1], 0x0073), pick_bytes(bits[2], bits[3], 0x0073), 0x5410);
  return (indices & 0x07070707) | (tops >> 4 & 0x08080808);
}

// NVFP4: a lane has a group to itself.
__device__ __forceinline__ void encode_e2m1(const QuantizeParams& p, int64_t token, int64_t column, bool exists,
                                            unsigned most, const float (&xs)[kColumns]) {
  if (!exists) return;
  const float absmax = multiply(as_float(most), p.inverse), alpha = absmax > 448.0f ? 448.0f : absmax;
  const float reciprocal = alpha == 0.0f ? 0.0f : divide(1.0f, alpha);
  unsigned words[kColumns / 4];
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = multiply(xs[4 * i + e], reciprocal);
    words[i] = join_e2m1(v);
  }
  store_bytes(p.args, token, column, words);
  unsigned char* scales = static_cast<unsigned char*>(p.args.scales) + token * (p.args.k / kColumns);
  st_global(scales + column / kColumns, static_cast<unsigned char>(to_e4m3(alpha)));
}

template <DType kX, bool kE2M1>
__device__ __forceinline__ void encode_token(const QuantizeParams& p, const Piece<kX>& piece, int half, unsigned most,
                                             const float (&xs)[kColumns]) {
  if constexpr (kE2M1) {
    encode_e2m1(p, piece.token[half], piece.column, piece.exists[half], most, xs);
  } else {
    encode_int_group<kX != DType::kF32>(p, piece.dtype, piece.token[half], piece.column, piece.exists[half], most, xs);
  }
}

// f(half, largest magnitude's bits, smoothed values) for each token of a piece that exists. kAll: for the others
// too, with zeros: where lanes tell each other something.
//
// Tokens of fp32 words are read here, each when it is wanted, as registers are short; halves were before, both at once,
// to wait for memory once.
template <bool kAll, DType kX, class F>
__device__ __forceinline__ void for_each_token(const Quantize& q, Piece<kX>& piece, F f) {
  Smoothed<kX> smoothed;
  bool quick = false;
  if constexpr (Piece<kX>::kTensor) quick = smoothed.make(q, piece);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float xs[kColumns] = {};
    unsigned most = 0;
    if (piece.exists[half]) {
      if constexpr (Piece<kX>::kTensor) {
        split_halves<kColumns>(smoothed.words[half], kX, xs);
        most = largest(xs);
      } else {
        piece.read(q, half);
      }
      if (!quick || !is_ordinary(most)) {
        piece.smooth(q, half, xs);
        most = largest(xs);
      }
    }
    if (kAll || piece.exists[half]) f(half, most, xs);
  }
}

// Codes and scales of a piece.
template <DType kX, bool kE2M1>
__device__ __forceinline__ void encode_piece(const QuantizeParams& p, Piece<kX>& piece) {
  for_each_token<true>(p.args, piece, [&](int half, unsigned most, const float(&xs)[kColumns]) {
    encode_token<kX, kE2M1>(p, piece, half, most, xs);
  });
}

// Hidden values through the tensor cores: x and down are of one 16-bit type.
template <DType kX, int kRank>
struct TensorHidden {
  float sums[kRank / 8][4] = {};

  __device__ __forceinline__ void add_chunk(const Quantize& q, int rank0, const Lane& lane, const Piece<kX>& piece) {
    const unsigned(&x)[2][kColumns / 2] = piece.words;
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
      const int64_t r = rank0 + 8 * j + lane.g;
      unsigned d[kColumns / 2] = {};
      if (r < q.r && piece.column < q.k) {
        const unsigned short* down = static_cast<const unsigned short*>(q.down.data);
        load_words<2 * kColumns>(down + r * q.down.stride + piece.column, d);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned a[4] = {x[0][2 * i], x[1][2 * i], x[0][2 * i + 1], x[1][2 * i + 1]};
        const unsigned b[2] = {d[2 * i], d[2 * i + 1]};
        if constexpr (kX == DType::kBF16) {
          mma_bf16(sums[j], a, b);
        } else {
          mma_f16(sums[j], a, b);
        }
      }
    }
  }

  // f(token of the block, rank of the chunk, sum) for every sum this lane holds.
  template <class F>
  __device__ __forceinline__ void for_each(const Lane& lane, F f) const {
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(lane.g + i / 2 * 8, 8 * j + 2 * lane.t + i % 2, sums[j][i]);
    }
  }
};

// Hidden values in fp32 arithmetic: fp32 activations, or a `down` of another type than x.
template <int kRank>
struct ScalarHidden {
  float sums[2][kRank] = {};

  __device__ __forceinline__ void add_chunk(const Quantize& q, int rank0, const Lane&,
                                            const Piece<DType::kF32>& piece) {
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
      if (rank0 + j >= q.r || piece.column >= q.k) continue;
      float d[kColumns];
      load_floats(q.down.data, q.down.dtype, (rank0 + j) * q.down.stride + piece.column, d);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        sums[0][j] = fused_multiply_add(piece.value(0, i), d[i], sums[0][j]);
        sums[1][j] = fused_multiply_add(piece.value(1, i), d[i], sums[1][j]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each(const Lane& lane, F f) const {
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums[half][j];  // over the columns of four lanes
        sum = add(sum, shuffle_xor(sum, 1));
        sum = add(sum, shuffle_xor(sum, 2));
        if (lane.t == 0) f(lane.g + 8 * half, j, sum);
      }
    }
  }
};

template <DType kX, int kRank>
using Hidden = std::conditional_t<kX != DType::kF32, TensorHidden<kX, kRank>, ScalarHidden<kRank>>;

// Where a sum of a token lies among kRank: in other places for each of eight tokens, so that they are in different banks.
template <int kRank>
__device__ __forceinline__ int place_of(int token, int rank) {
  const int group = kRank % 32 ? token / 2 % 2 : token % 4;  // of 16 sums two tokens fill all banks
  return token * kRank + (rank ^ (8 * group + token / 4 % 2));
}

// Add the warps' sums in their order, and write what exists.
template <DType kX, int kRank>
__device__ __forceinline__ void reduce_hidden(const Quantize& q, int64_t token0, int rank0, const Lane& lane,
                                              const Hidden<kX, kRank>& hidden) {
  float* total = reinterpret_cast<float*>(shared_memory());
  for (int warp = 0; warp < kWarps; ++warp) {
    if (lane.warp == warp) {
      hidden.for_each(lane, [&](int token, int rank, float sum) {
        float* at = total + place_of<kRank>(token, rank);
        st_shared(at, warp ? add(ld_shared(at), sum) : sum);
      });
    }
    barrier();
  }
  for (int i = threadIdx.x; i < kTokens * kRank; i += 32 * kWarps) {
    const int64_t token = token0 + i / kRank, rank = rank0 + i % kRank;
    if (token >= q.m || rank >= q.r) continue;
    st_global(q.hidden + token * q.r + rank, ld_shared(total + place_of<kRank>(i / kRank, i % kRank)));
  }
}

// Two blocks an SM, where the sums leave room for two.
constexpr int blocks_at_once(int rank) { return rank > 32 ? 1 : 2; }

// blockIdx.x counts 16 tokens, blockIdx.y chunks of kRank ranks; the first of those writes codes and scales, by
// `encode(piece)`.
template <DType kX, int kRank, class Encode>
__device__ __forceinline__ void quantize_tokens(const Quantize& q, Encode encode) {
  const Lane lane;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int rank0 = static_cast<int>(blockIdx.y) * kRank;
  const bool encodes = blockIdx.y == 0;
  Hidden<kX, kRank> hidden;

  for (int64_t column0 = lane.warp * kChunk; column0 < q.k; column0 += kWarps * kChunk) {
    Piece<kX> piece(q, token0, column0, lane);
    if (Piece<kX>::kTensor || !encodes) piece.read_both(q);
    if (encodes) encode(piece);
    if (rank0 < q.r) hidden.add_chunk(q, rank0, lane, piece);
  }
  if (rank0 < q.r) reduce_hidden<kX, kRank>(q, token0, rank0, lane, hidden);
}

template <DType kX, bool kE2M1, int kRank>
__global__ void __launch_bounds__(32 * kWarps, blocks_at_once(kRank)) quantize_kernel(QuantizeParams p) {
  quantize_tokens<kX, kRank>(p.args, [&](Piece<kX>& piece) { encode_piece<kX, kE2M1>(p, piece); });
}

}  // namespace svdquant::cuda
