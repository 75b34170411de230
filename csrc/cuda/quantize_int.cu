// int4 activations, signed and unsigned.
#include "run_quantize.cuh"

namespace svdquant::cuda {

const char* quantize_int4(const Quantize& args, const Launch& launch) {
  return choose_quantize<false>(quantize_params(args), launch);
}

}  // namespace svdquant::cuda
