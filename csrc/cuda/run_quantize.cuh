// Starting a quantizer: its kernel by the types of x and down and by the rank, and its grid.
#pragma once

#include "cuda_launch.h"
#include "quantize.cuh"
#include "run.cuh"

namespace svdquant::cuda {

template <DType kX, bool kE2M1, int kRank>
const char* run_quantize(const QuantizeParams& p, const Launch& launch) {
  const int64_t rank_chunks = p.args.r ? ceil_div(p.args.r, kRank) : 1;
  const Grid grid = {ceil_div(p.args.m, kTokens), rank_chunks, 32 * kWarps, kTokens * kRank * 4};
  return run(quantize_kernel<kX, kE2M1, kRank>, grid, launch, p);
}

// 32 ranks are what published checkpoints have; more come with LoRAs, and 128 sums a token are what registers hold.
template <DType kX, bool kE2M1>
const char* choose_rank(const QuantizeParams& p, const Launch& launch) {
  return p.args.r > 32 ? run_quantize<kX, kE2M1, 128>(p, launch) : run_quantize<kX, kE2M1, 32>(p, launch);
}

// Of 4-bit codes of any kind.
inline QuantizeParams quantize_params(const Quantize& args) {
  if (args.kind == Codes::kE2M1) return {args, 1.0f / 6, 0, 0};
  if (args.kind == Codes::kUint4) return {args, 1.0f / 15, 0, 15};
  return {args, 1.0f / 7, -8, 7};
}

// Why a quantizer cannot run, or nullptr.
inline const char* refuse(const Quantize& q) {
  if (q.x.dtype == DType::kE4M3) return "activations must be fp32, bf16 or fp16";
  if (q.smooth.stride != 1) return "smooth must be contiguous";
  if (!is_aligned(q.codes, 16)) return "codes must begin at a multiple of 16 bytes";
  return nullptr;
}

// The type of x and of down where tensor cores take both, else kF32.
inline DType tensor_type(const Quantize& q) {
  const bool same = q.down.dtype == q.x.dtype || q.r == 0, has_bf16 = device_arch() >= 80;
  return same && (q.x.dtype == DType::kF16 || (q.x.dtype == DType::kBF16 && has_bf16)) ? q.x.dtype : DType::kF32;
}

template <bool kE2M1>
const char* choose_quantize(const QuantizeParams& p, const Launch& launch) {
  if (p.args.m == 0) return nullptr;
  if (const char* problem = refuse(p.args)) return problem;
  const DType type = tensor_type(p.args);
  if (type == DType::kF16) return choose_rank<DType::kF16, kE2M1>(p, launch);
  if (type == DType::kBF16) return choose_rank<DType::kBF16, kE2M1>(p, launch);
  return run_quantize<DType::kF32, kE2M1, 16>(p, launch);
}

}  // namespace svdquant::cuda
