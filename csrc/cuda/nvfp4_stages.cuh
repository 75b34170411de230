// What the two NVFP4 products share: stages of codes with their scales, and the scale above the scales.
//
//   codes [M, K] bytes, scales [M, K/16] e4m3, weight_codes [N, K/2], weight_scales [N, K/16] e4m3,
//   second_scale [1] | [N], hidden [M, R], up [N, R], bias [N]
//   out[m, n] = second[n] * sum of (code * scale)(m, k) * (code * scale)(n, k) + hidden[m] . up[n] + bias[n]
//   means: core/reference.py gemm_nvfp4
#pragma once

#include "epilogue.cuh"

namespace svdquant::cuda {

constexpr int kStepGroups = kStep / 16;  // of a row and step: their scales are one word

// A loop of sum_up without its multiply().
template <class T>
struct NvFp4Stages {
  using Shape = T;
  static constexpr bool kE2M1 = true, kExists = true;
  static constexpr int kScaleRows = T::kM + T::kN;  // activations' rows, then weights'
  static constexpr int kScaleBytes = kScaleRows * kStepGroups;
  static constexpr int kSharedBytes = kStages * (T::kStageBytes + kScaleBytes);

  const Gemm& p;
  const Place<T>& place;
  char* memory;
  TileCodes<T, 8> codes;
  bool words;  // four scales of a row are a word in global memory too
  Sums<T> sums = {};

  __device__ __forceinline__ NvFp4Stages(const Gemm& args, const Place<T>& at)
      : p(args),
        place(at),
        memory(shared_memory()),
        codes(args, at),
        words(has_words(args.scales) && has_words(args.weight_scales)) {}

  static __device__ __forceinline__ bool has_words(const Floats& scales) {
    return is_aligned(scales.data, kStepGroups) && scales.stride % kStepGroups == 0;
  }

  __device__ __forceinline__ char* scales_of(int stage) const {
    return memory + kStages * T::kStageBytes + stage * kScaleBytes;
  }

  // A row's scales of a step, or nullptr where there is no such row.
  __device__ __forceinline__ const unsigned char* scales_at(int step, int slot) const {
    const bool is_weight = slot >= T::kM;
    const Floats& from = is_weight ? p.weight_scales : p.scales;
    const int64_t row = is_weight ? place.column0 + slot - T::kM : place.row0 + slot;
    if (row >= (is_weight ? p.n : p.m)) return nullptr;
    return static_cast<const unsigned char*>(from.data) + row * from.stride + static_cast<int64_t>(step) * kStepGroups;
  }

  __device__ __forceinline__ void copy(int step, int stage) {
    codes.copy(step, memory + stage * T::kStageBytes);
    if (words && (step + 1) * static_cast<int64_t>(kStep) <= p.k) {
      copy_scales(step, scales_of(stage));
    } else {
      copy_scales_by_bytes(step, scales_of(stage));
    }
  }

  __device__ __forceinline__ void copy_scales(int step, char* to) {
    if (place.row0 + T::kM <= p.m && place.column0 + T::kN <= p.n) {  // all rows exist
      copy_words<T::kM>(p.scales, place.row0, step, to);
      copy_words<T::kN>(p.weight_scales, place.column0, step, to + T::kM * kStepGroups);
      return;
    }
#pragma unroll 1
    for (int slot = threadIdx.x; slot < kScaleRows; slot += T::kThreads) {
      const unsigned char* from = scales_at(step, slot);
      cp_async<kStepGroups>(to + slot * kStepGroups, from ? from : p.scales.data, from != nullptr);
    }
  }

  template <int kRows>
  __device__ __forceinline__ void copy_words(const Floats& scales, int64_t row0, int step, char* to) {
    static_assert(kRows <= T::kThreads);
    if (threadIdx.x >= kRows) return;
    const char* from = static_cast<const char*>(scales.data) + (row0 + threadIdx.x) * scales.stride;
    cp_async<kStepGroups>(to + threadIdx.x * kStepGroups, from + static_cast<int64_t>(step) * kStepGroups, true);
  }

  // At any address, and zeros beyond K.
  __device__ __forceinline__ void copy_scales_by_bytes(int step, char* to) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kScaleBytes; i += T::kThreads) {
      const unsigned char* from = scales_at(step, i / kStepGroups);
      const bool exists = from && (static_cast<int64_t>(step) * kStepGroups + i % kStepGroups) * 16 < p.k;
      st_shared(to + i, exists ? static_cast<char>(ld_global(from + i % kStepGroups)) : '\0');
    }
  }

  __device__ __forceinline__ int steps() const { return static_cast<int>(ceil_div(p.k, kStep)); }

  // Times the second scale: one a tensor or one a row.
  __device__ __forceinline__ void finish() {
    const Floats& second = p.second_scale;
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t column = place.column0 + place.warp_column + 8 * j + 2 * place.t + e;
        if (column >= p.n) continue;
        const float scale = load_one(second.data, second.dtype, column * second.stride);
#pragma unroll
        for (int i = 0; i < T::kMs; ++i) {
          sums[i][j][e] = cuda::multiply(sums[i][j][e], scale);
          sums[i][j][e + 2] = cuda::multiply(sums[i][j][e + 2], scale);
        }
      }
    }
  }
};

}  // namespace svdquant::cuda
