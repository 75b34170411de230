// Activations to codes, scales and the branch's hidden values, reading x once. Four tokens at a time, so that the
// branch's matrix is read once for four.
#include "floats.h"
#include "parallel.h"
#include "spelling.h"

namespace svdquant {
namespace cpu {
namespace {

// A vector or matrix of any float as fp32 rows without gaps.
void widen_rows(const Spelling& s, const Launch& launch, const Floats& from, int64_t rows, int64_t columns,
                const Scratch<float>& to) {
  for_ranges(launch, rows, ceil_div(kCopyGrain, columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) s.widen(row_of(from, i), from.dtype, to + i * columns, columns);
  });
}

// Codes of integers: the largest one is what the scale is made for.
struct Range {
  int low, high;
};

Range range_of(Codes kind) {
  switch (kind) {
    case Codes::kInt8: return {-127, 127};
    case Codes::kUint4: return {0, 15};
    default: return {-8, 7};
  }
}

DType scale_type(const Quantize& q) {
  switch (q.kind) {
    case Codes::kInt8: return DType::kF32;
    case Codes::kE2M1: return DType::kE4M3;
    default: return q.x.dtype;
  }
}

class Quantizer {
 public:
  Quantizer(const Quantize& q, const Spelling& s, const Launch& launch)
      : q_(q), s_(s), size_(q.kind == Codes::kInt8 ? q.k : group_size(q.kind)), smooth_(q.k), down_(q.r * q.k) {
    widen_rows(s, launch, q.smooth, 1, q.k, smooth_);
    widen_rows(s, launch, q.down, q.r, q.k, down_);
  }

  // Tokens, in fours.
  void run(const Pieces& pieces) const {
    const Scratch<float> x(kTokens * q_.k), xs(q_.k), alpha(q_.k / size_);
    for (int64_t begin, end; pieces.take(&begin, &end);) {
      const int64_t last = end * kTokens < q_.m ? end * kTokens : q_.m;
      for (int64_t m = begin * kTokens; m < last; m += kTokens) {
        const int64_t rows = last - m < kTokens ? last - m : kTokens;
        for (int64_t i = 0; i < rows; ++i) {
          s_.widen(row_of(q_.x, m + i), q_.x.dtype, x + i * q_.k, q_.k);
          encode(x + i * q_.k, m + i, xs, alpha);
        }
        if (q_.r) s_.project(x + 0, rows, down_ + 0, q_.k, q_.r, q_.hidden + m * q_.r);
      }
    }
  }

 private:
  void encode(const float* x, int64_t token, const Scratch<float>& xs, const Scratch<float>& alpha) const {
    const int64_t groups = q_.k / size_, first = token * groups;
    s_.smooth(x, smooth_ + 0, q_.shift != 0.0f, q_.shift, q_.x.dtype, xs + 0, q_.k);
    void* codes = static_cast<uint8_t*>(q_.codes) + token * q_.k;
    if (q_.kind == Codes::kE2M1) {
      s_.codes_e2m1(xs + 0, groups, static_cast<uint8_t*>(codes), alpha + 0);
    } else {
      const Range range = range_of(q_.kind);
      s_.codes_int(xs + 0, groups, size_, range.high, range.low, static_cast<int8_t*>(codes), alpha + 0);
    }
    for (int64_t g = 0; g < groups; ++g) store(q_.scales, scale_type(q_), first + g, alpha[g]);
  }

  const Quantize& q_;
  const Spelling& s_;
  const int64_t size_;  // columns that share a scale
  const Scratch<float> smooth_, down_;
};

}  // namespace
}  // namespace cpu

const char* quantize(const Quantize& args, const Launch& launch) {
  const cpu::Spelling* s = cpu::find(launch.spelling);
  if (!s) return "this processor has no such spelling";
  const cpu::Quantizer quantizer(args, *s, launch);
  cpu::for_pieces(launch, cpu::ceil_div(args.m, cpu::kTokens), 1,
                  [&](const cpu::Pieces& pieces) { quantizer.run(pieces); });
  return nullptr;
}

}  // namespace svdquant
