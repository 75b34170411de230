// W4A4, GELU and quantizer on 8-bit tensor cores, for cards whose 4-bit products are emulated.
#include "run_gemm_gelu.cuh"

namespace svdquant::cuda {
namespace {

template <class T>
using Loop = Int4Loop<T, Int8Product>;

}  // namespace

const char* gemm_int4_gelu_wide(const GemmGelu& args, const Launch& launch) { return choose_gelu<Loop>(args, launch); }

}  // namespace svdquant::cuda
