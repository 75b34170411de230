// What the products of 4-bit and of 8-bit codes share: the loops over strips and panels, and what stands beside a
// panel's codes.
#pragma once

#include "floats.h"
#include "parallel.h"
#include "spelling.h"

namespace svdquant::cpu {

constexpr int64_t kStrip = 256;  // tokens

inline float bias_of(const Floats& bias, int64_t row) {
  return bias.data ? load(bias.data, bias.dtype, row * bias.stride) : 0.0f;
}

// Reads rows of any float as [count][16] in fp32, zeros where there is nothing; `most` is the largest count.
class Columns {
 public:
  Columns(const Spelling& s, int64_t most) : s_(s), line_(ceil_div(most, 8) * 8 * kPanel) {}

  void read(const Floats& from, int64_t first_row, int64_t rows, int64_t used, int64_t count, float* to) const {
    const int64_t stride = ceil_div(count, 8) * 8;
    if (used < stride || rows < kPanel) std::memset(line_ + 0, 0, static_cast<size_t>(stride * kPanel) * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) s_.widen(row_of(from, first_row + i), from.dtype, line_ + i * stride, used);
    s_.interleave(line_ + 0, stride, to);
  }

 private:
  const Spelling& s_;
  const Scratch<float> line_;
};

// Panels begin..end for the tokens first .. first + rows. A panel is summed where it belongs, or in a buffer if it is
// narrower than its width, of 16 bits, or has an addend, which comes last.
template <class Args, class Panel, class Activations>
void run_strip(const Args& g, const Spelling& s, const Panel& panel, const Activations& acts,
               int64_t first, int64_t begin, int64_t end) {
  const int64_t rows = g.m - first < kStrip ? g.m - first : kStrip;
  const int64_t width = panel.width();
  const Scratch<float> sums(rows * width);
  for (int64_t row = begin * width; row < end * width; row += width) {
    panel.load(row, rows);
    const int64_t columns = g.n - row < width ? g.n - row : width;
    if (g.out.dtype == DType::kF32 && columns == width && !g.addend.data) {
      panel.run(acts, first, rows, static_cast<float*>(g.out.data) + first * g.out.stride + row, g.out.stride);
      continue;
    }
    panel.run(acts, first, rows, sums + 0, width);
    for (int64_t m = 0; m < rows; ++m) {
      add_addend(g, first + m, row, columns, sums + m * width);
      s.narrow(sums + m * width, columns, g.out.dtype, place_of(g.out, first + m, row));
    }
  }
}

// Every strip with every panel; `make` gives each thread a panel of its own to load and run.
template <class Panel, class Args, class Make, class Activations>
void for_panels(const Launch& launch, const Args& g, const Spelling& s, const Make& make, const Activations& acts) {
  const int64_t width = Panel::width_of(s), panels = ceil_div(g.n, width), strips = ceil_div(g.m, kStrip);
  const int64_t grain = ceil_div(1 << 18, g.k * width * (g.m < kStrip ? g.m : kStrip));
  for_pieces(launch, strips * panels, grain, [&](const Pieces& pieces) {
    const auto panel = make();
    for (int64_t at, end; pieces.take(&at, &end);) {
      while (at < end) {
        const int64_t strip = at / panels, stop = end < (strip + 1) * panels ? end : (strip + 1) * panels;
        run_strip(g, s, panel, acts, strip * kStrip, at - strip * panels, stop - strip * panels);
        at = stop;
      }
    }
  });
}

}  // namespace svdquant::cpu
