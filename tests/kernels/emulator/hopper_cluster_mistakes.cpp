// What the emulator's clusters are tested with: two blocks that share an operand, and the same with one mistake each.
#include "hopper_map.cuh"

using namespace svdquant::cuda;

namespace {

constexpr int kRows = 64, kColumns = 96, kStep = 128, kLeftBytes = kRows * kStep, kSteps = 3;
constexpr int kHalfBytes = kColumns / 2 * kStep, kBytes = kLeftBytes + 2 * kHalfBytes, kThreads = 256;

// Each block multiplies 64 rows of 128 by all of 96; each brings half of the latter to both. 128 threads multiply, one
// more orders the copies. One stage.
struct Example {
  const char* mistake;
  const TensorMap *left, *half;
  int* out;  // [2][128][48]: the sums as threads hold them

  bool makes(const char* name) const { return !std::strcmp(mistake, name); }

  void run() const {
    char* memory = shared_memory();
    char* stage = memory + (1024 - shared_address(memory) % 1024) % 1024;
    uint64_t *full = reinterpret_cast<uint64_t*>(stage + kBytes), *empty = full + 1;
    if (threadIdx.x == 0) {
      mbarrier_init(full, 1);
      mbarrier_init(empty, makes("hears-its-own-warps-only") ? 4 : 8);
      mbarrier_init_fence();
    }
    makes("blocks-do-not-meet-first") ? barrier() : cluster_barrier();
    if (threadIdx.x == 128) copy(stage, full, empty);
    if (threadIdx.x < 128) multiply(stage, full, empty);
    if (!makes("blocks-do-not-meet-last") && !makes("one-block-stops-early")) cluster_barrier();
  }

  int steps() const { return makes("one-block-stops-early") && cluster_rank() == 1 ? 1 : kSteps; }

  void copy(char* stage, uint64_t* full, uint64_t* empty) const {
    const int rank = cluster_rank(), part = makes("both-bring-the-same-half") ? 0 : rank;
    const unsigned all = makes("sent-to-a-third-block") ? 7 : makes("sent-to-itself-alone") ? 1 << rank : 3;
    for (int step = 0; step < steps(); ++step) {
      mbarrier_wait(empty, step % 2 ^ 1);
      mbarrier_arrive_expect(full, makes("expects-its-own-half") ? kBytes - kHalfBytes : kBytes);
      if (makes("left-is-sent-too")) {
        tma_multicast(stage, left, step * kStep, rank * kRows, full, all);
      } else {
        tma_load(stage, left, step * kStep, rank * kRows, full);
      }
      char* to = stage + kLeftBytes + part * kHalfBytes + (makes("halves-overlap") ? 1024 - 2048 * part : 0);
      tma_multicast(to, half, step * kStep, part * kColumns / 2, full, all);
    }
  }

  void multiply(char* stage, uint64_t* full, uint64_t* empty) const {
    int sums[kColumns / 2] = {};
    for (int step = 0; step < steps(); ++step) {
      mbarrier_wait(full, step % 2);
      wgmma_fence();
      start(stage, sums);
      if (makes("tells-before-it-has-read")) tell(empty);
      wgmma_finish(sums);
      if (!makes("tells-before-it-has-read")) tell(empty);
    }
    int* to = out + (cluster_rank() * 128 + threadIdx.x) * (kColumns / 2);
    for (int i = 0; i < kColumns / 2; ++i) st_global(to + i, sums[i]);
  }

  static void start(const char* stage, int (&sums)[kColumns / 2]) {
    const unsigned left = shared_address(stage), right = left + kLeftBytes;
    for (int bytes = 0; bytes < kStep; bytes += 32) {
      wgmma_s8(sums, operand(left + bytes, Rows::kSwizzled, 8 * kStep),
               operand(right + bytes, Rows::kSwizzled, 8 * kStep), true);
    }
    wgmma_commit();
  }

  void tell(uint64_t* empty) const {
    const int lane = threadIdx.x % 32, rank = cluster_rank();
    if (makes("tells-a-third-block") && lane < 2) return mbarrier_arrive_at(empty, lane + 1);
    const bool other = lane == 1 && !makes("tells-its-own-block-only") && !makes("hears-its-own-warps-only");
    if (lane == 0 || other) mbarrier_arrive_at(empty, lane ^ rank);
  }
};

}  // namespace

extern "C" const char* make_cluster_mistake(const char* name, const signed char* left, const signed char* right,
                                            int* out) {
  TensorMap maps[2];
  const int64_t columns = kSteps * kStep;
  const char* wrong = encode_map({left, 2 * kRows, columns, columns, kRows, kStep, 1}, maps[0]);
  if (!wrong) wrong = encode_map({right, kColumns, columns, columns, kColumns / 2, kStep, 1}, maps[1]);
  if (wrong) return wrong;
  const Example example = {name, &maps[0], &maps[1], out};
  return emulator::run([&] { example.run(); }, 2, 1, kThreads, 1024 + kBytes + 16, 2);
}
