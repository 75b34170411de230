// W8A8 with one scale a token and one a row, on 8-bit tensor cores.
//
//   codes [M, K] int8, scales [M], weight_codes [N, K] int8, weight_scales [N], hidden [M, R], up [N, R], bias [N]
//   out[m, n] = (sum over k of code * weight) * weight_scales[n] * scales[m] + hidden[m] . up[n] + bias[n]
//   means: core/reference.py gemm_int8
//
// Nothing is scaled inside the sum, so it stays an integer in the registers of the products, exact for any K below
// 2^31 / 127^2, and the loop is copies, loads and products alone. It is gemm.cuh's, with a larger tile:
//
//     block 128 x 128    warp 64 x 64: a byte from shared memory serves 64 products instead of 43, and a step keeps
//     +-----+-----+      the tensor cores busy while the next but one arrives
//     |  0  |  1  |
//     +-----+-----+      a step's tiles lie in shared memory as in global, a row is 64 bytes of codes on both sides
//     |  2  |  3  |
//     +-----+-----+
#pragma once

#include "epilogue.cuh"

namespace svdquant::cuda {

template <int kRows, int kColumns, int kRowsOfWarp, int kColumnsOfWarp>
struct WideTile : Tile<kRows, kColumns, kRowsOfWarp, kColumnsOfWarp> {
  static constexpr int kStageBytes = (kRows + kColumns) * kStep;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

using LargeWideTile = WideTile<128, 128, 64, 64>;
using SmallWideTile = WideTile<64, 64, 32, 32>;

template <class T>
struct Int8Loop {
  static constexpr int kPieces = kStep / 16;  // 16 bytes: what a lane copies at once, and what it multiplies

  const GemmInt8& p;
  const Place<T>& place;
  char* memory;
  TileCodes<T, 16> codes;
  int sums[T::kMs][T::kNs][4] = {};

  __device__ __forceinline__ Int8Loop(const GemmInt8& args, const Place<T>& at)
      : p(args), place(at), memory(shared_memory()), codes(args, at) {}

  __device__ __forceinline__ void copy(int step, int stage) {
    codes.copy(step, memory + stage * T::kStageBytes);
  }

  // A lane's 16 columns are two products of 32: words 0 and 1 of every lane, then words 2 and 3.
  __device__ __forceinline__ void multiply(int, int stage) {
    const uint4* acts = reinterpret_cast<const uint4*>(memory + stage * T::kStageBytes);
    const uint4* weights = acts + T::kM * kPieces;
    uint4 b[T::kNs];
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      b[j] = ld_shared(weights + (place.warp_column + 8 * j + place.g) * kPieces + place.t);
    }
#pragma unroll
    for (int i = 0; i < T::kMs; ++i) {
      const int row = place.warp_row + 16 * i + place.g;
      const uint4 upper = ld_shared(acts + row * kPieces + place.t);
      const uint4 lower = ld_shared(acts + (row + 8) * kPieces + place.t);
      const unsigned first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < T::kNs; ++j) {
        mma_s8(sums[i][j], first, {b[j].x, b[j].y});
        mma_s8(sums[i][j], second, {b[j].z, b[j].w});
      }
    }
  }

  // The sums as numbers; rows and columns that do not exist become zero.
  __device__ __forceinline__ void scale(Sums<T>& to) const {
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      const int64_t column = place.column0 + place.warp_column + 8 * j + 2 * place.t;
      float w[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column + e < p.n) w[e] = ld_global(p.weight_scales + column + e);
      }
#pragma unroll
      for (int i = 0; i < T::kMs; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) to[i][j][e] = cuda::multiply(static_cast<float>(sums[i][j][e]), w[e % 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < T::kMs * 2; ++i) {
      const int64_t row = place.row0 + place.warp_row + 8 * i + place.g;
      const float s = row < p.m ? ld_global(p.scales + row) : 0.0f;
#pragma unroll
      for (int j = 0; j < T::kNs; ++j) {
#pragma unroll
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) to[i / 2][j][e] = cuda::multiply(to[i / 2][j][e], s);
      }
    }
  }
};

// Two blocks an SM, which hide each other's barriers.
template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) gemm_int8_kernel(GemmInt8 p) {
  const Place<T> place(p.m);
  Sums<T> sums;
  {
    Int8Loop<T> loop(p, place);
    run_pipeline(loop, static_cast<int>(ceil_div(p.k, kStep)));
    loop.scale(sums);
  }
  add_branch<T>(p, place, sums);
  store_sums<T>(p, place, sums);
}

}  // namespace svdquant::cuda
