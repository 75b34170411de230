// Barriers in shared memory on sm_90a, from the PTX ISA 9.0, 9.7.13.15: a phase ends when as many threads have arrived
// as the barrier was made for, and copies have brought as many bytes as were announced, before or after they come.
// Threads of other blocks of a cluster arrive too, as long as the barrier's block runs; an arrival is taken to tell
// what its thread has read, also where its `.release` is not that of the cluster.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "shadow.h"

namespace emulator {

class Barriers {
 public:
  explicit Barriers(Shared& memory) : shared_(memory) {}

  void reset(int blocks) {
    all_.clear();
    ended_.assign(blocks, false);
    visits_.assign(blocks, {});
  }

  const char* init(size_t at, int arrivals, int thread) {
    if (at % 8) return "mbarrier: not a multiple of 8 bytes";
    if (all_.size() == kMostBarriers) return "mbarrier: more than the emulator has room for";
    if (const char* wrong = shared_.write(at, 8, thread)) return wrong;
    const int number = static_cast<int>(all_.size());
    const Order& order = shared_.order;
    all_[at] = {number, arrivals, arrivals, 0, 0, 0, {}, false, order.now(thread), order.nothing(), order.nothing()};
    return nullptr;
  }

  void init_fence(int thread) {
    for (auto& [at, b] : all_) b.fenced |= b.made.agent == thread;
  }

  // May this thread use the barrier at all?
  const char* usable(size_t at, int thread) const {
    if (ended_[shared_.block_of(at)]) return "mbarrier: its block has ended";
    const auto found = all_.find(at);
    if (found == all_.end()) return "mbarrier: used before its initialisation";
    const bool known = shared_.order.before(found->second.made, shared_.order.heard[thread]);
    return known ? nullptr : "mbarrier: used by a thread that cannot know of its initialisation";
  }

  // `visiting`: from another block of the cluster.
  const char* arrive(size_t at, int thread, int expected_bytes, bool visiting = false) {
    if (const char* wrong = usable(at, thread)) return wrong;
    Barrier& b = all_[at];
    if (!b.pending) return "mbarrier: more arrivals in a phase than it was made for";
    if (visiting) visits_[shared_.block_of(at)][thread] = shared_.order.now(thread);
    b.bytes += expected_bytes;
    shared_.order.tell(thread, b.telling);
    --b.pending;
    end_phase(b);
    return nullptr;
  }

  bool ended(size_t at, unsigned parity) const { return (all_.at(at).phase & 1) != parity; }
  const Clock& told(size_t at) const { return all_.at(at).told; }

  std::string name(size_t at) const {
    const Barrier& b = all_.at(at);
    return " of barrier " + std::to_string(b.number) + ", which lacks " + std::to_string(b.pending) + " arrivals and " +
           std::to_string(b.bytes) + " bytes";
  }

  // ---- copies ----

  // A copy will bring bytes; its stamp as a writer, whose clock is its number.
  const char* expect_copy(size_t at, int thread, Stamp& writer) {
    if (const char* wrong = usable(at, thread)) return wrong;
    Barrier& b = all_[at];
    if (!b.fenced) return "mbarrier: given to the copy engine without a fence after its initialisation";
    writer = {shared_.order.copies_of(b.number), ++b.copies, 0};
    b.on_their_way.insert(b.copies);
    return nullptr;
  }

  void bring(size_t at, int bytes, int copy) {
    Barrier& b = all_[at];
    b.bytes -= bytes;
    b.on_their_way.erase(copy);
    end_phase(b);
  }

  // ---- the end of a block, whose threads have heard `known` together ----

  const char* end_block(int block, const Clock& known) {
    for (const auto& [thread, visit] : visits_[block]) {
      if (!shared_.order.before(visit, known)) return "the block has ended while others may arrive at its barriers";
    }
    for (const auto& [at, b] : all_) {
      if (shared_.block_of(at) != block || known[shared_.order.copies_of(b.number)] >= b.copies) continue;
      return "the block has ended while a copy was on its way";
    }
    ended_[block] = true;
    return nullptr;
  }

  bool has_ended(int block) const { return ended_[block]; }

 private:
  struct Barrier {
    int number, arrivals, pending;
    int64_t bytes;
    int phase;
    int copies;  // that were ordered so far
    std::set<int> on_their_way;
    bool fenced;
    Stamp made;
    Clock telling, told;  // by those who arrive in this phase; by those who had when the last one ended
  };

  void end_phase(Barrier& b) {
    if (b.pending || b.bytes) return;
    ++b.phase;
    b.pending = b.arrivals;
    b.telling[shared_.order.copies_of(b.number)] = b.on_their_way.empty() ? b.copies : *b.on_their_way.begin() - 1;
    b.told = b.telling;
  }

  Shared& shared_;
  std::map<size_t, Barrier> all_;
  std::vector<bool> ended_;                     // by block
  std::vector<std::map<int, Stamp>> visits_;  // by block: the last arrival of each thread of another one
};

}  // namespace emulator
