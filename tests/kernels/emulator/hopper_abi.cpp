// What the tests of the Hopper kernels call, by ctypes.
#include "cuda_launch.h"
#include "hopper_tile.cuh"
#include "scratch.h"

using namespace svdquant;

extern "C" {

void set_multiprocessors(int count) { emulator::Block::current().multiprocessors = count; }

const char* gemm_by_hopper(const Gemm* args) {
  emulator::Scratch scratch;
  return cuda::gemm_int4_hopper(*args, scratch.launch(""));
}

const char* gemm_int8_hopper(const GemmInt8* args) { return cuda::gemm_int8_hopper(*args, {}); }

int choose_tile_columns(int64_t m, int64_t n, int64_t sms) { return cuda::choose_tile_columns(m, n, sms); }

void tile_at(int row_tiles, int column_tiles, int tile, int* row, int* column) {
  const cuda::TileAt at = cuda::tile_at({row_tiles, column_tiles, 1}, tile);
  *row = at.row, *column = at.column;
}
}
