// Launches and the layout of their parameters, for ctypes.
#include <cstddef>

#include "launches.h"
#include "gemm_gelu.cuh"
#include "hopper_expand.cuh"
#include "hopper_w4a4.cuh"
#include "hopper_w8a8.cuh"

using namespace svdquant;
using emulator::Launches;

namespace {

struct Field {
  const char *of, *name;
  size_t at, size;
};

#define FIELD(STRUCT, NAME) {#STRUCT, #NAME, offsetof(STRUCT, NAME), sizeof(STRUCT::NAME)}
using cuda::Expand;
using cuda::Finish;
using cuda::GeluParams;
using cuda::PartsParams;
using cuda::QuantizeParams;
using cuda::TileGrid;
using cuda::W4A4Params;
using cuda::W8A8Params;
const Field kFields[] = {
    FIELD(Floats, data), FIELD(Floats, dtype), FIELD(Floats, stride),
    FIELD(Output, data), FIELD(Output, dtype), FIELD(Output, stride),
    FIELD(Quantize, kind), FIELD(Quantize, m), FIELD(Quantize, k), FIELD(Quantize, r), FIELD(Quantize, x),
    FIELD(Quantize, smooth), FIELD(Quantize, down), FIELD(Quantize, shift), FIELD(Quantize, codes),
    FIELD(Quantize, scales), FIELD(Quantize, hidden), FIELD(Quantize, scale_row),
    FIELD(QuantizeParams, args), FIELD(QuantizeParams, inverse), FIELD(QuantizeParams, low), FIELD(QuantizeParams, high),
    FIELD(Gemm, kind), FIELD(Gemm, m), FIELD(Gemm, n), FIELD(Gemm, k), FIELD(Gemm, r), FIELD(Gemm, codes),
    FIELD(Gemm, scales), FIELD(Gemm, hidden), FIELD(Gemm, weight_codes), FIELD(Gemm, weight_scales),
    FIELD(Gemm, second_scale), FIELD(Gemm, up), FIELD(Gemm, bias), FIELD(Gemm, addend), FIELD(Gemm, out),
    FIELD(GeluParams, product), FIELD(GeluParams, next), FIELD(GeluParams, parts), FIELD(GeluParams, walk),
    FIELD(PartsParams, parts), FIELD(PartsParams, sums), FIELD(PartsParams, count), FIELD(PartsParams, size),
    FIELD(GemmInt8, m), FIELD(GemmInt8, n), FIELD(GemmInt8, k), FIELD(GemmInt8, r), FIELD(GemmInt8, codes),
    FIELD(GemmInt8, scales), FIELD(GemmInt8, hidden), FIELD(GemmInt8, weight_codes), FIELD(GemmInt8, weight_scales),
    FIELD(GemmInt8, up), FIELD(GemmInt8, bias), FIELD(GemmInt8, addend), FIELD(GemmInt8, out),
    FIELD(Gemv, m), FIELD(Gemv, n), FIELD(Gemv, k), FIELD(Gemv, group), FIELD(Gemv, x), FIELD(Gemv, weight_codes),
    FIELD(Gemv, weight_scales), FIELD(Gemv, zeros), FIELD(Gemv, bias), FIELD(Gemv, addend), FIELD(Gemv, out),
    FIELD(TileGrid, rows), FIELD(TileGrid, columns), FIELD(TileGrid, workers), FIELD(TileGrid, band),
    FIELD(Finish, m), FIELD(Finish, n), FIELD(Finish, r), FIELD(Finish, scales), FIELD(Finish, weight_scales),
    FIELD(Finish, hidden), FIELD(Finish, up), FIELD(Finish, bias), FIELD(Finish, addend), FIELD(Finish, out),
    FIELD(W8A8Params, codes), FIELD(W8A8Params, weights), FIELD(W8A8Params, grid), FIELD(W8A8Params, steps),
    FIELD(W8A8Params, finish),
    FIELD(W4A4Params, codes), FIELD(W4A4Params, weights), FIELD(W4A4Params, scales), FIELD(W4A4Params, weight_scales),
    FIELD(W4A4Params, grid), FIELD(W4A4Params, steps), FIELD(W4A4Params, finish),
    FIELD(Expand, codes), FIELD(Expand, scales), FIELD(Expand, n),
    FIELD(Expand, k), FIELD(Expand, to_codes), FIELD(Expand, to_scales), FIELD(Expand, scale_row),
    FIELD(Expand, blocks),
};

}  // namespace

extern "C" {

// A line a field: "Gemm scales 48 24" is its offset and size.
const char* layout() {
  static std::string text;
  text.clear();
  for (const Field& f : kFields) {
    text += std::string(f.of) + ' ' + f.name + ' ' + std::to_string(f.at) + ' ' + std::to_string(f.size) + '\n';
  }
  return text.c_str();
}

// From now on, or no longer: launches are kept and nothing runs.
void record(bool yes) {
  Launches::current().recording = yes;
  Launches::current().recorded.clear();
  Launches::current().allocated.clear();
}

int recorded() { return static_cast<int>(Launches::current().recorded.size()); }
const char* recorded_name(int i) { return Launches::current().name_of(Launches::current().recorded[i].kernel); }
void recorded_grid(int i, emulator::Grid* to) { *to = Launches::current().recorded[i].grid; }
int recorded_params(int i, const unsigned char** to) {
  const auto& params = Launches::current().recorded[i].params;
  *to = params.data();
  return static_cast<int>(params.size());
}

int allocations() { return static_cast<int>(Launches::current().allocated.size()); }
int64_t allocation(int i, const void** at) {
  *at = Launches::current().allocated[i].at;
  return Launches::current().allocated[i].bytes;
}

const char* launch(const char* name, const emulator::Grid* grid, const void* params) {
  for (const auto& n : Launches::current().named) {
    if (n.name == name) return n.run(params, *grid);
  }
  return "there is no such kernel";
}
}
