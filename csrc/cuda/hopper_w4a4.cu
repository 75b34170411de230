// Starting exact W4A4 on Hopper: both operands as e4m3 in scratch memory, then the product.
#include "cuda_launch.h"
#include "hopper_expand.cuh"
#include "hopper_map.cuh"
#include "hopper_occupancy.cuh"
#include "hopper_w4a4.cuh"

namespace svdquant::cuda {

// Scratch memory for both operands: codes, then scales.
struct Expanded {
  Expand acts, weights;
  int64_t bytes;

  explicit Expanded(const Gemm& args) {
    const auto row = [](int64_t rows) { return ceil_div(rows, 4) * 4; };
    const NibbleTable& of_acts = args.kind == Codes::kUint4 ? kUnsignedNibbles : kSignedNibbles;
    acts = {args.codes, false, of_acts, args.scales, args.m, args.k, nullptr, nullptr, row(args.m), 0};
    weights = {args.weight_codes, true, kSignedNibbles, args.weight_scales, args.n, args.k, nullptr, nullptr,
               row(args.n), 0};
    bytes = (args.m + args.n) * args.k + (acts.scale_row + weights.scale_row) * (args.k / kGroupBytes) * 4;
  }

  // K is a multiple of 64, so everything begins at a multiple of 16.
  void place(void* memory) {
    acts.to_codes = static_cast<unsigned char*>(memory);
    weights.to_codes = acts.to_codes + acts.rows * acts.k;
    acts.to_scales = reinterpret_cast<float*>(weights.to_codes + weights.rows * weights.k);
    weights.to_scales = acts.to_scales + acts.scale_row * (acts.k / kGroupBytes);
  }
};

// Boxes of the codes of so many rows, and of the scales that as many blocks share out by groups.
inline const char* run_expand(Expand p, int sms, const Launch& launch) {
  const int64_t needed = ceil_div(p.rows * (p.k / 16), kExpandThreads), most = 16 * static_cast<int64_t>(sms);
  p.blocks = static_cast<int>(needed < most ? needed : most);
  return run(expand_kernel<64>, {p.blocks, 1, kExpandThreads, 0}, launch, p);
}

inline const char* encode_expanded(const Expand& e, int blocks, TensorMap& codes, TensorMap& scales) {
  const char* problem = encode_map({e.to_codes, e.rows, e.k, e.k, kTileRows / blocks, kStepBytes, 1}, codes);
  if (problem) return problem;
  const int groups = kGroupsOfStep / blocks;
  return encode_map({e.to_scales, e.k / kGroupBytes, e.rows, e.scale_row * 4, groups, kTileRows, 4}, scales);
}

template <class C>
const char* run_w4a4(const Gemm& args, const TileShape& shape, const Expanded& from, int sms, const Launch& launch) {
  using T = W4A4Tile<C>;
  static_assert(T::kN == kTileRows, "one box for both operands");
  W4A4Params p = {};
  Grid grid = {0, 1, kBlockThreads, T::kSharedBytes, C::kBlocks};
  p.grid = divide(args.m, args.n, shape, clusters_at_once(w4a4_kernel<T>, grid, sms));
  grid.x = p.grid.workers * C::kBlocks;
  p.steps = static_cast<int>(ceil_div(args.k, kStepBytes));
  p.finish = {static_cast<int>(args.m), static_cast<int>(args.n), static_cast<int>(args.r), nullptr, nullptr,
              args.hidden, args.up, args.bias, args.addend, args.out};
  const char* problem = encode_expanded(from.acts, C::kAcross, p.codes, p.scales);
  if (!problem) problem = encode_expanded(from.weights, C::kDown, p.weights, p.weight_scales);
  return problem ? problem : run(w4a4_kernel<T>, grid, launch, p);
}

const char* gemm_int4_hopper(const Gemm& args, bool in_clusters, const Launch& launch) {
  if (device_arch() != 90) return "this card has no products of warpgroups";
  if (args.m == 0 || args.n == 0) return nullptr;
  if (!is_aligned(args.codes, 16)) return "codes must begin at a multiple of 16 bytes";
  if (!is_aligned(args.weight_codes, 8)) return "weight codes must begin at a multiple of 8 bytes";
  const int sms = multiprocessors();
  Expanded expanded(args);
  void* memory = scratch(launch, expanded.bytes);
  if (!memory || !is_aligned(memory, 16)) return "no scratch memory";
  expanded.place(memory);
  const char* problem = run_expand(expanded.acts, sms, launch);
  if (!problem) problem = run_expand(expanded.weights, sms, launch);
  if (problem) return problem;
  const TileShape shape = choose_w4a4_tile(args.m, args.n, sms, in_clusters);
  return shape.down == 2 ? run_w4a4<Cluster<2, 2>>(args, shape, expanded, sms, launch)
                         : run_w4a4<Alone>(args, shape, expanded, sms, launch);
}

}  // namespace svdquant::cuda
