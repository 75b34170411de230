// A tile of a product on Hopper: who has which part of it, and what lies where in a block's shared memory.
//
//     block 128 x N    warpgroup 64 x N    warp 16 x N         N = 256, 192, 128 or 96
//     +-----------+
//     |     0     |    a step is 128 bytes of K: rows of 128 bytes, in the order that the copy engine's swizzle makes
//     |-----------|    and wgmma reads
//     |     1     |
//     +-----------+
//
// One block an SM takes tile after tile, so that one tile's first copies run while another's last numbers are stored.
#pragma once

#include "hopper_cluster.cuh"
#include "sizes.cuh"

namespace svdquant::cuda {

constexpr int kTileRows = 128, kStepBytes = 128;
constexpr int kGroups = 2;                       // warpgroups that multiply
constexpr int kBlockThreads = 128 * (1 + kGroups);  // the first one brings operands
// Of a thread: at the start what a block alone on an SM gets, in eights; later what warpgroups hand on to each other. One
// that asks for more than there is waits for ever.
constexpr int kStartRegisters = 65536 / kBlockThreads / 8 * 8;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= (1 + kGroups) * kStartRegisters, "registers");

constexpr int kRanksAtOnce = 32;                          // of the branch
constexpr int kStoreRows = 8, kStoreRowBytes = 128 + 16;  // what a warp stores at once; 16 more keep banks apart
constexpr int kSharedLimit = 227 * 1024, kSwizzleBytes = 1024;

// kScaleBytes: scales that come with a step's codes, of acts and as many of weights.
template <int kColumns, class C = Alone, int kScaleBytes = 0>
struct HopperTile {
  using Cluster = C;
  static constexpr int kN = kColumns;
  static constexpr int kSums = kN / 2;  // of a thread
  static constexpr bool kRegistersToSpare = kScaleBytes == 0;  // with scales go sums of single groups
  static constexpr int kActRows = kTileRows / C::kAcross, kWeightRows = kN / C::kDown;  // that a block brings
  static_assert(kActRows % 8 == 0 && kWeightRows % 8 == 0, "swizzled rows come in eights");
  static constexpr int kActsBytes = kTileRows * kStepBytes, kWeightsBytes = kN * kStepBytes;
  static constexpr int kStageBytes = kActsBytes + kWeightsBytes + 2 * kScaleBytes;
  static constexpr int kUpBytes = kN * kRanksAtOnce * 2;
  static constexpr int kStoreBytes = kGroups * 4 * kStoreRows * kStoreRowBytes;
  static constexpr int kFixedBytes = kUpBytes + 2 * kN * 4 + kStoreBytes + 256;  // 256 for barriers
  static constexpr int kStages = (kSharedLimit - kSwizzleBytes - kFixedBytes) / kStageBytes;
  static constexpr int kSharedBytes = kSwizzleBytes + kStages * kStageBytes + kFixedBytes;
  static_assert(kStages >= 4 && (2 * kStages + 2) * 8 <= 256 && kStageBytes % kSwizzleBytes == 0, "shared memory");
};

// Where things are in a block's memory. Stages begin at multiples of 1024, which swizzled rows need.
template <class T>
struct BlockMemory {
  char* stages;
  char* up;      // [kN / 8][ranks / 8][8][8] bf16
  float* scale;  // [kN] of weights
  float* bias;   // [kN]
  char* store;   // [8 warps][8][144] bytes
  uint64_t* full;  // [stages]
  uint64_t* empty;
  uint64_t* side_full;
  uint64_t* side_empty;

  __device__ __forceinline__ BlockMemory() {
    char* memory = shared_memory();
    stages = memory + (kSwizzleBytes - shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
    up = stages + T::kStages * T::kStageBytes;
    scale = reinterpret_cast<float*>(up + T::kUpBytes);
    bias = scale + T::kN;
    store = reinterpret_cast<char*>(bias + T::kN);
    full = reinterpret_cast<uint64_t*>(store + T::kStoreBytes);
    empty = full + T::kStages;
    side_full = empty + T::kStages;
    side_empty = side_full + 1;
  }
};

}  // namespace svdquant::cuda
