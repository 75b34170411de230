// W4A4 and W4A8 on 8-bit tensor cores, for cards whose 4-bit products are emulated, and for 8-bit activations.
#include "run_gemm_int4.cuh"

namespace svdquant::cuda {

const char* gemm_int4_by_int8(const Gemm& p, const Launch& launch) { return choose_tile<Int8Product>(p, launch); }

}  // namespace svdquant::cuda
