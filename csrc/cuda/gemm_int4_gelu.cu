// W4A4, GELU and quantizer on 4-bit tensor cores.
#include "run_gemm_gelu.cuh"

namespace svdquant::cuda {
namespace {

template <class T>
using Loop = Int4Loop<T, Int4Product<false>>;

}  // namespace

const char* gemm_int4_gelu(const GemmGelu& args, const Launch& launch) {
  if (device_arch() >= 90) return "this card has no 4-bit tensor cores";
  return choose_gelu<Loop>(args, launch);
}

}  // namespace svdquant::cuda
