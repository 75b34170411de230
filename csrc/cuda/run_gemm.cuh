// Starting a product: its tile and its grid.
#pragma once

#include "cuda_launch.h"
#include "gemm.cuh"
#include "run.cuh"

namespace svdquant::cuda {

// Which tile: a pure function of the shape. 64 blocks are half a wave of a small card.
template <class Large>
constexpr bool prefers_small(int64_t m, int64_t n) {
  return m <= 64 || ceil_div(m, Large::kM) * ceil_div(n, Large::kN) < 64;
}

// One block a tile of the output.
template <class T>
constexpr Grid tile_grid(int64_t m, int64_t n, int shared_bytes) {
  return {ceil_div(m, T::kM) * ceil_div(n, T::kN), 1, T::kThreads, shared_bytes};
}

// Why the arguments of a 4-bit product cannot be multiplied, nullptr if they can.
inline const char* refused(const Gemm& args) {
  if (!is_aligned(args.codes, 16)) return "codes must begin at a multiple of 16 bytes";
  if (!is_aligned(args.weight_codes, 8)) return "weight codes must begin at a multiple of 8 bytes";
  if (args.out.dtype == DType::kE4M3) return "the output must be fp32, bf16 or fp16";
  return nullptr;
}

}  // namespace svdquant::cuda
