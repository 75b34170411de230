// Starting a W4A4 product of either kind; each kind in a file of its own, to be compiled side by side.
#pragma once

#include "gemm_int4.cuh"
#include "run_gemm.cuh"

namespace svdquant::cuda {

template <class T, class P>
const char* run_gemm_int4(const Gemm& p, const Launch& launch) {
  return run(gemm_int4_kernel<T, P>, tile_grid<T>(p.m, p.n, Int4Loop<T, P>::kSharedBytes), launch, p);
}

template <class P>
const char* choose_tile(const Gemm& p, const Launch& launch) {
  if (prefers_small<LargeTile>(p.m, p.n)) return run_gemm_int4<SmallTile, P>(p, launch);
  return run_gemm_int4<LargeTile, P>(p, launch);
}

const char* gemm_int4_by_int4(const Gemm& p, const Launch& launch);
const char* gemm_int4_by_int8(const Gemm& p, const Launch& launch);

}  // namespace svdquant::cuda
