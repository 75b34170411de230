// NVFP4, GELU and quantizer by fp16 products.
#include "run_gemm_gelu.cuh"

namespace svdquant::cuda {

const char* gemm_nvfp4_gelu(const GemmGelu& args, const Launch& launch) { return choose_gelu<NvFp4Loop>(args, launch); }

}  // namespace svdquant::cuda
