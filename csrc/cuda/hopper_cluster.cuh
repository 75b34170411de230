// Blocks that work side by side on Hopper, so that what several of them read comes once from the second-level cache.
//
//     2 x 2 blocks     blocks of one row multiply the same tokens, blocks of one column the same weights: each brings
//     +---+---+        a part of both, and the copy engine delivers it to all of its row, or of its column
//     | 0 | 1 |
//     +---+---+
//     | 2 | 3 |
//     +---+---+
#pragma once

#include "hopper_ptx.cuh"

namespace svdquant::cuda {

template <int kRows, int kColumns>
struct Cluster {
  static constexpr int kDown = kRows, kAcross = kColumns, kBlocks = kDown * kAcross;
  static constexpr int kPartners = kDown + kAcross - 1;  // whom a block sends to and receives from, itself included
  static_assert(kBlocks <= 8, "more than every card can have");

  int rank = kBlocks == 1 ? 0 : cluster_rank();

  __device__ __forceinline__ int row() const { return rank / kAcross; }
  __device__ __forceinline__ int column() const { return rank % kAcross; }

  // A bit for each block of this one's row, and of its column.
  __device__ __forceinline__ unsigned of_row() const { return ((1u << kAcross) - 1) << row() * kAcross; }
  __device__ __forceinline__ unsigned of_column() const {
    unsigned blocks = 0;
#pragma unroll
    for (int i = 0; i < kDown; ++i) blocks |= 1u << i * kAcross;
    return blocks << column();
  }

  // One of kPartners: first those of the row, then the others of the column.
  __device__ __forceinline__ int partner(int i) const {
    if (i < kAcross) return row() * kAcross + i;
    const int other = i - kAcross;
    return (other < row() ? other : other + 1) * kAcross + column();
  }
};

using Alone = Cluster<1, 1>;

// All threads of all blocks have come this far.
template <class C>
__device__ __forceinline__ void meet() {
  if constexpr (C::kBlocks == 1) {
    barrier();
  } else {
    cluster_barrier();
  }
}

// A box for this block, or for all of a mask that has so many.
template <int kBlocks>
__device__ __forceinline__ void bring(char* to, const TensorMap* map, int column, int row, uint64_t* b, unsigned mask) {
  if constexpr (kBlocks == 1) {
    tma_load(to, map, column, row, b);
  } else {
    tma_multicast(to, map, column, row, b, mask);
  }
}

// What each warp says to all who write to this block's stages. Lanes share that out.
template <class C>
struct Partner {
  int rank;
  bool exists;

  __device__ __forceinline__ Partner() {
    const int lane = threadIdx.x % 32;
    exists = lane < C::kPartners;
    rank = exists ? C().partner(lane) : 0;
  }

  // This warp has read what the barrier stands for.
  __device__ __forceinline__ void tell(uint64_t* empty) const {
    if constexpr (C::kBlocks == 1) {
      if (exists) mbarrier_arrive(empty);
    } else {
      if (exists) mbarrier_arrive_at(empty, rank);
    }
  }
};

}  // namespace svdquant::cuda
