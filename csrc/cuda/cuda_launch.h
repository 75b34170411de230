// What the .cu files offer each other: launch.h's structs, and what a GPU's caller may ask for besides.
#pragma once

#include "../launch.h"

namespace svdquant::cuda {

// How 4-bit integers are multiplied.
enum class Product {
  kInt4,  // 4-bit tensor cores, sm_75 to sm_89
  kInt8,  // widened to int8, everywhere
};

// means: core/reference.py quantize_int4, quantize_int4_unsigned
const char* quantize_int4(const Quantize& args, const Launch& launch);
// The same with integers as e4m3, and scales by groups, for gemm_int4_hopper.
const char* quantize_e4m3(const Quantize& args, const Launch& launch);
// means: core/reference.py quantize_int8
const char* quantize_int8(const Quantize& args, const Launch& launch);
// means: core/reference.py quantize_nvfp4
const char* quantize_nvfp4(const Quantize& args, const Launch& launch);

// means: core/reference.py gemm_int4
const char* gemm_int4(const Gemm& args, Product product, const Launch& launch);
// The same of kE4M3 on sm_90a, by products of warpgroups, of blocks alone or in clusters; asks for scratch memory.
const char* gemm_int4_hopper(const Gemm& args, bool in_clusters, const Launch& launch);
// means: core/reference.py gemm_nvfp4
const char* gemm_nvfp4(const Gemm& args, const Launch& launch);
// The same on sm_120a and sm_121a, by products that multiply by the scales themselves.
const char* gemm_mxf4(const Gemm& args, const Launch& launch);

// means: core/reference.py gemm_int4_gelu, by 4-bit products or by 8-bit ones, and gemm_nvfp4_gelu, by fp16 products or
// by those that multiply by the scales; each asks for scratch memory.
const char* gemm_int4_gelu(const GemmGelu& args, const Launch& launch);
const char* gemm_int4_gelu_wide(const GemmGelu& args, const Launch& launch);
const char* gemm_nvfp4_gelu(const GemmGelu& args, const Launch& launch);
const char* gemm_mxf4_gelu(const GemmGelu& args, const Launch& launch);

// means: core/reference.py gemm_int8
const char* gemm_int8(const GemmInt8& args, const Launch& launch);
// The same on sm_90a, by blocks that each read their own operands, or by clusters that share them.
const char* gemm_int8_hopper(const GemmInt8& args, bool in_clusters, const Launch& launch);

// means: core/reference.py gemv_awq
const char* gemv_awq(const Gemv& args, const Launch& launch);

}  // namespace svdquant::cuda
