// 4-bit operands as wgmma can take them: each code an e4m3 byte, scales as fp32 with a group's side by side.
//
//   codes [rows, K] int8 | uint8, or packed [rows, K/2]; scales [rows, G]
//   -> e4m3 [rows, K], fp32 [G, rows rounded up to 4]
//
// An integer from -15 to 15 is exact in e4m3. Two nibbles at once index a table of four bytes: a byte permutation.
#pragma once

#include "floats.cuh"
#include "sizes.cuh"

namespace svdquant::cuda {

constexpr int kExpandThreads = 256;

// e4m3 of what a nibble 0 to 15 means, four to a word.
struct NibbleTable {
  unsigned words[4];
};
constexpr NibbleTable kUnsignedNibbles = {{0x44403800, 0x4E4C4A48, 0x53525150, 0x57565554}};  // 0 .. 15
constexpr NibbleTable kSignedNibbles = {{0x44403800, 0x4E4C4A48, 0xCACCCED0, 0xB8C0C4C8}};    // 0 .. 7, -8 .. -1

struct Expand {
  const void* codes;
  bool packed;
  NibbleTable table;
  Floats scales;
  int64_t rows, k;
  unsigned char* to_codes;  // [rows, K]
  float* to_scales;         // [G, scale_row]
  int64_t scale_row;
  int blocks;
};

// Four nibbles to four bytes.
__device__ __forceinline__ unsigned look_up(const NibbleTable& table, unsigned nibbles) {
  const unsigned low = pick_bytes(table.words[0], table.words[1], nibbles & 0x7777);
  const unsigned high = pick_bytes(table.words[2], table.words[3], nibbles & 0x7777);
  const unsigned is_high = pick_bytes(0xFF00, 0, nibbles >> 3 & 0x1111);
  return (low & ~is_high) | (high & is_high);
}

// The low nibbles of four bytes, together.
__device__ __forceinline__ unsigned low_nibbles(unsigned bytes) {
  const unsigned pairs = (bytes & 0x0F0F0F0F) | (bytes & 0x0F0F0F0F) >> 4;
  return (pairs & 0xFF) | (pairs >> 8 & 0xFF00);
}

__device__ __forceinline__ uint4 expand_piece(const Expand& p, int64_t piece) {
  if (p.packed) {
    const uint2 v = ld_global(static_cast<const uint2*>(p.codes) + piece);
    return {look_up(p.table, v.x), look_up(p.table, v.x >> 16), look_up(p.table, v.y), look_up(p.table, v.y >> 16)};
  }
  const uint4 v = ld_global(static_cast<const uint4*>(p.codes) + piece);
  return {look_up(p.table, low_nibbles(v.x)), look_up(p.table, low_nibbles(v.y)), look_up(p.table, low_nibbles(v.z)),
          look_up(p.table, low_nibbles(v.w))};
}

template <int kGroup>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(Expand p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(p.blocks) * kExpandThreads;
  for (int64_t i = first; i < p.rows * (p.k / 16); i += stride) {
    st_global(reinterpret_cast<uint4*>(p.to_codes) + i, expand_piece(p, i));
  }
  const unsigned rows = static_cast<unsigned>(p.rows), groups = static_cast<unsigned>(p.k / kGroup);
  for (unsigned i = static_cast<unsigned>(first); i < rows * groups; i += static_cast<unsigned>(stride)) {
    const int64_t group = i / rows, row = i % rows;
    st_global(p.to_scales + group * p.scale_row + row,
              load_one(p.scales.data, p.scales.dtype, row * p.scales.stride + group));
  }
}

}  // namespace svdquant::cuda
