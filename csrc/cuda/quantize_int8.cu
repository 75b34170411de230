// int8 activations, one scale a token.
#include "quantize_int8.cuh"
#include "run_quantize.cuh"

namespace svdquant::cuda {
namespace {

template <DType kX, int kRank>
const char* run_quantize_int8(const QuantizeParams& p, const Launch& launch) {
  const int64_t rank_chunks = p.args.r ? ceil_div(p.args.r, kRank) : 1;
  static_assert(kRank >= kWarps, "the tokens' largest have room where hidden values do");
  const Grid grid = {ceil_div(p.args.m, kTokens), rank_chunks, 32 * kWarps, kTokens * kRank * 4};
  return run(quantize_int8_kernel<kX, kRank>, grid, launch, p);
}

template <DType kX>
const char* choose_rank_int8(const QuantizeParams& p, const Launch& launch) {
  return p.args.r > 32 ? run_quantize_int8<kX, 128>(p, launch) : run_quantize_int8<kX, 32>(p, launch);
}

}  // namespace

const char* quantize_int8(const Quantize& args, const Launch& launch) {
  if (args.m == 0) return nullptr;
  if (const char* problem = refuse(args)) return problem;
  const QuantizeParams p = {args, 1.0f / 127, -127, 127};
  const DType type = tensor_type(args);
  if (type == DType::kF16) return choose_rank_int8<DType::kF16>(p, launch);
  if (type == DType::kBF16) return choose_rank_int8<DType::kBF16>(p, launch);
  return run_quantize_int8<DType::kF32, 16>(p, launch);
}

}  // namespace svdquant::cuda
