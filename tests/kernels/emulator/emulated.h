// The functions of csrc/cuda/ptx.cuh and the instructions of mma.cuh as plain C++: what the .cu files include where
// the compiler is not nvcc. SVDQUANT_ARCH names the card to be.
#pragma once

#include <cmath>

#include "launches.h"

#define SVDQUANT_MXF4 (SVDQUANT_ARCH / 10 == 12)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::Block::current().self().index)
#define blockIdx (emulator::Block::current().self().block)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace svdquant::cuda {

using emulator::Block;

inline char* shared_memory() { return Block::current().memory(); }

using emulator::Site;

template <class T>
T ld_global(const T* from, const Site& site = Site::here()) {
  Block::current().check_global(from, sizeof(T), false, site);
  return *from;
}

template <class T>
void st_global(T* to, T value, const Site& site = Site::here()) {
  Block::current().check_global(to, sizeof(T), true, site);
  *to = value;
}

template <class T>
T ld_own(const T* from, const Site& site = Site::here()) {
  Block::current().check_global(from, sizeof(T), false, site);
  return *from;
}

template <class T>
T ld_shared(const T* from, const Site& site = Site::here()) {
  Block& b = Block::current();
  b.read_shared(from, sizeof(T));
  b.count_shared(b.shared_offset(from, sizeof(T)), sizeof(T), "load", site);
  return *from;
}

template <class T>
void st_shared(T* to, T value, const Site& site = Site::here()) {
  Block& b = Block::current();
  const size_t at = b.shared_offset(to, sizeof(T));
  b.write_shared(at, sizeof(T));
  b.count_shared(at, sizeof(T), "store", site);
  *to = value;
}

template <int kBytes>
void cp_async(void* to, const void* from, bool valid, const Site& site = Site::here()) {
  Block& b = Block::current();
  emulator::Copy copy = {b.shared_offset(to, kBytes), kBytes, {}};
  b.count_shared(copy.at, kBytes, "copy", site);
  if (valid) {
    b.check_global(from, kBytes, false, site);
    std::memcpy(copy.data, from, kBytes);
  }
  b.issue(copy);
  if (SVDQUANT_ARCH < 80) {
    b.commit();
    b.arrive(0);
  }
}

inline void cp_async_commit() { Block::current().commit(); }

template <int kPending>
void cp_async_wait() {
  Block::current().arrive(kPending);
}

inline void barrier() { Block::current().wait(emulator::State::kBarrier, "barrier"); }

template <class T>
T shuffle_xor(T value, int mask) {
  struct Operand {
    T value;
    int mask;
    T result;
  } mine = {value, mask, value};
  Block::current().meet("shuffle_xor", &mine, [](void* const* lanes) {
    for (int i = 0; i < emulator::kWarp; ++i) {
      auto* o = static_cast<Operand*>(lanes[i]);
      o->result = static_cast<Operand*>(lanes[i ^ o->mask])->value;
    }
  });
  return mine.result;
}

inline float as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline unsigned as_bits(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// What a calculation makes of a product's sums before they were waited for.
inline float not_poison(float value) {
  if (value != value && (as_bits(value) & 0x7fffffff) == emulator::kPoison) {
    Block::current().fail("wgmma: sums are used before the product was waited for");
  }
  return value;
}

inline float divide(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return not_poison(a * b); }
inline float add(float a, float b) { return not_poison(a + b); }
inline float fused_multiply_add(float a, float b, float c) { return not_poison(std::fma(a, b, c)); }
inline float round_to_even(float a) { return std::nearbyint(a); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float magnitude(float a) { return std::fabs(a); }
inline float larger_magnitude(float a, float b) { return a != a || b != b ? NAN : std::fmax(a, std::fabs(b)); }

// A card's is within one unit in the last place: this one is the worst such, up and down in turns by the last bit of a.
inline float approximate_reciprocal(float a) {
  constexpr float kLeast = 0x1p-126f;
  const float value = 1.0f / (std::fabs(a) < kLeast ? std::copysign(0.0f, a) : a);
  if (std::isnan(value) || std::isinf(value) || std::fabs(value) < kLeast) return std::isfinite(value) ? 0.0f * value : value;
  return as_float(as_bits(value) + (as_bits(a) >> 16 & 1 ? 1u : -1u));
}

inline float hyperbolic_tangent(float a) { return std::tanh(a); }

inline unsigned choose_bits(unsigned mask, unsigned a, unsigned b) { return (mask & a) | (~mask & b); }

inline unsigned pick_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

// The nearest multiple of the format's step at this size, ties to even: rounding by definition, in double.
inline double to_nearest(double v, int significant_bits, int smallest_exponent) {
  int exponent;
  std::frexp(v, &exponent);
  const int last = std::max(exponent - 1, smallest_exponent) - significant_bits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(v, -last)), last);
}

inline unsigned short to_bf16(float value) {
  if (value != value) return 0x7fff;
  if (std::isinf(value)) return static_cast<unsigned short>(as_bits(value) >> 16);
  return static_cast<unsigned short>(as_bits(static_cast<float>(to_nearest(value, 8, -126))) >> 16);
}

inline unsigned short to_f16(float value) {
  const unsigned sign = as_bits(value) >> 16 & 0x8000;
  if (value != value) return 0x7fff;
  const double magnitude = std::fabs(to_nearest(value, 11, -14));
  if (magnitude > 65504.0) return static_cast<unsigned short>(sign | 0x7c00);
  int exponent;
  std::frexp(magnitude, &exponent);
  const bool subnormal = magnitude == 0 || exponent - 1 < -14;
  if (subnormal) return static_cast<unsigned short>(sign | static_cast<unsigned>(magnitude * 0x1p24));
  const unsigned mantissa = static_cast<unsigned>(std::ldexp(magnitude, 11 - exponent)) & 0x3ff;
  return static_cast<unsigned short>(sign | (exponent - 1 + 15) << 10 | mantissa);
}

inline unsigned to_bf16x2(float low, float high) { return to_bf16(low) | static_cast<unsigned>(to_bf16(high)) << 16; }
inline unsigned to_f16x2(float low, float high) { return to_f16(low) | static_cast<unsigned>(to_f16(high)) << 16; }

inline float from_f16(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                : exponent   ? std::ldexp(1024.0f + mantissa, exponent - 25)
                             : std::ldexp(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -value : value;
}

inline unsigned multiply_f16x2(unsigned a, unsigned b) {
  const auto half = [](unsigned x, unsigned y) {
    return to_f16(from_f16(static_cast<unsigned short>(x)) * from_f16(static_cast<unsigned short>(y)));
  };
  return half(a, b) | static_cast<unsigned>(half(a >> 16, b >> 16)) << 16;
}

// ---- matrix products ----

// Elements as they lie in a register: how wide, and what a pattern of bits means.
struct S8 {
  static constexpr int kBits = 8;
  static double value(unsigned bits) { return static_cast<signed char>(bits); }
};
struct S4 {
  static constexpr int kBits = 4;
  static double value(unsigned bits) { return static_cast<int>(bits ^ 8) - 8; }
};
struct U4 {
  static constexpr int kBits = 4;
  static double value(unsigned bits) { return bits; }
};
struct F16 {
  static constexpr int kBits = 16;
  static double value(unsigned bits) { return from_f16(static_cast<unsigned short>(bits)); }
};
struct BF16 {
  static constexpr int kBits = 16;
  static double value(unsigned bits) { return as_float(bits << 16); }
};

// kM x 8 x kK (PTX ISA, "Matrix Fragments for mma"). Lane 4g + t and its register i hold, p elements a register:
// A: rows g + 8 * (i % blocks), k from t * p + 4p * (i / blocks), where kM is `blocks` times 8; B: column g, k from
// t * p + 4p * i; C: number i is row g + 8 * (i / 2), column 2t + i % 2. Sums are exact, then rounded once.
template <int kM, int kK, class A, class B, class C>
struct WarpProduct {
  static constexpr int kBlocks = kM / 8, kPer = 32 / A::kBits, kA = kBlocks * kK / (4 * kPer), kB = kK / (4 * kPer);
  C* c[2 * kBlocks];
  unsigned a[kA], b[kB];

  static unsigned element(const unsigned* registers, int i) {
    return registers[i / kPer] >> i % kPer * A::kBits & ((1u << A::kBits) - 1);
  }

  static void work(void* const* operands) {
    double left[kM][kK], right[kK][8];
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const auto& o = *static_cast<const WarpProduct*>(operands[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < kA * kPer; ++i) {
        const int r = i / kPer;
        left[g + 8 * (r % kBlocks)][t * kPer + i % kPer + 4 * kPer * (r / kBlocks)] = A::value(element(o.a, i));
      }
      for (int i = 0; i < kB * kPer; ++i) {
        right[t * kPer + i % kPer + 4 * kPer * (i / kPer)][g] = B::value(element(o.b, i));
      }
    }
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const auto& o = *static_cast<const WarpProduct*>(operands[lane]);
      for (int i = 0; i < 2 * kBlocks; ++i) {
        double sum = *o.c[i];
        for (int k = 0; k < kK; ++k) sum += left[lane / 4 + 8 * (i / 2)][k] * right[k][lane % 4 * 2 + i % 2];
        *o.c[i] = static_cast<C>(sum);
      }
    }
  }

  void run(const char* name) { Block::current().meet(name, this, &work); }
};

#define EMULATED_M8(NAME, K, A, B)                                       \
  inline void NAME(int& c0, int& c1, unsigned a, unsigned b) {           \
    WarpProduct<8, K, A, B, int> p = {{&c0, &c1}, {a}, {b}};                 \
    p.run(#NAME);                                                        \
  }
EMULATED_M8(mma_m8n8k16_s8, 16, S8, S8)
EMULATED_M8(mma_m8n8k32_s4, 32, S4, S4)
EMULATED_M8(mma_m8n8k32_u4, 32, U4, S4)

#define EMULATED_M16(NAME, K, A, B, C)                                                       \
  inline void NAME(C (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {              \
    WarpProduct<16, K, A, B, C> p = {{&c[0], &c[1], &c[2], &c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}}; \
    p.run(#NAME);                                                                            \
  }
EMULATED_M16(mma_m16n8k32_s8, 32, S8, S8, int)
EMULATED_M16(mma_m16n8k64_s4, 64, S4, S4, int)
EMULATED_M16(mma_m16n8k64_u4, 64, U4, S4, int)
EMULATED_M16(mma_m16n8k16_f16, 16, F16, F16, float)
EMULATED_M16(mma_m16n8k16_bf16, 16, BF16, BF16, float)

inline void mma_m16n8k8_f16(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  WarpProduct<16, 8, F16, F16, float> p = {{&c[0], &c[1], &c[2], &c[3]}, {a0, a1}, {b}};
  p.run("mma_m16n8k8_f16");
}

// ---- products with block scales ----

// s1.e2m1: 0 0.5 1 1.5 2 3 4 6 and their negatives.
inline double from_e2m1(unsigned bits) {
  const int exponent = bits >> 1 & 3, mantissa = bits & 1;
  const double magnitude = exponent ? std::ldexp(2.0 + mantissa, exponent - 2) : 0.5 * mantissa;
  return bits & 8 ? -magnitude : magnitude;
}

// 0.e4.m3, bias 7: all ones is NaN, there is no infinity.
inline double from_ue4m3(unsigned bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  return exponent ? std::ldexp(8.0 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
}

// m16n8k64 of e2m1 with scale_vec::4X. Element i of a lane, as of other 4-bit types: A row g where i < 8 or
// 16 <= i < 24, else g + 8; k = 8t + i % 8, from i = 16 on (B: from 8 on) 32 more. Scales lie as CUTLASS's traits
// for sm_120 have them: with selectors of 0 the first two lanes of four hold those of rows g and g + 8, the first those
// of column g, in byte k / 16 of the register.
struct ScaledProduct {
  float (&c)[4];
  const unsigned (&a)[4];
  const unsigned (&b)[2];
  unsigned a_scales, b_scales;

  static unsigned bits(const unsigned* registers, int i, int width) {
    return registers[i * width / 32] >> i * width % 32 & ((1u << width) - 1);
  }

  static void work(void* const* operands) {
    const auto lane = [&](int i) -> const ScaledProduct& { return *static_cast<const ScaledProduct*>(operands[i]); };
    double left[16][64], right[64][8];
    for (int l = 0; l < emulator::kWarp; ++l) {
      const int g = l >> 2, t = l & 3;
      for (int i = 0; i < 32; ++i) {
        const int row = i < 8 || (i >= 16 && i < 24) ? g : g + 8;
        const int k = i < 16 ? 8 * t + (i & 7) : 8 * t + (i & 7) + 32;
        const unsigned scale = bits(&lane((row & 7) * 4 + (row >> 3)).a_scales, k / 16, 8);
        left[row][k] = from_e2m1(bits(lane(l).a, i, 4)) * from_ue4m3(scale);
      }
      for (int i = 0; i < 16; ++i) {
        const int k = i < 8 ? 8 * t + (i & 7) : 8 * t + (i & 7) + 32;
        right[k][g] = from_e2m1(bits(lane(l).b, i, 4)) * from_ue4m3(bits(&lane(4 * g).b_scales, k / 16, 8));
      }
    }
    for (int l = 0; l < emulator::kWarp; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? l >> 2 : (l >> 2) + 8, column = (l & 3) * 2 + (i & 1);
        double sum = lane(l).c[i];
        for (int k = 0; k < 64; ++k) sum += left[row][k] * right[k][column];
        lane(l).c[i] = static_cast<float>(sum);
      }
    }
  }
};

inline void mma_m16n8k64_mxf4(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], unsigned a_scales,
                              unsigned b_scales) {
  if ((a_scales | b_scales) & 0x80808080) Block::current().fail("mma: a scale of ue4m3 with a sign");
  ScaledProduct p = {c, a, b, a_scales, b_scales};
  Block::current().meet("mma_m16n8k64_mxf4", &p, &ScaledProduct::work);
}

}  // namespace svdquant::cuda
