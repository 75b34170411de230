// Starting a W4A4 product with GELU and quantizer behind it; each kind of product in a file of its own, to be compiled
// side by side.
#pragma once

#include "gemm_int4_gelu.cuh"
#include "run_gemm.cuh"
#include "run_quantize.cuh"

namespace svdquant::cuda {

// How many tiles a block takes: fewer parts are less memory to go through, but 1536 blocks must remain, a dozen for
// every place on a large card, or some wait for the last ones.
constexpr int tiles_a_walk(int64_t row_blocks, int64_t tiles) {
  const int64_t walk = row_blocks * tiles / 1536;
  return walk < 1 ? 1 : walk > 16 ? 16 : static_cast<int>(walk);
}

template <class T, class P, DType kX>
const char* run_gemm_gelu(GeluParams p, const Launch& launch) {
  const int64_t rows = ceil_div(p.product.m, T::kM), runs = ceil_div(p.product.n / T::kN, p.walk);
  const int64_t size = p.product.m * p.next.args.r;
  const bool apart = runs > 1 && size;
  p.parts = apart ? static_cast<float*>(scratch(launch, runs * size * 4)) : p.next.args.hidden;
  if (apart && !p.parts) return "no scratch memory";
  const Grid grid = {rows * runs, 1, T::kThreads, Int4Loop<T, P>::kSharedBytes};
  if (const char* problem = run(gemm_gelu_kernel<T, P, kX>, grid, launch, p)) return problem;
  if (!apart) return nullptr;
  const PartsParams sums = {p.parts, p.next.args.hidden, runs, size};
  return run(add_parts_kernel<256>, {ceil_div(size, 256), 1, 256, 0}, launch, sums);
}

template <class P, DType kX>
const char* choose_gelu_tile(GeluParams p, const Launch& launch) {
  if (prefers_small<LargeTile>(p.product.m, p.product.n)) return run_gemm_gelu<SmallTile, P, kX>(p, launch);
  p.walk = tiles_a_walk(ceil_div(p.product.m, LargeTile::kM), p.product.n / LargeTile::kN);
  return run_gemm_gelu<LargeTile, P, kX>(p, launch);
}

template <class P>
const char* choose_gelu_type(const GeluParams& p, const Launch& launch) {
  if (p.next.args.x.dtype == DType::kF16) return choose_gelu_tile<P, DType::kF16>(p, launch);
  return choose_gelu_tile<P, DType::kBF16>(p, launch);
}

const char* gemm_gelu_by_int4(const GeluParams& p, const Launch& launch);
const char* gemm_gelu_by_int8(const GeluParams& p, const Launch& launch);

}  // namespace svdquant::cuda
