// How a block's warps work together on Hopper.
//
//     warp 0, one thread   orders copies of the next steps' operands, as far ahead as there are free stages
//     warps 1 to 3         bring what the end of a tile needs: scales, bias, the branch's `up`
//     warps 4 to 11        two warpgroups that multiply, add the branch and store
//
// They meet at barriers in shared memory: a stage is `full` when its bytes are there, and `empty` when the eight warps
// that multiply have read it. In a cluster the bytes of a stage come from several blocks, each of which has to know
// that the stage is empty: its own `empty` hears the warps of all to whom it sends.
#pragma once

#include "hopper_finish.cuh"

namespace svdquant::cuda {

// Which stage a thread has come to, and how often the stages were gone round.
template <class T>
struct StageAt {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
};

// All barriers, before anyone may use them.
template <class T>
__device__ __forceinline__ void init_barriers(const BlockMemory<T>& memory) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      mbarrier_init(memory.full + i, 1);
      mbarrier_init(memory.empty + i, 4 * kGroups * T::Cluster::kPartners);
    }
    mbarrier_init(memory.side_full, kSideThreads);
    mbarrier_init(memory.side_empty, 4 * kGroups);
    mbarrier_init_fence();
  }
  meet<typename T::Cluster>();
}

// One step's copies of both operands to a stage: all of a tile's rows, or this block's part of them for all who share
// them.
template <class T>
__device__ __forceinline__ void load_operands(const TensorMap* acts, const TensorMap* weights, const TileAt& tile,
                                              int step, char* stage, uint64_t* full) {
  using C = typename T::Cluster;
  const C cluster;
  const int act = cluster.column() * T::kActRows, weight = cluster.row() * T::kWeightRows;
  bring<C::kAcross>(stage + act * kStepBytes, acts, step * kStepBytes, tile.row * kTileRows + act, full,
                    cluster.of_row());
  bring<C::kDown>(stage + T::kActsBytes + weight * kStepBytes, weights, step * kStepBytes, tile.column * T::kN + weight,
                  full, cluster.of_column());
}

// One thread: order all steps of all tiles. `load` orders one step's copies to a stage.
template <class T, class Load>
__device__ __forceinline__ void produce(const TileGrid& grid, int steps, const BlockMemory<T>& memory,
                                        const Load& load) {
  StageAt<T> at;
  for (Walk<T> walk(grid); walk.goes_on(); walk.advance()) {
    const TileAt place = walk.at();
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(memory.empty + at.stage, at.parity ^ 1);
      mbarrier_arrive_expect(memory.full + at.stage, T::kStageBytes);
      load(place, step, memory.stages + at.stage * T::kStageBytes, memory.full + at.stage);
      at.advance();
    }
  }
}

// The descriptors of a stage's operands, of this warpgroup's rows of A.
template <class T>
struct Operands {
  uint64_t acts, weights;

  __device__ __forceinline__ Operands(const BlockMemory<T>& memory, int group) {
    const unsigned stages = shared_address(memory.stages);
    acts = operand(stages + group * 64 * kStepBytes, Rows::kSwizzled, 8 * kStepBytes);
    weights = operand(stages + T::kActsBytes, Rows::kSwizzled, 8 * kStepBytes);
  }
  // `bytes` further on: addresses are counted in sixteens.
  static __device__ __forceinline__ uint64_t moved(uint64_t operand, int bytes) { return operand + (bytes >> 4); }
};

// The roles. `load` as above; `multiply(at, memory, lane, sums)` leaves a tile's finished sums in fp32.
template <class T, class Load, class Multiply>
__device__ __forceinline__ void run_block(const TileGrid& grid, int steps, const Finish& finish, const Load& load,
                                          const Multiply& multiply) {
  const BlockMemory<T> memory;
  init_barriers(memory);
  const int warp = threadIdx.x / 32;
  if (warp < 4) {
    registers_down<kProducerRegisters>();
    if (threadIdx.x == 0) produce(grid, steps, memory, load);
    if (warp > 0) bring_sides(grid, finish, memory);
  } else {
    registers_up<kConsumerRegisters>();
    StageAt<T> at;
    unsigned side_parity = 0;
    for (Walk<T> walk(grid); walk.goes_on(); walk.advance()) {
      const FinishTile<T> end(finish, memory, walk.at());
      HiddenPiece hidden;
      if (T::kRegistersToSpare) hidden = end.load_hidden(0);  // long before it is needed
      float sums[T::kSums];
      multiply(at, memory, end, sums);
      if (!T::kRegistersToSpare) hidden = end.load_hidden(0);
      end.run(hidden, side_parity, sums);
    }
  }
  if constexpr (T::Cluster::kBlocks > 1) cluster_barrier();  // others may still arrive at this block's barriers
}

}  // namespace svdquant::cuda
