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
  const bool speaker = threadIdx.x % 32 == 0;
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
    if (step && speaker) mbarrier_arrive(memory.empty + previous);
    previous = at.stage;
    at.advance();
  }
  wgmma_finish(sums);
  if (speaker) mbarrier_arrive(memory.empty + previous);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1) w8a8_kernel(
    [[maybe_unused]] const __grid_constant__ W8A8Params p) {
#if SVDQUANT_HOPPER
  const auto load = [&](const TileAt& tile, int step, char* stage, uint64_t* full) {
    tma_load(stage, &p.codes, step * kStepBytes, tile.row * kTileRows, full);
    tma_load(stage + T::kActsBytes, &p.weights, step * kStepBytes, tile.column * T::kN, full);
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

template <int kColumns>
const char* run_w8a8(const GemmInt8& args, int sms, const Launch& launch) {
  using T = HopperTile<kColumns>;
  W8A8Params p = {};
  p.grid = {static_cast<int>(ceil_div(args.m, kTileRows)), static_cast<int>(ceil_div(args.n, T::kN)), sms};
  if (p.grid.tiles() < sms) p.grid.blocks = static_cast<int>(p.grid.tiles());
  p.steps = static_cast<int>(ceil_div(args.k, kStepBytes));
  p.finish = {static_cast<int>(args.m), static_cast<int>(args.n), static_cast<int>(args.r), args.scales,
              args.weight_scales, args.hidden, args.up, args.bias, args.addend, args.out};
  const char* problem = encode_map({args.codes, args.m, args.k, args.k, kTileRows, kStepBytes, 1}, p.codes);
  if (!problem) problem = encode_map({args.weight_codes, args.n, args.k, args.k, T::kN, kStepBytes, 1}, p.weights);
  if (problem) return problem;
  return run(w8a8_kernel<T>, {p.grid.blocks, 1, kBlockThreads, T::kSharedBytes}, launch, p);
}

const char* gemm_int8_hopper(const GemmInt8& args, const Launch& launch) {
  if (device_arch() != 90) return "this card has no products of warpgroups";
  if (args.m == 0 || args.n == 0) return nullptr;
  if (args.k % 16) return "rows of codes must be a multiple of 16 bytes";
  if (!is_aligned(args.codes, 16) || !is_aligned(args.weight_codes, 16)) {
    return "codes must begin at a multiple of 16 bytes";
  }
  const int sms = multiprocessors();
  switch (choose_tile_columns(args.m, args.n, sms)) {
    case 256: return run_w8a8<256>(args, sms, launch);
    case 192: return run_w8a8<192>(args, sms, launch);
    case 128: return run_w8a8<128>(args, sms, launch);
    default: return run_w8a8<96>(args, sms, launch);
  }
}

}  // namespace svdquant::cuda
