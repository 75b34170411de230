// What hopper_ptx.cuh offers a kernel, as plain C++ over the engines of its neighbours.
#pragma once

#include "emulated.h"

#define SVDQUANT_HOPPER (SVDQUANT_ARCH == 90)
#define SVDQUANT_CLUSTER(BLOCKS)  // the launch says it

namespace svdquant::cuda {

using emulator::Format;
using emulator::TensorMap;

inline unsigned shared_address(const void* p) {
  Block& block = Block::current();
  return static_cast<unsigned>(block.shared_offset(p, 1) - block.shared.first_byte_of(block.number())) +
         emulator::kSharedBase;
}

inline size_t barrier_offset(const uint64_t* b) { return Block::current().shared_offset(b, 8); }

inline void mbarrier_init(uint64_t* b, int arrivals) {
  Block& block = Block::current();
  block.check(block.engines.barriers.init(barrier_offset(b), arrivals, block.number()));
}

inline void mbarrier_init_fence() { Block::current().engines.barriers.init_fence(Block::current().number()); }

inline void mbarrier_arrive_expect(uint64_t* b, int bytes) {
  Block& block = Block::current();
  block.check(block.engines.barriers.arrive(barrier_offset(b), block.number(), bytes));
}

inline void mbarrier_arrive(uint64_t* b) { mbarrier_arrive_expect(b, 0); }

inline void mbarrier_wait(uint64_t* b, unsigned parity) { Block::current().wait_phase(barrier_offset(b), parity); }

inline void check_matrix(const TensorMap* map) {
  const int64_t bytes = (map->rows - 1) * map->row_bytes + map->columns * map->element_bytes;
  Block::current().check_range(map->data, bytes, false);
}

inline void tma_load(void* to, const TensorMap* map, int column, int row, uint64_t* b) {
  Block& block = Block::current();
  check_matrix(map);
  const size_t there = block.shared_offset(to, 1);
  block.check(block.engines.copies.order(there, map, column, row, barrier_offset(b), block.number()));
}

// ---- a cluster ----

inline int cluster_rank() { return Block::current().rank(); }

inline void cluster_barrier() { Block::current().wait(emulator::State::kCluster, "cluster_barrier"); }

inline void mbarrier_arrive_at(uint64_t* b, int rank) {
  Block& block = Block::current();
  if (rank < 0 || rank >= block.shared.blocks()) block.fail("mbarrier: of a block that the cluster does not have");
  const size_t there = block.shared.place_in(rank, barrier_offset(b));
  block.check(block.engines.barriers.arrive(there, block.number(), 0, rank != block.rank()));
}

inline void tma_multicast(void* to, const TensorMap* map, int column, int row, uint64_t* b, unsigned mask) {
  Block& block = Block::current();
  check_matrix(map);
  const size_t there = block.shared_offset(to, 1);
  block.check(
      block.engines.copies.order_for_all(there, map, column, row, barrier_offset(b), block.number(), mask));
}

inline void async_proxy_fence() { Block::current().shared.order.fence(Block::current().number()); }

template <int kCount>
void registers_up() {}

template <int kCount>
void registers_down() {}

// Lanes hear what the others of their warp have done.
inline void warp_barrier() {
  int thread = Block::current().number();
  Block::current().meet("warp_barrier", &thread, [](void* const* lanes) {
    emulator::Order& order = Block::current().shared.order;
    emulator::Clock all = order.nothing();
    for (int i = 0; i < emulator::kWarp; ++i) order.tell(*static_cast<int*>(lanes[i]), all);
    for (int i = 0; i < emulator::kWarp; ++i) emulator::join(order.heard[*static_cast<int*>(lanes[i])], all);
  });
}

inline float to_float(int value) {
  if (static_cast<unsigned>(value) == emulator::kPoison) {
    Block::current().fail("wgmma: sums are used before the product was waited for");
  }
  return static_cast<float>(value);
}

// ---- a warpgroup ----

inline void wgmma_fence() { Block::current().engines.products.fence(Block::current().number()); }

inline void wgmma_commit() {
  int thread = Block::current().number();
  Block::current().meet_warpgroup("wgmma_commit", &thread, [](void* const* threads) -> const char* {
    Block::current().engines.products.commit(*static_cast<int*>(threads[0]) / emulator::kWarpgroup);
    return nullptr;
  });
}

template <int kPending>
void wgmma_wait() {
  int thread = Block::current().number();
  Block::current().meet_warpgroup("wgmma_wait", &thread, [](void* const* threads) {
    return Block::current().engines.products.wait(*static_cast<int*>(threads[0]) / emulator::kWarpgroup, kPending);
  });
}

template <int kPending = 0, class C, int kCount>
void wgmma_finish(C (&)[kCount]) {
  wgmma_wait<kPending>();
}

inline void start_product(emulator::Product product) {
  product.thread = Block::current().number();
  Block::current().meet_warpgroup("wgmma", &product, [](void* const* threads) {
    return Block::current().engines.products.start(reinterpret_cast<emulator::Product* const*>(threads));
  });
}

template <int kCount>
void wgmma_s8(int (&sums)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  start_product({Format::kS8, 2 * kCount, accumulate, false, a, b, {}, sums, 0});
}

inline void wgmma_e4m3(float (&sums)[64], uint64_t a, uint64_t b, bool accumulate) {
  start_product({Format::kE4M3, 128, accumulate, false, a, b, {}, sums, 0});
}

template <int kCount>
void wgmma_bf16(float (&sums)[kCount], const unsigned (&a)[4], uint64_t b) {
  start_product({Format::kBF16, 2 * kCount, true, true, 0, b, {a[0], a[1], a[2], a[3]}, sums, 0});
}

// To nearest even, in steps of an eighth of the power of two below, at least of 2^-9; beyond 448 it stays there.
inline unsigned e4m3_of(float value) {
  if (value != value) return 0x7f;
  const float a = std::fmin(std::fabs(value), 448.0f);
  const int exponent = a < 0x1p-6f ? -6 : std::ilogb(a);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(a, 3 - exponent)));  // 16 carries into the exponent
  return (std::signbit(value) ? 0x80 : 0) + ((exponent + 6) << 3) + steps;
}

inline unsigned to_e4m3x2(float low, float high) { return e4m3_of(low) | e4m3_of(high) << 8; }

}  // namespace svdquant::cuda
