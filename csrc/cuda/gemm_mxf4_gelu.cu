// NVFP4, GELU and quantizer by products of 4-bit floats, on the cards that have them.
#include "run_gemm_gelu.cuh"

namespace svdquant::cuda {

const char* gemm_mxf4_gelu(const GemmGelu& args, const Launch& launch) {
  if (device_arch() / 10 != 12) return "this card has no products of 4-bit floats with their scales";
  return choose_gelu<Mxf4Loop>(args, launch);
}

}  // namespace svdquant::cuda
