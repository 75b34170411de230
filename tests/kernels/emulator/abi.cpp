// What the tests call, by ctypes.
#include "run_gemm_gelu.cuh"
#include "scratch.h"

using namespace svdquant;
using emulator::Block;

extern "C" {

void allow(const void* begin, int64_t bytes, bool writable) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  Block::current().ranges.push_back({at, at + static_cast<uintptr_t>(bytes), writable});
}

void forget() { Block::current().ranges.clear(); }

// From now on, or no longer: accesses are counted. Counts begin at zero.
void count_traffic(bool yes) {
  Block::current().traffic.counting = yes;
  Block::current().traffic.reset();
}

const char* counted_traffic() {
  static std::string text;
  text = Block::current().traffic.report();
  return text.c_str();
}

void run_backwards(bool yes) { Block::current().backwards = yes; }

int size_of_struct(int which) {
  const int sizes[] = {sizeof(Floats), sizeof(Quantize), sizeof(Gemm), sizeof(GemmInt8),
                       sizeof(Gemv),   sizeof(GemmGelu)};
  return sizes[which];
}

const char* quantize_int4(const Quantize* args) { return cuda::quantize_int4(*args, {}); }
const char* quantize_e4m3(const Quantize* args) { return cuda::quantize_e4m3(*args, {}); }
const char* quantize_int8(const Quantize* args) { return cuda::quantize_int8(*args, {}); }
const char* quantize_nvfp4(const Quantize* args) { return cuda::quantize_nvfp4(*args, {}); }

const char* gemm_by_nvfp4(const Gemm* args) { return cuda::gemm_nvfp4(*args, {}); }
const char* gemm_by_mxf4(const Gemm* args) { return cuda::gemm_mxf4(*args, {}); }
const char* gemm_by_int4(const Gemm* args) { return cuda::gemm_int4(*args, cuda::Product::kInt4, {}); }
const char* gemm_by_int8(const Gemm* args) { return cuda::gemm_int4(*args, cuda::Product::kInt8, {}); }
const char* gemm_gelu_by_int4(const GemmGelu* args) {
  emulator::Scratch scratch;
  return cuda::gemm_int4_gelu(*args, scratch.launch(""));
}
const char* gemm_gelu_by_int8(const GemmGelu* args) {
  emulator::Scratch scratch;
  return cuda::gemm_int4_gelu_wide(*args, scratch.launch(""));
}
const char* gemm_gelu_by_nvfp4(const GemmGelu* args) {
  emulator::Scratch scratch;
  return cuda::gemm_nvfp4_gelu(*args, scratch.launch(""));
}
const char* gemm_gelu_by_mxf4(const GemmGelu* args) {
  emulator::Scratch scratch;
  return cuda::gemm_mxf4_gelu(*args, scratch.launch(""));
}
// With as many tiles a block as are asked for; otherwise only large outputs have more than one.
const char* gemm_gelu_walking(const GemmGelu* args, int walk) {
  emulator::Scratch scratch;
  const cuda::GeluParams p = {args->product, cuda::quantize_params(args->next), nullptr, walk};
  const Launch launch = scratch.launch("");
  using Integers = cuda::Int4Loop<cuda::SmallTile, cuda::Int8Product>;
  using Floats = cuda::NvFp4Loop<cuda::SmallTile>;
  return args->product.kind == Codes::kE2M1 ? cuda::run_gemm_gelu<Floats, DType::kBF16>(p, launch)
                                            : cuda::run_gemm_gelu<Integers, DType::kBF16>(p, launch);
}
const char* gemm_w8a8(const GemmInt8* args) { return cuda::gemm_int8(*args, {}); }
const char* gemv(const Gemv* args) { return cuda::gemv_awq(*args, {}); }

// By the name of a spelling, as ops.cpp calls them.
const char* enter_quantize(const char* spelling, const Quantize* args) { return quantize(*args, {spelling}); }
const char* enter_gemm(const char* spelling, const Gemm* args) {
  emulator::Scratch scratch;
  return gemm(*args, scratch.launch(spelling));
}
const char* enter_gemm_gelu(const char* spelling, const GemmGelu* args) {
  emulator::Scratch scratch;
  return gemm_gelu(*args, scratch.launch(spelling));
}
const char* enter_gemm_w8a8(const char* spelling, const GemmInt8* args) { return gemm_int8(*args, {spelling}); }
const char* enter_gemv(const char* spelling, const Gemv* args) { return gemv_awq(*args, {spelling}); }
const char* list_spellings() { return spellings(); }

void divide_each_by(const float* a, const float* b, const float* reciprocals, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = cuda::divide_by(a[i], b[i], reciprocals[i]);
}

int tiles_a_walk(int64_t row_blocks, int64_t tiles) { return cuda::tiles_a_walk(row_blocks, tiles); }
bool prefers_small_tile(int64_t m, int64_t n) { return cuda::prefers_small<cuda::LargeTile>(m, n); }
}
