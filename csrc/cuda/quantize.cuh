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

  // One token's; each when it is wanted, for the sake of registers.
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

  __device__ __forceinline__ float value(int half, int i) const {
    if constexpr (kTensor) {
      return i % 2 ? high_half(words[half][i / 2], kX) : low_half(words[half][i / 2], kX);
    } else {
      return as_float(words[half][i]);
    }
  }

  // round_T(round_T(x + shift) / smooth), zeros where there are none.
  __device__ __forceinline__ void smooth(const Quantize& q, int half, float (&xs)[kColumns]) const {
    float by[kColumns];
    if (exists[half]) load_floats(q.smooth.data, q.smooth.dtype, column, by);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float x = value(half, i), shifted = q.shift != 0.0f ? round_to(add(x, q.shift), dtype) : x;
      xs[i] = exists[half] ? round_to(divide(shifted, by[i]), dtype) : 0.0f;
    }
  }
};

// The largest |v| as bits: the order of non-negative floats is that of their bits, and a NaN is above everything, so
// that it reaches the scale and is seen.
__device__ __forceinline__ unsigned largest(const float (&v)[kColumns]) {
  unsigned most = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const unsigned bits = as_bits(v[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

__device__ __forceinline__ void store_codes(const Quantize& q, int64_t token, int64_t column,
                                            const unsigned (&codes)[kColumns]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = (codes[4 * i] & 255) | (codes[4 * i + 1] & 255) << 8 | (codes[4 * i + 2] & 255) << 16 |
               codes[4 * i + 3] << 24;
  }
  uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(q.codes) + token * q.k + column);
  st_global(to, uint4{words[0], words[1], words[2], words[3]});
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

__device__ __forceinline__ void encode_int(const QuantizeParams& p, int64_t token, int64_t column, float alpha,
                                           const float (&xs)[kColumns]) {
  const float divisor = alpha == 0.0f ? 1.0f : alpha;
  unsigned codes[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const float code = round_to_even(divide(xs[i], divisor));
    codes[i] = static_cast<unsigned>(static_cast<int>(code < p.low ? p.low : code > p.high ? p.high : code));
  }
  store_codes(p.args, token, column, codes);
}

// Integers: four lanes share a group.
__device__ __forceinline__ void encode_int_group(const QuantizeParams& p, DType dtype, int64_t token, int64_t column,
                                                 bool exists, const float (&xs)[kColumns]) {
  const unsigned most = largest_of_four(largest(xs));
  if (!exists) return;
  const float alpha = multiply(as_float(most), p.inverse);
  encode_int(p, token, column, alpha, xs);
  if (column % kChunk == 0) store_one(p.args.scales, dtype, token * (p.args.k / kChunk) + column / kChunk, alpha);
}

// e2m1 to nearest, ties to the even code, the sign of zero kept: 0 .5 1 1.5 2 3 4 6.
__device__ __forceinline__ unsigned to_e2m1(float v) {
  const float a = as_float(as_bits(v) & 0x7fffffff);
  const unsigned index =
      (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
  return index | (as_bits(v) >> 31) << 3;
}

// NVFP4: a lane has a group to itself.
__device__ __forceinline__ void encode_e2m1(const QuantizeParams& p, int64_t token, int64_t column, bool exists,
                                            const float (&xs)[kColumns]) {
  if (!exists) return;
  const float absmax = multiply(as_float(largest(xs)), p.inverse), alpha = absmax > 448.0f ? 448.0f : absmax;
  const float reciprocal = alpha == 0.0f ? 0.0f : divide(1.0f, alpha);
  unsigned codes[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) codes[i] = to_e2m1(multiply(xs[i], reciprocal));
  store_codes(p.args, token, column, codes);
  unsigned char* scales = static_cast<unsigned char*>(p.args.scales) + token * (p.args.k / kColumns);
  st_global(scales + column / kColumns, static_cast<unsigned char>(to_e4m3(alpha)));
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

// Add the warps' sums in their order, and write what exists.
template <DType kX, int kRank>
__device__ __forceinline__ void reduce_hidden(const Quantize& q, int64_t token0, int rank0, const Lane& lane,
                                              const Hidden<kX, kRank>& hidden) {
  float* total = reinterpret_cast<float*>(shared_memory());
  for (int warp = 0; warp < kWarps; ++warp) {
    if (lane.warp == warp) {
      hidden.for_each(lane, [&](int token, int rank, float sum) {
        float* at = total + token * kRank + rank;
        st_shared(at, warp ? add(ld_shared(at), sum) : sum);
      });
    }
    barrier();
  }
  for (int i = threadIdx.x; i < kTokens * kRank; i += 32 * kWarps) {
    const int64_t token = token0 + i / kRank, rank = rank0 + i % kRank;
    if (token < q.m && rank < q.r) st_global(q.hidden + token * q.r + rank, ld_shared(total + i));
  }
}

// Two blocks an SM, where the sums leave room for two.
constexpr int blocks_at_once(int rank) { return rank > 32 ? 1 : 2; }

// blockIdx.x counts 16 tokens, blockIdx.y chunks of kRank ranks; the first of those writes codes and scales.
template <DType kX, bool kE2M1, int kRank>
__global__ void __launch_bounds__(32 * kWarps, blocks_at_once(kRank)) quantize_kernel(QuantizeParams p) {
  const Quantize& q = p.args;
  const Lane lane;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int rank0 = static_cast<int>(blockIdx.y) * kRank;
  Hidden<kX, kRank> hidden;

  for (int64_t column0 = lane.warp * kChunk; column0 < q.k; column0 += kWarps * kChunk) {
    Piece<kX> piece(q, token0, column0, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      piece.read(q, half);
      if (blockIdx.y) continue;
      float xs[kColumns];
      piece.smooth(q, half, xs);
      if constexpr (kE2M1) {
        encode_e2m1(p, piece.token[half], piece.column, piece.exists[half], xs);
      } else {
        encode_int_group(p, piece.dtype, piece.token[half], piece.column, piece.exists[half], xs);
      }
    }
    if (rank0 < q.r) hidden.add_chunk(q, rank0, lane, piece);
  }
  if (rank0 < q.r) reduce_hidden<kX, kRank>(q, token0, rank0, lane, hidden);
}

}  // namespace svdquant::cuda
