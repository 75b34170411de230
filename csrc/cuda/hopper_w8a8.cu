// Starting W8A8 on Hopper: its tile, its grid, and the maps of both operands.
#include "cuda_launch.h"
#include "hopper_map.cuh"
#include "hopper_occupancy.cuh"
#include "hopper_w8a8.cuh"

namespace svdquant::cuda {

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
