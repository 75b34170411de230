// NVFP4 by widening to fp16, on every card that has no instruction for it.
//
// e2m1 has two significant bits, an e4m3 scale four: their product has six and lies within 2^-10..2688, so that fp16
// holds it exactly, and only the fp32 sum rounds. The rate is that of fp16 tensor cores.
#pragma once

#include "nvfp4_stages.cuh"

namespace svdquant::cuda {

// The low half of every byte of four, as fp16 pairs: byte 0 and 2, then byte 1 and 3. e2m1's exponent and mantissa stand
// where fp16's do, 2^-14 too small.
__device__ __forceinline__ void widen_e2m1(unsigned word, unsigned factor, unsigned (&pairs)[2]) {
  constexpr unsigned kTwoTo14 = 0x74007400;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned bits = i ? word >> 8 : word;
    const unsigned half = (bits & 0x00080008) << 12 | (bits & 0x00070007) << 9;
    pairs[i] = multiply_f16x2(multiply_f16x2(half, kTwoTo14), factor);
  }
}

// An e4m3 scale as two equal fp16: its bits stand where fp16's do, 2^-8 too small. NaN stays one.
__device__ __forceinline__ unsigned widen_scale(unsigned char code) {
  if ((code & 0x7f) == 0x7f) return 0x7e007e00;
  const unsigned half = (code & 0x80u) << 8 | (code & 0x7fu) << 7;
  return multiply_f16x2(half | half << 16, 0x5c005c00);  // 2^8
}

// A lane's 16 columns are a group: it needs one scale a row.
template <class T>
struct NvFp4Loop : NvFp4Stages<T> {
  using NvFp4Stages<T>::NvFp4Stages, NvFp4Stages<T>::place, NvFp4Stages<T>::memory, NvFp4Stages<T>::sums;

  __device__ __forceinline__ void multiply(int, int stage) {
    const char* codes = memory + stage * T::kStageBytes;
    const uint4* acts = reinterpret_cast<const uint4*>(codes);
    const uint2* weights = reinterpret_cast<const uint2*>(codes + T::kM * kStep);
    const unsigned char* scales = reinterpret_cast<const unsigned char*>(this->scales_of(stage));
    unsigned b[T::kNs][kStepGroups][2];
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      const int column = place.warp_column + 8 * j + place.g;
      const uint2 nibbles = ld_shared(weights + column * 4 + place.t);
      const unsigned factor = widen_scale(ld_shared(scales + (T::kM + column) * kStepGroups + place.t));
      const unsigned words[2] = {nibbles.x, nibbles.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // even columns 0 4, 2 6; odd columns 1 5, 3 7
        widen_e2m1(words[i], factor, b[j][2 * i]);
        widen_e2m1(words[i] >> 4, factor, b[j][2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < T::kMs; ++i) {
      unsigned a[2][kStepGroups][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = place.warp_row + 16 * i + 8 * half + place.g;
        const uint4 v = ld_shared(acts + row * 4 + place.t);
        const unsigned factor = widen_scale(ld_shared(scales + row * kStepGroups + place.t));
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int w = 0; w < 2; ++w) {  // the order of columns in which a word of nibbles comes apart
          widen_e2m1(pick_bytes(words[2 * w], words[2 * w + 1], 0x6420), factor, a[half][2 * w]);
          widen_e2m1(pick_bytes(words[2 * w], words[2 * w + 1], 0x7531), factor, a[half][2 * w + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < T::kNs; ++j) {
#pragma unroll
        for (int w = 0; w < kStepGroups; ++w) {
          const unsigned fragment[4] = {a[0][w][0], a[1][w][0], a[0][w][1], a[1][w][1]};
          mma_f16(sums[i][j], fragment, b[j][w]);
        }
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 2) gemm_nvfp4_kernel(Gemm p) {
  multiply_tile<NvFp4Loop<T>>(p);
}

}  // namespace svdquant::cuda
