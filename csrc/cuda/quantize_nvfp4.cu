// NVFP4 activations.
#include "run_quantize.cuh"

namespace svdquant::cuda {

const char* quantize_nvfp4(const Quantize& args, const Launch& launch) {
  return choose_quantize<true>(quantize_params(args), launch);
}

}  // namespace svdquant::cuda
