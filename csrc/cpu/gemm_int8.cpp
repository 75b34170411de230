// The W8A8 product, in the loops of panel.h. A panel's bytes are code + 128, and a token's sums start at -128 times
// the sum of its codes. Nothing is scaled inside the sum, so it is an exact integer in 32 bits.
#include "panel.h"

namespace svdquant {
namespace cpu {
namespace {

constexpr int64_t kWords = 8;  // what `interleave` takes at a time, of four columns each
constexpr int32_t kZero = 128;

int64_t filled(const GemmInt8& g) { return ceil_div(g.k, 4 * kWords) * 4 * kWords; }

// Codes with zeros up to whole vectors, and where their sums start.
struct Activations8 {
  Activations8(const GemmInt8& g, const Launch& launch) : k(filled(g)), codes(g.m * k), starts(g.m), scales(g.scales) {
    for_ranges(launch, g.m, ceil_div(kCopyGrain, k), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int8_t* from = g.codes + m * g.k;
        std::memcpy(codes + m * k, from, static_cast<size_t>(g.k));
        std::memset(codes + m * k + g.k, 0, static_cast<size_t>(k - g.k));
        int32_t sum = 0;
        for (int64_t i = 0; i < g.k; ++i) sum += from[i];
        starts[m] = -kZero * sum;
      }
    });
  }

  const int64_t k;
  const Scratch<int8_t> codes;
  const Scratch<int32_t> starts;
  const float* scales;
};

// 16 weight rows, and what stands beside them. Rows past the last are zeros.
class Panel8 {
 public:
  Panel8(const GemmInt8& g, const Spelling& s)
      : g_(g),
        s_(s),
        k_(filled(g)),
        columns_(s, g.r),
        line_(k_ * kPanel),
        bytes_(k_ * kPanel),
        up_(ceil_div(g.r, 8) * 8 * kPanel) {}

  static int64_t width_of(const Spelling&) { return kPanel; }
  int64_t width() const { return kPanel; }

  void load(int64_t first_row, int64_t) const {
    const int64_t rows = g_.n - first_row < kPanel ? g_.n - first_row : kPanel;
    load_codes(g_.weight_codes + first_row * g_.k, rows);
    columns_.read(g_.up, first_row, rows, g_.r, g_.r, up_ + 0);
    for (int64_t i = 0; i < kPanel; ++i) {
      scales_[i] = i < rows ? g_.weight_scales[first_row + i] : 0.0f;
      bias_[i] = i < rows ? bias_of(g_.bias, first_row + i) : 0.0f;
    }
  }

  // out = bias + branch + 8-bit product, for tokens first .. first + rows.
  void run(const Activations8& acts, int64_t first, int64_t rows, float* out, int64_t stride) const {
    s_.branch(g_.hidden + first * g_.r, rows, g_.r, up_ + 0, bias_, out, stride);
    Tile tile = {rows, 1, 1, bytes_ + 0, scales_};
    tile.acts = acts.codes + first * k_;
    tile.starts = acts.starts + first;
    tile.scales = acts.scales + first;
    tile.out = out;
    tile.out_stride = stride;
    s_.multiply_int8(tile, k_);
  }

 private:
  void load_codes(const int8_t* from, int64_t rows) const {
    const bool whole = rows == kPanel && k_ == g_.k;
    if (!whole) std::memset(line_ + 0, 0, static_cast<size_t>(k_ * kPanel));
    for (int64_t i = 0; i < rows && !whole; ++i) {
      std::memcpy(line_ + i * k_, from + i * g_.k, static_cast<size_t>(g_.k));
    }
    s_.interleave(whole ? from : line_ + 0, k_ / 4, bytes_ + 0);
    uint8_t* bytes = bytes_ + 0;
    for (int64_t i = 0, count = k_ * kPanel; i < count; ++i) bytes[i] ^= kZero;  // code + 128
  }

  const GemmInt8& g_;
  const Spelling& s_;
  const int64_t k_;
  const Columns columns_;
  const Scratch<int8_t> line_;
  const Scratch<uint8_t> bytes_;
  const Scratch<float> up_;
  mutable float scales_[kPanel], bias_[kPanel];
};

}  // namespace
}  // namespace cpu

const char* gemm_int8(const GemmInt8& args, const Launch& launch) {
  using namespace cpu;
  const Spelling* s = find(launch.spelling);
  if (!s) return "this processor has no such spelling";
  const Activations8 acts(args, launch);
  for_panels<Panel8>(launch, args, *s, [&] { return Panel8(args, *s); }, acts);
  return nullptr;
}

}  // namespace svdquant
