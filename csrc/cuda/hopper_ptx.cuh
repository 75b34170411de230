// What a thread of sm_90a can do besides: barriers in shared memory, the copy engine, products of a warpgroup. As in
// ptx.cuh, nothing else holds inline PTX, and tests/kernels/emulator supplies the same functions as plain C++.
//
// Section numbers are those of the PTX ISA 9.0.
#pragma once

#include "hopper_wgmma.cuh"
#include "ptx.cuh"

#ifndef __CUDACC__
#include "hopper_emulated.h"
#else

#include <cuda.h>

// The device's pass over a file for sm_90a; everything here and in the kernels is empty in every other.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SVDQUANT_HOPPER 1
#else
#define SVDQUANT_HOPPER 0
#endif

// So many neighbouring blocks of a kernel's grid are a cluster, however it is launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SVDQUANT_CLUSTER(BLOCKS)
#else
#define SVDQUANT_CLUSTER(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)
#endif

namespace svdquant::cuda {

using TensorMap = CUtensorMap;

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// ---- barriers in shared memory (9.7.13.15): a phase ends with so many arrivals and as many bytes as announced ----

__device__ __forceinline__ void mbarrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

// What was initialised is seen by the copy engine; other threads need a barrier besides.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

// Arrive, and announce bytes that copies will bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* b, unsigned parity) {
  unsigned done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done;
}

__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Wait for the end of the phase of this parity. A kernel that would wait for ever is stopped: an error can be
// reported, a card that hangs cannot.
__device__ __forceinline__ void mbarrier_wait(uint64_t* b, unsigned parity) {
  constexpr unsigned long long kPatience = 20'000'000'000;
  if (mbarrier_try_wait(b, parity)) return;
  const unsigned long long start = nanoseconds();
  while (!mbarrier_try_wait(b, parity)) {
    if (nanoseconds() - start > kPatience) asm volatile("trap;");
  }
}

// ---- the copy engine (9.7.9.25.5.2): a box of a matrix to shared memory, zeros where the matrix has ended ----

// `column` and `row` are those of the box's first element.
__device__ __forceinline__ void tma_load(void* to, const TensorMap* map, int column, int row, uint64_t* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
               : "memory");
}

// ---- a cluster: blocks that run at one time, and whose copies and barriers reach each other's shared memory ----

// Which block of its cluster this is.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks meet, and know what the others have done (9.7.13.4).
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrive at the barrier that lies at this place in the memory of a block of the cluster. What this thread has read is
// read by then; what it has stored is not announced to the other block: .release.cluster would wait for the card's
// memory each time.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* b, int rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(b)),
      "r"(rank)
      : "memory");
}

// A copy to this place in the memory of every block of a mask, whose barriers at the place of `b` are told.
__device__ __forceinline__ void tma_multicast(void* to, const TensorMap* map, int column, int row, uint64_t* b,
                                              unsigned mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(b)), "h"(static_cast<unsigned short>(mask))
      : "memory");
}

// What this thread stored to shared memory may be read by the copy engine and by wgmma, once others know (9.7.13.4).
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- a warpgroup (9.7.15): 128 threads that multiply together ----

// Registers that each thread of this warpgroup may use from here on (9.7.19.5).
template <int kCount>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first product, and again whenever registers of a product were touched by anything else.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kPending groups of products are running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler must not read a sum any earlier than this.
__device__ __forceinline__ void has_changed(int& sum) { asm volatile("" : "+r"(sum)::"memory"); }
__device__ __forceinline__ void has_changed(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

// Wait for all groups of products but the last kPending, with which `sums` are complete.
template <int kPending = 0, class C, int kCount>
__device__ __forceinline__ void wgmma_finish(C (&sums)[kCount]) {
  wgmma_wait<kPending>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) has_changed(sums[i]);
}

__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ float to_float(int value) { return __int2float_rn(value); }

// Two numbers as e4m3, the first one in the lower byte (9.7.9.22, cvt).
__device__ __forceinline__ unsigned to_e4m3x2(float low, float high) {
  unsigned short bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
}

}  // namespace svdquant::cuda
#endif  // __CUDACC__
