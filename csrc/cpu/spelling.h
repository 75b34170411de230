// What an instruction set supplies, and who supplies it. The loops over tokens, panels and threads are written once,
// in quantize.cpp, gemm.cpp and gemv.cpp; only what runs inside them is written again for each instruction set.
//
// The integer product. A panel is 16 weight rows, a block is 64 columns, a step is 4 columns of all 16 rows: 64 bytes.
// Stored nibbles have the even column in the low half, so masking 4 bytes of a row gives its columns 0 2 4 6 and
// shifting them gives 1 3 5 7. Activations are ours to order, and take the same order:
//
//     a row's 8 columns   0 1 2 3 4 5 6 7  ->  step 2c: 0 2 4 6, step 2c+1: 1 3 5 7
//     a panel             [steps][16 rows][4 columns]  uint8, code + zero
//
// AVX2 has an order of its own, of 32 rows: `unpack` in avx2_gemm.cpp.
//
// Bytes of a panel are unsigned: `zero` is added, and taken out again by starting every sum at -zero * (sum of the
// token's codes). Unsigned times signed bytes is what CPUs multiply. It is 16 for int4 and 24 for e2m1, whose values
// are doubled: twice what would do, so that a weight's byte plus an activation is never negative either.
//
// 8-bit codes are bytes already: columns keep their order, `zero` is 128, and one group is all of K.
#pragma once

#include "../launch.h"

namespace svdquant::cpu {

constexpr int64_t kPanel = 16;  // weight rows, one 512-bit register of sums
constexpr int64_t kBlock = 64;  // columns, one 256-bit load of nibbles
constexpr int64_t kFetching = 32;  // tokens from which on a product takes long enough to fetch the next panel in

// What a 4-bit code becomes, as a weight's byte (zero added) and as an activation's.
struct CodeTable {
  int64_t group;
  int32_t zero;
  uint8_t weight[16];
  const int8_t* activation;  // 16 values, or nullptr where codes are their own values
};

// One panel times some tokens: out[m][0..15] += sum over groups of (int sum) * weight_scale * token_scale. Where a
// panel comes in chunks, all that belongs to groups begins at the chunk's first.
struct Tile {
  int64_t rows, groups;        // of all of K: numbers of a token lie as far apart
  int64_t count;               // groups to multiply
  const uint8_t* panel;        // [K/4][16][4], or as `unpack` has it
  const float* weight_scales;  // [panels][groups][16]
  const int8_t* acts;          // [rows][K]        arranged
  const int32_t* starts;       // [rows][groups]   -zero * sum of codes, and what else `arrange` puts in
  const float* scales;         // [rows][groups]
  float* out;                  // [rows][panels * 16]
  int64_t out_stride;
  const uint8_t* next;         // nibbles to fetch meanwhile, as many as this panel's, or nullptr
};

struct Spelling {
  const char* name;
  bool (*supported)();

  // How many panels `unpack` and `multiply` take side by side; their 4-bit codes may then lie in an order of their own.
  int64_t panels;
  // Blocks of a panel that are unpacked, and multiplied with all tokens, before the next ones; 0 for all.
  int64_t chunk;

  // Any float to fp32.
  void (*widen)(const void* from, DType dtype, float* to, int64_t count);
  // fp32 to the dtype of an output, rounded once; fp16 saturates.
  void (*narrow)(const float* from, int64_t count, DType dtype, void* to);
  // to = round_T(round_T(x + shift) / smooth); `shifted` says whether there is a shift at all.
  void (*smooth)(const float* x, const float* smooth, bool shifted, float shift, DType dtype, float* to, int64_t k);
  // Codes and unrounded scales of smoothed values; `size` columns share a scale, a multiple of 16.
  void (*codes_int)(const float* xs, int64_t groups, int64_t size, int q_max, int q_min, int8_t* codes, float* alpha);
  void (*codes_e2m1)(const float* xs, int64_t groups, uint8_t* codes, float* alpha);
  // hidden[i][j] = x[i] . down[j] for up to four tokens.
  void (*project)(const float* x, int64_t rows, const float* down, int64_t k, int64_t r, float* hidden);

  // Codes of one token in the order of a panel, and the start of every group's sum, for nobody but `multiply`.
  void (*arrange)(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to, int32_t* starts);
  // Nibbles of panels * 16 weight rows, `stride` bytes apart, into a panel; `next` as in Tile.
  void (*unpack)(const uint8_t* rows, int64_t stride, int64_t blocks, const CodeTable& table, uint8_t* panel,
                 const uint8_t* next);
  // Rows of 16 to columns of 16, of 32-bit words: to[j][i] = from[i][j], with rows `stride` apart, a multiple of 8.
  void (*interleave)(const void* from, int64_t stride, void* to);
  void (*multiply)(const Tile& tile, int64_t group);
  // The same with bytes of any size and one group of K columns, a multiple of 4.
  void (*multiply_int8)(const Tile& tile, int64_t k);
  // One token in the order in which `dot4` meets the nibbles. Both are nullptr where they are not written.
  void (*order_token)(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to);
  // One token times four weight rows, straight from their nibbles, where unpacking is most of the work:
  // to[0..3] += sum over groups of (int sum) * scale, with `scales` [4][groups] of weight and token.
  void (*dot4)(const uint8_t* rows, int64_t blocks, const CodeTable& table, const int8_t* token, const float* scales,
               float* to);
  // out[m][0..15] = bias + hidden[m] . up[0..15], with up as [R][16].
  void (*branch)(const float* hidden, int64_t rows, int64_t r, const float* up, const float* bias, float* out,
                 int64_t out_stride);

  // One token in the order in which `dot_awq` meets the nibbles, and sums of x that go with its lanes.
  void (*order_awq)(const float* x, int64_t blocks, float* to, float* sums);
  // out[m] = one weight row times up to four ordered tokens; `per_group` blocks share a scale and a zero.
  void (*dot_awq)(const uint8_t* codes, int64_t blocks, int64_t per_group, const float* scales, const float* zeros,
                  const float* ordered, const float* sums, int64_t rows, float* out);
};

constexpr int64_t kTokens = 4;       // of project and dot_awq
constexpr int64_t kTokenBytes = 96;  // of order_token, a block
constexpr int64_t kAwqSums = 8;      // sums a block

// nullptr where the file was compiled for another processor.
const Spelling* portable();
const Spelling* avx2();
const Spelling* avx512();
const Spelling* neon();

// By name; nullptr where there is none or this processor cannot run it.
const Spelling* find(const char* name);

}  // namespace svdquant::cpu
