// What engines.h is tested with: a small right kernel of copies and products, and the same with one mistake each.
#include "hopper_map.cuh"
#include "hopper_tile.cuh"

using namespace svdquant::cuda;
using emulator::Block;

namespace {

constexpr int kRows = 64, kColumns = 96, kBytes = (kRows + kColumns) * kStepBytes, kSteps = 2;

// 128 threads multiply 64 x 256 codes by 96 x 256, one more warp orders the copies. One stage.
struct Example {
  const char* mistake;
  const TensorMap *left, *right;
  int* out;  // [128][48]: the sums as threads hold them

  bool makes(const char* name) const { return !std::strcmp(mistake, name); }

  void run() const {
    char* memory = shared_memory();
    char* stage = memory + (kSwizzleBytes - shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
    uint64_t *full = reinterpret_cast<uint64_t*>(stage + kBytes), *empty = full + 1;
    if (threadIdx.x == 0) {
      mbarrier_init(full, 1);
      mbarrier_init(empty, makes("one-warp-speaks") ? 1 : 4);
      if (!makes("no-init-fence")) mbarrier_init_fence();
    }
    for (int i = threadIdx.x; makes("stored-without-fence") && i < kBytes / 4; i += 160) {
      st_shared(reinterpret_cast<unsigned*>(stage) + i, 0u);
    }
    if (!makes("no-barrier-after-init")) barrier();
    if (threadIdx.x == 128) copy(stage, full, empty);
    if (threadIdx.x < 128) multiply(stage, full, empty);
  }

  void copy(char* stage, uint64_t* full, uint64_t* empty) const {
    for (int step = 0; step < kSteps + makes("one-copy-too-many"); ++step) {
      if (!makes("no-wait-for-empty")) mbarrier_wait(empty, step % 2 ^ 1);
      if (makes("stored-without-fence")) return mbarrier_arrive(full);
      mbarrier_arrive_expect(full, kBytes + (makes("bytes-that-never-come") ? 16 : 0));
      tma_load(stage + (makes("unaligned-copy") ? 16 : 0), left, step * kStepBytes, 0, full);
      tma_load(stage + kRows * kStepBytes, right, step * kStepBytes, 0, full);
    }
  }

  void multiply(char* stage, uint64_t* full, uint64_t* empty) const {
    const int warp = threadIdx.x / 32;
    int sums[kColumns / 2] = {};
    for (int step = 0; step < kSteps; ++step) {
      if (!makes("no-wait-for-full")) mbarrier_wait(full, step % 2);
      if (!makes("no-wgmma-fence")) wgmma_fence();
      if (makes("sums-changed-after-fence")) sums[0] += step;
      if (makes("half-a-warpgroup") && warp > 1) return;
      start(stage, makes("different-operands") ? warp : 0, sums);
      if (makes("empty-too-early")) release(empty, warp);
      if (makes("sums-before-wait")) to_float(sums[3]);
      if (makes("sums-written-before-wait")) sums[3] = 0;
      if (makes("never-waited") && step == kSteps - 1) return;
      wgmma_finish(sums);
      if (!makes("empty-too-early")) release(empty, warp);
    }
    for (int i = 0; i < kColumns / 2; ++i) st_global(out + threadIdx.x * (kColumns / 2) + i, sums[i]);
  }

  static void start(const char* stage, int shift, int (&sums)[kColumns / 2]) {
    const unsigned left = shared_address(stage), right = left + kRows * kStepBytes;
    for (int bytes = 0; bytes < kStepBytes; bytes += 32) {
      wgmma_s8(sums, operand(left + bytes + 16 * shift, Rows::kSwizzled, 8 * kStepBytes),
               operand(right + bytes, Rows::kSwizzled, 8 * kStepBytes), true);
    }
    wgmma_commit();
  }

  void release(uint64_t* empty, int warp) const {
    const bool speaks = makes("every-lane-speaks") || threadIdx.x % 32 == 0;
    if (speaks && (warp == 0 || !makes("one-warp-speaks"))) mbarrier_arrive(empty);
  }
};

}  // namespace

extern "C" const char* make_hopper_mistake(const char* name, const signed char* left, const signed char* right,
                                           int* out) {
  TensorMap maps[2];
  const int64_t columns = kSteps * kStepBytes;
  const char* wrong = encode_map({left, kRows, columns, columns, kRows, kStepBytes, 1}, maps[0]);
  if (!wrong) wrong = encode_map({right, kColumns, columns, columns, kColumns, kStepBytes, 1}, maps[1]);
  if (wrong) return wrong;
  const Example example = {name, &maps[0], &maps[1], out};
  return emulator::run([&] { example.run(); }, 1, 1, 160, kSwizzleBytes + kBytes + 16);
}
