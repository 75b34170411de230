// NVFP4 by products of 4-bit floats, on the cards that have them.
#include "gemm_mxf4.cuh"
#include "run_gemm.cuh"

namespace svdquant::cuda {
namespace {

template <class T>
const char* run_gemm_mxf4(const Gemm& p, const Launch& launch) {
  return run(gemm_mxf4_kernel<T>, tile_grid<T>(p.m, p.n, Mxf4Loop<T>::kSharedBytes), launch, p);
}

}  // namespace

const char* gemm_mxf4(const Gemm& args, const Launch& launch) {
  if (device_arch() / 10 != 12) return "this card has no products of 4-bit floats with their scales";
  if (args.m == 0 || args.n == 0) return nullptr;
  if (const char* why = refused(args)) return why;
  if (prefers_small<LargeTile>(args.m, args.n)) return run_gemm_mxf4<SmallTile>(args, launch);
  return run_gemm_mxf4<LargeTile>(args, launch);
}

}  // namespace svdquant::cuda
