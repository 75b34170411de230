// The AWQ product: 16-bit activations, 4-bit weights with a scale and a zero a group. Made for few tokens, where
// reading the nibbles is all there is to do; more tokens go through it four at a time.
#include "floats.h"
#include "parallel.h"
#include "spelling.h"

namespace svdquant {

const char* gemv_awq(const Gemv& args, const Launch& launch) {
  using namespace cpu;
  const Spelling* s = find(launch.spelling);
  if (!s) return "this processor has no such spelling";
  const int64_t blocks = args.k / kBlock, groups = args.k / args.group;
  const Scratch<float> ordered(args.m * args.k), sums(args.m * blocks * kAwqSums);
  for_ranges(launch, args.m, ceil_div(kCopyGrain, args.k), [&](int64_t begin, int64_t end) {
    const Scratch<float> x(args.k);
    for (int64_t m = begin; m < end; ++m) {
      s->widen(row_of(args.x, m), args.x.dtype, x + 0, args.k);
      s->order_awq(x + 0, blocks, ordered + m * args.k, sums + m * blocks * kAwqSums);
    }
  });
  for_ranges(launch, args.n, ceil_div(1 << 16, args.k), [&](int64_t begin, int64_t end) {
    const Scratch<float> scales(groups), zeros(groups);
    for (int64_t n = begin; n < end; ++n) {
      s->widen(row_of(args.weight_scales, n), args.weight_scales.dtype, scales + 0, groups);
      s->widen(row_of(args.zeros, n), args.zeros.dtype, zeros + 0, groups);
      const float bias = args.bias.data ? load(args.bias.data, args.bias.dtype, n * args.bias.stride) : 0.0f;
      for (int64_t m = 0; m < args.m; m += kTokens) {
        const int64_t rows = args.m - m < kTokens ? args.m - m : kTokens;
        float y[kTokens];
        s->dot_awq(args.weight_codes + n * args.k / 2, blocks, args.group / kBlock, scales + 0, zeros + 0,
                   ordered + m * args.k, sums + m * blocks * kAwqSums, rows, y);
        for (int64_t i = 0; i < rows; ++i) store_output(args, m + i, n, y[i] + bias);
      }
    }
  });
  return nullptr;
}

}  // namespace svdquant
