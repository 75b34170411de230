// Loops over torch's thread pool without torch, and scratch memory.
#pragma once

#include <atomic>
#include <new>

#include "../launch.h"

namespace svdquant::cpu {

// Elements that one thread copies or converts in the time that waking another takes.
constexpr int64_t kCopyGrain = 1 << 17;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(begin, end) for ranges that cover 0..count.
template <class F>
void for_ranges(const Launch& launch, int64_t count, int64_t grain, const F& f) {
  launch.parallel(
      count, grain, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &f);
}

// A range's next piece for whichever thread asks: cores that are slower, or that others use too, get less to do. Pieces
// are parts of what is left, so that the last ones, for which all others wait, are small.
class Pieces {
 public:
  Pieces(std::atomic<int64_t>& taken, int64_t count, int64_t grain, int64_t parts)
      : taken_(taken), count_(count), grain_(grain), parts_(parts) {}

  bool take(int64_t* begin, int64_t* end) const {
    *begin = taken_.load(std::memory_order_relaxed);
    do {
      const int64_t left = count_ - *begin, part = left / parts_ > grain_ ? left / parts_ : grain_;
      *end = part < left ? *begin + part : count_;
    } while (*begin < count_ && !taken_.compare_exchange_weak(*begin, *end, std::memory_order_relaxed));
    return *begin < count_;
  }

 private:
  std::atomic<int64_t>& taken_;
  const int64_t count_, grain_, parts_;
};

// Calls f(pieces) in every thread that has a part in 0..count, with pieces of half of a fair share of what is left,
// none below `grain`.
template <class F>
void for_pieces(const Launch& launch, int64_t count, int64_t grain, const F& f) {
  std::atomic<int64_t> taken{0};
  for_ranges(launch, count, grain, [&](int64_t begin, int64_t end) {
    const int64_t threads = ceil_div(count, end - begin);
    f(Pieces(taken, count, grain, threads == 1 ? 1 : 2 * threads));
  });
}

// Uninitialised numbers on a cache line's boundary.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* operator+(int64_t offset) const { return data_ + offset; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace svdquant::cpu
