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
  static constexpr int kBlocksAtOnce = 2;  // on an SM, which hide each other's barriers
  static constexpr float kScale = 1.0f / 16;
  struct Weights {  // two products of 32 columns
    unsigned b[2][2];
  };
  struct Acts {
    unsigned a[2][4];
  };

  static __device__ __forceinline__ Weights load_weights(const uint2& nibbles) {
    return {{{nibbles.x << 4 & 0xF0F0F0F0, nibbles.x & 0xF0F0F0F0}, {nibbles.y << 4 & 0xF0F0F0F0, nibbles.y & 0xF0F0F0F0}}};
  }

  static __device__ __forceinline__ Acts load_acts(const uint4& upper, const uint4& lower) {
    unsigned even[2][2], odd[2][2];
    split_columns(upper, even[0], odd[0]);
    split_columns(lower, even[1], odd[1]);
    return {{{even[0][0], even[1][0], odd[0][0], odd[1][0]}, {even[0][1], even[1][1], odd[0][1], odd[1][1]}}};
  }

  static __device__ __forceinline__ void multiply(int (&c)[4], const Acts& acts, const Weights& weights) {
    mma_s8(c, acts.a[0], weights.b[0]);
    mma_s8(c, acts.a[1], weights.b[1]);
  }
};

// 4-bit tensor cores. Nibbles of weights are in place; bytes of activations are put together the same way.
template <bool kUnsigned>
struct Int4Product {
  static constexpr bool kExists = kHasInt4;
  static constexpr int kBlocksAtOnce = SVDQUANT_ARCH == 80 ? 3 : 2;  // as many as shared memory holds
  static constexpr float kScale = 1.0f;
  struct Weights {
    unsigned b[2];
  };
  struct Acts {
    unsigned a[4];
  };

  static __device__ __forceinline__ Weights load_weights(const uint2& nibbles) { return {{nibbles.x, nibbles.y}}; }

  static __device__ __forceinline__ Acts load_acts(const uint4& upper, const uint4& lower) {
    unsigned even[2][2], odd[2][2];
    split_columns(upper, even[0], odd[0]);
    split_columns(lower, even[1], odd[1]);
    return {{join_nibbles(even[0][0], odd[0][0]), join_nibbles(even[1][0], odd[1][0]),
             join_nibbles(even[0][1], odd[0][1]), join_nibbles(even[1][1], odd[1][1])}};
  }

  static __device__ __forceinline__ void multiply(int (&c)[4], const Acts& acts, const Weights& weights) {
    mma_int4<kUnsigned>(c, acts.a, weights.b);
  }
};

// Scales of the rows of a tile, and of its columns, as floats in shared memory: [2 * kGroupsAhead][rows, then columns].
// One half is used while the other is filled: read from global memory before a step's products, stored behind them.
template <class T>
struct GroupScales {
  static constexpr int kRow = T::kM + T::kN, kGroups = 2 * kGroupsAhead, kBytes = kGroups * kRow * 4;
  static constexpr int kTurns = (kRow + T::kThreads - 1) / T::kThreads;  // a thread takes a row at a turn

  const Gemm& p;
  const Place<T>& place;
  float* memory;
  float factor;  // of the weights' scales
  int groups;
  bool words;                              // 16-bit scales of two groups are a word in global memory
  unsigned ahead[kTurns][kGroupsAhead / 2];  // words on their way

  __device__ __forceinline__ GroupScales(const Gemm& args, const Place<T>& at, char* to, float weights_factor)
      : p(args),
        place(at),
        memory(reinterpret_cast<float*>(to)),
        factor(weights_factor),
        groups(static_cast<int>(args.k / kStep)),
        words(groups % 2 == 0 && has_words(args.scales) && has_words(args.weight_scales) &&
              at.row0 + T::kM <= args.m && at.column0 + T::kN <= args.n) {}

  static __device__ __forceinline__ bool has_words(const Floats& scales) {
    return size_of(scales.dtype) == 2 && is_aligned(scales.data, 4) && scales.stride % 2 == 0;
  }

  __device__ __forceinline__ const float* of_group(int group) const { return memory + group % kGroups * kRow; }

  __device__ __forceinline__ void store(int slot, int group, float scale) {
    if (slot >= T::kM) scale = cuda::multiply(scale, factor);
    st_shared(memory + group % kGroups * kRow + slot, scale);
  }

  // kGroupsAhead groups, from `first` on.
  __device__ __forceinline__ void fetch(int first) {
    if (!words) return;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int slot = threadIdx.x + turn * T::kThreads;
      const Floats& from = slot < T::kM ? p.scales : p.weight_scales;
      const int64_t row = slot < T::kM ? place.row0 + slot : place.column0 + slot - T::kM;
      const unsigned short* at = static_cast<const unsigned short*>(from.data) + row * from.stride + first;
#pragma unroll
      for (int i = 0; i < kGroupsAhead / 2; ++i) {
        if (slot < kRow && first + 2 * i < groups) ahead[turn][i] = ld_global(reinterpret_cast<const unsigned*>(at) + i);
      }
    }
  }

  __device__ __forceinline__ void keep(int first) {
    if (!words) return keep_by_one(first);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int slot = threadIdx.x + turn * T::kThreads;
      const DType dtype = slot < T::kM ? p.scales.dtype : p.weight_scales.dtype;
#pragma unroll
      for (int i = 0; i < kGroupsAhead / 2; ++i) {
        if (slot >= kRow || first + 2 * i >= groups) continue;
        store(slot, first + 2 * i, low_half(ahead[turn][i], dtype));
        store(slot, first + 2 * i + 1, high_half(ahead[turn][i], dtype));
      }
    }
  }

  // In any format, at any address. Neighbouring lanes take neighbouring groups of a row.
  __device__ __forceinline__ void keep_by_one(int first) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRow * kGroupsAhead; i += T::kThreads) {
      const int slot = i / kGroupsAhead, group = first + i % kGroupsAhead;
      const bool is_weight = slot >= T::kM;
      const Floats& from = is_weight ? p.weight_scales : p.scales;
      const int64_t row = is_weight ? place.column0 + slot - T::kM : place.row0 + slot;
      const bool exists = row < (is_weight ? p.n : p.m) && group < groups;
      store(slot, group, exists ? load_one(from.data, from.dtype, row * from.stride + group) : 0.0f);
    }
  }
};

template <class T, class P>
struct Int4Loop {
  using Shape = T;
  static constexpr bool kE2M1 = false, kExists = P::kExists;
  static constexpr int kSharedBytes = kStages * T::kStageBytes + GroupScales<T>::kBytes;

  const Gemm& p;
  const Place<T>& place;
  char* memory;
  TileCodes<T, 8> codes;
  GroupScales<T> scales;
  Sums<T> sums = {};

  __device__ __forceinline__ Int4Loop(const Gemm& args, const Place<T>& at)
      : p(args),
        place(at),
        memory(shared_memory()),
        codes(args, at),
        scales(args, at, memory + kStages * T::kStageBytes, P::kScale) {
    scales.fetch(0);
    scales.keep(0);  // run_pipeline's first barrier makes them seen
  }

  __device__ __forceinline__ int steps() const { return scales.groups; }
  __device__ __forceinline__ void finish() {}

  __device__ __forceinline__ void copy(int step, int stage) {
    codes.copy(step, memory + stage * T::kStageBytes);
  }

  __device__ __forceinline__ void multiply(int step, int stage) {
    // The half that the next groups' scales go to was read last before this step's barrier.
    const bool turn = step % kGroupsAhead == 0 && step + kGroupsAhead < scales.groups;
    if (turn) scales.fetch(step + kGroupsAhead);
    multiply_step(memory + stage * T::kStageBytes, scales.of_group(step));
    if (turn) scales.keep(step + kGroupsAhead);
  }

  __device__ __forceinline__ void multiply_step(const char* stage, const float* step_scales) {
    const uint4* acts = reinterpret_cast<const uint4*>(stage);
    const uint2* weights = reinterpret_cast<const uint2*>(stage + T::kM * kStep);
    typename P::Acts a[T::kMs];
    float act_scale[T::kMs][2];
#pragma unroll
    for (int i = 0; i < T::kMs; ++i) {
      const int row = place.warp_row + 16 * i + place.g;
      a[i] = P::load_acts(ld_shared(acts + row * 4 + place.t), ld_shared(acts + (row + 8) * 4 + place.t));
      act_scale[i][0] = ld_shared(step_scales + row), act_scale[i][1] = ld_shared(step_scales + row + 8);
    }
#pragma unroll
    for (int j = 0; j < T::kNs; ++j) {
      const int column = place.warp_column + 8 * j;
      const typename P::Weights b = P::load_weights(ld_shared(weights + (column + place.g) * 4 + place.t));
      const float2 weight_scale = ld_shared(reinterpret_cast<const float2*>(step_scales + T::kM + column) + place.t);
#pragma unroll
      for (int i = 0; i < T::kMs; ++i) {
        int c[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
        P::multiply(c, a[i], b);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float scale = cuda::multiply(act_scale[i][e / 2], e % 2 ? weight_scale.y : weight_scale.x);
          const float sum = add(as_float(static_cast<unsigned>(c[e])), -kMagic);
          sums[i][j][e] = fused_multiply_add(sum, scale, sums[i][j][e]);
        }
      }
    }
  }
};

// One block a tile of the output.
template <class T, class P>
__global__ void __launch_bounds__(T::kThreads, P::kBlocksAtOnce) gemm_int4_kernel(Gemm p) {
  if constexpr (P::kExists) multiply_tile<Int4Loop<T, P>>(p);
}

}  // namespace svdquant::cuda
