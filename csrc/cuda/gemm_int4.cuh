// W4A4 with a scale for every 64 columns, on integer tensor cores.
//
//   codes [M, K] bytes, scales [M, G], weight_codes [N, K/2], weight_scales [N, G], hidden [M, R], up [N, R], bias [N]
//   out[m, n] = sum over g of (sum over k in g of code * weight) * scales[m, g] * weight_scales[n, g]
//               + hidden[m] . up[n] + bias[n]
//   means: core/reference.py gemm_int4
//
// A group's sum is an exact integer. It is made a float without a conversion: the product starts at the integer whose
// bits are the float 2^23 + 2^22, where one unit is one bit, so that the sum's bits are the float 12582912 + sum.
// Conversions run at a quarter of the rate of additions or less, and this is the inner loop.
#pragma once

#include "epilogue.cuh"

namespace svdquant::cuda {

constexpr int kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;  // the same bits; sums may be anything within +-2^22
constexpr int kGroupsAhead = 4;        // groups whose scales are fetched at once: 8 bytes a row in 16 bits

// Sixteen bytes of codes as the words of even columns and the words of odd ones, which is how nibbles come apart.
__device__ __forceinline__ void split_columns(const uint4& v, unsigned (&even)[2], unsigned (&odd)[2]) {
  even[0] = pick_bytes(v.x, v.y, 0x6420), odd[0] = pick_bytes(v.x, v.y, 0x7531);
  even[1] = pick_bytes(v.z, v.w, 0x6420), odd[1] = pick_bytes(v.z, v.w, 0x7531);
}

// 4-bit codes widened to int8. A weight's nibble becomes 16 times its value by standing in the upper half of a byte,
// which keeps its sign and costs no sign extension; kScale takes the 16 out again.
struct Int8Product {
  static constexpr bool kExists = true;
  static constexpr float kScale = 1.0f / 16;
  using Weights = unsigned[2][2];  // two products of 32 columns

  static __device__ __forceinline__ void load_weights(const uint2& nibbles, Weights& b) {
    b[0][0] = nibbles.x << 4 & 0xF0F0F0F0, b[0][1] = nibbles.x & 0xF0F0F0F0;
    b[1][0] = nibbles.y << 4 & 0xF0F0F0F0, b[1][1] = nibbles.y & 0xF0F0F0F0;
  }

  struct Acts {
    unsigned a[2][4];
    __device__ __forceinline__ Acts(const uint4& upper, const uint4& lower) {
      unsigned even[2][2], odd[2][2];
      split_columns(upper, even[0], odd[0]);
      split_columns(lower, even[1], odd[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half][0] = even[0][half], a[half][1] = even[1][half], a[half][2] = odd[0][half], a[half][3] = odd[1][half];
      }
    }
  };

  static __device__ __forceinline__ void multiply(int (&c)[4], const Acts& acts, const Weights& b) {
    mma_s8(c, acts.a[0], b[0]);
    mma_s8(c, acts.a[1], b[1]);
  }
};

// 4-bit tensor cores. Nibbles of weights are in place; bytes of activations are put together the same way.
template <bool kUnsigned>
struct Int4Product {
  static constexpr bool kExists = kHasInt4;
  static constexpr float kScale = 1.0f;
  using Weights = unsigned[2];

  static __device__ __forceinline__ void load_weights(const uint2& nibbles, Weights& b) {
    b[0] = nibbles.x, b[1] = nibbles.y;
  }

  struct Acts {
    unsigned a[4];
    __device__ __forceinline__ Acts(const uint4& upper, const uint4& lower) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unsigned even[2], odd[2];
        split_columns(i ? lower : upper, even, odd);
        a[i] = (even[0] & 0x0F0F0F0F) | (odd[0] << 4 & 0xF0F0F0F0);
        a[i + 2] = (even[1] & 0x0F0F0F0F) | (odd[1] << 4 & 0xF0F0F0F0);
      }
    }
  };

  static __device__ __forceinline__ void multiply(int (&c)[4], const Acts& acts, const Weights& b) {
    mma_int4<kUnsigned>(c, acts.a, b);
  }
};

template <class T, class P>
struct Int4Loop {
  static constexpr int kScaleRow = T::kM + T::kN, kScaleRows = 2 * kGroupsAhead;  // of floats, twice over
  static constexpr int kSharedBytes = kStages * T::kStageBytes + kScaleRows * kScaleRow * 4;

  const Gemm& p;
  const Place<T>& place;
  char* memory;
  float* scales;  // [2 * kGroupsAhead][rows of the block, then its columns]
  int groups;
  Sums<T> sums = {};

  __device__ __forceinline__ Int4Loop(const Gemm& args, const Place<T>& at) : p(args), place(at) {
    memory = shared_memory();
    scales = reinterpret_cast<float*>(memory + kStages * T::kStageBytes);
    groups = static_cast<int>(p.k / kStep);
    load_scales(0);  // run_pipeline's first barrier makes them seen
  }

  // kGroupsAhead scales of each row and column of the block, from the group's number on. Neighbouring lanes take
  // neighbouring groups of a row.
  __device__ __forceinline__ void load_scales(int first) {
#pragma unroll 2
    for (int i = threadIdx.x; i < kScaleRow * kGroupsAhead; i += T::kThreads) {
      const int slot = i / kGroupsAhead;
      const bool is_weight = slot >= T::kM;
      const Floats from = is_weight ? p.weight_scales : p.scales;
      const int64_t row = is_weight ? place.column0 + slot - T::kM : place.row0 + slot;
      const int group = first + i % kGroupsAhead;
      float scale = 0.0f;
      if (row < (is_weight ? p.n : p.m) && group < groups) {
        scale = load_one(from.data, from.dtype, row * from.stride + group);
      }
      if (is_weight) scale = cuda::multiply(scale, P::kScale);
      st_shared(scales + group % kScaleRows * kScaleRow + slot, scale);
    }
  }

  __device__ __forceinline__ void copy(int step, int stage) {
    copy_codes<T>(p, place, step, memory + stage * T::kStageBytes);
  }

  __device__ __forceinline__ void multiply(int step, int stage) {
    // The half that the next groups' scales go to was read last before this step's barrier.
    if (step % kGroupsAhead == 0 && step + kGroupsAhead < groups) load_scales(step + kGroupsAhead);
    multiply_step(memory + stage * T::kStageBytes, scales + step % kScaleRows * kScaleRow);
  }

  __device__ __forceinline__ void multiply_step(const char* stage, const float* step_scales) {
    const uint4* acts = reinterpret_cast<const uint4*>(stage);
    const uint2* weights = reinterpret_cast<const uint2*>(stage + T::kM * kStep);
    typename P::Weights b[T::kNs];
    float2 weight_scale[T::kNs];
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      const int column = place.warp_column + 8 * j;
      P::load_weights(ld_shared(weights + (column + place.g) * 4 + place.t), b[j]);
      weight_scale[j] = ld_shared(reinterpret_cast<const float2*>(step_scales + T::kM + column) + place.t);
    }
#pragma unroll
    for (int i = 0; i < T::kMs; ++i) {
      const int row = place.warp_row + 16 * i + place.g;
      const typename P::Acts a(ld_shared(acts + row * 4 + place.t), ld_shared(acts + (row + 8) * 4 + place.t));
      const float act_scale[2] = {ld_shared(step_scales + row), ld_shared(step_scales + row + 8)};
#pragma unroll
      for (int j = 0; j < T::kNs; ++j) {
        int c[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
        P::multiply(c, a, b[j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float scale = cuda::multiply(act_scale[e / 2], e % 2 ? weight_scale[j].y : weight_scale[j].x);
          const float sum = add(as_float(static_cast<unsigned>(c[e])), -kMagic);
          sums[i][j][e] = fused_multiply_add(sum, scale, sums[i][j][e]);
        }
      }
    }
  }
};

// Blocks on an SM, which hide each other's barriers: as many as its shared memory holds, and their registers with them.
constexpr int kBlocksAtOnce = SVDQUANT_ARCH == 80 || SVDQUANT_ARCH == 90 || SVDQUANT_ARCH == 100 ? 3 : 2;

// One block a tile of the output.
template <class T, class P>
__global__ void __launch_bounds__(T::kThreads, kBlocksAtOnce) gemm_int4_kernel(Gemm p) {
  if constexpr (P::kExists) {
    const Place<T> place(p.m);
    Int4Loop<T, P> loop(p, place);
    run_pipeline(loop, loop.groups);
    add_branch<T>(p, place, loop.sums);
    store_sums<T>(p, place, loop.sums);
  }
}

}  // namespace svdquant::cuda
