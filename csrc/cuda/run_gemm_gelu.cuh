// Starting a product with GELU and quantizer behind it; each kind of product in a file of its own, to be compiled side
// by side.
#pragma once

#include "gemm_gelu.cuh"
#include "run_gemm.cuh"
#include "run_quantize.cuh"

namespace svdquant::cuda {

// How many tiles a block takes: fewer parts are less memory to go through, but 1536 blocks must remain, a dozen for
// every place on a large card, or some wait for the last ones.
constexpr int tiles_a_walk(int64_t row_blocks, int64_t tiles) {
  const int64_t walk = row_blocks * tiles / 1536;
  return walk < 1 ? 1 : walk > 16 ? 16 : static_cast<int>(walk);
}

template <class Loop, DType kX>
const char* run_gemm_gelu(GeluParams p, const Launch& launch) {
  using T = typename Loop::Shape;
  const int64_t rows = ceil_div(p.product.m, T::kM), runs = ceil_div(p.product.n / T::kN, p.walk);
  const int64_t size = p.product.m * p.next.args.r;
  const bool apart = runs > 1 && size;
  p.parts = apart ? static_cast<float*>(scratch(launch, runs * size * 4)) : p.next.args.hidden;
  if (apart && !p.parts) return "no scratch memory";
  const Grid grid = {rows * runs, 1, T::kThreads, Loop::kSharedBytes};
  if (const char* problem = run(gemm_gelu_kernel<Loop, kX>, grid, launch, p)) return problem;
  if (!apart) return nullptr;
  const PartsParams sums = {p.parts, p.next.args.hidden, runs, size};
  return run(add_parts_kernel<256>, {ceil_div(size, 256), 1, 256, 0}, launch, sums);
}

template <template <class> class Loop, DType kX>
const char* choose_gelu_tile(GeluParams p, const Launch& launch) {
  if (prefers_small<LargeTile>(p.product.m, p.product.n)) return run_gemm_gelu<Loop<SmallTile>, kX>(p, launch);
  p.walk = tiles_a_walk(ceil_div(p.product.m, LargeTile::kM), p.product.n / LargeTile::kN);
  return run_gemm_gelu<Loop<LargeTile>, kX>(p, launch);
}

// Why the kernel cannot run, or nullptr.
inline const char* refuse_gelu(const GemmGelu& p) {
  const DType type = p.next.x.dtype;
  if (type != DType::kF16 && (type != DType::kBF16 || device_arch() < 80)) return "activations must be fp16, or bf16";
  if (p.next.r && p.next.down.dtype != type) return "down must be of the activations' type";
  if (p.product.n % kChunk) return "N must be a multiple of 64";
  if (p.product.kind == Codes::kUint4) return "the first layer's codes must be signed";
  if (const char* why = refused(p.product)) return why;
  return refuse(p.next);
}

template <template <class> class Loop>
const char* choose_gelu(const GemmGelu& args, const Launch& launch) {
  if (args.product.m == 0 || args.product.n == 0) return nullptr;
  if (const char* problem = refuse_gelu(args)) return problem;
  const GeluParams p = {args.product, quantize_params(args.next), nullptr, 1};
  if (args.next.x.dtype == DType::kF16) return choose_gelu_tile<Loop, DType::kF16>(p, launch);
  return choose_gelu_tile<Loop, DType::kBF16>(p, launch);
}

}  // namespace svdquant::cuda
