// Weights as wgmma can take them: each code an e4m3 byte, scales as fp32 with a group's side by side.
//
//   codes [N, K/2] packed, scales [N, G]  ->  e4m3 [N, K], fp32 [G, N rounded up to 4]
//
// An integer from -8 to 7 is exact in e4m3. Two nibbles at once index a table of four bytes: a byte permutation.
#pragma once

#include "floats.cuh"
#include "sizes.cuh"

namespace svdquant::cuda {

constexpr int kExpandThreads = 256;

struct Expand {
  const uint8_t* codes;
  Floats scales;
  int64_t n, k;
  unsigned char* to_codes;  // [N, K]
  float* to_scales;         // [G, scale_row]
  int64_t scale_row;
  int blocks;
};

// Four nibbles to four bytes: e4m3 of 0 to 7, and of -8 to -1.
__device__ __forceinline__ unsigned look_up(unsigned nibbles) {
  const unsigned low = pick_bytes(0x44403800, 0x4E4C4A48, nibbles & 0x7777);
  const unsigned high = pick_bytes(0xCACCCED0, 0xB8C0C4C8, nibbles & 0x7777);
  const unsigned is_high = pick_bytes(0xFF00, 0, nibbles >> 3 & 0x1111);
  return (low & ~is_high) | (high & is_high);
}

template <int kGroup>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(Expand p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(p.blocks) * kExpandThreads;
  for (int64_t i = first; i < p.n * (p.k / 16); i += stride) {
    const uint2 v = ld_global(reinterpret_cast<const uint2*>(p.codes) + i);
    const uint4 bytes = {look_up(v.x), look_up(v.x >> 16), look_up(v.y), look_up(v.y >> 16)};
    st_global(reinterpret_cast<uint4*>(p.to_codes) + i, bytes);
  }
  const unsigned rows = static_cast<unsigned>(p.n), groups = static_cast<unsigned>(p.k / kGroup);
  for (unsigned i = static_cast<unsigned>(first); i < rows * groups; i += static_cast<unsigned>(stride)) {
    const int64_t group = i / rows, row = i % rows;
    st_global(p.to_scales + group * p.scale_row + row,
              load_one(p.scales.data, p.scales.dtype, row * p.scales.stride + group));
  }
}

}  // namespace svdquant::cuda
