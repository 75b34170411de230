// Compile a part of a file for an instruction set that the rest may not use. MSVC needs no telling.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define SVDQUANT_X86
#elif defined(__aarch64__) || defined(_M_ARM64)
#define SVDQUANT_ARM64
#endif

// Registers handed to a function by reference are registers only if it is inlined.
#if defined(_MSC_VER) && !defined(__clang__)
#define SVDQUANT_INLINE __forceinline
#else
#define SVDQUANT_INLINE __attribute__((always_inline)) inline
#endif

#define SVDQUANT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SVDQUANT_TARGET(features) \
  SVDQUANT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SVDQUANT_TARGET_END SVDQUANT_PRAGMA(clang attribute pop)
#define SVDQUANT_UNROLL(count) SVDQUANT_PRAGMA(unroll count)
#elif defined(__GNUC__)
#define SVDQUANT_TARGET(features) SVDQUANT_PRAGMA(GCC push_options) SVDQUANT_PRAGMA(GCC target(features))
#define SVDQUANT_TARGET_END SVDQUANT_PRAGMA(GCC pop_options)
#define SVDQUANT_UNROLL(count) SVDQUANT_PRAGMA(GCC unroll count)
#else
#define SVDQUANT_TARGET(features)
#define SVDQUANT_TARGET_END
#define SVDQUANT_UNROLL(count)
#endif

// Everything that `v` depends on is done here, and nothing after it begun: left to itself, GCC has the products of many
// steps under way and their sums on the stack.
#if defined(SVDQUANT_X86) && (defined(__GNUC__) || defined(__clang__))
#define SVDQUANT_SETTLE(v) __asm__("" : "+x"(v))
#else
#define SVDQUANT_SETTLE(v)
#endif

namespace svdquant::cpu {

// What the processor has and the operating system saves.
bool has_avx2();    // with FMA and F16C
bool has_avx512();  // F, BW and VNNI, with all of the above
bool has_dotprod();

}  // namespace svdquant::cpu
