// What the products share: how a block and its warps divide the output, the pipeline, the epilogue.
//
//     out [M, N] = codes [M, K] x weights [N, K]^T, in steps of 64 columns
//
//     block 128 x 64    warp 32 x 64, of m16n8 products: the most sums that leave room for three blocks an SM, and
//     +-----------+     codes of activations, which take work before they are multiplied, are taken by one warp alone
//     |     0     |
//     +-----------+     a step's tiles lie in shared memory as in global: a row of activations is 64 bytes of codes,
//     |     1     |     a row of weights 32 bytes of nibbles
//     +-----------+
//     |     2     |
//     +-----------+
//     |     3     |
//     +-----------+
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

using LargeTile = Tile<128, 64, 32, 64>;
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

// The low nibbles of four bytes below those of four others.
__device__ __forceinline__ unsigned join_nibbles(unsigned low, unsigned high) {
  return choose_bits(0x0F0F0F0F, low, high << 4);
}

// Codes of one operand on their way into stages, step after step: kRows rows, of which a step takes four pieces of kBytes
// each, one or more a thread.
template <int kRows, int kBytes, int kThreads>
struct CodeRows {
  static constexpr int kPieces = 4, kAtOnce = kThreads / kPieces, kCopies = kRows / kAtOnce;
  static_assert(kRows % kAtOnce == 0);

  const char* codes;
  const char* from;  // this thread's first piece of the next step
  int64_t row0, rows, row_bytes;

  __device__ __forceinline__ CodeRows(const void* data, int64_t first, int64_t count, int64_t bytes)
      : codes(static_cast<const char*>(data)), row0(first), rows(count), row_bytes(bytes) {
    from = codes + (row0 + threadIdx.x / kPieces) * row_bytes + threadIdx.x % kPieces * kBytes;
  }

  __device__ __forceinline__ bool all_exist() const { return row0 + kRows <= rows; }

  // Where all rows and columns exist: an address a copy and no more.
  __device__ __forceinline__ void copy_whole(char* stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async<kBytes>(stage + (threadIdx.x + i * kThreads) * kBytes, from + i * kAtOnce * row_bytes, true);
    }
    from += kPieces * kBytes;
  }

  // Rows that do not exist, and columns beyond K, become zeros.
  __device__ __forceinline__ void copy_part(int step, char* stage) const {
    const int64_t at = (static_cast<int64_t>(step) * kPieces + threadIdx.x % kPieces) * kBytes;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row = row0 + threadIdx.x / kPieces + i * kAtOnce;
      const bool exists = row < rows && at < row_bytes;
      cp_async<kBytes>(stage + (threadIdx.x + i * kThreads) * kBytes, codes + (exists ? row * row_bytes + at : 0), exists);
    }
  }
};

// Both operands: a stage holds the activations' rows, then the weights'. kWeightBytes is what 16 columns of one take.
template <class T, int kWeightBytes>
struct TileCodes {
  CodeRows<T::kM, 16, T::kThreads> acts;
  CodeRows<T::kN, kWeightBytes, T::kThreads> weights;
  int whole_steps;  // nearly all tiles and steps are whole

  template <class Args>
  __device__ __forceinline__ TileCodes(const Args& p, const Place<T>& place)
      : acts(p.codes, place.row0, p.m, p.k),
        weights(p.weight_codes, place.column0, p.n, p.k / 16 * kWeightBytes),
        whole_steps(acts.all_exist() && weights.all_exist() ? static_cast<int>(p.k / kStep) : 0) {}

  __device__ __forceinline__ void copy(int step, char* stage) {
    char* behind = stage + T::kM * kStep;
    if (step < whole_steps) {
      acts.copy_whole(stage);
      weights.copy_whole(behind);
    } else {
      acts.copy_part(step, stage);
      weights.copy_part(step, behind);
    }
  }
};

// Multiply all steps. The stage that is refilled is the one all warps left before the barrier: never refill first, or
// a slow warp reads the next step's codes.
template <class Loop>
__device__ __forceinline__ void run_pipeline(Loop& loop, int steps) {
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) loop.copy(step, step);
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
