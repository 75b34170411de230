// W8A8 on Hopper: int8 codes with a scale a token and a scale a row of weights, by products of a warpgroup.
//
//   codes [M, K] int8, scales [M], weight_codes [N, K] int8, weight_scales [N], hidden [M, R], up [N, R], bias [N]
//   out[m, n] = (sum over k of code * weight) * scales[m] * weight_scales[n] + hidden[m] . up[n] + bias[n]
//   means: core/reference.py gemm_int8
//
// Nothing has to be scaled before the sums are complete, so the loop is copies and products only.
#pragma once

#include "hopper_pipeline.cuh"

namespace svdquant::cuda {

struct W8A8Params {
  TensorMap codes, weights;
  TileGrid grid;
  int steps;  // of 128 columns
  Finish finish;
};

// All steps of a tile, one group of products always running while the next is being started.
template <class T>
__device__ __forceinline__ void multiply_s8(int steps, StageAt<T>& at, const BlockMemory<T>& memory, int group,
                                            int (&sums)[T::kSums]) {
  const Operands<T> first(memory, group);
  const Partner<typename T::Cluster> partner;
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    mbarrier_wait(memory.full + at.stage, at.parity);
    wgmma_fence();
#pragma unroll
    for (int bytes = 0; bytes < kStepBytes; bytes += 32) {
      const int moved = at.stage * T::kStageBytes + bytes;
      wgmma_s8(sums, first.moved(first.acts, moved), first.moved(first.weights, moved), true);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (step) partner.tell(memory.empty + previous);
    previous = at.stage;
    at.advance();
  }
  wgmma_finish(sums);
  partner.tell(memory.empty + previous);
}

template <class T>
__global__ void SVDQUANT_CLUSTER(T::Cluster::kBlocks) __launch_bounds__(kBlockThreads, 1) w8a8_kernel(
    [[maybe_unused]] const __grid_constant__ W8A8Params p) {
#if SVDQUANT_HOPPER
  const auto load = [&](const TileAt& tile, int step, char* stage, uint64_t* full) {
    load_operands<T>(&p.codes, &p.weights, tile, step, stage, full);
  };
  const auto multiply = [&](StageAt<T>& at, const BlockMemory<T>& memory, const FinishTile<T>& end,
                            float(&sums)[T::kSums]) {
    int exact[T::kSums] = {};
    multiply_s8(p.steps, at, memory, end.group, exact);
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) sums[i] = to_float(exact[i]);
  };
  run_block<T>(p.grid, p.steps, p.finish, load, multiply);
#endif
}

}  // namespace svdquant::cuda
