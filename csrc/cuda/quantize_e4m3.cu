// Activations for exact W4A4 on Hopper.
#include "quantize_e4m3.cuh"
#include "run_quantize.cuh"

namespace svdquant::cuda {
namespace {

template <DType kX, int kRank>
const char* run_quantize_e4m3(const QuantizeParams& p, const Launch& launch) {
  const int64_t rank_chunks = p.args.r ? ceil_div(p.args.r, kRank) : 1;
  const Grid grid = {ceil_div(p.args.m, kTokens), rank_chunks, 32 * kWarps, kTokens * kRank * 4};
  return run(quantize_e4m3_kernel<kX, kRank>, grid, launch, p);
}

template <DType kX>
const char* choose_rank_e4m3(const QuantizeParams& p, const Launch& launch) {
  return p.args.r > 32 ? run_quantize_e4m3<kX, 128>(p, launch) : run_quantize_e4m3<kX, 32>(p, launch);
}

}  // namespace

const char* quantize_e4m3(const Quantize& args, const Launch& launch) {
  if (device_arch() != 90) return "this card has no products of warpgroups";
  if (args.m == 0) return nullptr;
  if (const char* problem = refuse(args)) return problem;
  const QuantizeParams p = quantize_params(args);
  const DType type = tensor_type(args);
  if (type == DType::kF16) return choose_rank_e4m3<DType::kF16>(p, launch);
  if (type == DType::kBF16) return choose_rank_e4m3<DType::kBF16>(p, launch);
  return run_quantize_e4m3<DType::kF32, 16>(p, launch);
}

}  // namespace svdquant::cuda
