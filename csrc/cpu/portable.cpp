// The spelling for any processor: plain loops, and the shortest statement of what the others do.
#include "floats.h"
#include "spelling.h"

namespace svdquant::cpu {
namespace {

bool supported() { return true; }

void widen(const void* from, DType dtype, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from, dtype, i);
}

void narrow(const float* from, int64_t count, DType dtype, void* to) {
  for (int64_t i = 0; i < count; ++i) store_saturated(to, dtype, i, from[i]);
}

void smooth(const float* x, const float* smooth, bool shifted, float shift, DType dtype, float* to, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    const float v = shifted ? round_to(x[i] + shift, dtype) : x[i];
    to[i] = round_to(v / smooth[i], dtype);
  }
}

// Bits of non-negative floats order as the floats do, with NaN above infinity: an integer maximum keeps NaN.
float absmax(const float* x, int64_t count) {
  uint32_t top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  return float_of(top);
}

void codes_int(const float* xs, int64_t groups, int64_t size, int q_max, int q_min, int8_t* codes, float* alpha) {
  const float high = static_cast<float>(q_max), low = static_cast<float>(q_min);
  for (int64_t g = 0; g < groups; ++g, xs += size, codes += size) {
    alpha[g] = absmax(xs, size) * (1.0f / high);
    const float divisor = alpha[g] == 0.0f ? 1.0f : alpha[g];
    for (int64_t i = 0; i < size; ++i) {
      float q = std::nearbyint(xs[i] / divisor);
      q = q < low ? low : q > high ? high : q;
      codes[i] = q == q ? static_cast<int8_t>(q) : 0;
    }
  }
}

// Nearest, ties to the even code: at a midpoint an odd code gives way upwards. NaN takes the largest.
uint8_t e2m1_code(float v) {
  const float a = float_of(bits_of(v) & 0x7fffffff);
  const int magnitude = !(a <= 0.25f) + !(a < 0.75f) + !(a <= 1.25f) + !(a < 1.75f) + !(a <= 2.5f) + !(a < 3.5f) +
                        !(a <= 5.0f);
  return static_cast<uint8_t>(magnitude + (bits_of(v) >> 31) * 8);
}

void codes_e2m1(const float* xs, int64_t groups, uint8_t* codes, float* alpha) {
  for (int64_t g = 0; g < groups; ++g, xs += 16, codes += 16) {
    const float a = absmax(xs, 16) * (1.0f / 6.0f);
    alpha[g] = a > 448.0f ? 448.0f : a;
    const float reciprocal = alpha[g] == 0.0f ? 0.0f : 1.0f / alpha[g];
    for (int64_t i = 0; i < 16; ++i) codes[i] = e2m1_code(xs[i] * reciprocal);
  }
}

// Eight chains: faster than one, and a shorter way for rounding errors.
float sum(const float (&s)[8]) { return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])); }

void project(const float* x, int64_t rows, const float* down, int64_t k, int64_t r, float* hidden) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t j = 0; j < r; ++j) {
      float sums[8] = {};
      for (int64_t i = 0; i < k; i += 8) {
        for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += x[m * k + i + lane] * down[j * k + i + lane];
      }
      hidden[m * r + j] = sum(sums);
    }
  }
}

void arrange(const int8_t* codes, int64_t blocks, const CodeTable& table, int8_t* to, int32_t* starts) {
  for (int64_t i = 0; i < blocks * kBlock; i += table.group) {
    int32_t sum = 0;
    for (int64_t j = i; j < i + table.group; ++j) {
      const int8_t value = table.activation ? table.activation[codes[j]] : codes[j];
      to[j / 8 * 8 + j % 2 * 4 + j % 8 / 2] = value;
      sum += value;
    }
    starts[i / table.group] = -table.zero * sum;
  }
}

void unpack(const uint8_t* rows, int64_t stride, int64_t blocks, const CodeTable& table, uint8_t* panel,
            const uint8_t*) {
  for (int64_t row = 0; row < kPanel; ++row) {
    for (int64_t byte = 0; byte < blocks * kBlock / 2; ++byte) {
      const uint8_t pair = rows[row * stride + byte];
      uint8_t* even = panel + (byte / 4 * 2 * kPanel + row) * 4 + byte % 4;
      even[0] = table.weight[pair & 15];
      even[kPanel * 4] = table.weight[pair >> 4];
    }
  }
}

void interleave(const void* from, int64_t stride, void* to) {
  const char* words = static_cast<const char*>(from);
  char* column = static_cast<char*>(to);
  for (int64_t j = 0; j < stride; ++j) {
    for (int64_t i = 0; i < kPanel; ++i, column += 4) std::memcpy(column, words + (i * stride + j) * 4, 4);
  }
}

// Sums of one group for one token.
void group_sums(const uint8_t* panel, const int8_t* acts, int64_t steps, int32_t start, int32_t (&sums)[kPanel]) {
  for (int64_t j = 0; j < kPanel; ++j) sums[j] = start;
  for (int64_t s = 0; s < steps; ++s, panel += 4 * kPanel, acts += 4) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const uint8_t* w = panel + 4 * j;
      sums[j] += w[0] * acts[0] + w[1] * acts[1] + w[2] * acts[2] + w[3] * acts[3];
    }
  }
}

void multiply(const Tile& t, int64_t group) {
  for (int64_t m = 0; m < t.rows; ++m) {
    float* out = t.out + m * t.out_stride;
    for (int64_t g = 0; g < t.groups; ++g) {
      const float scale = t.scales[m * t.groups + g];
      int32_t sums[kPanel];
      group_sums(t.panel + g * group * kPanel, t.acts + (m * t.groups + g) * group, group / 4,
                 t.starts[m * t.groups + g], sums);
      for (int64_t j = 0; j < kPanel; ++j) {
        out[j] += static_cast<float>(sums[j]) * t.weight_scales[g * kPanel + j] * scale;
      }
    }
  }
}

void branch(const float* hidden, int64_t rows, int64_t r, const float* up, const float* bias, float* out,
            int64_t out_stride) {
  for (int64_t m = 0; m < rows; ++m, out += out_stride) {
    for (int64_t j = 0; j < kPanel; ++j) out[j] = bias[j];
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < kPanel; ++j) out[j] += hidden[m * r + i] * up[i * kPanel + j];
    }
  }
}

void order_awq(const float* x, int64_t blocks, float* to, float*) {
  std::memcpy(to, x, static_cast<size_t>(blocks * kBlock) * sizeof(float));
}

void dot_awq(const uint8_t* codes, int64_t blocks, int64_t per_group, const float* scales, const float* zeros,
             const float* ordered, const float*, int64_t rows, float* out) {
  float sums[kTokens][8] = {};
  for (int64_t i = 0; i < blocks * kBlock; i += 8) {
    const float scale = scales[i / (per_group * kBlock)], zero = zeros[i / (per_group * kBlock)];
    float w[8];
    for (int64_t j = 0; j < 8; ++j) w[j] = static_cast<float>(codes[(i + j) / 2] >> j % 2 * 4 & 15) * scale + zero;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t j = 0; j < 8; ++j) sums[m][j] += w[j] * ordered[m * blocks * kBlock + i + j];
    }
  }
  for (int64_t m = 0; m < rows; ++m) out[m] = sum(sums[m]);
}

}  // namespace

const Spelling* portable() {
  static const Spelling spelling = {
      "portable", supported, 1, 0, widen, narrow, smooth, codes_int, codes_e2m1, project, arrange, unpack, interleave,
      multiply, multiply, nullptr, nullptr, branch, order_awq, dot_awq};
  return &spelling;
}

}  // namespace svdquant::cpu
