// A thread block on a CPU, or the blocks of a cluster. Every CUDA thread is a fiber; fibers take turns and stop where
// threads wait for each other: at barriers, and at warp instructions. What a GPU leaves undefined is an error here,
// with a sentence about it:
//
//   - a barrier or warp instruction that not all threads reach, or reach at different places
//   - a block that ends while others of its cluster may still send to it
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
#include <memory>
#include <string>
#include <vector>

#include "engines.h"
#include "traffic.h"

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

enum class State { kReady, kBarrier, kCluster, kWarp, kWarpgroup, kPhase, kDone };

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
  Traffic traffic;
  int multiprocessors = 4;

  // `cluster` neighbouring blocks of a row run together.
  const char* run(const std::function<void()>& kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes,
                  int cluster = 1) {
    problem.clear();
    if (threads % kWarp) return fail_text("threads: not a multiple of 32");
    if (cluster > 1 && threads % kWarpgroup) return fail_text("threads of a cluster: not a multiple of 128");
    if (grid_x % cluster) return fail_text("grid: not a multiple of the cluster");
    if (shared_bytes > kMostShared) return fail_text("more shared memory than a block can have");
    for (int64_t y = 0; y < grid_y && problem.empty(); ++y) {
      for (int64_t x = 0; x < grid_x && problem.empty(); x += cluster) {
        run_cluster(kernel, {static_cast<unsigned>(x), static_cast<unsigned>(y)}, cluster, threads, shared_bytes);
      }
    }
    return problem.empty() ? nullptr : problem.c_str();
  }

  Thread& self() { return threads_[current_]; }
  int number() const { return current_; }                              // among all threads of the cluster
  int rank() const { return shared.block_of_thread(current_); }        // of the thread's block in its cluster
  char* memory() { return reinterpret_cast<char*>(shared.bytes.data()) + shared.first_byte_of(current_); }

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
    check(engines.barriers.usable(barrier, current_));
    self().phase_of = barrier;
    self().parity = parity;
    if (!engines.barriers.ended(barrier, parity)) wait(State::kPhase, "the end of a phase");
    join(shared.order.heard[current_], engines.barriers.told(barrier));
  }

  void check(const char* wrong) {
    if (wrong) fail(wrong);
  }

  void check_global(const void* p, size_t bytes, bool writing, const Site& site) {
    const bool aligned = reinterpret_cast<uintptr_t>(p) % bytes == 0;
    if (!aligned) fail("global access of " + std::to_string(bytes) + " bytes is not aligned");
    check_range(p, bytes, writing);
    if (traffic.counting) count_global(p, bytes, writing ? "store" : "load", site);
  }

  void count_global(const void* p, size_t bytes, const char* kind, const Site& site) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    const auto range = std::find_if(ranges.begin(), ranges.end(),
                                    [&](const Range& r) { return at >= r.begin && at + bytes <= r.end; });
    traffic.note(current_, kind, site, static_cast<int>(range - ranges.begin()), at, bytes);
  }

  void count_shared(size_t at, size_t bytes, const char* kind, const Site& site) {
    if (traffic.counting) traffic.note(current_, kind, site, kInShared, at, bytes);
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
    if (!shared.holds(at, bytes) || shared.block_of(at) != rank()) fail("shared access outside the block's memory");
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

  void run_cluster(const std::function<void()>& kernel, Dim first, int blocks, int threads, int shared_bytes) {
    kernel_ = &kernel;
    threads_a_block_ = threads;
    shared.reset(blocks, shared_bytes, threads);
    engines.reset(blocks, blocks * threads);
    threads_.assign(blocks * threads, {});
    if (stacks_for_ < threads_.size()) {
      stacks_for_ = threads_.size();
      stacks_.reset(new char[stacks_for_ * kStack]);  // of which pages exist when they are touched
    }
    for (unsigned i = 0; i < threads_.size(); ++i) {
      threads_[i].index = {i % threads, 0};
      threads_[i].block = {first.x + i / threads, first.y};
    }
    while (problem.empty() && !all_of(threads_.begin(), threads_.end(), State::kDone)) {
      // Copies end as late as they can: when nobody can do anything else.
      const bool moved = run_warps() || (problem.empty() && run_warpgroups());
      if (problem.empty()) end_blocks();
      if (!moved && problem.empty() && !engines.copies.deliver(backwards)) cross_barriers();
    }
    traffic.close_all();
    if (problem.empty() && engines.products.unfinished()) fail_text("the kernel has ended while a product was running");
  }

  using Threads = std::vector<Thread>::iterator;

  static bool all_of(Threads begin, Threads end, State state) {
    return std::all_of(begin, end, [=](const Thread& t) { return t.state == state; });
  }

  // Blocks of which every thread is done are gone.
  void end_blocks() {
    for (int block = 0; block < shared.blocks(); ++block) {
      const int first = block * threads_a_block_;
      const Threads begin = threads_.begin() + first;
      if (engines.barriers.has_ended(block) || !all_of(begin, begin + threads_a_block_, State::kDone)) continue;
      Clock known = shared.order.nothing();
      for (int t = first; t < first + threads_a_block_; ++t) join(known, shared.order.heard[t]);
      if (const char* wrong = engines.barriers.end_block(block, known)) {
        fail_text(std::string(wrong) + " (block " + std::to_string(begin->block.x) + ")");
      }
    }
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
        if (t.state == State::kPhase && engines.barriers.ended(t.phase_of, t.parity)) t.state = State::kReady;
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
    traffic.close(first / kWarp);
    for (int i = 0; i < kWarp; ++i) threads_[first + i].state = State::kReady;
    return true;
  }

  // Nobody can go on: let those pass who all stand at a barrier, of a block or of the cluster.
  void cross_barriers() {
    traffic.close_all();
    bool crossed = false;
    for (int first = 0; first < static_cast<int>(threads_.size()); first += threads_a_block_) {
      const Threads begin = threads_.begin() + first, end = begin + threads_a_block_;
      if (!all_of(begin, end, State::kBarrier)) continue;
      for (Threads t = begin; t != end; ++t) t->state = State::kReady;
      shared.blocks() > 1 ? shared.order.meet(first, threads_a_block_) : void(++shared.order.epoch);
      crossed = true;
    }
    if (crossed) return;
    if (const size_t waiting = count(State::kCluster); waiting && waiting + count(State::kDone) == threads_.size()) {
      for (Thread& t : threads_) {  // threads that have ended count as arrived
        if (t.state == State::kCluster) t.state = State::kReady;
      }
      ++shared.order.epoch;
    } else {
      explain();
    }
  }

  size_t count(State state) const {
    return std::count_if(threads_.begin(), threads_.end(), [=](const Thread& t) { return t.state == state; });
  }

  // Why nobody can go on.
  void explain() {
    for (const Thread& t : threads_) {
      if (t.state != State::kPhase && t.state != State::kWarpgroup) continue;
      const bool phase = t.state == State::kPhase;
      fail_text(std::string("deadlock: thread ") + std::to_string(t.index.x) + " of block " +
                std::to_string(t.block.x) + " waits for " + t.where +
                (phase ? engines.barriers.name(t.phase_of) : ", which its warpgroup does not reach"));
      return;
    }
    const bool of_block = count(State::kBarrier);
    fail_text((of_block ? "a barrier was reached by " : "a barrier of the cluster was reached by ") +
              std::to_string(count(of_block ? State::kBarrier : State::kCluster)) + " of " +
              std::to_string(threads_.size()) + " threads");
  }

  // Run a thread until it waits.
  void enter(int i) {
    current_ = i;
    if (_setjmp(scheduler_)) return;
    Thread& t = threads_[i];
    if (t.started) _longjmp(t.resume, 1);
    t.started = true;
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = stacks_.get() + i * kStack;
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
  std::unique_ptr<char[]> stacks_;
  size_t stacks_for_ = 0;
  jmp_buf scheduler_{};
  int current_ = 0, threads_a_block_ = 0;
};

inline Block& Block::current() {
  static Block block;
  return block;
}

template <class F>
const char* run(const F& kernel, int64_t grid_x, int64_t grid_y, int threads, int shared_bytes, int cluster = 1) {
  return Block::current().run(kernel, grid_x, grid_y, threads, shared_bytes, cluster);
}

}  // namespace emulator
