// What the tests of the Hopper kernels call, by ctypes.
#include <cstring>

#include "cuda_launch.h"
#include "hopper_grid.cuh"
#include "scratch.h"

using namespace svdquant;

extern "C" {

void set_multiprocessors(int count) { emulator::Block::current().multiprocessors = count; }

const char* gemm_by_hopper(const Gemm* args) {
  emulator::Scratch scratch;
  return cuda::gemm_int4_hopper(*args, false, scratch.launch(""));
}
const char* gemm_by_hopper_x4(const Gemm* args) {
  emulator::Scratch scratch;
  return cuda::gemm_int4_hopper(*args, true, scratch.launch(""));
}

const char* gemm_int8_hopper(const GemmInt8* args) { return cuda::gemm_int8_hopper(*args, false, {}); }
const char* gemm_int8_hopper_x2(const GemmInt8* args) { return cuda::gemm_int8_hopper(*args, true, {}); }

// Of "w8a8" or "w4a4".
void choose_tile(const char* kernel, bool in_clusters, int64_t m, int64_t n, int64_t sms, cuda::TileShape* to) {
  const bool bytes = std::strcmp(kernel, "w8a8") == 0;
  *to = bytes ? cuda::choose_w8a8_tile(m, n, sms, in_clusters) : cuda::choose_w4a4_tile(m, n, sms, in_clusters);
}

int64_t step_clocks(int64_t m, int64_t n, int64_t sms, const cuda::TileShape* shape) {
  return cuda::step_clocks(m, n, sms, *shape);
}

void tile_at(int64_t m, int64_t n, const cuda::TileShape* shape, int tile, int* row, int* column) {
  const cuda::TileAt at = cuda::tile_at(cuda::divide(m, n, *shape, 1), tile);
  *row = at.row, *column = at.column;
}
}
