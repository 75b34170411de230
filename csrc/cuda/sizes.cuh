// Sizes and addresses, for both sides of a launch.
#pragma once

#include "ptx.cuh"

namespace svdquant::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ inline bool is_aligned(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) == 0;
}

}  // namespace svdquant::cuda
