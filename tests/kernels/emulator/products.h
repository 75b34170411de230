// Products of warpgroups on sm_90a, from the PTX ISA 9.0, 9.7.15, and on purpose not from the kernels' own helpers.
//
// A product takes as long as the program allows: it gives its sums back when it is waited for. Until then they hold a
// poison that no result may come from.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "copies.h"

namespace emulator {

constexpr unsigned kPoison = 0x7FE5DEAD;  // a NaN; as an integer, no sum that a test makes
constexpr int kWarpgroup = 128;

enum class Format { kS8, kE4M3, kBF16 };

// A wgmma as one thread brings it.
struct Product {
  Format format;
  int n;
  bool accumulate;
  bool a_in_registers;
  uint64_t a, b;       // descriptors
  unsigned rows_a[4];  // A's registers
  void* sums;          // n / 2 of 32 bits
  int thread;
};

// The caller has brought together the 128 threads of a warpgroup, which are counted through all blocks of a cluster.
class Products {
 public:
  explicit Products(Shared& memory) : shared_(memory) {}

  void reset(int threads) {
    registers_.assign(threads, {});
    fenced_.assign(threads, false);
    groups_.assign(threads / kWarpgroup, {});
    problem_ = nullptr;
  }

  void fence(int thread) {
    fenced_[thread] = true;
    for (auto& [at, r] : registers_[thread]) {
      if (!r.running) r.at_fence.assign(words(at), words(at) + r.at_fence.size()), r.changed = false;
    }
  }

  const char* start(const Product* const* threads) {
    const Product& p = *threads[0];
    Group& group = groups_[p.thread / kWarpgroup];
    for (int i = 0; i < kWarpgroup; ++i) {
      const Product& q = *threads[i];
      const bool same = q.n == p.n && q.format == p.format && q.b == p.b && (p.a_in_registers || q.a == p.a);
      if (!same || q.accumulate != p.accumulate) return "wgmma: the threads of a warpgroup bring different operands";
      if (const char* wrong = take_registers(q)) return wrong;
    }
    Running running = {p, {}, {}, read_operand(p.b, p.n, p, true)};
    for (int i = 0; i < kWarpgroup; ++i) running.sums[i] = threads[i]->sums;
    if (p.a_in_registers) {
      running.left = rows_in_registers(threads);
    } else {
      running.left = read_operand(p.a, 64, p, false);
    }
    group.open.push_back(std::move(running));
    return problem_;
  }

  void commit(int warpgroup) {
    Group& group = groups_[warpgroup];
    group.committed.push_back(std::move(group.open));
    group.open.clear();
    ++group.commits;
  }

  const char* wait(int warpgroup, size_t pending) {
    Group& group = groups_[warpgroup];
    while (group.committed.size() > pending) {
      for (Running& r : group.committed.front()) finish(r, warpgroup);
      group.committed.pop_front();
      ++group.finished;
    }
    for (int i = 0; i < kWarpgroup; ++i) {
      const int thread = warpgroup * kWarpgroup + i;
      shared_.order.heard[thread][shared_.order.products_of(thread / kWarp)] = group.finished;
      for (auto& [at, r] : registers_[thread]) {
        if (!r.poisoned || r.running) continue;
        for (size_t j = 0; j < r.truth.size(); ++j) {
          if (words(at)[j] != kPoison) return "wgmma: sums were changed while a product was running";
        }
        std::memcpy(at, r.truth.data(), 4 * r.truth.size());
        r.poisoned = false, r.changed = true;
      }
    }
    return nullptr;
  }

  bool unfinished() const {
    for (const Group& g : groups_) {
      if (!g.open.empty() || !g.committed.empty()) return true;
    }
    return false;
  }

 private:
  struct Registers {                  // a thread's sums, by their address
    std::vector<unsigned> truth;      // what products made of them
    std::vector<unsigned> at_fence;   // as they were at the last fence
    int running = 0;
    bool poisoned = false, changed = true;  // changed: given back since the last fence
  };
  using Matrix = std::vector<std::array<float, 32>>;  // rows; s8, e4m3 and bf16 are exact in a float
  struct Running {
    Product p;
    std::array<void*, kWarpgroup> sums;
    Matrix left, right;
    Running(const Product& product, std::array<void*, kWarpgroup> s, Matrix l, Matrix r)
        : p(product), sums(s), left(std::move(l)), right(std::move(r)) {}
  };
  struct Group {
    std::vector<Running> open;
    std::deque<std::vector<Running>> committed;
    int commits = 0, finished = 0;
  };

  static unsigned* words(void* at) { return static_cast<unsigned*>(at); }
  static int depth(Format f) { return f == Format::kBF16 ? 16 : 32; }

  // Take a thread's sums away from it until the product is waited for.
  const char* take_registers(const Product& p) {
    const size_t count = p.n / 2;
    if (!fenced_[p.thread]) return "wgmma: starts without a wgmma_fence";
    const auto [found, is_new] = registers_[p.thread].try_emplace(p.sums);
    Registers& r = found->second;
    if (!r.running) {
      if (!is_new && r.changed) return "wgmma: no wgmma_fence since its sums were given back";
      if (!is_new && r.at_fence.size() == count && std::memcmp(r.at_fence.data(), p.sums, 4 * count)) {
        return "wgmma: sums were changed after the last wgmma_fence";
      }
      r.truth.assign(words(p.sums), words(p.sums) + count);
      r.at_fence = r.truth;
      std::fill_n(words(p.sums), count, kPoison);
      r.poisoned = true, r.changed = false;
    }
    ++r.running;
    return nullptr;
  }

  // Matrix descriptor: bits 0-13 start address, 16-29 leading and 32-45 stride dimension byte offset, all in sixteens,
  // 49-51 base offset, 62-63 swizzle (0 none, 1 128 bytes). K-major operands: eight rows of 16 bytes are a core matrix;
  // the stride offset leads to the next eight rows; the leading offset to the next 16 bytes of K, which in a swizzled
  // layout follow in the same row of 128 bytes.
  Matrix read_operand(uint64_t descriptor, int rows, const Product& p, bool by_all) {
    const unsigned start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const unsigned stride = (descriptor >> 32 & 0x3FFF) << 4, swizzle = descriptor >> 62;
    if (descriptor >> 49 & 7) problem_ = "wgmma: the emulator knows no base offset";
    if (swizzle > 1) problem_ = "wgmma: the emulator knows no swizzle but that of 128 bytes";
    const int warpgroup = p.thread / kWarpgroup;
    const size_t block = shared_.first_byte_of(p.thread);  // addresses are those of the warpgroup's own block
    const Clock starter = heard_by_all(warpgroup);
    Matrix to(rows);
    for (int row = 0; row < rows && !problem_; ++row) {
      for (int piece = 0; piece < 2; ++piece) {
        unsigned address = start + row / 8 * stride;
        address += swizzle ? row % 8 * 128 + piece * 16 : row % 8 * 16 + piece * leading;
        if (swizzle) address = swizzle_128(address);
        const int warp = by_all ? -1 : row / 16;
        read_piece(block + address - kSharedBase, starter, warpgroup, warp, p.format, &to[row][0], piece);
      }
    }
    return to;
  }

  void read_piece(size_t at, const Clock& starter, int warpgroup, int warp, Format format, float* row, int piece) {
    if (!shared_.holds(at, 16) || shared_.block_of(at) != shared_.block_of_thread(warpgroup * kWarpgroup)) {
      problem_ = "wgmma: a descriptor leads out of shared memory";
      return;
    }
    for (int w = 0; w < 4; ++w) {
      if (warp != -1 && warp != w) continue;
      const int agent = shared_.order.products_of(4 * warpgroup + w);
      const char* wrong = shared_.read_beside(at, 16, starter, {agent, groups_[warpgroup].commits + 1, 0});
      if (wrong) problem_ = wrong;
    }
    decode(&shared_.bytes[at], format, row, piece);
  }

  static void decode(const unsigned char* from, Format format, float* row, int piece) {
    const int count = format == Format::kBF16 ? 8 : 16;
    for (int i = 0; i < count; ++i) {
      float& to = row[piece * count + i];
      if (format == Format::kS8) to = static_cast<signed char>(from[i]);
      if (format == Format::kE4M3) to = e4m3(from[i]);
      if (format == Format::kBF16) to = bf16(from[2 * i] | from[2 * i + 1] << 8);
    }
  }

  static float e4m3(unsigned bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
    return bits & 0x80 ? -value : value;
  }

  static float bf16(unsigned bits) {
    const unsigned wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }

  // A in registers: each warp has 16 rows, as for m16n8k16.
  static Matrix rows_in_registers(const Product* const* threads) {
    Matrix to(64);
    for (int i = 0; i < kWarpgroup; ++i) {
      const int g = i % kWarp / 4, t = i % 4;
      for (int r = 0; r < 4; ++r) {
        float* row = &to[i / kWarp * 16 + g + 8 * (r % 2)][2 * t + 8 * (r / 2)];
        row[0] = bf16(threads[i]->rows_a[r] & 0xffff), row[1] = bf16(threads[i]->rows_a[r] >> 16);
      }
    }
    return to;
  }

  Clock heard_by_all(int warpgroup) const {
    Clock least = shared_.order.heard[warpgroup * kWarpgroup];
    for (int i = 1; i < kWarpgroup; ++i) {
      const Clock& other = shared_.order.heard[warpgroup * kWarpgroup + i];
      for (size_t j = 0; j < least.size(); ++j) least[j] = std::min(least[j], other[j]);
    }
    return least;
  }

  // Thread 4g + t of warp w holds rows 16w + g and 8 more, columns 8j + 2t and the next, in registers 4j to 4j + 3.
  void finish(Running& r, int warpgroup) {
    for (int i = 0; i < kWarpgroup; ++i) {
      Registers& registers = registers_[warpgroup * kWarpgroup + i][r.sums[i]];
      --registers.running;
      for (int j = 0; j < r.p.n / 2; ++j) {
        const int row = i / kWarp * 16 + i % kWarp / 4 + 8 * (j / 2 % 2), column = j / 4 * 8 + i % 4 * 2 + j % 2;
        registers.truth[j] = sum(r, row, column, r.p.accumulate ? registers.truth[j] : 0);
      }
    }
  }

  static unsigned sum(const Running& r, int row, int column, unsigned start) {
    const float *a = r.left[row].data(), *b = r.right[column].data();
    if (r.p.format == Format::kS8) {
      int total = 0;
      for (int k = 0; k < 32; ++k) total += static_cast<int>(a[k]) * static_cast<int>(b[k]);
      return start + static_cast<unsigned>(total);
    }
    float before;
    std::memcpy(&before, &start, 4);
    const float after = r.p.format == Format::kE4M3 ? sum_e4m3(a, b, before) : sum_bf16(a, b, before);
    unsigned bits;
    std::memcpy(&bits, &after, 4);
    return bits;
  }

  static float sum_bf16(const float* a, const float* b, double total) {
    for (int k = 0; k < 16; ++k) total += static_cast<double>(a[k]) * b[k];
    return static_cast<float>(total);
  }

  // As Hopper is understood to add products of fp8: all are cut off 13 bits below the largest, then added.
  static float sum_e4m3(const float* a, const float* b, float before) {
    double largest = std::fabs(before), total = 0;
    for (int k = 0; k < 32; ++k) largest = std::max(largest, std::fabs(static_cast<double>(a[k]) * b[k]));
    if (largest == 0) return 0;
    int exponent;
    std::frexp(largest, &exponent);
    const double step = std::ldexp(1.0, exponent - 1 - 13);
    for (int k = 0; k < 32; ++k) total += std::trunc(static_cast<double>(a[k]) * b[k] / step) * step;
    return static_cast<float>(total + std::trunc(before / step) * step);
  }

  Shared& shared_;
  std::vector<std::map<void*, Registers>> registers_;  // by thread
  std::vector<bool> fenced_;
  std::vector<Group> groups_;
  const char* problem_ = nullptr;
};

}  // namespace emulator
