// The W4A4 product. Loops, outermost first:
//
//     256 tokens        a strip: their codes stay in the second- or third-level cache
//       16 rows         a panel of weights, unpacked once from nibbles, in the second-level cache (AVX2: 32 rows, in
//                       chunks that stay in the first-level cache)
//         all tokens    Spelling::multiply, which takes as many at once as it has registers for
//
// Threads take (strip, panel) pairs as they get through with them. Every output is one thread's, summed in fp32 in one
// order, whatever the number of threads.
#include "panel.h"

namespace svdquant {
namespace cpu {
namespace {

const int8_t kE2M1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

CodeTable table_of(Codes kind) {
  const bool e2m1 = kind == Codes::kE2M1;
  CodeTable table = {group_size(kind), e2m1 ? 24 : 16, {}, e2m1 ? kE2M1Doubled : nullptr};
  for (int code = 0; code < 16; ++code) {
    table.weight[code] = static_cast<uint8_t>(e2m1 ? kE2M1Doubled[code] + 24 : (code ^ 8) + 8);
  }
  return table;
}

// A call's sizes. K is filled up to whole blocks with zeros, which only NVFP4 ever needs.
struct Shape {
  explicit Shape(const Gemm& g)
      : blocks(ceil_div(g.k, kBlock)), groups(blocks * kBlock / group_size(g.kind)), used(g.k / group_size(g.kind)) {}

  const int64_t blocks, groups;
  const int64_t used;  // groups that are not filling
};

// Activations as `Tile` wants them.
struct Activations {
  Activations(const Gemm& g, const Shape& shape, const Spelling& s, const CodeTable& table, const Launch& launch)
      : codes(g.m * shape.blocks * kBlock), starts(g.m * shape.groups), scales(g.m * shape.groups) {
    for_ranges(launch, g.m, ceil_div(kCopyGrain, g.k), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) prepare(g, shape, s, table, m);
    });
  }

  void prepare(const Gemm& g, const Shape& shape, const Spelling& s, const CodeTable& table, int64_t m) const {
    const int8_t* from = static_cast<const int8_t*>(g.codes) + m * g.k;
    int8_t* to = codes + m * shape.blocks * kBlock;
    const int64_t whole = g.k / kBlock, rest = g.k % kBlock, first = m * shape.groups;
    s.arrange(from, whole, table, to, starts + first);
    if (rest) {
      int8_t last[kBlock] = {};
      std::memcpy(last, from + whole * kBlock, static_cast<size_t>(rest));
      s.arrange(last, 1, table, to + whole * kBlock, starts + first + whole * kBlock / table.group);
    }
    s.widen(row_of(g.scales, m), g.scales.dtype, scales + first, shape.used);
    for (int64_t i = shape.used; i < shape.groups; ++i) scales[first + i] = 0.0f;
  }

  // The part of a tile that tokens first .. first + rows are.
  Tile tile(const Shape& shape, int64_t first, int64_t rows) const {
    Tile t = {};
    t.rows = rows;
    t.groups = shape.groups;
    t.acts = codes + first * shape.blocks * kBlock;
    t.starts = starts + first * shape.groups;
    t.scales = scales + first * shape.groups;
    return t;
  }

  const Scratch<int8_t> codes;
  const Scratch<int32_t> starts;
  const Scratch<float> scales;
};

// What a row's scales are multiplied by: the second scale, and a quarter, as both sides' e2m1 values were doubled.
float second_scale(const Gemm& g, int64_t row) {
  if (g.kind != Codes::kE2M1) return 1.0f;
  return 0.25f * load(g.second_scale.data, g.second_scale.dtype, row * g.second_scale.stride);
}

// The weight rows that a spelling takes at once, in the form that `multiply` and `branch` read. Rows past the last are
// zeros.
class Panel {
 public:
  Panel(const Gemm& g, const Shape& shape, const Spelling& s, const CodeTable& table)
      : g_(g),
        shape_(shape),
        s_(s),
        table_(table),
        columns_(s, shape.groups > g.r ? shape.groups : g.r),
        width_(width_of(s)),
        chunk_(s.chunk && s.chunk < shape.blocks ? s.chunk : shape.blocks),
        filled_(shape.blocks * kBlock / 2 * width_),
        bytes_(chunk_ * kBlock * width_),
        scales_((shape.groups + 7) * width_),
        up_((g.r + 7) * width_),
        bias_(width_) {}

  static int64_t width_of(const Spelling& s) { return s.panels * kPanel; }
  int64_t width() const { return width_; }

  void load(int64_t first_row, int64_t tokens) const {
    fetching_ = tokens >= kFetching;
    next_ = g_.weight_codes + (first_row + width_) * g_.k / 2;
    find_codes(first_row, g_.n - first_row < width_ ? g_.n - first_row : width_);
    for (int64_t at = 0; at < width_; at += kPanel) load_beside(first_row + at, at);
  }

  // out = bias + branch + 4-bit product, for tokens first .. first + rows.
  void run(const Activations& acts, int64_t first, int64_t rows, float* out, int64_t stride) const {
    for (int64_t at = 0; at < width_; at += kPanel) {
      s_.branch(g_.hidden + first * g_.r, rows, g_.r, up_ + at * g_.r, bias_ + at, out + at, stride);
    }
    Tile tile = acts.tile(shape_, first, rows);
    tile.panel = bytes_ + 0;
    tile.out = out;
    tile.out_stride = stride;
    for (int64_t block = 0; block < shape_.blocks; block += chunk_) multiply(tile, block);
  }

 private:
  // A chunk for all tokens, of which `tile` has the first group.
  void multiply(Tile tile, int64_t block) const {
    const int64_t blocks = shape_.blocks - block < chunk_ ? shape_.blocks - block : chunk_;
    const int64_t stride = shape_.blocks * kBlock / 2, per_block = kBlock / table_.group, group = block * per_block;
    const uint8_t* next = next_ + block * kBlock / 2 * width_;
    s_.unpack(codes_ + block * kBlock / 2, stride, blocks, table_, bytes_ + 0, fetching_ ? nullptr : next);
    tile.count = blocks * per_block;
    tile.acts += block * kBlock;
    tile.starts += group;
    tile.scales += group;
    tile.weight_scales = scales_ + group * kPanel;
    tile.next = fetching_ ? next : nullptr;
    s_.multiply(tile, table_.group);
  }

  // Where the rows' nibbles are: in place, or filled up with zeros.
  void find_codes(int64_t first_row, int64_t rows) const {
    codes_ = g_.weight_codes + first_row * g_.k / 2;
    if (rows == width_ && g_.k % kBlock == 0) return;
    const uint8_t* from = codes_;
    const int64_t stride = shape_.blocks * kBlock / 2;
    std::memset(filled_ + 0, 0, static_cast<size_t>(stride * width_));
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(filled_ + i * stride, from + i * g_.k / 2, static_cast<size_t>(g_.k / 2));
    }
    codes_ = filled_ + 0;
  }

  // What stands beside the codes of 16 rows, the panel's `at`th and following.
  void load_beside(int64_t first_row, int64_t at) const {
    const int64_t left = g_.n - first_row, rows = left < 0 ? 0 : left < kPanel ? left : kPanel;
    float* scales = scales_ + at * shape_.groups;
    columns_.read(g_.weight_scales, first_row, rows, shape_.used, shape_.groups, scales);
    if (g_.kind == Codes::kE2M1) times_second_scale(first_row, rows, scales);
    columns_.read(g_.up, first_row, rows, g_.r, g_.r, up_ + at * g_.r);
    for (int64_t i = 0; i < kPanel; ++i) bias_[at + i] = i < rows ? bias_of(g_.bias, first_row + i) : 0.0f;
  }

  void times_second_scale(int64_t first_row, int64_t rows, float* scales) const {
    float factors[kPanel] = {};
    for (int64_t i = 0; i < rows; ++i) factors[i] = second_scale(g_, first_row + i);
    for (int64_t g = 0; g < shape_.groups; ++g) {
      for (int64_t i = 0; i < kPanel; ++i) scales[g * kPanel + i] *= factors[i];
    }
  }

  const Gemm& g_;
  const Shape& shape_;
  const Spelling& s_;
  const CodeTable& table_;
  const Columns columns_;
  const int64_t width_, chunk_;
  const Scratch<uint8_t> filled_, bytes_;
  const Scratch<float> scales_, up_, bias_;
  mutable const uint8_t *codes_ = nullptr, *next_ = nullptr;
  mutable bool fetching_ = false;
};

// One token: reading the nibbles once, in the order in which they lie, is all there is to gain.
bool suits_dot4(const Gemm& g, const Spelling& s) {
  return s.dot4 && g.m == 1 && g.n % 4 == 0 && g.k % kBlock == 0;
}

class Token {
 public:
  Token(const Gemm& g, const Shape& shape, const Spelling& s, const CodeTable& table)
      : g_(g),
        shape_(shape),
        s_(s),
        table_(table),
        rank_(ceil_div(g.r, 8) * 8),
        codes_(shape.blocks * kTokenBytes),
        scales_(shape.groups),
        hidden_(rank_) {
    s.order_token(static_cast<const int8_t*>(g.codes), shape.blocks, table, codes_ + 0);
    s.widen(g.scales.data, g.scales.dtype, scales_ + 0, shape.groups);
    std::memset(hidden_ + 0, 0, static_cast<size_t>(rank_) * sizeof(float));
    s.widen(g.hidden, DType::kF32, hidden_ + 0, g.r);
  }

  // Outputs, in fours.
  void run(const Pieces& pieces) const {
    const Scratch<float> scales(4 * shape_.groups), up(4 * rank_);
    std::memset(up + 0, 0, static_cast<size_t>(4 * rank_) * sizeof(float));
    for (int64_t begin, end; pieces.take(&begin, &end);) {
      for (int64_t row = begin * 4; row < end * 4; row += 4) run_four(row, scales, up);
    }
  }

 private:
  void run_four(int64_t row, const Scratch<float>& scales, const Scratch<float>& up) const {
    float sums[4];
    for (int64_t i = 0; i < 4; ++i) {
      s_.widen(row_of(g_.up, row + i), g_.up.dtype, up + i * rank_, g_.r);
      load_scales(row + i, scales + i * shape_.groups);
    }
    s_.project(hidden_ + 0, 1, up + 0, rank_, 4, sums);
    s_.dot4(g_.weight_codes + row * g_.k / 2, shape_.blocks, table_, codes_ + 0, scales + 0, sums);
    for (int64_t i = 0; i < 4; ++i) store_output(g_, 0, row + i, sums[i] + bias_of(g_.bias, row + i));
  }

  // A weight row's scales times the token's.
  void load_scales(int64_t row, float* to) const {
    s_.widen(row_of(g_.weight_scales, row), g_.weight_scales.dtype, to, shape_.groups);
    const float factor = second_scale(g_, row);
    for (int64_t j = 0; j < shape_.groups; ++j) to[j] = to[j] * factor * scales_[j];
  }

  const Gemm& g_;
  const Shape& shape_;
  const Spelling& s_;
  const CodeTable& table_;
  const int64_t rank_;  // in whole vectors
  const Scratch<int8_t> codes_;
  const Scratch<float> scales_, hidden_;
};

}  // namespace
}  // namespace cpu

const char* gemm(const Gemm& args, const Launch& launch) {
  using namespace cpu;
  const Spelling* s = find(launch.spelling);
  if (!s) return "this processor has no such spelling";
  const CodeTable table = table_of(args.kind);
  const Shape shape(args);
  if (suits_dot4(args, *s)) {
    const Token token(args, shape, *s, table);
    for_pieces(launch, args.n / 4, ceil_div(1 << 16, args.k), [&](const Pieces& pieces) { token.run(pieces); });
    return nullptr;
  }
  const Activations acts(args, shape, *s, table, launch);
  for_panels<Panel>(launch, args, *s, [&] { return Panel(args, shape, *s, table); }, acts);
  return nullptr;
}

}  // namespace svdquant
