// launch.h's functions in a GPU's library: from the name of a spelling to the kernel.
#include <cstring>

#include "cuda_launch.h"
#include "run.cuh"

namespace svdquant {
namespace {

bool is(const char* spelling, const char* name) { return !std::strcmp(spelling, name); }
bool is(const Launch& launch, const char* name) { return is(launch.spelling, name); }

cuda::Product product(const Launch& launch) {
  return is(launch, "mma_s4") || is(launch, "mma_sm75") ? cuda::Product::kInt4 : cuda::Product::kInt8;
}

}  // namespace

const char* quantize(const Quantize& args, const Launch& launch) {
  if (args.kind == Codes::kE2M1) return cuda::quantize_nvfp4(args, launch);
  if (args.kind == Codes::kInt8) return cuda::quantize_int8(args, launch);
  return carries_e4m3(launch.spelling) ? cuda::quantize_e4m3(args, launch) : cuda::quantize_int4(args, launch);
}

const char* gemm(const Gemm& args, const Launch& launch) {
  if (args.kind == Codes::kE2M1) {
    return is(launch, "mxf4_sm120") ? cuda::gemm_mxf4(args, launch) : cuda::gemm_nvfp4(args, launch);
  }
  if (args.kind == Codes::kE4M3) return cuda::gemm_int4_hopper(args, is(launch, "wgmma_e4m3_x4"), launch);
  return cuda::gemm_int4(args, product(launch), launch);
}

const char* gemm_gelu(const GemmGelu& args, const Launch& launch) {
  if (args.product.kind == Codes::kE2M1) {
    return is(launch, "gelu_mxf4") ? cuda::gemm_mxf4_gelu(args, launch) : cuda::gemm_nvfp4_gelu(args, launch);
  }
  return is(launch, "gelu_s8") ? cuda::gemm_int4_gelu_wide(args, launch) : cuda::gemm_int4_gelu(args, launch);
}

const char* gemm_int8(const GemmInt8& args, const Launch& launch) {
  if (is(launch, "wgmma_s8_x2")) return cuda::gemm_int8_hopper(args, true, launch);
  return is(launch, "wgmma_s8") ? cuda::gemm_int8_hopper(args, false, launch) : cuda::gemm_int8(args, launch);
}

const char* gemv_awq(const Gemv& args, const Launch& launch) { return cuda::gemv_awq(args, launch); }

// Best first.
const char* spellings() {
  const int arch = cuda::device_arch();
  if (arch < 75) return "";
  if (arch < 80) return "mma_sm75 mma_s8 mma_f16 gemv gelu_sm75";
  if (arch < 90) return "mma_s4 mma_s8 mma_f16 gemv gelu_s4 gelu_s8 gelu_f16";
  if (arch == 90) return "wgmma_e4m3_x4 wgmma_e4m3 wgmma_s8_x2 wgmma_s8 mma_s8 mma_f16 gemv gelu_s8 gelu_f16";
  if (arch / 10 == 12) return "mxf4_sm120 mma_s8 mma_f16 gemv gelu_s8 gelu_mxf4 gelu_f16";
  return "mma_s8 mma_f16 gemv gelu_s8 gelu_f16";
}

bool carries_e4m3(const char* spelling) { return is(spelling, "wgmma_e4m3") || is(spelling, "wgmma_e4m3_x4"); }

}  // namespace svdquant
