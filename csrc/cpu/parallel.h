// Loops over torch's thread pool without torch, and scratch memory.
#pragma once

#include <atomic>
#include <new>

#include "../launch.h"

namespace svdquant::cpu {

// Elements that one thread copies or converts in the time that waking another takes.
constexpr int64_t kCopyGrain = 1 << 17;

// Calls f(begin, end) for ranges that cover 0..count.
template <class F>
void for_ranges(const Launch& launch, int64_t count, int64_t grain, const F& f) {
  launch.parallel(
      count, grain, [](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &f);
}

// A range's next piece for whichever thread asks: cores that are slower, or that others use too, get less to do.
class Pieces {
 public:
  Pieces(std::atomic<int64_t>& taken, int64_t count, int64_t size) : taken_(taken), count_(count), size_(size) {}

  bool take(int64_t* begin, int64_t* end) const {
    *begin = taken_.fetch_add(size_, std::memory_order_relaxed);
    *end = *begin + size_ < count_ ? *begin + size_ : count_;
    return *begin < count_;
  }

 private:
  std::atomic<int64_t>& taken_;
  const int64_t count_, size_;
};

// Calls f(pieces) in every thread that has a part in 0..count, with pieces of an eighth of a fair share.
template <class F>
void for_pieces(const Launch& launch, int64_t count, int64_t grain, const F& f) {
  std::atomic<int64_t> taken{0};
  for_ranges(launch, count, grain, [&](int64_t begin, int64_t end) {
    const int64_t share = end - begin == count ? count : (end - begin) / 8;
    f(Pieces(taken, count, share > 1 ? share : 1));
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

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace svdquant::cpu
