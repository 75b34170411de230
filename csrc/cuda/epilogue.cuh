// What follows the sums: the low-rank branch, the bias, the addend, and the one rounding to the output's type. Args is
// Gemm or GemmInt8, which name alike what this needs of them.
//
// The branch's hidden values are fp32, tensor cores take 16 bits: each number v is split into two, high = round(v) and
// low = round(v - high), and the products of high with high, low with high and, where `up` has more bits than one half
// holds, high with low are added. With bf16 halves 16 bits of v remain, an error of 2^-17, against 2^-9 in kernels that
// round once.
#pragma once

#include "gemm.cuh"

namespace svdquant::cuda {

constexpr int kRanks = 16;  // k of one product

// Halves on this card: bf16 has fp32's range; Turing has fp16 only, whose numbers end at 65504.
struct Halves {
  unsigned short high, low;
};

__device__ __forceinline__ Halves split(float v) {
  if constexpr (kHasBf16) {
    const unsigned short high = to_bf16(v);
    return {high, to_bf16(add(v, -from_bf16(high)))};
  }
  const auto saturate = [](float x) { return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x; };
  const unsigned short high = to_f16(saturate(v));
  return {high, to_f16(saturate(add(v, -from_f16(high))))};
}

// Four of a row's 16 ranks: two registers of a fragment.
__device__ __forceinline__ uint2 load_ranks(const char* half, int row, int t) {
  return ld_shared(reinterpret_cast<const uint2*>(half + row * 2 * kRanks + 8 * t));
}

__device__ __forceinline__ void mma_half(float (&c)[4], const uint2 (&rows)[2], const uint2& column) {
  const unsigned a[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y}, b[2] = {column.x, column.y};
  if constexpr (kHasBf16) {
    mma_bf16(c, a, b);
  } else {
    mma_f16(c, a, b);
  }
}

// The multiplication of 16 staged ranks.
template <class T>
__device__ __forceinline__ void multiply_ranks(const Place<T>& place, const char* memory, bool low_up, Sums<T>& sums) {
  const char* hidden[2] = {memory, memory + T::kM * 2 * kRanks};
  const char* up[2] = {memory + T::kM * 4 * kRanks, memory + T::kM * 4 * kRanks + T::kN * 2 * kRanks};
  uint2 b[2][T::kNs];
#pragma unroll
  for (int j = 0; j < T::kNs; ++j) {
    b[0][j] = load_ranks(up[0], place.warp_column + 8 * j + place.g, place.t);
    b[1][j] = load_ranks(up[1], place.warp_column + 8 * j + place.g, place.t);
  }
#pragma unroll
  for (int i = 0; i < T::kMs; ++i) {
    const int row = place.warp_row + 16 * i + place.g;
    const uint2 high[2] = {load_ranks(hidden[0], row, place.t), load_ranks(hidden[0], row + 8, place.t)};
    const uint2 low[2] = {load_ranks(hidden[1], row, place.t), load_ranks(hidden[1], row + 8, place.t)};
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      mma_half(sums[i][j], high, b[0][j]);
      mma_half(sums[i][j], low, b[0][j]);
      if (low_up) mma_half(sums[i][j], high, b[1][j]);
    }
  }
}

// 16 ranks of the block's rows of hidden and of up: [kM][16] high halves, as many low ones, then [kN][16] twice.
template <class T, class Args>
__device__ __forceinline__ void stage_ranks(const Args& p, const Place<T>& place, int64_t rank0, char* memory) {
  constexpr int kPairs = kRanks / 2;
#pragma unroll 2
  for (int i = threadIdx.x; i < (T::kM + T::kN) * kPairs; i += T::kThreads) {
    const bool is_up = i >= T::kM * kPairs;
    const int slot = is_up ? i - T::kM * kPairs : i;
    const int64_t row = (is_up ? place.column0 : place.row0) + slot / kPairs, rank = rank0 + slot % kPairs * 2;
    const Floats from = {is_up ? p.up.data : p.hidden, is_up ? p.up.dtype : DType::kF32, is_up ? p.up.stride : p.r};
    float v[2] = {};
    if (row < (is_up ? p.n : p.m)) {
      if (rank < p.r) v[0] = load_one(from.data, from.dtype, row * from.stride + rank);
      if (rank + 1 < p.r) v[1] = load_one(from.data, from.dtype, row * from.stride + rank + 1);
    }
    const Halves a = split(v[0]), b = split(v[1]);
    unsigned* to = reinterpret_cast<unsigned*>(memory + (is_up ? T::kM * 4 * kRanks : 0)) + slot;
    st_shared(to, a.high | static_cast<unsigned>(b.high) << 16);
    st_shared(to + (is_up ? T::kN : T::kM) * kPairs, a.low | static_cast<unsigned>(b.low) << 16);
  }
}

// sums += hidden x up^T. The pipeline's memory is free by now.
template <class T, class Args>
__device__ __forceinline__ void add_branch(const Args& p, const Place<T>& place, Sums<T>& sums) {
  char* memory = shared_memory();
  const bool low_up = p.up.dtype != (kHasBf16 ? DType::kBF16 : DType::kF16);
  for (int64_t rank0 = 0; rank0 < p.r; rank0 += kRanks) {
    stage_ranks<T>(p, place, rank0, memory);
    barrier();
    multiply_ranks<T>(place, memory, low_up, sums);
    barrier();
  }
}

// Two neighbours of a row, of which the second may not exist, in one store where their address allows it.
__device__ __forceinline__ void store_pair(const Output& out, int64_t row, int64_t column, int64_t n, float a,
                                           float b) {
  const bool pair = column + 1 < n;
  const int64_t at = row * out.stride + column;
  if (out.dtype == DType::kF32) {
    float* to = static_cast<float*>(out.data) + at;
    if (pair && is_aligned(to, 8)) return st_global(reinterpret_cast<float2*>(to), float2{a, b});
  } else {
    unsigned short* to = static_cast<unsigned short*>(out.data) + at;
    const unsigned low = output_bits(out.dtype, a), high = output_bits(out.dtype, b);
    if (pair && is_aligned(to, 4)) return st_global(reinterpret_cast<unsigned*>(to), low | high << 16);
  }
  store_output(out, row, column, a);
  if (pair) store_output(out, row, column + 1, b);
}

// Two neighbours of a row of the addend, of which the second may not exist.
__device__ __forceinline__ float2 load_addend(const Floats& addend, int64_t row, int64_t column, int64_t n) {
  const float* from = static_cast<const float*>(addend.data) + row * addend.stride + column;
  const bool pair = column + 1 < n;
  if (pair && is_aligned(from, 8)) return ld_global(reinterpret_cast<const float2*>(from));
  return {ld_global(from), pair ? ld_global(from + 1) : 0.0f};
}

// out = sums + bias + addend.
template <class T, class Args>
__device__ __forceinline__ void store_sums(const Args& p, const Place<T>& place, const Sums<T>& sums) {
  const Floats& bias = p.bias;
#pragma unroll
  for (int j = 0; j < T::kNs; ++j) {
    const int64_t column = place.column0 + place.warp_column + 8 * j + 2 * place.t;
    if (column >= p.n) continue;
    float b[2] = {};
    if (bias.data) {
      b[0] = load_one(bias.data, bias.dtype, column);
      if (column + 1 < p.n) b[1] = load_one(bias.data, bias.dtype, column + 1);
    }
#pragma unroll
    for (int i = 0; i < T::kMs * 2; ++i) {
      const int64_t row = place.row0 + place.warp_row + 8 * i + place.g;
      if (row >= p.m) continue;
      const float* pair = &sums[i / 2][j][i % 2 * 2];
      float2 v = {add(pair[0], b[0]), add(pair[1], b[1])};
      if (p.addend.data) {
        const float2 more = load_addend(p.addend, row, column, p.n);
        v = {add(v.x, more.x), add(v.y, more.y)};
      }
      store_pair(p.out, row, column, p.n, v.x, v.y);
    }
  }
}

}  // namespace svdquant::cuda
