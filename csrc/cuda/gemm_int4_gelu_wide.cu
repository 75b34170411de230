// W4A4, GELU and quantizer on 8-bit tensor cores, for cards whose 4-bit products are emulated.
#include "run_gemm_gelu.cuh"

namespace svdquant::cuda {

const char* gemm_gelu_by_int8(const GeluParams& p, const Launch& launch) {
  return choose_gelu_type<Int8Product>(p, launch);
}

}  // namespace svdquant::cuda
