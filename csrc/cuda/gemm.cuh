// What the products share: how a block and its warps divide the output, the pipeline, the epilogue.
//
//     out [M, N] = codes [M, K] x weights [N, K]^T, in steps of 64 columns
//
//     block 128 x 64    warp 64 x 32, of m16n8 products: the most sums that leave room for three blocks an SM
//     +-----+-----+
//     |  0  |  1  |     a step's tiles lie in shared memory as in global: a row of activations is 64 bytes of codes,
//     |     |     |     a row of weights 32 bytes of nibbles
//     +-----+-----+
//     |  2  |  3  |
//     |     |     |
//     +-----+-----+
//
// A lane (g, t) takes 16 neighbouring columns 16t..16t+15 of rows g: 16 bytes of activations, 8 of weights. Quarter
// warps then read 128 neighbouring bytes, so plain rows have no bank conflicts and nothing is swizzled; and weights
// are used as they are in the file, no layout has to be prepared.
#pragma once

#include "floats.cuh"
#include "mma.cuh"

namespace svdquant::cuda {

constexpr int kStep = 64;   // columns a step: an int4 group, four nvfp4 groups
constexpr int kStages = 3;  // two steps on their way while one is multiplied; more would halve the blocks on an SM

// kM x kN of the output a block, kWarpM x kWarpN a warp.
template <int kRows, int kColumns, int kRowsOfWarp, int kColumnsOfWarp>
struct Tile {
  static constexpr int kM = kRows, kN = kColumns, kWarpM = kRowsOfWarp, kWarpN = kColumnsOfWarp;
  static constexpr int kWarpsN = kN / kWarpN, kThreads = 32 * kWarpsN * (kM / kWarpM);
  static constexpr int kMs = kWarpM / 16, kNs = kWarpN / 8;  // products m16n8 of a warp
  static constexpr int kStageBytes = kM * kStep + kN * kStep / 2;
};

using LargeTile = Tile<128, 64, 64, 32>;
using SmallTile = Tile<64, 64, 32, 32>;  // few tokens, or an output too small to fill the card with large ones

// Where a lane is in its block and in the output. Blocks that follow each other share their weights.
template <class T>
struct Place {
  int64_t row0, column0;  // of the block
  int warp_row, warp_column, g, t;

  __device__ explicit Place(int64_t m)
      : Place(blockIdx.x % row_blocks(m), static_cast<int64_t>(blockIdx.x / row_blocks(m))) {}

  __device__ Place(int row_block, int64_t column_block) {
    const int warp = threadIdx.x / 32;
    row0 = static_cast<int64_t>(row_block) * T::kM;
    column0 = column_block * T::kN;
    warp_row = warp / T::kWarpsN * T::kWarpM;
    warp_column = warp % T::kWarpsN * T::kWarpN;
    g = threadIdx.x % 32 / 4;
    t = threadIdx.x % 4;
  }

  static __device__ int row_blocks(int64_t m) { return static_cast<int>(ceil_div(m, T::kM)); }
};

// One sum per output of a lane: sums[i][j] is the C fragment of product (i, j) of the warp.
template <class T>
using Sums = float[T::kMs][T::kNs][4];

// One step's codes into a stage; rows that do not exist, and columns beyond K, become zeros.
template <class T>
__device__ __forceinline__ void copy_codes(const Gemm& p, const Place<T>& place, int step, char* stage) {
  constexpr int kPieces = kStep / 16;  // 16 bytes of activations, 8 of weights
  const char* acts = static_cast<const char*>(p.codes);
  for (int i = threadIdx.x; i < T::kM * kPieces; i += T::kThreads) {
    const int64_t row = place.row0 + i / kPieces, column = step * kStep + i % kPieces * 16;
    const bool exists = row < p.m && column < p.k;
    cp_async<16>(stage + i * 16, acts + (exists ? row * p.k + column : 0), exists);
  }
  char* weights = stage + T::kM * kStep;
  for (int i = threadIdx.x; i < T::kN * kPieces; i += T::kThreads) {
    const int64_t row = place.column0 + i / kPieces, column = step * kStep + i % kPieces * 16;
    const bool exists = row < p.n && column < p.k;
    cp_async<8>(weights + i * 8, p.weight_codes + (exists ? row * (p.k / 2) + column / 2 : 0), exists);
  }
}

// Multiply all steps. The stage that is refilled is the one all warps left before the barrier: never refill first, or
// a slow warp reads the next step's codes.
template <class Loop>
__device__ __forceinline__ void run_pipeline(Loop& loop, int steps) {
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) loop.copy(step, static_cast<int>(step));
    cp_async_commit();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    barrier();
    const int next = step + kStages - 1;
    if (next < steps) loop.copy(next, stage ? stage - 1 : kStages - 1);
    cp_async_commit();
    loop.multiply(step, stage);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  barrier();
}

}  // namespace svdquant::cuda
