// What ops.cpp hands to a kernel: pointers, sizes and strides, and how to run on this device. No torch here, so that a
// kernel compiles in seconds; the shapes were checked before anything in this file was filled in.
//
// Every entry point has one definition in each library: csrc/cpu/ in the CPU's, the .cu files in a GPU's. It returns
// nullptr, or a sentence that says why it could not run.
//
// Letters: M tokens, K in_features, N out_features, R rank, G groups of K.
#pragma once

#include <cstdint>

namespace svdquant {

enum class DType : int32_t { kF32, kBF16, kF16, kE4M3 };

// The kinds of 4-bit code, and with them the group size and how codes are rounded.
enum class Codes : int32_t {
  kInt4,   // -7..7 emitted, -8..7 understood; group 64
  kUint4,  // 0..15, activations only; group 64
  kE2M1,   // NVFP4; group 16, e4m3 scales
  kInt8,   // -127..127, one fp32 scale a token: activations of an 8-bit layer
  kE4M3,   // either kind of int4, each integer as an e4m3 number, for a product that takes no other; group 64
};

// Columns that share a scale, which divide K; an 8-bit layer has one for the whole row, in pieces of 16 for vectors' sake.
constexpr int64_t group_size(Codes kind) { return kind == Codes::kE2M1 || kind == Codes::kInt8 ? 16 : 64; }

// A matrix or vector of floats: `stride` elements from one row (or element of a vector) to the next.
struct Floats {
  const void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride = 0;
};

// Where a product writes: fp32, bf16 or fp16, rounded once from fp32; fp16 saturates at 65504. Rows are `stride` elements
// apart, of any alignment: between them may lie what other products of the same layer write.
struct Output {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride = 0;
};

// How to run: the spelling that select.py chose, and the device's own way to spread work.
struct Launch {
  const char* spelling = nullptr;
  void* stream = nullptr;  // cudaStream_t on a GPU
  // Torch's thread pool on a CPU: calls body(context, begin, end) for ranges that cover 0..count, none below `grain`.
  void (*parallel)(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                   const void* context) = nullptr;
  // Memory of the device that lives as long as the call: `owner` keeps it.
  void* (*allocate)(void* owner, int64_t bytes) = nullptr;
  void* owner = nullptr;
};

// means: core/reference.py quantize_int4, quantize_int4_unsigned, quantize_nvfp4, quantize_int8
struct Quantize {
  Codes kind;
  int64_t m, k, r;
  Floats x;       // [M, K]
  Floats smooth;  // [K]
  Floats down;    // [R, K]
  float shift;    // added to x before smoothing, kUint4 and kInt8 only
  void* codes;    // [M, K]     int8 | uint8, or e4m3 where the spelling carries integers so
  void* scales;   // [M, G]     x's dtype, e4m3, or fp32 [M]; beside integers carried by e4m3 fp32 [G, scale_row]
  float* hidden;  // [M, R]
  int64_t scale_row = 0;  // from one group's scales to the next group's
};

// means: core/reference.py gemm_int4, gemm_nvfp4
struct Gemm {
  Codes kind;  // of activations; kInt8 has a struct of its own
  int64_t m, n, k, r;
  const void* codes;            // [M, K]     int8 | uint8 | e4m3, contiguous
  Floats scales;                // [M, G]; of kE4M3 fp32 [G, M], rows at multiples of 16 bytes
  const float* hidden;          // [M, R]     contiguous
  const uint8_t* weight_codes;  // [N, K/2]   contiguous
  Floats weight_scales;         // [N, G]
  Floats second_scale;          // [1] with stride 0, or [N]; kE2M1 only
  Floats up;                    // [N, R]
  Floats bias;                  // [N] or no data
  Floats addend;                // [M, N] fp32 or no data: added last, before the rounding
  Output out;                   // [M, N]
};

// means: core/reference.py gemm_int4_gelu, gemm_nvfp4_gelu. The output of one layer and the input of the next meet in registers alone:
// `product.out` and `next.x` have a dtype, the same bf16 or fp16, and no data.
struct GemmGelu {
  Gemm product;
  Quantize next;  // its m is the product's, its k the product's n
};

// means: core/reference.py gemm_int8
struct GemmInt8 {
  int64_t m, n, k, r;
  const int8_t* codes;         // [M, K]   contiguous
  const float* scales;         // [M]
  const float* hidden;         // [M, R]   contiguous
  const int8_t* weight_codes;  // [N, K]   contiguous
  const float* weight_scales;  // [N]
  Floats up;                   // [N, R]
  Floats bias;                 // [N] or no data
  Floats addend;               // [M, N] fp32 or no data: added last, before the rounding
  Output out;                  // [M, N]
};

// means: core/reference.py gemv_awq
struct Gemv {
  int64_t m, n, k, group;
  Floats x;                     // [M, K]
  const uint8_t* weight_codes;  // [N, K/2]   contiguous
  Floats weight_scales;         // [N, K/group]
  Floats zeros;                 // [N, K/group]
  Floats bias;                  // [N] or no data
  Floats addend;                // [M, N] fp32 or no data: added last, before the rounding
  Output out;                   // [M, N]
};

const char* quantize(const Quantize& args, const Launch& launch);
const char* gemm(const Gemm& args, const Launch& launch);
const char* gemm_gelu(const GemmGelu& args, const Launch& launch);  // of GPUs only
const char* gemm_int8(const GemmInt8& args, const Launch& launch);
const char* gemv_awq(const Gemv& args, const Launch& launch);

// Spellings this device can run, best first, separated by spaces.
const char* spellings();

// Whether a spelling's quantizers of int4 write integers as e4m3, and scales by groups: what its product reads.
bool carries_e4m3(const char* spelling);

}  // namespace svdquant
