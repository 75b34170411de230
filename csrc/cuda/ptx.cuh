// What a thread can do besides arithmetic, one instruction a function. Nothing outside this file and mma.cuh is inline
// PTX, and every access to memory goes through here: tests/kernels/emulator supplies the same functions as plain C++,
// where they also check bounds, alignment and races, and the kernels then run on a CPU unchanged.
//
// Section numbers are those of the PTX ISA 9.0.
#pragma once

#include "../launch.h"

#ifndef __CUDACC__
#include "emulated.h"
#else

#ifdef __CUDA_ARCH__
#define SVDQUANT_ARCH (__CUDA_ARCH__ / 10)
#else
#define SVDQUANT_ARCH 0  // the host's pass over a .cu file, which reads the kernels and compiles none
#endif

// Products of 4-bit floats with their scales, which only code for exactly this architecture may use.
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define SVDQUANT_MXF4 1
#else
#define SVDQUANT_MXF4 0
#endif

namespace svdquant::cuda {

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ uint4 memory[];  // uint4: 16-byte alignment
  return reinterpret_cast<char*>(memory);
}

// Global memory that no thread of this kernel writes (9.7.9.8, ld.global.nc).
template <class T>
__device__ __forceinline__ T ld_global(const T* from) {
  return __ldg(from);
}

template <class T>
__device__ __forceinline__ void st_global(T* to, T value) {
  *to = value;
}

// Global memory that this thread may have written itself.
template <class T>
__device__ __forceinline__ T ld_own(const T* from) {
  return *from;
}

template <class T>
__device__ __forceinline__ T ld_shared(const T* from) {
  return *from;
}

template <class T>
__device__ __forceinline__ void st_shared(T* to, T value) {
  *to = value;
}

// kBytes (4, 8 or 16) from global to shared memory, or zeros (9.7.9.25.3.1). Without cp.async, on Turing, a plain copy.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, bool valid) {
#if SVDQUANT_ARCH >= 80
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(to) = valid ? __ldg(static_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
  } else if constexpr (kBytes == 4) {
    *static_cast<unsigned*>(to) = valid ? __ldg(static_cast<const unsigned*>(from)) : 0;
  } else {
    *static_cast<uint2*>(to) = valid ? __ldg(static_cast<const uint2*>(from)) : uint2{0, 0};
  }
#endif
}

// Close the group of copies issued since the last commit (9.7.9.25.3.2).
__device__ __forceinline__ void cp_async_commit() {
#if SVDQUANT_ARCH >= 80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most kPending of this thread's groups are on their way (9.7.9.25.3.3).
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if SVDQUANT_ARCH >= 80
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

__device__ __forceinline__ void barrier() { __syncthreads(); }

// The value of the lane whose number differs by `mask` (9.7.9.6, shfl.sync.bfly).
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Correctly rounded whatever the compiler's flags, and never contracted.
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float round_to_even(float a) { return rintf(a); }

// 1 / a within one unit in the last place; what would be below 2^-126 is zero, and so is such an a (rcp.approx.ftz).
__device__ __forceinline__ float approximate_reciprocal(float a) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(a));
  return value;
}

__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// max(a, |b|), or NaN if either is (max.NaN).
__device__ __forceinline__ float larger_magnitude(float a, float b) {
#if SVDQUANT_ARCH >= 80
  float value;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(fabsf(b)));
  return value;
#else
  const unsigned bits = __float_as_uint(b) & 0x7fffffff;  // the order of floats that are not negative, NaN above all
  return __float_as_uint(a) > bits ? a : __uint_as_float(bits);
#endif
}

__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }

// The one of CUDA's library, which torch's GELU calls.
__device__ __forceinline__ float hyperbolic_tangent(float a) { return tanhf(a); }

__device__ __forceinline__ float as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned as_bits(float value) { return __float_as_uint(value); }

// Four bytes of eight: each nibble of `selector` numbers one, 0..3 in a and 4..7 in b (9.7.8.7, prmt).
__device__ __forceinline__ unsigned pick_bytes(unsigned a, unsigned b, unsigned selector) {
  return __byte_perm(a, b, selector);
}

// Bits of a where the mask has ones, of b elsewhere (lop3).
__device__ __forceinline__ unsigned choose_bits(unsigned mask, unsigned a, unsigned b) {
  unsigned value;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(value) : "r"(mask), "r"(a), "r"(b));
  return value;
}

// fp32 to the bits of a 16-bit float, to nearest even (9.7.9.22, cvt). Turing has no bf16: it rounds integers.
__device__ __forceinline__ unsigned short to_bf16(float value) {
#if SVDQUANT_ARCH >= 80
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const unsigned bits = as_bits(value);
  return value != value ? 0x7fff : static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

__device__ __forceinline__ unsigned short to_f16(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// The same of two numbers, the first one in the lower half.
__device__ __forceinline__ unsigned to_bf16x2(float low, float high) {
#if SVDQUANT_ARCH >= 80
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return to_bf16(low) | static_cast<unsigned>(to_bf16(high)) << 16;
#endif
}

__device__ __forceinline__ unsigned to_f16x2(float low, float high) {
#if SVDQUANT_ARCH >= 80
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return to_f16(low) | static_cast<unsigned>(to_f16(high)) << 16;
#endif
}

__device__ __forceinline__ float from_f16(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Two fp16 products, each rounded once (9.7.4.3, mul.f16x2).
__device__ __forceinline__ unsigned multiply_f16x2(unsigned a, unsigned b) {
  unsigned c;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

}  // namespace svdquant::cuda
#endif  // __CUDACC__
