// int4 activations, signed and unsigned.
#include "run_quantize.cuh"

namespace svdquant::cuda {

const char* quantize_int4(const Quantize& args, const Launch& launch) {
  const QuantizeParams is_signed = {args, 1.0f / 7, -8, 7}, is_unsigned = {args, 1.0f / 15, 0, 15};
  return choose_quantize<false>(args.kind == Codes::kUint4 ? is_unsigned : is_signed, launch);
}

}  // namespace svdquant::cuda
