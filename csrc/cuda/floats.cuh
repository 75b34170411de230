// Reading and writing floats of any of the formats. No instruction of a particular card: it compiles everywhere.
#pragma once

#include "sizes.cuh"

namespace svdquant::cuda {

// Between 2^23 and 2^24 a float's low bits are an integer. So a sum with this is its number rounded to the nearest one,
// ties to even, and as bits that integer plus kMagicBits, for anything within +-2^22. Conversions take four times as long
// as additions, or more.
constexpr float kMagic = 12582912.0f;  // 2^23 + 2^22
constexpr int kMagicBits = 0x4B400000;

__device__ __forceinline__ float from_bf16(unsigned bits) { return as_float(bits << 16); }

// e4m3 to fp32: exponent and mantissa moved into place are the value times 2^-120, subnormals included.
__device__ __forceinline__ float from_e4m3(unsigned code) {
  if ((code & 0x7f) == 0x7f) return as_float(0x7fc00000);
  return multiply(as_float((code & 0x80) << 24 | (code & 0x7f) << 20), as_float(0x7b800000));  // 2^120
}

// A number >= 0 to e4m3, to nearest even; above 448 it saturates instead of becoming NaN.
__device__ __forceinline__ unsigned to_e4m3(float value) {
  if (value != value) return 0x7f;
  if (value >= 448.0f) return 0x7e;
  if (value < 0x1p-6f) return static_cast<unsigned>(round_to_even(multiply(value, 512.0f)));  // steps of 2^-9
  const unsigned bits = as_bits(value);
  return ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3);
}

__device__ __forceinline__ int size_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kE4M3 ? 1 : 2;
}

// Rounded to a dtype and back.
__device__ __forceinline__ float round_to(float value, DType dtype) {
  if (dtype == DType::kBF16) return from_bf16(to_bf16(value));
  return dtype == DType::kF16 ? from_f16(to_f16(value)) : value;
}

__device__ __forceinline__ float load_one(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32: return ld_global(static_cast<const float*>(data) + i);
    case DType::kBF16: return from_bf16(ld_global(static_cast<const unsigned short*>(data) + i));
    case DType::kF16: return from_f16(ld_global(static_cast<const unsigned short*>(data) + i));
    default: return from_e4m3(ld_global(static_cast<const unsigned char*>(data) + i));
  }
}

__device__ __forceinline__ void store_one(void* data, DType dtype, int64_t i, float value) {
  if (dtype == DType::kF32) {
    st_global(static_cast<float*>(data) + i, value);
  } else {
    const unsigned short bits = dtype == DType::kBF16 ? to_bf16(value) : to_f16(value);
    st_global(static_cast<unsigned short*>(data) + i, bits);
  }
}

// An output's 16 bits. fp16 saturates, as published kernels do: a model that runs in fp16 survives 65504, not infinity.
__device__ __forceinline__ unsigned short output_bits(DType dtype, float value) {
  if (dtype == DType::kBF16) return to_bf16(value);
  return to_f16(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value);
}

__device__ __forceinline__ unsigned output_pair(DType dtype, float low, float high) {
  if (dtype == DType::kBF16) return to_bf16x2(low, high);
  const auto saturate = [](float v) { return v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v; };
  return to_f16x2(saturate(low), saturate(high));
}

__device__ __forceinline__ void store_output(const Output& out, int64_t row, int64_t column, float value) {
  const int64_t at = row * out.stride + column;
  if (out.dtype == DType::kF32) {
    st_global(static_cast<float*>(out.data) + at, value);
  } else {
    st_global(static_cast<unsigned short*>(out.data) + at, output_bits(out.dtype, value));
  }
}

// kCount neighbours as raw 32-bit words, by the widest loads that their address allows. kBytes is what they occupy.
template <int kBytes>
__device__ __forceinline__ void load_words(const void* from, unsigned (&words)[kBytes / 4]) {
  if (kBytes >= 16 && is_aligned(from, 16)) {
#pragma unroll
    for (int i = 0; i + 4 <= kBytes / 4; i += 4) {
      const uint4 v = ld_global(static_cast<const uint4*>(from) + i / 4);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  } else if (is_aligned(from, 8)) {
#pragma unroll
    for (int i = 0; i + 2 <= kBytes / 4; i += 2) {
      const uint2 v = ld_global(static_cast<const uint2*>(from) + i / 2);
      words[i] = v.x, words[i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      const unsigned short* half = static_cast<const unsigned short*>(from) + 2 * i;
      words[i] = ld_global(half) | static_cast<unsigned>(ld_global(half + 1)) << 16;
    }
  }
}

__device__ __forceinline__ float low_half(unsigned word, DType dtype) {
  return dtype == DType::kBF16 ? from_bf16(word & 0xffff) : from_f16(static_cast<unsigned short>(word));
}

__device__ __forceinline__ float high_half(unsigned word, DType dtype) {
  return dtype == DType::kBF16 ? as_float(word & 0xffff0000) : low_half(word >> 16, dtype);
}

// Two numbers as a word of halves.
__device__ __forceinline__ unsigned join_halves(float low, float high, DType dtype) {
  return dtype == DType::kBF16 ? to_bf16x2(low, high) : to_f16x2(low, high);
}

// The halves of words, low first, as fp32.
template <int kCount>
__device__ __forceinline__ void split_halves(const unsigned (&words)[kCount / 2], DType dtype, float (&to)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) to[j] = j % 2 ? high_half(words[j / 2], dtype) : low_half(words[j / 2], dtype);
}

// kCount neighbours, from element i on, as fp32.
template <int kCount>
__device__ __forceinline__ void load_floats(const void* data, DType dtype, int64_t i, float (&to)[kCount]) {
  const char* from = static_cast<const char*>(data) + i * size_of(dtype);
  if (dtype == DType::kF32) {
    unsigned words[kCount];
    load_words<4 * kCount>(from, words);
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = as_float(words[j]);
  } else if (dtype == DType::kE4M3) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = from_e4m3(ld_global(static_cast<const unsigned char*>(data) + i + j));
  } else {
    unsigned words[kCount / 2];
    load_words<2 * kCount>(from, words);
    split_halves(words, dtype, to);
  }
}

}  // namespace svdquant::cuda
