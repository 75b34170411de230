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
#include "cuda_launch.h"
#include "hopper_expand.cuh"
#include "hopper_map.cuh"
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
  void* scratch = launch.allocate ? launch.allocate(launch.owner, expanded.bytes) : nullptr;
  if (!scratch || !is_aligned(scratch, 16)) return "no scratch memory";
  expanded.place(scratch);
  const char* problem = run_expand(expanded.acts, sms, launch);
  if (!problem) problem = run_expand(expanded.weights, sms, launch);
  if (problem) return problem;
  const TileShape shape = choose_w4a4_tile(args.m, args.n, sms, in_clusters);
  return shape.down == 2 ? run_w4a4<Cluster<2, 2>>(args, shape, expanded, sms, launch)
                         : run_w4a4<Alone>(args, shape, expanded, sms, launch);
}

}  // namespace svdquant::cuda
