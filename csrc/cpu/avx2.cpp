// AVX2, FMA and F16C: eight floats or 32 bytes at a time. Every x86 processor since 2013 (Intel) and 2015 (AMD).
#include "avx2.h"

#ifdef SVDQUANT_X86

const svdquant::cpu::Spelling* svdquant::cpu::avx2() {
  static const Spelling spelling = [] {
    Spelling s = {};
    s.name = "avx2";
    s.supported = has_avx2;
    add_avx2_quantize(s);
    add_avx2_gemm(s);
    add_avx2_gemm_int8(s);
    add_avx2_gemv(s);
    return s;
  }();
  return &spelling;
}

#else
const svdquant::cpu::Spelling* svdquant::cpu::avx2() { return nullptr; }
#endif
