// A thread block on a CPU. Every CUDA thread is a fiber; fibers take turns and stop where threads wait for each other:
// at barriers, and at warp instructions. What a GPU leaves undefined is an error here, with a sentence about it:
//
//   - a barrier or warp instruction that not all threads reach, or reach at different places
//   - threads that wait for each other, or for what nobody will bring
//   - shared memory read before it was written, or while a copy to it is on its way
//   - shared memory touched by two threads, one of them writing, without a barrier between (shadow.h)
//   - an access outside what the test handed over, or not a multiple of its size
//
// A warp runs as far as it can before the next one starts. `backwards` turns that order round.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "engines.h"

namespace emulator {

constexpr int kMostShared = 227 * 1024;  // bytes of a block, on the cards that have most
constexpr size_t kStack = 256 * 1024;

struct Dim {
  unsigned x, y;
};

struct Copy {  // of cp.async: `bytes` of `data` to a place in shared memory
  size_t at;
  int bytes;
  unsigned char data[16];
};

enum class State { kReady, kBarrier, kWarp, kWarpgroup, kPhase, kDone };

struct Thread {
  Dim index{}, block{};
  State state = State::kReady;
  const char* where = "";              // what it waits for
  void* operand = nullptr;             // what it brings to a warp instruction
  void (*work)(void* const*) = nullptr;  // the instruction, given every lane's operand
  const char* (*group_work)(void* const*) = nullptr;
  std::vector<Copy> issued;            // since the last commit
  std::vector<std::vector<Copy>> groups;
  size_t phase_of = 0;  // the barrier in shared memory whose phase it waits for
  unsigned parity = 0;
  ucontext_t start{};
  jmp_buf resume{};
  bool started = false;
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
  Shared shared;
  Engines engines{shared};
  int multiprocessors = 4;

  const char* run(const std::function<void()>& kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes) {
    problem.clear();
    if (threads % kWarp) return fail_text("threads: not a multiple of 32");
    if (shared_bytes > kMostShared) return fail_text("more shared memory than a block can have");
    for (int64_t y = 0; y < grid_y && problem.empty(); ++y) {
      for (int64_t x = 0; x < grid_x && problem.empty(); ++x) {
        run_block(kernel, {static_cast<unsigned>(x), static_cast<unsigned>(y)}, threads, shared_bytes);
      }
    }
    return problem.empty() ? nullptr : problem.c_str();
  }

  Thread& self() { return threads_[current_]; }
  int number() const { return current_; }

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

  // The same of the four warps of a warpgroup. `work` may not fail(), only answer with what is wrong.
  void meet_warpgroup(const char* where, void* operand, const char* (*work)(void* const*)) {
    self().operand = operand;
    self().group_work = work;
    wait(State::kWarpgroup, where);
  }

  // Until the phase of this parity has ended.
  void wait_phase(size_t barrier, unsigned parity) {
    check(engines.usable(barrier, current_));
    self().phase_of = barrier;
    self().parity = parity;
    if (!engines.ended(barrier, parity)) wait(State::kPhase, "the end of a phase");
    join(shared.order.heard[current_], engines.told(barrier));
  }

  void check(const char* wrong) {
    if (wrong) fail(wrong);
  }

  void check_global(const void* p, size_t bytes, bool writing) {
    const bool aligned = reinterpret_cast<uintptr_t>(p) % bytes == 0;
    if (!aligned) fail("global access of " + std::to_string(bytes) + " bytes is not aligned");
    check_range(p, bytes, writing);
  }

  void check_range(const void* p, size_t bytes, bool writing) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    for (const Range& r : ranges) {
      if (at >= r.begin && at + bytes <= r.end && (r.writable || !writing)) return;
    }
    if (!ranges.empty()) fail(std::string("global ") + (writing ? "store" : "load") + " outside every tensor");
  }

  size_t shared_offset(const void* p, size_t bytes) {
    const size_t at = static_cast<const unsigned char*>(p) - shared.bytes.data();
    if (at % bytes) fail("shared access of " + std::to_string(bytes) + " bytes is not aligned");
    if (at + bytes > shared.bytes.size()) fail("shared access outside the block's memory");
    return at;
  }

  void read_shared(const void* p, size_t bytes) { check(shared.read(shared_offset(p, bytes), bytes, current_)); }

  void write_shared(size_t at, size_t bytes, bool on_its_way = false) {
    check(shared.write(at, bytes, current_, on_its_way));
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
        std::memcpy(shared.bytes.data() + c.at, c.data, c.bytes);
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
    shared.reset(shared_bytes, threads);
    engines.reset(threads);
    threads_.assign(threads, {});
    if (stacks_.size() < threads * kStack) stacks_.resize(threads * kStack);
    for (int i = 0; i < threads; ++i) {
      threads_[i].index = {static_cast<unsigned>(i), 0};
      threads_[i].block = block;
    }
    while (problem.empty() && !all_done()) {
      // Copies end as late as they can: when nobody can do anything else.
      if (!run_warps() && problem.empty() && !run_warpgroups() && problem.empty() && !engines.deliver(backwards)) {
        cross_barrier();
      }
    }
    if (problem.empty() && engines.unfinished()) fail_text(engines.unfinished());
  }

  bool all_done() const {
    return std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == State::kDone; });
  }

  // Returns whether any thread could move.
  bool run_warps() {
    bool moved = false;
    const int warps = static_cast<int>(threads_.size()) / kWarp;
    for (int w = 0; w < warps && problem.empty(); ++w) moved |= run_warp((backwards ? warps - 1 - w : w) * kWarp);
    return moved;
  }

  // Let a warp run until each of its threads is done or waits for others than its warp.
  bool run_warp(int first) {
    bool any = false;
    for (bool moved = true; moved && problem.empty(); any |= moved) {
      moved = false;
      for (int i = first; i < first + kWarp && problem.empty(); ++i) {
        Thread& t = threads_[i];
        if (t.state == State::kPhase && engines.ended(t.phase_of, t.parity)) t.state = State::kReady;
        if (t.state != State::kReady) continue;
        enter(i);
        moved = true;
      }
      if (problem.empty() && threads_[first].state == State::kWarp) moved |= carry_out(first);
    }
    const auto begin = threads_.begin() + first, end = begin + kWarp;
    const auto waits = [](const Thread& t) { return t.state == State::kPhase || t.state == State::kWarpgroup; };
    if (std::any_of(begin, end, waits)) return any;  // the others of this warp may have to wait for these
    for (int i = first; i < first + kWarp && problem.empty(); ++i) {
      if (threads_[i].state == State::kWarp) fail_text(std::string("not all lanes reached ") + threads_[i].where);
    }
    return any;
  }

  // Carry out an instruction that all threads of a warpgroup have reached.
  bool run_warpgroups() {
    constexpr int kSize = 4 * kWarp;
    bool moved = false;
    for (size_t first = 0; first + kSize <= threads_.size() && problem.empty(); first += kSize) {
      void* operands[kSize];
      const auto begin = threads_.begin() + first, end = begin + kSize;
      const auto same = [&](const Thread& t) {
        return t.state == State::kWarpgroup && t.group_work == begin->group_work;
      };
      if (!std::all_of(begin, end, same)) continue;
      for (int i = 0; i < kSize; ++i) operands[i] = begin[i].operand, begin[i].state = State::kReady;
      if (const char* wrong = begin->group_work(operands)) {
        fail_text(std::string(wrong) + " (warpgroup " + std::to_string(first / kSize) + ")");
      }
      moved = true;
    }
    return moved;
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

  // All threads stand at the barrier: let them pass.
  void cross_barrier() {
    size_t waiting = 0;
    for (const Thread& t : threads_) {
      waiting += t.state == State::kBarrier;
      if (t.state != State::kPhase && t.state != State::kWarpgroup) continue;
      fail_text(std::string("deadlock: thread ") + std::to_string(t.index.x) + " waits for " + t.where +
                (t.state == State::kPhase ? engines.name(t.phase_of) : ", which its warpgroup does not reach"));
      return;
    }
    if (waiting != threads_.size()) {
      fail_text("a barrier was reached by " + std::to_string(waiting) + " of " + std::to_string(threads_.size()) +
                " threads");
    }
    for (Thread& t : threads_) t.state = State::kReady;
    ++shared.order.epoch;
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
  jmp_buf scheduler_{};
  int current_ = 0;
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
