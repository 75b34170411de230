// Shared memory that knows who touched each byte, and what happened before what.
//
// Every thread has a clock, and what it has heard of everybody else's: it hears when it meets others at a barrier, or
// waits for what they have told (a vector clock). Two accesses of which one writes must be in such an order. Work that
// runs beside the program is somebody too: the products that a warp has started, and the copies that one barrier in
// shared memory is told of. The blocks of a cluster have one clock of everybody, and each a piece of the memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMostBarriers = 64;  // of a cluster

using Clock = std::vector<int>;  // by agent: threads, then warps' products, then barriers' copies

inline void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

struct Stamp {  // when an agent did something; `epoch` counts the barriers that all threads of a cluster pass
  int agent = -1, clock = 0, epoch = 0;
};

class Order {
 public:
  int epoch = 0;
  std::vector<Clock> heard;  // by each thread

  void reset(int threads) {
    threads_ = threads;
    epoch = 0;
    heard.assign(threads, nothing());
    for (int t = 0; t < threads; ++t) heard[t][t] = 1;
    fences_.assign(threads, {});
  }

  Clock nothing() const { return Clock(threads_ + threads_ / kWarp + kMostBarriers, 0); }
  int products_of(int warp) const { return threads_ + warp; }
  int copies_of(int barrier) const { return threads_ + threads_ / kWarp + barrier; }
  bool is_thread(const Stamp& s) const { return s.agent < threads_; }
  bool is_copy(const Stamp& s) const { return s.agent >= threads_ + threads_ / kWarp; }

  Stamp now(int thread) const { return {thread, heard[thread][thread], epoch}; }

  bool before(const Stamp& s, const Clock& listener) const {
    return (is_thread(s) && s.epoch < epoch) || listener[s.agent] >= s.clock;
  }

  // A thread tells all it knows; what it does from here on is not part of it.
  void tell(int thread, Clock& to) {
    join(to, heard[thread]);
    ++heard[thread][thread];
  }

  // So many threads, one block of several, meet at a barrier.
  void meet(int first, int count) {
    Clock all = nothing();
    for (int t = first; t < first + count; ++t) tell(t, all);
    for (int t = first; t < first + count; ++t) join(heard[t], all);
  }

  // What a thread stored so far may be read by copies and products, for those who hear of it after this.
  void fence(int thread) {
    fences_[thread].push_back(now(thread));
    ++heard[thread][thread];
  }

  bool fenced(const Stamp& s, const Clock& listener) const {
    for (const Stamp& f : fences_[s.agent]) {
      if (f.clock >= s.clock) return f.epoch < epoch || listener[s.agent] > f.clock;
    }
    return false;
  }

 private:
  int threads_ = 0;
  std::vector<std::vector<Stamp>> fences_;
};

// Each function answers with what is wrong, or nullptr.
class Shared {
 public:
  std::vector<unsigned char> bytes;
  Order order;

  // `size` bytes and `threads` threads a block; the memory of blocks lies one behind the other.
  void reset(int blocks, int size, int threads) {
    blocks_ = blocks, size_ = size, threads_ = threads;
    stride_ = (size + kAlign - 1) / kAlign * kAlign;
    bytes.assign(blocks * stride_, 0xA5);
    written_.assign(blocks * stride_, {});
    read_.assign(blocks * stride_ / 4, {});
    order.reset(blocks * threads);
  }

  int blocks() const { return blocks_; }
  int block_of(size_t at) const { return static_cast<int>(at / stride_); }
  int block_of_thread(int thread) const { return thread / threads_; }
  size_t first_byte_of(int thread) const { return block_of_thread(thread) * stride_; }
  size_t place_in(int block, size_t at) const { return block * stride_ + at % stride_; }
  bool holds(size_t at, size_t count) const { return at < bytes.size() && at % stride_ + count <= size_; }

  const char* read(size_t at, size_t count, int thread) {
    for (size_t i = at; i < at + count; ++i) {
      const Write& w = written_[i];
      if (w.on_its_way) return "shared memory is read while a copy to it is on its way";
      if (w.by.agent == -1) return "shared memory is read before it was written";
      if (order.before(w.by, order.heard[thread])) continue;
      return order.is_copy(w.by) ? "shared memory is read while a copy to it is on its way"
                                 : "race: read and written without a barrier between";
    }
    remember(at, count, order.now(thread));
    return nullptr;
  }

  const char* write(size_t at, size_t count, int thread, bool on_its_way = false) {
    return overwrite(at, count, order.heard[thread], order.now(thread), on_its_way);
  }

  // By work beside the program that was started by threads who had heard `starter`.
  const char* read_beside(size_t at, size_t count, const Clock& starter, const Stamp& reader) {
    for (size_t i = at; i < at + count; ++i) {
      const Stamp& by = written_[i].by;
      if (by.agent == -1) return "a product reads shared memory before it was written";
      if (!order.before(by, starter)) {
        return order.is_copy(by) ? "a product reads shared memory while a copy to it is on its way"
                                 : "race: a product reads what was written without a barrier between";
      }
      if (order.is_thread(by) && !order.fenced(by, starter)) {
        return "a product reads what was stored without a fence for asynchronous reads";
      }
    }
    remember(at, count, reader);
    return nullptr;
  }

  const char* write_beside(size_t at, size_t count, const Clock& starter, const Stamp& writer) {
    return overwrite(at, count, starter, writer, false);
  }

 private:
  struct Write {
    Stamp by;
    bool on_its_way = false;  // a cp.async, which its own thread must wait for
  };

  const char* overwrite(size_t at, size_t count, const Clock& writer, const Stamp& by, bool on_its_way) {
    for (size_t word = at / 4; word <= (at + count - 1) / 4; ++word) {
      for (const Stamp& s : read_[word]) {
        if (s.agent == by.agent || order.before(s, writer)) continue;
        return order.is_thread(s) ? "race: written and read without a barrier between"
                                  : "shared memory is overwritten while a product reads it";
      }
      read_[word].clear();
    }
    for (size_t i = at; i < at + count; ++i) {
      Write& w = written_[i];
      if (w.by.agent != -1 && !order.before(w.by, writer)) {
        return order.is_copy(w.by) ? "shared memory is overwritten while a copy to it is on its way"
                                   : "race: written twice without a barrier between";
      }
      w = {by, on_its_way};
    }
    return nullptr;
  }

  void remember(size_t at, size_t count, const Stamp& reader) {
    for (size_t word = at / 4; word <= (at + count - 1) / 4; ++word) {
      std::vector<Stamp>& readers = read_[word];
      if (!readers.empty() && readers.back().agent == reader.agent) {
        readers.back() = reader;
      } else {
        readers.push_back(reader);
      }
    }
  }

  static constexpr size_t kAlign = 1024;  // so that the copy engine's swizzle is the same in each block

  int blocks_ = 1, threads_ = 0;
  size_t size_ = 0, stride_ = kAlign;
  std::vector<Write> written_;            // by byte
  std::vector<std::vector<Stamp>> read_;  // by word: since it was last written
};

}  // namespace emulator
