// Loops over torch's thread pool without torch, and scratch memory.
#pragma once

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
