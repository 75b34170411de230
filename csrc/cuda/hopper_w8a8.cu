// W8A8 on Hopper: int8 codes with a scale a token and a scale a row of weights, by products of a warpgroup.
//
//   codes [M, K] int8, scales [M], weight_codes [N, K] int8, weight_scales [N], hidden [M, R], up [N, R], bias [N]
//   out[m, n] = (sum over k of code * weight) * scales[m] * weight_scales[n] + hidden[m] . up[n] + bias[n]
//   means: core/reference.py gemm_int8
//
// Nothing has to be scaled before the sums are complete, so the loop is copies and products only.
#include "cuda_launch.h"
#include "hopper_map.cuh"
#include "hopper_pipeline.cuh"
#include "run.cuh"

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

template <int kColumns, class C>
const char* run_w8a8(const GemmInt8& args, const TileShape& shape, int sms, const Launch& launch) {
  using T = HopperTile<kColumns, C>;
  W8A8Params p = {};
  Grid grid = {0, 1, kBlockThreads, T::kSharedBytes, C::kBlocks};
  p.grid = divide(args.m, args.n, shape, clusters_at_once(w8a8_kernel<T>, grid, sms));
  grid.x = p.grid.workers * C::kBlocks;
  p.steps = static_cast<int>(ceil_div(args.k, kStepBytes));
  p.finish = {static_cast<int>(args.m), static_cast<int>(args.n), static_cast<int>(args.r), args.scales,
              args.weight_scales, args.hidden, args.up, args.bias, args.addend, args.out};
  const char* problem = encode_map({args.codes, args.m, args.k, args.k, T::kActRows, kStepBytes, 1}, p.codes);
  if (!problem) {
    problem = encode_map({args.weight_codes, args.n, args.k, args.k, T::kWeightRows, kStepBytes, 1}, p.weights);
  }
  return problem ? problem : run(w8a8_kernel<T>, grid, launch, p);
}

using Pair = Cluster<2, 1>;

template <class C>
const char* run_w8a8_columns(const GemmInt8& args, const TileShape& shape, int sms, const Launch& launch) {
  switch (shape.columns) {
    case 256: return run_w8a8<256, C>(args, shape, sms, launch);
    case 192: return run_w8a8<192, C>(args, shape, sms, launch);
    case 128: return run_w8a8<128, C>(args, shape, sms, launch);
    default: return run_w8a8<96, C>(args, shape, sms, launch);
  }
}

const char* gemm_int8_hopper(const GemmInt8& args, bool in_clusters, const Launch& launch) {
  if (device_arch() != 90) return "this card has no products of warpgroups";
  if (args.m == 0 || args.n == 0) return nullptr;
  if (args.k % 16) return "rows of codes must be a multiple of 16 bytes";
  if (!is_aligned(args.codes, 16) || !is_aligned(args.weight_codes, 16)) {
    return "codes must begin at a multiple of 16 bytes";
  }
  const int sms = multiprocessors();
  const TileShape shape = choose_w8a8_tile(args.m, args.n, sms, in_clusters);
  return shape.down == 2 ? run_w8a8_columns<Pair>(args, shape, sms, launch)
                         : run_w8a8_columns<Alone>(args, shape, sms, launch);
}

}  // namespace svdquant::cuda
