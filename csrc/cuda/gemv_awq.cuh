// W4A16 for few tokens: modulation layers, which read every weight for one token.
//
//   x [M, K], weight_codes [N, K/2], weight_scales [N, K/group], zeros [N, K/group], bias [N]  ->  out [M, N]
//   out[m, n] = sum over groups of (scale * sum of code * x + zero * sum of x) + bias
//   means: core/reference.py gemv_awq
//
// Time is that of reading the weights, so a lane does little with each: a warp reads 256 columns of four rows, 4 bytes
// a lane and row. A nibble becomes a float where it stands: with the exponent of 2^23 above it, nibble i of a half word
// reads 2^23 + code * 16^i, one subtraction leaves code * 16^i, and x lies in shared memory divided by 16^i already,
// which is exact. Tokens beyond eight take another block.
#pragma once

#include "floats.cuh"

namespace svdquant::cuda {

constexpr int kWarps = 8;
constexpr int kRows = 4;      // of a warp: loads in the air together
constexpr int kTokens = 8;    // of a block
constexpr int kWord = 8;      // columns of a lane: one word of nibbles
constexpr int kStep = 256;    // columns of a warp
constexpr int kPanel = 1024;  // columns of x in shared memory: 32 KB for eight tokens, granted by every card

// Where column c of a panel lies: of every second 32 columns fours change places with their neighbours, so that the first
// four columns of eight lanes are in different banks.
__device__ __forceinline__ int turned(int c) { return c ^ c / 32 % 2 * 4; }

// x of a panel as fp32, column c divided by 16^(c % 4): [tokens][kPanel]. Zeros where nothing is.
template <int kM>
__device__ __forceinline__ void stage_tokens(const Gemv& p, int64_t token0, int64_t column0, float* to) {
  for (int i = threadIdx.x; i < kM * kPanel; i += 32 * kWarps) {
    const int64_t token = token0 + i / kPanel, column = column0 + i % kPanel;
    float x = 0.0f;
    if (token < p.m && column < p.k) x = load_one(p.x.data, p.x.dtype, token * p.x.stride + column);
    st_shared(to + turned(i), multiply(x, as_float((127u - 4 * (i % 4)) << 23)));
  }
}

// Eight codes, column i times 16^(i % 4).
__device__ __forceinline__ void widen_codes(unsigned word, float (&codes)[kWord]) {
  constexpr unsigned kExponent = 0x4B000000;  // 2^23
#pragma unroll
  for (int i = 0; i < kWord; ++i) {
    const unsigned half = i < 4 ? word : word >> 16;
    codes[i] = add(as_float((half & 0xFu << 4 * (i % 4)) | kExponent), -8388608.0f);
  }
}

// blockIdx.x counts kWarps * kRows outputs, blockIdx.y kM tokens.
template <int kM>
__global__ void __launch_bounds__(32 * kWarps, 2) gemv_awq_kernel(Gemv p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * kM;
  float* panel = reinterpret_cast<float*>(shared_memory());
  float sums[kRows][kM] = {};

  for (int64_t column0 = 0; column0 < p.k; column0 += kPanel) {
    barrier();  // everybody is done with the panel before
    stage_tokens<kM>(p, token0, column0, panel);
    barrier();
    for (int step = 0; step < kPanel; step += kStep) {
      const int64_t column = column0 + step + lane * kWord;
      if (column >= p.k) continue;
      float scale[kRows], zero[kRows];
      unsigned words[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = row0 + r < p.n ? row0 + r : p.n - 1;  // the last row again: no branch, not stored
        const int64_t group = column / p.group;
        words[r] = ld_global(reinterpret_cast<const unsigned*>(p.weight_codes + (row * p.k + column) / 2));
        scale[r] = load_one(p.weight_scales.data, p.weight_scales.dtype, row * p.weight_scales.stride + group);
        zero[r] = load_one(p.zeros.data, p.zeros.dtype, row * p.zeros.stride + group);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float* from = panel + m * kPanel + step;
        const float4 low = ld_shared(reinterpret_cast<const float4*>(from + turned(lane * kWord)));
        const float4 high = ld_shared(reinterpret_cast<const float4*>(from + turned(lane * kWord + 4)));
        const float x[kWord] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float plain[4] = {add(x[0], x[4]), add(x[1], x[5]), add(x[2], x[6]), add(x[3], x[7])};
        const float total = fused_multiply_add(  // of x itself
            plain[3], 4096.0f, fused_multiply_add(plain[2], 256.0f, fused_multiply_add(plain[1], 16.0f, plain[0])));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float codes[kWord], dot = 0.0f;
          widen_codes(words[r], codes);
#pragma unroll
          for (int i = 0; i < kWord; ++i) dot = fused_multiply_add(codes[i], x[i], dot);
          sums[r][m] = fused_multiply_add(dot, scale[r], fused_multiply_add(total, zero[r], sums[r][m]));
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      float sum = sums[r][m];
#pragma unroll
      for (int mask = 16; mask; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
      const int64_t row = row0 + r, token = token0 + m;
      if (lane != 0 || row >= p.n || token >= p.m) continue;
      if (p.bias.data) sum = add(sum, load_one(p.bias.data, p.bias.dtype, row));
      if (p.addend.data) sum = add(sum, load_one(p.addend.data, DType::kF32, token * p.addend.stride + row));
      store_output(p.out, token, row, sum);
    }
  }
}

}  // namespace svdquant::cuda
