// NVFP4 by fp16 products.
#include "gemm_nvfp4.cuh"
#include "run_gemm.cuh"

namespace svdquant::cuda {
namespace {

template <class T>
const char* run_gemm_nvfp4(const Gemm& p, const Launch& launch) {
  return run(gemm_nvfp4_kernel<T>, tile_grid<T>(p.m, p.n, NvFp4Loop<T>::kSharedBytes), launch, p);
}

}  // namespace

const char* gemm_nvfp4(const Gemm& args, const Launch& launch) {
  if (args.m == 0 || args.n == 0) return nullptr;
  if (const char* why = refused(args)) return why;
  if (prefers_small<LargeTile>(args.m, args.n)) return run_gemm_nvfp4<SmallTile>(args, launch);
  return run_gemm_nvfp4<LargeTile>(args, launch);
}

}  // namespace svdquant::cuda
