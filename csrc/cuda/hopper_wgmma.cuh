// Products of a warpgroup (PTX ISA 9.0, 9.7.15.5), one instruction a function. Included by hopper_ptx.cuh.
//
// Four warps multiply 64 x k by k x N. Warp w holds rows 16w to 16w + 15 of the result: its lane 4g + t has
//
//     sums[4j], sums[4j + 1]        row 16w + g,     columns 8j + 2t, 8j + 2t + 1
//     sums[4j + 2], sums[4j + 3]    row 16w + g + 8, the same columns
//
// Operands lie in shared memory and are named by descriptors; or A in registers, by the rules of m16n8k16 (mma.cuh) for
// each warp's 16 rows. Products run beside the program: sums must not be touched until they are finished.
#pragma once

#include "ptx.cuh"

namespace svdquant::cuda {

// How an operand lies in shared memory (9.7.15.5.1.2.2): its rows in eights, of which each row is
enum class Rows : unsigned {
  kPlain = 0,  // 16-byte pieces, eight rows of a piece side by side, `pieces` bytes from one piece of a row to the next
  kSwizzled = 1,  // 128 bytes, pieces exchanged as the copy engine's 128-byte swizzle does
};

// The descriptor of an operand that begins at a shared address; `eights` bytes from eight rows to the next eight.
__host__ __device__ constexpr uint64_t operand(unsigned address, Rows rows, unsigned eights, unsigned pieces = 16) {
  return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(pieces >> 4) << 16 |
         static_cast<uint64_t>(eights >> 4) << 32 | static_cast<uint64_t>(rows) << 62;
}

}  // namespace svdquant::cuda

#ifdef __CUDACC__
namespace svdquant::cuda {

// The operands of an asm statement are numbered: first the sums, which are 48, 64, 96 or 128 a thread.
#define SVDQUANT_NAMES_48                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                             \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SVDQUANT_NAMES_64                                                                                              \
  SVDQUANT_NAMES_48 ", "                                                                                               \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SVDQUANT_NAMES_96                                                                                              \
  SVDQUANT_NAMES_64 ", "                                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                                   \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SVDQUANT_NAMES_128                                                                                             \
  SVDQUANT_NAMES_96 ", "                                                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                       \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define SVDQUANT_SUMS_8(R, d, i) \
  R(d[i]), R(d[i + 1]), R(d[i + 2]), R(d[i + 3]), R(d[i + 4]), R(d[i + 5]), R(d[i + 6]), R(d[i + 7])
#define SVDQUANT_SUMS_16(R, d, i) SVDQUANT_SUMS_8(R, d, i), SVDQUANT_SUMS_8(R, d, i + 8)
#define SVDQUANT_SUMS_48(R, d) SVDQUANT_SUMS_16(R, d, 0), SVDQUANT_SUMS_16(R, d, 16), SVDQUANT_SUMS_16(R, d, 32)
#define SVDQUANT_SUMS_64(R, d) SVDQUANT_SUMS_48(R, d), SVDQUANT_SUMS_16(R, d, 48)
#define SVDQUANT_SUMS_96(R, d) SVDQUANT_SUMS_64(R, d), SVDQUANT_SUMS_16(R, d, 64), SVDQUANT_SUMS_16(R, d, 80)
#define SVDQUANT_SUMS_128(R, d) SVDQUANT_SUMS_96(R, d), SVDQUANT_SUMS_16(R, d, 96), SVDQUANT_SUMS_16(R, d, 112)

// sums (+)= A * B, both in shared memory. A, B and P are the numbers that follow the names of the sums.
#define SVDQUANT_WGMMA(NAME, INSTRUCTION, C, R, COUNT, A, B, P, FACTORS)                                          \
  __device__ __forceinline__ void NAME(C(&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {                   \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " P ", 0;\n\t" INSTRUCTION                                 \
                 " {" SVDQUANT_NAMES_##COUNT "}, " A ", " B ", p" FACTORS ";\n\t}"                                \
                 : SVDQUANT_SUMS_##COUNT(R, d)                                                                    \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                            \
  }

#define SVDQUANT_INT(x) "+r"(x)
#define SVDQUANT_FLOAT(x) "+f"(x)
#define SVDQUANT_S8(N) "wgmma.mma_async.sync.aligned.m64n" N "k32.s32.s8.s8"
SVDQUANT_WGMMA(wgmma_s8, SVDQUANT_S8("96"), int, SVDQUANT_INT, 48, "%48", "%49", "%50", "")
SVDQUANT_WGMMA(wgmma_s8, SVDQUANT_S8("128"), int, SVDQUANT_INT, 64, "%64", "%65", "%66", "")
SVDQUANT_WGMMA(wgmma_s8, SVDQUANT_S8("192"), int, SVDQUANT_INT, 96, "%96", "%97", "%98", "")
SVDQUANT_WGMMA(wgmma_s8, SVDQUANT_S8("256"), int, SVDQUANT_INT, 128, "%128", "%129", "%130", "")
SVDQUANT_WGMMA(wgmma_e4m3, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", float, SVDQUANT_FLOAT, 64, "%64",
               "%65", "%66", ", 1, 1")

// sums += A * B, bf16, A in registers.
#define SVDQUANT_WGMMA_BF16(COUNT, N, A, B)                                                                       \
  __device__ __forceinline__ void wgmma_bf16(float(&d)[COUNT], const unsigned(&a)[4], uint64_t b) {               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" SVDQUANT_NAMES_##COUNT "}, " A ", " B \
                 ", 1, 1, 1, 0;"                                                                                  \
                 : SVDQUANT_SUMS_##COUNT(SVDQUANT_FLOAT, d)                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
  }
SVDQUANT_WGMMA_BF16(48, "96", "{%48, %49, %50, %51}", "%52")
SVDQUANT_WGMMA_BF16(64, "128", "{%64, %65, %66, %67}", "%68")
SVDQUANT_WGMMA_BF16(96, "192", "{%96, %97, %98, %99}", "%100")
SVDQUANT_WGMMA_BF16(128, "256", "{%128, %129, %130, %131}", "%132")

}  // namespace svdquant::cuda
#endif
