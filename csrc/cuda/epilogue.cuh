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

// All sums of a tile: its steps, what they are multiplied by at the end, the branch.
template <class Loop>
__device__ __forceinline__ void sum_up(Loop& loop) {
  run_pipeline(loop, loop.steps());
  loop.finish();
  add_branch<typename Loop::Shape>(loop.p, loop.place, loop.sums);
}

// Two neighbours of a row of the addend, of which the second may not exist.
__device__ __forceinline__ float2 load_addend(const Floats& addend, int64_t row, int64_t column, int64_t n) {
  const float* from = static_cast<const float*>(addend.data) + row * addend.stride + column;
  const bool pair = column + 1 < n;
  if (pair && is_aligned(from, 8)) return ld_global(reinterpret_cast<const float2*>(from));
  return {ld_global(from), pair ? ld_global(from + 1) : 0.0f};
}

__device__ __forceinline__ float2 load_bias(const Floats& bias, int64_t column, int64_t n) {
  float2 b = {};
  if (bias.data && column < n) b.x = load_one(bias.data, bias.dtype, column);
  if (bias.data && column + 1 < n) b.y = load_one(bias.data, bias.dtype, column + 1);
  return b;
}

// Two neighbours of a row in fp32, of which any may not exist.
__device__ __forceinline__ void store_floats(const Output& out, int64_t row, int64_t column, int64_t n, float2 v) {
  float* to = static_cast<float*>(out.data) + row * out.stride + column;
  if (column + 1 < n && is_aligned(to, 8)) return st_global(reinterpret_cast<float2*>(to), v);
  if (column < n) st_global(to, v.x);
  if (column + 1 < n) st_global(to + 1, v.y);
}

// Four neighbours of a row in 16 bits, likewise.
__device__ __forceinline__ void store_halves(const Output& out, int64_t row, int64_t column, int64_t n, uint2 words) {
  unsigned short* to = static_cast<unsigned short*>(out.data) + row * out.stride + column;
  if (column + 3 < n && is_aligned(to, 8)) return st_global(reinterpret_cast<uint2*>(to), words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned word = i < 2 ? words.x : words.y;
    if (column + i < n) st_global(to + i, static_cast<unsigned short>(i % 2 ? word >> 16 : word));
  }
}

// Two products' pairs of a row, 8 columns apart, to memory. Halves change places first: of two neighbouring lanes one
// takes both pairs of the first product, one those of the second, so that four lanes write 32 bytes, a sector, at once.
__device__ __forceinline__ void store_pairs(const Output& out, int64_t row, int64_t rows, int64_t column, int64_t n,
                                            const float2 (&v)[2]) {
  if (out.dtype == DType::kF32) {
    if (row >= rows) return;
    store_floats(out, row, column, n, v[0]);
    store_floats(out, row, column + 8, n, v[1]);
    return;
  }
  const unsigned first = output_pair(out.dtype, v[0].x, v[0].y), second = output_pair(out.dtype, v[1].x, v[1].y);
  const bool odd = threadIdx.x % 2;
  const unsigned other = shuffle_xor(odd ? first : second, 1);
  if (row >= rows) return;
  store_halves(out, row, odd ? column + 6 : column, n, odd ? uint2{other, second} : uint2{first, other});
}

// out = sums + bias + addend.
template <class T, class Args>
__device__ __forceinline__ void store_sums(const Args& p, const Place<T>& place, const Sums<T>& sums) {
#pragma unroll
  for (int j = 0; j < T::kNs; j += 2) {
    const int64_t column = place.column0 + place.warp_column + 8 * j + 2 * place.t;
    const float2 bias[2] = {load_bias(p.bias, column, p.n), load_bias(p.bias, column + 8, p.n)};
#pragma unroll
    for (int i = 0; i < T::kMs * 2; ++i) {
      const int64_t row = place.row0 + place.warp_row + 8 * i + place.g;
      float2 v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float* pair = &sums[i / 2][j + e][i % 2 * 2];
        v[e] = {add(pair[0], bias[e].x), add(pair[1], bias[e].y)};
        if (!p.addend.data || row >= p.m || column + 8 * e >= p.n) continue;
        const float2 more = load_addend(p.addend, row, column + 8 * e, p.n);
        v[e] = {add(v[e].x, more.x), add(v[e].y, more.y)};
      }
      store_pairs(p.out, row, p.m, column, p.n, v);
    }
  }
}

// A tile from the first step to the output.
template <class Loop>
__device__ __forceinline__ void multiply_tile(const Gemm& p) {
  const Place<typename Loop::Shape> place(p.m);
  Loop loop(p, place);
  sum_up(loop);
  store_sums<typename Loop::Shape>(p, place, loop.sums);
}

}  // namespace svdquant::cuda
