// A thread block on a CPU. Every CUDA thread is a fiber; fibers take turns and stop where threads wait for each other:
// at barriers, and at warp instructions. What a GPU leaves undefined is an error here, with a sentence about it:
//
//   - a barrier or warp instruction that not all threads reach, or reach at different places
//   - shared memory read before it was written, or while a copy to it is on its way
//   - shared memory touched by two threads, one of them writing, without a barrier between
//   - an access outside what the test handed over, or not a multiple of its size
//
// A warp runs as far as it can before the next one starts. `backwards` turns that order round.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Dim {
  unsigned x, y;
};

struct Copy {  // of cp.async: `bytes` of `data` to a place in shared memory
  size_t at;
  int bytes;
  unsigned char data[16];
};

enum class State { kReady, kBarrier, kWarp, kDone };

struct Thread {
  Dim index{}, block{};
  State state = State::kReady;
  const char* where = "";              // what it waits for
  void* operand = nullptr;             // what it brings to a warp instruction
  void (*work)(void* const*) = nullptr;  // the instruction, given every lane's operand
  std::vector<Copy> issued;            // since the last commit
  std::vector<std::vector<Copy>> groups;
  ucontext_t start{};
  jmp_buf resume{};
  bool started = false;
};

// Who last touched a byte of shared memory, and between which barriers. -1: nobody, -2: several.
struct Shadow {
  int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
  bool on_its_way = false;
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

class Block {
 public:
  static Block& current();

  std::vector<Range> ranges;  // global memory; nothing is checked while it is empty
  bool backwards = false;
  std::string problem;
  std::vector<unsigned char> shared;

  const char* run(const std::function<void()>& kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes) {
    problem.clear();
    if (threads % kWarp) return fail_text("threads: not a multiple of 32");
    for (int64_t y = 0; y < grid_y && problem.empty(); ++y) {
      for (int64_t x = 0; x < grid_x && problem.empty(); ++x) {
        run_block(kernel, {static_cast<unsigned>(x), static_cast<unsigned>(y)}, threads, shared_bytes);
      }
    }
    return problem.empty() ? nullptr : problem.c_str();
  }

  Thread& self() { return threads_[current_]; }

  // Leave the kernel with a sentence.
  [[noreturn]] void fail(const std::string& text) {
    const Thread& t = self();
    fail_text(text + " (thread " + std::to_string(t.index.x) + " of block " + std::to_string(t.block.x) + ", " +
              std::to_string(t.block.y) + ")");
    _longjmp(scheduler_, 2);
  }

  void wait(State state, const char* where) {
    self().state = state;
    self().where = where;
    if (!_setjmp(self().resume)) _longjmp(scheduler_, 1);
  }

  // A warp instruction: `work` runs once, when all lanes have come.
  void meet(const char* where, void* operand, void (*work)(void* const*)) {
    self().operand = operand;
    self().work = work;
    wait(State::kWarp, where);
  }

  void check_global(const void* p, size_t bytes, bool writing) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (at % bytes) fail("global access of " + std::to_string(bytes) + " bytes is not aligned");
    for (const Range& r : ranges) {
      if (at >= r.begin && at + bytes <= r.end && (r.writable || !writing)) return;
    }
    if (!ranges.empty()) fail(std::string("global ") + (writing ? "store" : "load") + " outside every tensor");
  }

  size_t shared_offset(const void* p, size_t bytes) {
    const size_t at = static_cast<const unsigned char*>(p) - shared.data();
    if (at % bytes) fail("shared access of " + std::to_string(bytes) + " bytes is not aligned");
    if (at + bytes > shared.size()) fail("shared access outside the block's memory");
    return at;
  }

  void read_shared(const void* p, size_t bytes) {
    const size_t at = shared_offset(p, bytes);
    for (size_t i = at; i < at + bytes; ++i) {
      Shadow& s = shadow_[i];
      if (s.on_its_way) fail("shared memory is read while a copy to it is on its way");
      if (s.writer == -1) fail("shared memory is read before it was written");
      if (s.write_epoch == epoch_ && s.writer != current_) fail("race: read and written without a barrier between");
      s.reader = s.read_epoch == epoch_ && s.reader != current_ ? -2 : current_;
      s.read_epoch = epoch_;
    }
  }

  void write_shared(size_t at, size_t bytes, bool on_its_way = false) {
    for (size_t i = at; i < at + bytes; ++i) {
      Shadow& s = shadow_[i];
      if (s.read_epoch == epoch_ && s.reader != current_) fail("race: written and read without a barrier between");
      if (s.write_epoch == epoch_ && s.writer != current_) fail("race: written twice without a barrier between");
      s.writer = current_;
      s.write_epoch = epoch_;
      s.on_its_way = on_its_way;
    }
  }

  void issue(const Copy& copy) {
    write_shared(copy.at, copy.bytes, true);
    self().issued.push_back(copy);
  }

  void commit() {
    self().groups.push_back(self().issued);
    self().issued.clear();
  }

  // Carry out all groups but the last `pending`.
  void arrive(int pending) {
    auto& groups = self().groups;
    while (static_cast<int>(groups.size()) > pending) {
      for (const Copy& c : groups.front()) {
        std::memcpy(shared.data() + c.at, c.data, c.bytes);
        write_shared(c.at, c.bytes);
      }
      groups.erase(groups.begin());
    }
  }

 private:
  const char* fail_text(const std::string& text) {
    problem = text;
    return problem.c_str();
  }

  void run_block(const std::function<void()>& kernel, Dim block, int threads, int shared_bytes) {
    kernel_ = &kernel;
    epoch_ = 0;
    shared.assign(shared_bytes, 0xA5);
    shadow_.assign(shared_bytes, {});
    threads_.assign(threads, {});
    if (stacks_.size() < threads * kStack) stacks_.resize(threads * kStack);
    for (int i = 0; i < threads; ++i) {
      threads_[i].index = {static_cast<unsigned>(i), 0};
      threads_[i].block = block;
    }
    const int warps = threads / kWarp;
    for (bool done = false; !done && problem.empty();) {
      for (int w = 0; w < warps && problem.empty(); ++w) run_warp((backwards ? warps - 1 - w : w) * kWarp);
      if (problem.empty()) done = cross_barrier();
    }
  }

  // Let a warp run until each of its threads is done or waits for the block.
  void run_warp(int first) {
    for (bool moved = true; moved && problem.empty();) {
      moved = false;
      for (int i = first; i < first + kWarp && problem.empty(); ++i) {
        if (threads_[i].state != State::kReady) continue;
        enter(i);
        moved = true;
      }
      if (problem.empty() && threads_[first].state == State::kWarp) moved = carry_out(first);
    }
    for (int i = first; i < first + kWarp && problem.empty(); ++i) {
      if (threads_[i].state == State::kWarp) fail_text(std::string("not all lanes reached ") + threads_[i].where);
    }
  }

  bool carry_out(int first) {
    void* operands[kWarp];
    for (int i = 0; i < kWarp; ++i) {
      const Thread& t = threads_[first + i];
      if (t.state != State::kWarp || t.work != threads_[first].work) return false;
      operands[i] = t.operand;
    }
    threads_[first].work(operands);
    for (int i = 0; i < kWarp; ++i) threads_[first + i].state = State::kReady;
    return true;
  }

  // All threads stand at the barrier: let them pass. Returns whether all are done.
  bool cross_barrier() {
    size_t waiting = 0, done = 0;
    for (const Thread& t : threads_) {
      waiting += t.state == State::kBarrier;
      done += t.state == State::kDone;
    }
    if (done == threads_.size()) return true;
    if (waiting != threads_.size()) {
      fail_text("a barrier was reached by " + std::to_string(waiting) + " of " + std::to_string(threads_.size()) +
                " threads");
    }
    for (Thread& t : threads_) t.state = State::kReady;
    ++epoch_;
    return false;
  }

  // Run a thread until it waits.
  void enter(int i) {
    current_ = i;
    if (_setjmp(scheduler_)) return;
    Thread& t = threads_[i];
    if (t.started) _longjmp(t.resume, 1);
    t.started = true;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = stacks_.data() + i * kStack;
    t.start.uc_stack.ss_size = kStack;
    makecontext(&t.start, &Block::body, 0);
    setcontext(&t.start);
  }

  static void body() {
    Block& b = current();
    (*b.kernel_)();
    b.wait(State::kDone, "the end");
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<char> stacks_;
  std::vector<Shadow> shadow_;
  jmp_buf scheduler_{};
  int current_ = 0, epoch_ = 0;
};

inline Block& Block::current() {
  static Block block;
  return block;
}

template <class F>
const char* run(const F& kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes) {
  return Block::current().run(kernel, grid_x, grid_y, threads, shared_bytes);
}

}  // namespace emulator
