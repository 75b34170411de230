// Activations to integers of four bits as exact W4A4 on Hopper reads them, and the branch's hidden values.
//
//   x [M, K] fp32 | bf16 | fp16, smooth [K], down [R, K]
//   ->  codes [M, K] e4m3, scales [G, M] fp32 of scale_row numbers a row, hidden [M, R] fp32
//   means: core/reference.py quantize_int4, quantize_int4_unsigned: the same numbers
//
// As in quantize.cuh; only what is stored differs. An integer from -15 to 15 is exact in e4m3, so the product's copies
// bring codes as they lie. Scales lie as it reads them, a group's side by side: a warp writes those of its 16 tokens
// as 64 bytes.
#pragma once

#include "hopper_ptx.cuh"
#include "quantize.cuh"

namespace svdquant::cuda {

// Sixteen integers, each kMagicBits more than it is.
__device__ __forceinline__ void store_e4m3(const Quantize& q, int64_t token, int64_t column,
                                           const unsigned (&codes)[kColumns]) {
  unsigned words[kColumns / 4];
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    float v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = add(as_float(codes[4 * i + e]), -kMagic);
    words[i] = to_e4m3x2(v[0], v[1]) | to_e4m3x2(v[2], v[3]) << 16;
  }
  store_bytes(q, token, column, words);
}

template <DType kX>
__device__ __forceinline__ void carry_piece(const QuantizeParams& p, Piece<kX>& piece) {
  for_each_token<true>(p.args, piece, [&](int half, unsigned largest_of_lane, const float(&xs)[kColumns]) {
    const unsigned most = largest_of_four(largest_of_lane);
    if (!piece.exists[half]) return;
    const float alpha = multiply(as_float(most), p.inverse);
    unsigned codes[kColumns];
    find_integers<kX != DType::kF32>(p, alpha, xs, codes);
    store_e4m3(p.args, piece.token[half], piece.column, codes);
    if (piece.column % kChunk) return;
    float* scales = static_cast<float*>(p.args.scales) + piece.column / kChunk * p.args.scale_row;
    st_global(scales + piece.token[half], round_to(alpha, piece.dtype));
  });
}

template <DType kX, int kRank>
__global__ void __launch_bounds__(32 * kWarps, blocks_at_once(kRank)) quantize_e4m3_kernel(
    [[maybe_unused]] QuantizeParams p) {
#if SVDQUANT_HOPPER
  quantize_tokens<kX, kRank>(p.args, [&](Piece<kX>& piece) { carry_piece<kX>(p, piece); });
#endif
}

}  // namespace svdquant::cuda
