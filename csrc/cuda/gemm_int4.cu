// W4A4 on 4-bit tensor cores, and the choice between the two ways to multiply.
#include "run_gemm_int4.cuh"

namespace svdquant::cuda {

const char* gemm_int4_by_int4(const Gemm& p, const Launch& launch) {
  if (device_arch() >= 90) return "this card has no 4-bit tensor cores";
  if (p.kind == Codes::kUint4) return choose_tile<Int4Product<true>>(p, launch);
  return choose_tile<Int4Product<false>>(p, launch);
}

const char* gemm_int4(const Gemm& args, Product product, const Launch& launch) {
  if (args.m == 0 || args.n == 0) return nullptr;
  if (const char* why = refused(args)) return why;
  return product == Product::kInt4 ? gemm_int4_by_int4(args, launch) : gemm_int4_by_int8(args, launch);
}

}  // namespace svdquant::cuda
