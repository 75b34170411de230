// Tensor-core products, one instruction a function, and the shapes that the kernels use made of what each card has.
//
// A warp multiplies a 16 x k by a k x 8 matrix. Lane 4g + t holds rows g and g + 8 of A, column g of B, and of the
// result rows g, g + 8 at columns 2t, 2t + 1:
//
//     a[0] row g, first half of k     a[1] row g + 8, first half     a[2] row g, second half     a[3] row g + 8, second
//     b[0] column g, first half       b[1] column g, second half
//     c[0] c[1] row g                 c[2] c[3] row g + 8
//
// One register holds 32 bits of consecutive k: t chooses which. As the sum over k has no order, a kernel may give lane
// t any k it likes, if it does so for A and B alike; all of ours give it 16 neighbours, which one wide load brings.
#pragma once

#include "ptx.cuh"

#ifdef __CUDACC__
namespace svdquant::cuda {

// Written as a macro, because the type is in the middle of the instruction's name.
#define SVDQUANT_MMA_INT(NAME, INSTRUCTION)                                                        \
  __device__ __forceinline__ void NAME(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
    asm(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                       \
  }

#define SVDQUANT_MMA_INT8(NAME, INSTRUCTION)                                                 \
  __device__ __forceinline__ void NAME(int& c0, int& c1, unsigned a, unsigned b) {           \
    asm(INSTRUCTION " {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c0), "+r"(c1) : "r"(a), "r"(b)); \
  }

// 9.7.14.5.14: the m16 shapes from sm_80, the m8 shapes from sm_75. Four-bit products are native up to sm_89 only.
SVDQUANT_MMA_INT8(mma_m8n8k16_s8, "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32")
SVDQUANT_MMA_INT8(mma_m8n8k32_s4, "mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32")
SVDQUANT_MMA_INT8(mma_m8n8k32_u4, "mma.sync.aligned.m8n8k32.row.col.s32.u4.s4.s32")
#if SVDQUANT_ARCH >= 80
SVDQUANT_MMA_INT(mma_m16n8k32_s8, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
SVDQUANT_MMA_INT(mma_m16n8k64_s4, "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32")
SVDQUANT_MMA_INT(mma_m16n8k64_u4, "mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32")
#endif

__device__ __forceinline__ void mma_m16n8k8_f16(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

#if SVDQUANT_ARCH >= 80
#define SVDQUANT_MMA_FLOAT(NAME, INSTRUCTION)                                                           \
  __device__ __forceinline__ void NAME(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
    asm(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                            \
  }
SVDQUANT_MMA_FLOAT(mma_m16n8k16_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
SVDQUANT_MMA_FLOAT(mma_m16n8k16_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
#endif

// A product of e2m1 in which the instruction multiplies by a ue4m3 scale for each 16 of k: byte i of a register belongs
// to the i-th 16. The pairs of zeros say which lanes' registers are meant (as in CUTLASS's traits for sm_120): of each
// four the first for row g of A, the second for row g + 8; the first for column g of B.
#if SVDQUANT_MXF4
__device__ __forceinline__ void mma_m16n8k64_mxf4(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                                  unsigned a_scales, unsigned b_scales) {
  asm("mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {0, 0}, %11, {0, 0};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(a_scales), "r"(b_scales));
}
#endif

}  // namespace svdquant::cuda
#endif  // __CUDACC__

namespace svdquant::cuda {

// The native products of 4-bit integers exist here; elsewhere the instruction is a call to some 180 others.
constexpr bool kHasInt4 = SVDQUANT_ARCH >= 75 && SVDQUANT_ARCH < 90;
constexpr bool kHasBf16 = SVDQUANT_ARCH >= 80;
constexpr bool kHasMxf4 = SVDQUANT_MXF4;

// c += A * B, 16 x 32 by 32 x 8, int8.
__device__ __forceinline__ void mma_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if SVDQUANT_ARCH >= 80
  mma_m16n8k32_s8(c, a, b);
#else
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mma_m8n8k16_s8(c[0], c[1], a[2 * half], b[half]);
    mma_m8n8k16_s8(c[2], c[3], a[2 * half + 1], b[half]);
  }
#endif
}

// c += A * B, 16 x 64 by 64 x 8; B is signed, A signed or unsigned.
template <bool kUnsigned>
__device__ __forceinline__ void mma_int4(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if SVDQUANT_ARCH >= 80
  if constexpr (kUnsigned) {
    mma_m16n8k64_u4(c, a, b);
  } else {
    mma_m16n8k64_s4(c, a, b);
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // register i: rows 8 * (i % 2), half i / 2 of k
    int &c0 = c[2 * (i % 2)], &c1 = c[2 * (i % 2) + 1];
    if constexpr (kUnsigned) {
      mma_m8n8k32_u4(c0, c1, a[i], b[i / 2]);
    } else {
      mma_m8n8k32_s4(c0, c1, a[i], b[i / 2]);
    }
  }
#endif
}

// c += A * B, 16 x 16 by 16 x 8, fp16 operands.
__device__ __forceinline__ void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if SVDQUANT_ARCH >= 80
  mma_m16n8k16_f16(c, a, b);
#else
  mma_m16n8k8_f16(c, a[0], a[1], b[0]);
  mma_m16n8k8_f16(c, a[2], a[3], b[1]);
#endif
}

// The same with bf16 operands; not on Turing, where no caller remains.
__device__ __forceinline__ void mma_bf16([[maybe_unused]] float (&c)[4], [[maybe_unused]] const unsigned (&a)[4],
                                         [[maybe_unused]] const unsigned (&b)[2]) {
#if SVDQUANT_ARCH >= 80
  mma_m16n8k16_bf16(c, a, b);
#endif
}

// c += A * B, 16 x 64 by 64 x 8, e2m1 times its scales; not on other cards, where no caller remains.
__device__ __forceinline__ void mma_mxf4([[maybe_unused]] float (&c)[4], [[maybe_unused]] const unsigned (&a)[4],
                                         [[maybe_unused]] const unsigned (&b)[2], [[maybe_unused]] unsigned a_scales,
                                         [[maybe_unused]] unsigned b_scales) {
#if SVDQUANT_MXF4
  mma_m16n8k64_mxf4(c, a, b, a_scales, b_scales);
#endif
}

}  // namespace svdquant::cuda
