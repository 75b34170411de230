// The copy engine of sm_90a, from the PTX ISA 9.0, 9.7.9.25.5: boxes of a matrix to shared memory, of one block or of
// several of a cluster, at the same place in each. A copy happens as late as the program allows: when nobody can go on
// without it.
#pragma once

#include <deque>

#include "barriers.h"

namespace emulator {

constexpr unsigned kSharedBase = 512;  // the address of a block's first byte: no multiple of the swizzle's 1024

// A matrix that the copy engine knows, as large as the driver's form of it.
struct alignas(128) TensorMap {
  const unsigned char* data = nullptr;
  int64_t rows = 0, columns = 0, row_bytes = 0;
  int box_rows = 0, box_columns = 0, element_bytes = 0;
  bool swizzled = false;

  int box_bytes() const { return box_rows * box_columns * element_bytes; }

  // What cuTensorMapEncodeTiled asks for.
  const char* problem() const {
    if (reinterpret_cast<uintptr_t>(data) % 16 || row_bytes % 16) return "tensor map: not a multiple of 16 bytes";
    if (box_rows < 1 || box_rows > 256 || box_columns < 1 || box_columns > 256) return "tensor map: box too large";
    if (box_columns * element_bytes % 16) return "tensor map: rows of the box are not multiples of 16 bytes";
    if (swizzled && box_columns * element_bytes > 128) return "tensor map: swizzled rows of more than 128 bytes";
    return nullptr;
  }
};

// The 128-byte swizzle: bits 4 to 6 of an address are exchanged by bits 7 to 9.
inline unsigned swizzle_128(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

class Copies {
 public:
  Copies(Shared& memory, Barriers& barriers) : shared_(memory), barriers_(barriers) {}

  void reset() { on_their_way_.clear(); }

  // Order a copy to one block, which its barrier there is told of.
  const char* order(size_t to, const TensorMap* map, int column, int row, size_t barrier, int thread) {
    Stamp writer;
    if (const char* wrong = barriers_.expect_copy(barrier, thread, writer)) return wrong;
    if ((to + kSharedBase) % 128) return "copy engine: the destination is not a multiple of 128 bytes";
    if (!shared_.holds(to, map->box_bytes())) return "copy engine: the box does not fit into shared memory";
    const Clock& starter = shared_.order.heard[thread];
    if (const char* wrong = shared_.write_beside(to, map->box_bytes(), starter, writer)) return wrong;
    on_their_way_.push_back({to, *map, column, row, barrier, writer.clock});
    return nullptr;
  }

  // The same to every block of a mask, at the same places: 16 bits, one a block of the cluster.
  const char* order_for_all(size_t to, const TensorMap* map, int column, int row, size_t barrier, int thread,
                            unsigned mask) {
    if (!mask || mask >> shared_.blocks()) return "copy engine: a mask of blocks that the cluster does not have";
    for (int block = 0; block < shared_.blocks(); ++block) {
      if (!(mask >> block & 1)) continue;
      const size_t there = shared_.place_in(block, to), barrier_there = shared_.place_in(block, barrier);
      if (const char* wrong = order(there, map, column, row, barrier_there, thread)) return wrong;
    }
    return nullptr;
  }

  // Finish a copy: the one that was ordered first, or last. False if there is none.
  bool deliver(bool last) {
    if (on_their_way_.empty()) return false;
    const Copying c = last ? on_their_way_.back() : on_their_way_.front();
    last ? on_their_way_.pop_back() : on_their_way_.pop_front();
    const int row_bytes = c.map.box_columns * c.map.element_bytes;
    for (int i = 0; i < c.map.box_bytes(); ++i) {
      const int64_t row = c.row + i / row_bytes, at = c.column * c.map.element_bytes + i % row_bytes;
      const bool exists = row >= 0 && row < c.map.rows && at >= 0 && at < c.map.columns * c.map.element_bytes;
      unsigned address = static_cast<unsigned>(c.to) + kSharedBase + i;
      if (c.map.swizzled) address = swizzle_128(address);
      shared_.bytes[address - kSharedBase] = exists ? c.map.data[row * c.map.row_bytes + at] : 0;
    }
    barriers_.bring(c.barrier, c.map.box_bytes(), c.number);
    return true;
  }

 private:
  struct Copying {
    size_t to;
    TensorMap map;
    int column, row;
    size_t barrier;
    int number;  // of the barrier's copies
  };

  Shared& shared_;
  Barriers& barriers_;
  std::deque<Copying> on_their_way_;
};

}  // namespace emulator
