// W4A4, GELU and quantizer on 4-bit tensor cores, and the choice between the two ways to multiply.
#include "run_gemm_gelu.cuh"

namespace svdquant::cuda {
namespace {

// Why the kernel cannot run, or nullptr.
const char* refuse_gelu(const GemmGelu& p) {
  const DType type = p.next.x.dtype;
  if (type != DType::kF16 && (type != DType::kBF16 || device_arch() < 80)) return "activations must be fp16, or bf16";
  if (p.next.r && p.next.down.dtype != type) return "down must be of the activations' type";
  if (p.product.n % kChunk) return "N must be a multiple of 64";
  if (p.product.kind != Codes::kInt4) return "the first layer's codes must be signed";
  if (const char* why = refused(p.product)) return why;
  return refuse(p.next);
}

}  // namespace

const char* gemm_gelu_by_int4(const GeluParams& p, const Launch& launch) {
  if (device_arch() >= 90) return "this card has no 4-bit tensor cores";
  return choose_gelu_type<Int4Product<false>>(p, launch);
}

const char* gemm_int4_gelu(const GemmGelu& args, Product product, const Launch& launch) {
  if (args.product.m == 0 || args.product.n == 0) return nullptr;
  if (const char* problem = refuse_gelu(args)) return problem;
  const GeluParams p = {args.product, int_params(args.next), nullptr, 1};
  return product == Product::kInt4 ? gemm_gelu_by_int4(p, launch) : gemm_gelu_by_int8(p, launch);
}

}  // namespace svdquant::cuda
