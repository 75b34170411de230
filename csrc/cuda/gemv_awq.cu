// W4A16 for few tokens: how many of them a block takes.
#include "cuda_launch.h"
#include "gemv_awq.cuh"
#include "run.cuh"

namespace svdquant::cuda {
namespace {

template <int kM>
const char* run_gemv(const Gemv& p, const Launch& launch) {
  const Grid grid = {ceil_div(p.n, kWarps * kRows), ceil_div(p.m, kM), 32 * kWarps, kM * kPanel * 4};
  return run(gemv_awq_kernel<kM>, grid, launch, p);
}

}  // namespace

const char* gemv_awq(const Gemv& args, const Launch& launch) {
  if (args.m == 0 || args.n == 0) return nullptr;
  if (!is_aligned(args.weight_codes, 4)) return "weight codes must begin at a multiple of 4 bytes";
  if (args.out.dtype == DType::kE4M3) return "the output must be fp32, bf16 or fp16";
  if (args.m == 1) return run_gemv<1>(args, launch);
  return args.m <= 4 ? run_gemv<4>(args, launch) : run_gemv<kTokens>(args, launch);
}

}  // namespace svdquant::cuda
