// NVFP4 by the instruction for it, which multiplies by the scales itself: sm_120a and its kin. Empty for other cards.
//
// The instruction scales groups of 16 columns, so here a lane may not take 16 neighbours: columns 8t..8t+7 are one
// register of its fragment, columns 32+8t..32+8t+7 the other. A row's four scales are one register of one lane: of
// lanes t = 0 and 1 for rows g and g + 8, of lane t = 0 for a column.
#pragma once

#include "nvfp4_stages.cuh"

namespace svdquant::cuda {

template <class T>
struct Mxf4Loop : NvFp4Stages<T> {
  static constexpr bool kExists = kHasMxf4;
  using NvFp4Stages<T>::NvFp4Stages, NvFp4Stages<T>::place, NvFp4Stages<T>::memory, NvFp4Stages<T>::sums;

  // Eight bytes of codes as eight nibbles, in the order of weights in memory.
  static __device__ __forceinline__ unsigned load_nibbles(const uint2* from) {
    const uint2 v = ld_shared(from);
    const unsigned even = pick_bytes(v.x, v.y, 0x6420), odd = pick_bytes(v.x, v.y, 0x7531);
    return join_nibbles(even, odd);
  }

  // Columns 8t.. and 32+8t.. of a row of activations. Rows 2, 3, 6 and 7 of eight are read the second half first, so
  // that what a half warp reads at one time lies in different banks.
  __device__ __forceinline__ void load_acts(const char* codes, int row, unsigned& first, unsigned& second) const {
    const uint2* at = reinterpret_cast<const uint2*>(codes + row * kStep) + place.t;
    const int turned = place.g / 2 % 2;
    const unsigned one = load_nibbles(at + 4 * turned), other = load_nibbles(at + 4 - 4 * turned);
    first = turned ? other : one, second = turned ? one : other;
  }

  // The same columns of a row of weights, and for the same reason the last four rows of eight the other way round.
  __device__ __forceinline__ void load_weights(const char* codes, int row, unsigned (&b)[2]) const {
    const unsigned* at = reinterpret_cast<const unsigned*>(codes + T::kM * kStep + row * kStep / 2) + place.t;
    const int turned = place.g / 4;
    const unsigned one = ld_shared(at + 4 * turned), other = ld_shared(at + 4 - 4 * turned);
    b[0] = turned ? other : one, b[1] = turned ? one : other;
  }

  static __device__ __forceinline__ unsigned load_scales(const char* scales, int slot) {
    return ld_shared(reinterpret_cast<const unsigned*>(scales) + slot);
  }

  // The instruction's scales have no sign: its place must hold zero, even for -0.
  static __device__ __forceinline__ unsigned magnitudes(unsigned scales) { return scales & 0x7F7F7F7F; }

  // Activations' scales are never negative; a file's may be, and then its codes take the sign. This lane's registers
  // belong to groups t / 2 and t / 2 + 2.
  __device__ __forceinline__ void move_signs(unsigned& scales, unsigned (&b)[2]) const {
    const unsigned mine = scales >> 8 * (place.t / 2);
    b[0] ^= (mine >> 7 & 1) * 0x88888888;
    b[1] ^= (mine >> 23 & 1) * 0x88888888;
    scales = magnitudes(scales);
  }

  __device__ __forceinline__ void multiply(int, int stage) {
    const char* codes = memory + stage * T::kStageBytes;
    const char* scales = this->scales_of(stage);
    unsigned b[T::kNs][2], b_scales[T::kNs];
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      const int column = place.warp_column + 8 * j + place.g;
      load_weights(codes, column, b[j]);
      b_scales[j] = load_scales(scales, T::kM + column);
      move_signs(b_scales[j], b[j]);
    }
#pragma unroll
    for (int i = 0; i < T::kMs; ++i) {
      const int row = place.warp_row + 16 * i + place.g;
      unsigned a[4];
      load_acts(codes, row, a[0], a[2]);
      load_acts(codes, row + 8, a[1], a[3]);
      const unsigned a_scales = magnitudes(load_scales(scales, row + 8 * (place.t % 2)));
#pragma unroll
      for (int j = 0; j < T::kNs; ++j) mma_mxf4(sums[i][j], a, b[j], a_scales, b_scales[j]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 3) gemm_mxf4_kernel(Gemm p) {
  if constexpr (Mxf4Loop<T>::kExists) multiply_tile<Mxf4Loop<T>>(p);
}

}  // namespace svdquant::cuda
