// Exact W4A4 on Hopper: 4-bit integers carried by e4m3, whose products of a warpgroup run at the rate of int8.
//
//   codes [M, K] bytes, scales [M, G], weight_codes [N, K/2], weight_scales [N, G], hidden [M, R], up [N, R], bias [N]
//   out[m, n] = sum over g of (sum over k in g of code * weight) * scales[m, g] * weight_scales[n, g]
//               + hidden[m] . up[n] + bias[n]
//   means: core/reference.py gemm_int4
//
// A group's sum is an integer of at most 64 * 15 * 8 = 7680, below 2^13, and the fp8 products keep 13 bits below the
// largest number they add: no sum loses anything. What is left to do for every 64 columns is one multiplication and one
// multiply-add for each output, without a conversion from integers. A warpgroup does that for one group while the next
// one's product runs.
#pragma once

#include "hopper_pipeline.cuh"

namespace svdquant::cuda {

constexpr int kGroupBytes = 64, kGroupsOfStep = kStepBytes / kGroupBytes;
template <class C>
using W4A4Tile = HopperTile<128, C, kGroupsOfStep * kTileRows * 4>;

struct W4A4Params {
  TensorMap codes, weights, scales, weight_scales;
  TileGrid grid;
  int steps;  // of two groups; the last may have a second one of zeros
  Finish finish;
};

using Sums128 = float[W4A4Tile<Alone>::kSums];

// One group's product, of a stage's first or second 64 bytes.
template <class T>
__device__ __forceinline__ void start_group(const Operands<T>& first, int stage, int group, Sums128& part) {
  wgmma_fence();
#pragma unroll
  for (int bytes = 0; bytes < kGroupBytes; bytes += 32) {
    const int moved = stage * T::kStageBytes + group * kGroupBytes + bytes;
    wgmma_e4m3(part, first.moved(first.acts, moved), first.moved(first.weights, moved), bytes);
  }
  wgmma_commit();
}

// sums += part times both scales of the group.
template <class T>
__device__ __forceinline__ void add_group(const char* stage, int group, const FinishTile<T>& lane, const Sums128& part,
                                          Sums128& sums) {
  const float* acts =
      reinterpret_cast<const float*>(stage + T::kActsBytes + T::kWeightsBytes) + group * kTileRows;
  const float* weights = acts + kGroupsOfStep * kTileRows;
  const float row[2] = {ld_shared(acts + 16 * lane.warp + lane.g), ld_shared(acts + 16 * lane.warp + lane.g + 8)};
#pragma unroll
  for (int j = 0; j < T::kN / 8; ++j) {
    const float2 column = ld_shared(reinterpret_cast<const float2*>(weights + 8 * j) + lane.t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = multiply(row[i / 2], i % 2 ? column.y : column.x);
      sums[4 * j + i] = fused_multiply_add(part[4 * j + i], scale, sums[4 * j + i]);
    }
  }
}

// All groups of a tile. While a step's first group is being added its second one's product runs; during that one's, the
// other warpgroup's products do.
template <class T>
__device__ __forceinline__ void multiply_groups(int steps, StageAt<T>& at, const BlockMemory<T>& memory,
                                                const FinishTile<T>& lane, Sums128& sums) {
  const Operands<T> first(memory, lane.group);
  const Partner<typename T::Cluster> partner;
  for (int step = 0; step < steps; ++step) {
    const char* stage = memory.stages + at.stage * T::kStageBytes;
    Sums128 even = {}, odd = {};  // costs nothing: the first products start from zero anyway
    mbarrier_wait(memory.full + at.stage, at.parity);
    start_group(first, at.stage, 0, even);
    start_group(first, at.stage, 1, odd);
    wgmma_finish<1>(even);
    add_group(stage, 0, lane, even, sums);
    wgmma_finish(odd);
    add_group(stage, 1, lane, odd, sums);
    warp_barrier();  // all lanes have read the scales
    partner.tell(memory.empty + at.stage);
    at.advance();
  }
}

// One step's scales behind the codes, [groups][128] of acts, then of weights: a block of a cluster brings whole groups.
template <class T>
__device__ __forceinline__ void load_scales(const W4A4Params& p, const TileAt& tile, int step, char* stage,
                                            uint64_t* full) {
  using C = typename T::Cluster;
  const C cluster;
  const int act = cluster.column() * (kGroupsOfStep / C::kAcross), weight = cluster.row() * (kGroupsOfStep / C::kDown);
  char* scales = stage + T::kActsBytes + T::kWeightsBytes;
  bring<C::kAcross>(scales + act * kTileRows * 4, &p.scales, tile.row * kTileRows, step * kGroupsOfStep + act, full,
                    cluster.of_row());
  bring<C::kDown>(scales + (kGroupsOfStep + weight) * kTileRows * 4, &p.weight_scales, tile.column * T::kN,
                  step * kGroupsOfStep + weight, full, cluster.of_column());
}

template <class T>
__global__ void SVDQUANT_CLUSTER(T::Cluster::kBlocks) __launch_bounds__(kBlockThreads, 1) w4a4_kernel(
    [[maybe_unused]] const __grid_constant__ W4A4Params p) {
#if SVDQUANT_HOPPER
  const auto load = [&](const TileAt& tile, int step, char* stage, uint64_t* full) {
    load_operands<T>(&p.codes, &p.weights, tile, step, stage, full);
    load_scales<T>(p, tile, step, stage, full);
  };
  const auto multiply = [&](StageAt<T>& at, const BlockMemory<T>& memory, const FinishTile<T>& end,
                            float(&sums)[T::kSums]) {
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) sums[i] = 0.0f;
    multiply_groups(p.steps, at, memory, end, sums);
  };
  run_block<T>(p.grid, p.steps, p.finish, load, multiply);
#endif
}

}  // namespace svdquant::cuda
