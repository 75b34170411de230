// What follows the sums on Hopper: scales, bias, the low-rank branch, the addend, and the one rounding to the output's
// type.
//
// Three warps bring what a tile's columns need while the tile is being multiplied: weight scales and bias as fp32, and
// 32 ranks at a time of `up` as bf16. The branch is computed on the registers that hold the sums, by the same split of
// each factor into two bf16 as in epilogue.cuh: hidden's halves with up's high one and, where `up` has more bits than
// one bf16, hidden's high half with up's low one in a turn of its own.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "hopper_grid.cuh"

namespace svdquant::cuda {

constexpr int kSideThreads = 96;

struct Finish {
  int m, n, r;
  const float* scales;         // [M] or null, where the sums are scaled already
  const float* weight_scales;  // [N] or null
  const float* hidden;         // [M, R]   contiguous
  Floats up;                   // [N, R]
  Floats bias;                 // [N] or no data
  Floats addend;               // [M, N] fp32 or no data
  Output out;                  // [M, N]
};

// What the three warps bring for a tile: scales and bias with the first turn, 32 ranks with each, high halves and low
// ones in turns of their own.
struct Sides {
  int halves, turns;

  __device__ __forceinline__ explicit Sides(const Finish& p) {
    halves = p.up.dtype == DType::kBF16 ? 1 : 2;
    turns = p.r ? static_cast<int>(ceil_div(p.r, kRanksAtOnce)) * halves : 1;
  }
  __device__ __forceinline__ int rank(int turn) const { return turn / halves * kRanksAtOnce; }
  __device__ __forceinline__ bool is_low(int turn) const { return turn % halves; }
};

// ---- the three warps ----

template <class T>
__device__ __forceinline__ void bring_vectors(const Finish& p, const BlockMemory<T>& memory, int column0) {
  for (int i = threadIdx.x - 32; i < T::kN; i += kSideThreads) {
    const int column = column0 + i;
    const bool exists = column < p.n;
    st_shared(memory.scale + i, p.weight_scales && exists ? ld_global(p.weight_scales + column) : 1.0f);
    st_shared(memory.bias + i, p.bias.data && exists ? load_one(p.bias.data, p.bias.dtype, column) : 0.0f);
  }
}

// Eight neighbouring ranks of a row of up as bf16, zeros where there are none.
__device__ __forceinline__ uint4 up_piece(const Finish& p, int64_t row, int rank, bool low) {
  unsigned words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row >= p.n || rank + i >= p.r) continue;
    const Halves v = split(load_one(p.up.data, p.up.dtype, row * p.up.stride + rank + i));
    words[i / 2] |= static_cast<unsigned>(low ? v.low : v.high) << 16 * (i % 2);
  }
  return {words[0], words[1], words[2], words[3]};
}

// The same where it is one load.
__device__ __forceinline__ uint4 wide_up_piece(const Finish& p, int64_t row, int rank) {
  if (row >= p.n || rank >= p.r) return {};
  const unsigned short* up = static_cast<const unsigned short*>(p.up.data);
  return ld_global(reinterpret_cast<const uint4*>(up + row * p.up.stride + rank));
}

// 32 ranks of the tile's rows of up, in eights of rows and pieces of eight ranks.
template <class T>
__device__ __forceinline__ void bring_up(const Finish& p, const BlockMemory<T>& memory, int column0, int rank0,
                                         bool low) {
  constexpr int kPieces = kRanksAtOnce / 8;
  const auto place = [&](int row, int piece) {
    return reinterpret_cast<uint4*>(memory.up) + row / 8 * (8 * kPieces) + piece * 8 + row % 8;
  };
  const int first = threadIdx.x - 32, piece = first % kPieces;  // the same in each round
  static_assert(kSideThreads % kPieces == 0);
  if (p.up.dtype == DType::kBF16 && p.up.stride % 8 == 0 && p.r % 8 == 0 && is_aligned(p.up.data, 16)) {
#pragma unroll 4
    for (int row = first / kPieces; row < T::kN; row += kSideThreads / kPieces) {
      st_shared(place(row, piece), wide_up_piece(p, column0 + row, rank0 + 8 * piece));
    }
  } else {
#pragma unroll 1
    for (int row = first / kPieces; row < T::kN; row += kSideThreads / kPieces) {
      st_shared(place(row, piece), up_piece(p, column0 + row, rank0 + 8 * piece, low));
    }
  }
}

template <class T>
__device__ __forceinline__ void bring_sides(const TileGrid& grid, const Finish& p, const BlockMemory<T>& memory) {
  const Sides sides(p);
  unsigned parity = 0;
  for (Walk<T> walk(grid); walk.goes_on(); walk.advance()) {
    const int column0 = walk.at().column * T::kN;
    for (int turn = 0; turn < sides.turns; ++turn) {
      mbarrier_wait(memory.side_empty, parity ^ 1);
      if (turn == 0) bring_vectors(p, memory, column0);
      if (p.r) bring_up(p, memory, column0, sides.rank(turn), sides.is_low(turn));
      async_proxy_fence();
      mbarrier_arrive(memory.side_full);
      parity ^= 1;
    }
  }
}

// ---- the warps that have the sums ----

// A lane's hidden values of 32 ranks: [16 ranks][row of two][8 ranks][two neighbours].
struct HiddenPiece {
  float v[2][2][2][2];
};

// A lane's part of a tile: rows g and g + 8 of its warp's sixteen, columns 8j + 2t and the next.
template <class T>
struct FinishTile {
  const Finish& p;
  const BlockMemory<T>& memory;
  int group, warp, g, t;  // warp counts all eight
  int row0, column0;      // of the warp's rows, of the tile
  float scale[2];

  __device__ __forceinline__ FinishTile(const Finish& args, const BlockMemory<T>& block, const TileAt& at)
      : p(args), memory(block) {
    warp = threadIdx.x / 32 - 4, group = warp / 4;
    g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    row0 = at.row * kTileRows + 16 * warp;
    column0 = at.column * T::kN;
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = p.scales && row(i) < p.m ? ld_global(p.scales + row(i)) : 1.0f;
  }

  __device__ __forceinline__ int row(int i) const { return row0 + g + 8 * i; }

  __device__ __forceinline__ HiddenPiece load_hidden(int rank0) const {
    HiddenPiece h = {};
    const bool pairs = p.r % 2 == 0 && is_aligned(p.hidden, 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int step = i / 4, lower = i / 2 % 2, half = i % 2;
      const int rank = rank0 + 16 * step + 8 * half + 2 * t;
      const int64_t at = static_cast<int64_t>(row(lower)) * p.r + rank;
      float(&to)[2] = h.v[step][lower][half];
      if (row(lower) >= p.m || rank >= p.r) continue;
      if (pairs) {
        const float2 v = ld_global(reinterpret_cast<const float2*>(p.hidden + at));
        to[0] = v.x, to[1] = v.y;
      } else {
        to[0] = ld_global(p.hidden + at);
        if (rank + 1 < p.r) to[1] = ld_global(p.hidden + at + 1);
      }
    }
    return h;
  }

  // All of the branch and the store; sums are already scaled by what varies with K.
  __device__ __forceinline__ void run(const HiddenPiece& first, unsigned& parity, float (&sums)[T::kSums]) const {
    const Sides sides(p);
    HiddenPiece hidden = first;
    mbarrier_wait(memory.side_full, parity);
    scale_and_bias(sums);
    for (int turn = 0; turn < sides.turns; ++turn) {
      if (turn) mbarrier_wait(memory.side_full, parity);
      if (p.r) multiply_ranks(hidden, sides.is_low(turn), sums);
      release();
      parity ^= 1;
      if (turn + 1 < sides.turns && !sides.is_low(turn + 1)) hidden = load_hidden(sides.rank(turn + 1));
    }
    if (p.addend.data) add_addend(sums);
    store(sums);
  }

  __device__ __forceinline__ void scale_and_bias(float (&sums)[T::kSums]) const {
#pragma unroll
    for (int j = 0; j < T::kN / 8; ++j) {
      const float2 w = ld_shared(reinterpret_cast<const float2*>(memory.scale + 8 * j) + t);
      const float2 b = ld_shared(reinterpret_cast<const float2*>(memory.bias + 8 * j) + t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = sums[4 * j + i];
        sum = fused_multiply_add(multiply(sum, scale[i / 2]), i % 2 ? w.y : w.x, i % 2 ? b.y : b.x);
      }
    }
  }

  // sums += hidden x up^T, 32 ranks.
  __device__ __forceinline__ void multiply_ranks(const HiddenPiece& hidden, bool low_up,
                                                 float (&sums)[T::kSums]) const {
    unsigned high[2][4], low[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float(&v)[2] = hidden.v[i / 4][i % 2][i / 2 % 2];
      const Halves a = split(v[0]), b = split(v[1]);
      high[i / 4][i % 4] = a.high | static_cast<unsigned>(b.high) << 16;
      low[i / 4][i % 4] = low_up ? 0 : a.low | static_cast<unsigned>(b.low) << 16;
    }
    const unsigned up = shared_address(memory.up);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint64_t ranks = operand(up + step * 256, Rows::kPlain, 16 * kRanksAtOnce, 128);
      wgmma_bf16(sums, high[step], ranks);
      wgmma_bf16(sums, low[step], ranks);
    }
    wgmma_commit();
    wgmma_finish(sums);
  }

  // This warp has read what the three warps brought.
  __device__ __forceinline__ void release() const {
    warp_barrier();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(memory.side_empty);
  }

  // Four lanes read 32 bytes of a row, a sector.
  __device__ __forceinline__ void add_addend(float (&sums)[T::kSums]) const {
#pragma unroll
    for (int j = 0; j < T::kN / 8; ++j) {
      const int column = column0 + 8 * j + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row(i) >= p.m || column >= p.n) continue;
        const float2 more = load_addend(p.addend, row(i), column, p.n);
        float* pair = sums + 4 * j + 2 * i;
        pair[0] = add(pair[0], more.x), pair[1] = add(pair[1], more.y);
      }
    }
  }

  __device__ __forceinline__ void store(const float (&sums)[T::kSums]) const {
    switch (p.out.dtype) {
      case DType::kF32: return store_as<DType::kF32>(sums);
      case DType::kBF16: return store_as<DType::kBF16>(sums);
      default: return store_as<DType::kF16>(sums);
    }
  }

  // Eight rows of 128 bytes at a time go through shared memory, to leave it as whole lines.
  template <DType kType>
  __device__ __forceinline__ void store_as(const float (&sums)[T::kSums]) const {
    constexpr int kBytes = kType == DType::kF32 ? 4 : 2, kAtOnce = 128 / kBytes;
    char* rows = memory.store + warp * kStoreRows * kStoreRowBytes;
#pragma unroll
    for (int first = 0; first < T::kN; first += kAtOnce) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
        for (int column = first; column < first + kAtOnce && column < T::kN; column += 8) {
          char* to = rows + g * kStoreRowBytes + (column - first + 2 * t) * kBytes;
          const float a = sums[column / 2 + 2 * lower], b = sums[column / 2 + 2 * lower + 1];
          if constexpr (kType == DType::kF32) {
            st_shared(reinterpret_cast<float2*>(to), float2{a, b});
          } else {
            st_shared(reinterpret_cast<unsigned*>(to),
                      output_bits(kType, a) | static_cast<unsigned>(output_bits(kType, b)) << 16);
          }
        }
        warp_barrier();
        store_rows<kBytes>(rows, row0 + 8 * lower, column0 + first, T::kN - first);
        warp_barrier();
      }
    }
  }

  // Up to 128 bytes of each of eight rows from shared memory to the output, 16 bytes a lane.
  template <int kBytes>
  __device__ __forceinline__ void store_rows(const char* rows, int row, int column, int columns) const {
    constexpr int kAtOnce = 16 / kBytes;
    const int pieces = columns * kBytes >= 128 ? 8 : columns / kAtOnce;
    for (int i = threadIdx.x % 32; i < kStoreRows * pieces; i += 32) {
      const int to_row = row + i / pieces, to_column = column + i % pieces * kAtOnce;
      if (to_row >= p.m || to_column >= p.n) continue;
      const char* from = rows + i / pieces * kStoreRowBytes + i % pieces * 16;
      char* to = static_cast<char*>(p.out.data) + (to_row * p.out.stride + to_column) * kBytes;
      if (to_column + kAtOnce <= p.n && is_aligned(to, 16)) {
        st_global(reinterpret_cast<uint4*>(to), ld_shared(reinterpret_cast<const uint4*>(from)));
      } else {
        store_singles<kBytes>(from, to, p.n - to_column);
      }
    }
  }

  template <int kBytes>
  __device__ __forceinline__ void store_singles(const char* from, char* to, int count) const {
    using Bits = std::conditional_t<kBytes == 4, unsigned, unsigned short>;
#pragma unroll
    for (int i = 0; i < 16 / kBytes; ++i) {
      if (i < count) st_global(reinterpret_cast<Bits*>(to) + i, ld_shared(reinterpret_cast<const Bits*>(from) + i));
    }
  }
};

}  // namespace svdquant::cuda
