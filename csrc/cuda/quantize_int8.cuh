// Activations to int8, one scale a token, and the branch's hidden values.
//
//   x [M, K] fp32 | bf16 | fp16, smooth [K], down [R, K]  ->  codes [M, K] int8, scales [M] fp32, hidden [M, R] fp32
//   means: core/reference.py quantize_int8, to the bit for codes and scales
//
// As in quantize.cuh, but a scale is known only when all of its token was read. So a block reads its 16 tokens twice, the
// second time from the second-level cache: first for the largest of each and for the hidden values, then for the codes.
// Smoothed values are computed again: 16 tokens of them are more than shared memory holds.
#pragma once

#include "quantize.cuh"

namespace svdquant::cuda {

// The largest of the lane's two tokens, from what each lane has seen of them.
__device__ __forceinline__ void share_largest(const Lane& lane, unsigned (&most)[2]) {
  unsigned* seen = reinterpret_cast<unsigned*>(shared_memory());  // [kWarps][kTokens]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    most[half] = largest_of_four(most[half]);
    if (lane.t == 0) st_shared(seen + lane.warp * kTokens + lane.g + 8 * half, most[half]);
  }
  barrier();
#pragma unroll
  for (int i = 0; i < 2 * kWarps; ++i) {
    const unsigned other = ld_shared(seen + i / 2 * kTokens + lane.g + 8 * (i % 2));
    most[i % 2] = other > most[i % 2] ? other : most[i % 2];
  }
  barrier();  // hidden values take the memory next
}

// blockIdx.x counts 16 tokens, blockIdx.y chunks of kRank ranks; the first of those writes codes and scales.
template <DType kX, int kRank>
__global__ void __launch_bounds__(32 * kWarps, blocks_at_once(kRank)) quantize_int8_kernel(QuantizeParams p) {
  const Quantize& q = p.args;
  const Lane lane;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kTokens, first = lane.warp * kChunk;
  const int rank0 = static_cast<int>(blockIdx.y) * kRank;
  const bool encodes = blockIdx.y == 0;
  Hidden<kX, kRank> hidden;
  unsigned most[2] = {};

  for (int64_t column0 = first; column0 < q.k; column0 += kWarps * kChunk) {
    Piece<kX> piece(q, token0, column0, lane);
    if (Piece<kX>::kTensor || !encodes) piece.read_both(q);
    if (encodes) {
      for_each_token<false>(q, piece, [&](int half, unsigned here, const float(&)[kColumns]) {
        most[half] = here > most[half] ? here : most[half];
      });
    }
    if (rank0 < q.r) hidden.add_chunk(q, rank0, lane, piece);
  }
  if (encodes) {
    share_largest(lane, most);
    const float alpha[2] = {multiply(as_float(most[0]), p.inverse), multiply(as_float(most[1]), p.inverse)};
    for (int64_t column0 = first; column0 < q.k; column0 += kWarps * kChunk) {
      Piece<kX> piece(q, token0, column0, lane);
      if (Piece<kX>::kTensor) piece.read_both(q);
      for_each_token<false>(q, piece, [&](int half, unsigned, const float(&xs)[kColumns]) {
        encode_int<Piece<kX>::kTensor>(p, piece.token[half], piece.column, alpha[half], xs);
        if (piece.column == 0) st_global(static_cast<float*>(q.scales) + piece.token[half], alpha[half]);
      });
    }
  }
  if (rank0 < q.r) reduce_hidden<kX, kRank>(q, token0, rank0, lane, hidden);
}

}  // namespace svdquant::cuda
