// W8A8: which tile, which grid.
#include "gemm_w8a8.cuh"
#include "run_gemm.cuh"

namespace svdquant::cuda {
namespace {

template <class T>
const char* run_gemm_int8(const GemmInt8& p, const Launch& launch) {
  return run(gemm_int8_kernel<T>, tile_grid<T>(p.m, p.n, T::kSharedBytes), launch, p);
}

}  // namespace

const char* gemm_int8(const GemmInt8& args, const Launch& launch) {
  if (args.m == 0 || args.n == 0) return nullptr;
  if (args.k % 16) return "K must be a multiple of 16";
  if (!is_aligned(args.codes, 16)) return "codes must begin at a multiple of 16 bytes";
  if (!is_aligned(args.weight_codes, 16)) return "weight codes must begin at a multiple of 16 bytes";
  if (args.out.dtype == DType::kE4M3) return "the output must be fp32, bf16 or fp16";
  if (prefers_small<LargeWideTile>(args.m, args.n)) return run_gemm_int8<SmallWideTile>(args, launch);
  return run_gemm_int8<LargeWideTile>(args, launch);
}

}  // namespace svdquant::cuda
