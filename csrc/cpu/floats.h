// The 16-bit and 8-bit floats of the formats, one number at a time, in integer arithmetic that every compiler has.
// Everything is `static`: files for different instruction sets must not share a compiled copy.
#pragma once

#include <cmath>
#include <cstring>

#include "../launch.h"

namespace svdquant::cpu {

static inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Drop `count` low bits, to nearest, ties to even. Exponent and mantissa are one number, so a carry moves on rightly.
static inline uint32_t drop_bits(uint32_t bits, int count) {
  return (bits + (1u << (count - 1)) - 1 + ((bits >> count) & 1)) >> count;
}

static inline uint16_t to_bf16(float v) {
  return v != v ? 0x7fc0 : static_cast<uint16_t>(drop_bits(bits_of(v), 16));
}

static inline float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

static inline uint16_t to_f16(float v) {
  const uint32_t bits = bits_of(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 65536 and above
  if (magnitude < 0x38800000) {  // subnormal: next to 0.5 the fp32 spacing is 2^-24, as fp16's is here
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | drop_bits(magnitude - (112u << 23), 13));
}

static inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// Scales are never negative; they saturate at 448 instead of becoming NaN.
static inline uint8_t to_e4m3(float v) {
  if (v != v) return 0x7f;
  if (v >= 448.0f) return 0x7e;
  if (v < 0x1p-6f) return static_cast<uint8_t>(std::nearbyint(v * 512.0f));
  return static_cast<uint8_t>(drop_bits(bits_of(v), 20) - (120u << 3));
}

static inline float from_e4m3(uint8_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  float v = exponent ? float_of((exponent + 120) << 23 | mantissa << 20) : static_cast<float>(mantissa) * 0x1p-9f;
  if ((code & 0x7f) == 0x7f) v = float_of(0x7fc00000);
  return code & 0x80 ? -v : v;
}

static inline float load(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF32: return static_cast<const float*>(data)[i];
    case DType::kBF16: return from_bf16(static_cast<const uint16_t*>(data)[i]);
    case DType::kF16: return from_f16(static_cast<const uint16_t*>(data)[i]);
    default: return from_e4m3(static_cast<const uint8_t*>(data)[i]);
  }
}

static inline void store(void* data, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::kF32: static_cast<float*>(data)[i] = v; break;
    case DType::kBF16: static_cast<uint16_t*>(data)[i] = to_bf16(v); break;
    case DType::kF16: static_cast<uint16_t*>(data)[i] = to_f16(v); break;
    default: static_cast<uint8_t*>(data)[i] = to_e4m3(v);
  }
}

// As `store`, but fp16 saturates: a model that runs in fp16 survives 65504, not infinity.
static inline void store_saturated(void* data, DType dtype, int64_t i, float v) {
  if (dtype == DType::kF16) v = v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
  store(data, dtype, i, v);
}

// The addend, where there is one, onto `count` finished sums of a row.
template <class Args>
static inline void add_addend(const Args& args, int64_t row, int64_t column, int64_t count, float* sums) {
  if (!args.addend.data) return;
  const float* from = static_cast<const float*>(args.addend.data) + row * args.addend.stride + column;
  for (int64_t i = 0; i < count; ++i) sums[i] += from[i];
}

template <class Args>
static inline void store_output(const Args& args, int64_t row, int64_t column, float v) {
  add_addend(args, row, column, 1, &v);
  store_saturated(args.out.data, args.out.dtype, row * args.out.stride + column, v);
}

static inline float round_to(float v, DType dtype) {
  if (dtype == DType::kBF16) return from_bf16(to_bf16(v));
  return dtype == DType::kF16 ? from_f16(to_f16(v)) : v;
}

static inline int64_t size_of(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kE4M3 ? 1 : 2;
}

static inline void* place_of(const Output& out, int64_t row, int64_t column) {
  return static_cast<char*>(out.data) + (row * out.stride + column) * size_of(out.dtype);
}

static inline const void* row_of(const Floats& f, int64_t row) {
  return static_cast<const char*>(f.data) + row * f.stride * size_of(f.dtype);
}

}  // namespace svdquant::cpu
