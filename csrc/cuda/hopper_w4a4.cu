// Starting exact W4A4 on Hopper: weights as e4m3 in scratch memory, then the product. Activations come so.
#include "cuda_launch.h"
#include "hopper_expand.cuh"
#include "hopper_map.cuh"
#include "hopper_occupancy.cuh"
#include "hopper_w4a4.cuh"

namespace svdquant::cuda {

// Weights in scratch memory: codes, then scales. K is a multiple of 64, so both begin at a multiple of 16.
inline const char* expand_weights(const Gemm& args, int sms, const Launch& launch, Expand& e) {
  const int64_t groups = args.k / kGroupBytes, scale_row = ceil_div(args.n, 4) * 4;
  auto* memory = static_cast<unsigned char*>(scratch(launch, args.n * args.k + scale_row * groups * 4));
  if (!memory || !is_aligned(memory, 16)) return "no scratch memory";
  const int64_t needed = ceil_div(args.n * (args.k / 16), kExpandThreads), most = 16 * static_cast<int64_t>(sms);
  auto* scales = reinterpret_cast<float*>(memory + args.n * args.k);
  e = {args.weight_codes, args.weight_scales, args.n, args.k, memory, scales, scale_row,
       static_cast<int>(needed < most ? needed : most)};
  return run(expand_kernel<kGroupBytes>, {e.blocks, 1, kExpandThreads, 0}, launch, e);
}

// Boxes of an operand's codes, of whose rows so many blocks bring a part each, and of its scales, of which they bring
// groups.
struct CarriedOperand {
  const void* codes;   // [rows, K] e4m3
  const void* scales;  // [G, scale_row] fp32
  int64_t rows, k, scale_row;

  const char* encode(int blocks, TensorMap& to_codes, TensorMap& to_scales) const {
    if (const char* problem = encode_map({codes, rows, k, k, kTileRows / blocks, kStepBytes, 1}, to_codes)) {
      return problem;
    }
    const int groups = kGroupsOfStep / blocks;
    return encode_map({scales, k / kGroupBytes, rows, scale_row * 4, groups, kTileRows, 4}, to_scales);
  }
};

template <class C>
const char* run_w4a4(const Gemm& args, const TileShape& shape, const Expand& e, int sms, const Launch& launch) {
  using T = W4A4Tile<C>;
  static_assert(T::kN == kTileRows, "one box for both operands");
  W4A4Params p = {};
  Grid grid = {0, 1, kBlockThreads, T::kSharedBytes, C::kBlocks};
  p.grid = divide(args.m, args.n, shape, clusters_at_once(w4a4_kernel<T>, grid, sms));
  grid.x = p.grid.workers * C::kBlocks;
  p.steps = static_cast<int>(ceil_div(args.k, kStepBytes));
  p.finish = {static_cast<int>(args.m), static_cast<int>(args.n), static_cast<int>(args.r), nullptr, nullptr,
              args.hidden, args.up, args.bias, args.addend, args.out};
  const CarriedOperand acts = {args.codes, args.scales.data, args.m, args.k, args.scales.stride};
  const CarriedOperand weights = {e.to_codes, e.to_scales, args.n, args.k, e.scale_row};
  const char* problem = acts.encode(C::kAcross, p.codes, p.scales);
  if (!problem) problem = weights.encode(C::kDown, p.weights, p.weight_scales);
  return problem ? problem : run(w4a4_kernel<T>, grid, launch, p);
}

const char* gemm_int4_hopper(const Gemm& args, bool in_clusters, const Launch& launch) {
  if (device_arch() != 90) return "this card has no products of warpgroups";
  if (args.m == 0 || args.n == 0) return nullptr;
  if (!is_aligned(args.codes, 16)) return "codes must begin at a multiple of 16 bytes";
  if (!is_aligned(args.weight_codes, 8)) return "weight codes must begin at a multiple of 8 bytes";
  const int sms = multiprocessors();
  Expand e = {};
  if (const char* problem = expand_weights(args, sms, launch, e)) return problem;
  const TileShape shape = choose_w4a4_tile(args.m, args.n, sms, in_clusters);
  return shape.down == 2 ? run_w4a4<Cluster<2, 2>>(args, shape, e, sms, launch)
                         : run_w4a4<Alone>(args, shape, e, sms, launch);
}

}  // namespace svdquant::cuda
