// W4A4 of one layer, GELU, and the quantizer of the next layer, without the 16-bit activations between them in memory.
//
//   what gemm_int4.cuh or nvfp4_stages.cuh takes; of the next layer smooth [N], down [R', N]
//   y = the product, with branch and bias, rounded;  x = gelu(y), rounded
//   x -> codes [M, N] bytes, scales [M, N/64] or [M, N/16], hidden [M, R'] fp32
//   means: core/reference.py gemm_int4_gelu, gemm_nvfp4_gelu
//
// A block's tile is 64 columns wide: a group of the next layer, or four of NVFP4. It lays its x into shared memory, where
// the pipeline's stages are done with, and its warps take it up again as the quantizer's do, 16 tokens by 64 columns
// each, in the very functions of quantize.cuh:
//
//     sums                         x in shared memory              quantized
//     +-----------+                +-----------+                   +-----------+  16 tokens
//     |  warp 0   |   bias, GELU   |  16 bits  |                   |  warp 0   |
//     +-----------+  ----------->  |           |  --------------->  +-----------+
//     |  warp 1   |                |           |                   |  warp 1   |
//     |    ...    |                |           |                   |    ...    |
//
// The hidden values are sums over all of N, of which a block sees 64 columns. It walks over several tiles of a row of
// tiles and adds theirs in memory of its own, which the second-level cache keeps; a second kernel adds what the blocks
// have, in their order. No atomics: the same input gives the same bits.
#pragma once

#include "gemm_int4.cuh"
#include "gemm_mxf4.cuh"
#include "gemm_nvfp4.cuh"
#include "quantize.cuh"

namespace svdquant::cuda {

struct GeluParams {
  Gemm product;
  QuantizeParams next;
  float* parts;        // [blocks of a row][M, R'], or next.hidden where there is but one
  int walk;            // tiles a block takes
};

// GELU by tanh as torch computes it, in fp32.
__device__ __forceinline__ float gelu(float x) {
  const float cube = multiply(multiply(x, x), x);
  const float inner = multiply(0.7978845608f, fused_multiply_add(0.044715f, cube, x));  // sqrt(2 / pi)
  return multiply(multiply(0.5f, x), add(1.0f, hyperbolic_tangent(inner)));
}

// A tile of x in shared memory, rows 16 bytes apart besides: neither side meets a bank twice.
template <class T>
struct GeluTile {
  static constexpr int kRow = T::kN + 8, kBytes = T::kM * kRow * 2;
  static_assert(T::kN == kChunk && kBytes <= kStages * T::kStageBytes);
};

// x = gelu(sums + bias), rounded before and after, into the tile.
template <class T, DType kX>
__device__ __forceinline__ void lay_out_gelu(const Gemm& p, const Place<T>& place, const Sums<T>& sums,
                                             unsigned short* tile) {
#pragma unroll
  for (int j = 0; j < T::kNs; ++j) {
    const int column = place.warp_column + 8 * j + 2 * place.t;
    float b[2] = {};
    if (p.bias.data) {
      b[0] = load_one(p.bias.data, p.bias.dtype, place.column0 + column);
      b[1] = load_one(p.bias.data, p.bias.dtype, place.column0 + column + 1);
    }
#pragma unroll
    for (int i = 0; i < T::kMs * 2; ++i) {
      unsigned pair = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float y = low_half(output_bits(kX, add(sums[i / 2][j][i % 2 * 2 + e], b[e])), kX), x = gelu(y);
        pair |= static_cast<unsigned>(kX == DType::kBF16 ? to_bf16(x) : to_f16(x)) << 16 * e;
      }
      const int row = place.warp_row + 8 * i + place.g;
      st_shared(reinterpret_cast<unsigned*>(tile + row * GeluTile<T>::kRow + column), pair);
    }
  }
}

// 32 of the next layer's ranks for 16 tokens: what these 64 columns add to their hidden values.
template <DType kX>
__device__ __forceinline__ void add_hidden(const GeluParams& p, int64_t token0, int rank0, const Lane& lane,
                                           const Piece<kX>& piece, float* part, bool first) {
  TensorHidden<kX, 32> hidden;
  hidden.add_chunk(p.next.args, rank0, lane, piece);
  hidden.for_each(lane, [&](int token, int rank, float sum) {
    if (token0 + token >= p.next.args.m || rank0 + rank >= p.next.args.r) return;
    float* to = part + (token0 + token) * p.next.args.r + rank0 + rank;
    st_global(to, first ? sum : add(ld_own(to), sum));
  });
}

// Codes, scales and the part of hidden values of 16 tokens of the tile.
template <class T, DType kX, bool kE2M1>
__device__ __forceinline__ void quantize_gelu(const GeluParams& p, const Place<T>& place, int slice,
                                              const unsigned short* tile, float* part, bool first) {
  const Lane lane;
  const int64_t token0 = place.row0 + slice * kTokens;
  Piece<kX> piece(p.next.args, token0, place.column0, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = slice * kTokens + lane.g + 8 * half;
    const uint4* from = reinterpret_cast<const uint4*>(tile + row * GeluTile<T>::kRow + lane.t * kColumns);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = ld_shared(from + i);
      unsigned* to = &piece.words[half][4 * i];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  }
  encode_piece<kX, kE2M1>(p.next, piece);
  for (int rank0 = 0; rank0 < p.next.args.r; rank0 += 32) add_hidden(p, token0, rank0, lane, piece, part, first);
}

// One tile: the product, and what becomes of it in the same format.
template <class Loop, DType kX>
__device__ __forceinline__ void run_gelu_tile(const GeluParams& p, int column_block, int run, bool first) {
  using T = typename Loop::Shape;
  const Place<T> place(blockIdx.x % Place<T>::row_blocks(p.product.m), column_block);
  unsigned short* tile = reinterpret_cast<unsigned short*>(shared_memory());
  {
    Loop loop(p.product, place);
    sum_up(loop);
    lay_out_gelu<T, kX>(p.product, place, loop.sums, tile);
  }
  barrier();
  float* part = p.parts + run * p.product.m * p.next.args.r;
  for (int slice = threadIdx.x / 32; slice < T::kM / kTokens; slice += T::kThreads / 32) {
    quantize_gelu<T, kX, Loop::kE2M1>(p, place, slice, tile, part, first);
  }
  barrier();
}

// Three would fit beside an integer product alone; with what is done between tiles, some registers would go to memory.
constexpr int kGeluBlocksAtOnce = 2;

// One block a run of tiles in a row of tiles.
template <class Loop, DType kX>
__global__ void __launch_bounds__(Loop::Shape::kThreads, kGeluBlocksAtOnce) gemm_gelu_kernel(GeluParams p) {
  if constexpr (Loop::kExists && (kX == DType::kF16 || kHasBf16)) {
    using T = typename Loop::Shape;
    const int run = blockIdx.x / Place<T>::row_blocks(p.product.m), tiles = static_cast<int>(p.product.n / T::kN);
    for (int i = 0; i < p.walk && run * p.walk + i < tiles; ++i) {
      run_gelu_tile<Loop, kX>(p, run * p.walk + i, run, i == 0);
    }
  }
}

struct PartsParams {
  const float* parts;  // [count][size]
  float* sums;         // [size]
  int64_t count, size;
};

// One thread a hidden value.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(PartsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.size) return;
  float sum = ld_global(p.parts + i);
  for (int64_t part = 1; part < p.count; ++part) sum = add(sum, ld_global(p.parts + part * p.size + i));
  st_global(p.sums + i, sum);
}

}  // namespace svdquant::cuda
