// The ops as torch sees them: check, fill in launch.h's structs, launch. The only file that includes torch, and only its
// light headers: this one file is most of a build's time. Quantizers allocate what they return; a product writes into
// `out`, which may be some columns of a wider matrix.
//
// Schemas and fake kernels are in svdquant/kernels/ops.py. This file is compiled once for each library, with
// SVDQUANT_DEVICE naming the dispatch key: CPU, linked with csrc/cpu/, or CUDA, linked with the .cu files, and then
// SVDQUANT_GPU is defined. On a GPU nothing here waits for the device or allocates anything but results, what a kernel
// asks for as scratch memory, and copies of inputs whose rows are not contiguous or that are fp64.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#ifdef SVDQUANT_GPU
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <string>
#include <tuple>
#include <vector>

#include "launch.h"

namespace svdquant {
namespace {

using at::Tensor;

DType dtype_of(at::ScalarType type, const char* name) {
  switch (type) {
    case at::kFloat: return DType::kF32;
    case at::kBFloat16: return DType::kBF16;
    case at::kHalf: return DType::kF16;
    case at::kFloat8_e4m3fn: return DType::kE4M3;
    default: TORCH_CHECK_VALUE(false, name, ": expected a float of 32, 16 or 8 bits, got ", type);
  }
}

DType dtype_of(const Tensor& t, const char* name) { return dtype_of(t.scalar_type(), name); }

void check_columns(int64_t k) { TORCH_CHECK_VALUE(k, "weight_codes: expected columns, got none"); }

void check_shape(const Tensor& t, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(t.sizes() == expected, name, ": expected shape ", expected, ", got ", t.sizes());
}

Tensor narrowed(const Tensor& t) { return t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t; }

// A matrix whose rows may lie apart, but not the numbers in a row. `kept` owns what had to be copied for that.
Floats matrix(const Tensor& t, const char* name, Tensor& kept) {
  kept = narrowed(t);
  if (kept.stride(1) != 1) kept = kept.contiguous();
  return {kept.const_data_ptr(), dtype_of(kept, name), kept.stride(0)};
}

Floats vector(const Tensor& t, const char* name, Tensor& kept) {
  kept = narrowed(t).contiguous();
  return {kept.const_data_ptr(), dtype_of(kept, name), 1};
}

// All tensors of a call where its first one is.
void check_device(const Tensor& first, std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  for (const auto& [name, t] : others) {
    TORCH_CHECK_VALUE(t->device() == first.device(), name, ": expected on ", first.device(), " as the rest, got ",
                      t->device());
  }
}

const Tensor* if_any(const std::optional<Tensor>& t, const Tensor& otherwise) { return t ? &*t : &otherwise; }

// Makes the device of a call's tensors the current one; a CPU has no such thing.
struct OnDevice {
#ifdef SVDQUANT_GPU
  explicit OnDevice(const Tensor& t) : guard(t.device()) {}
  c10::cuda::CUDAGuard guard;
#else
  explicit OnDevice(const Tensor&) {}
#endif
};

// Under an OnDevice.
Launch launch(const std::string& spelling) {
  Launch l;
  l.spelling = spelling.c_str();
#ifdef SVDQUANT_GPU
  l.stream = c10::cuda::getCurrentCUDAStream().stream();
#endif
  l.parallel = [](int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return l;
}

// Memory for the length of a call. A GPU's allocator gives it to later calls in the order of the stream.
struct Scratch {
  at::TensorOptions options;
  std::vector<Tensor> kept;

  static void* allocate(void* owner, int64_t bytes) {
    Scratch& scratch = *static_cast<Scratch*>(owner);
    scratch.kept.push_back(at::empty({bytes}, scratch.options.dtype(at::kByte)));
    return scratch.kept.back().mutable_data_ptr();
  }
};

Launch launch(const std::string& spelling, Scratch& scratch) {
  Launch l = launch(spelling);
  l.allocate = Scratch::allocate, l.owner = &scratch;
  return l;
}

void check_launch(const char* problem, const std::string& spelling) {
  TORCH_CHECK(!problem, "svdquant kernels, spelling '", spelling, "': ", problem);
}

// Scales beside integers carried by e4m3: [M, G] fp32, a group's side by side from a multiple of 16 bytes on.
Tensor scales_by_group(const Tensor& x, int64_t groups) {
  const int64_t m = x.size(0);
  return at::empty_strided({m, groups}, {1, (m + 3) / 4 * 4}, x.options().dtype(at::kFloat));
}

// The same as a product reads them.
Floats read_by_group(const Tensor& scales) {
  const bool fits = scales.scalar_type() == at::kFloat && scales.stride(0) == 1 && scales.stride(1) % 4 == 0;
  TORCH_CHECK_VALUE(fits && reinterpret_cast<uintptr_t>(scales.const_data_ptr()) % 16 == 0,
                    "scales: expected fp32 with a group's side by side from a multiple of 16 bytes on, got ",
                    scales.scalar_type(), " of strides ", scales.strides());
  return {scales.const_data_ptr(), DType::kF32, scales.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor> quantize_as(Codes kind, const Tensor& x, const Tensor& smooth, const Tensor& down,
                                               double shift, const std::string& spelling) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected [M, K], got ", x.sizes());
  check_device(x, {{"smooth", &smooth}, {"down", &down}});
  const OnDevice here(x);
  const int64_t m = x.size(0), k = x.size(1), group = group_size(kind);
  TORCH_CHECK_VALUE(k && k % group == 0, "x: last axis is ", k, ", expected a multiple of ", group, ". Pad K first.");
  check_shape(smooth, "smooth", {k});
  TORCH_CHECK_VALUE(down.dim() == 2 && down.size(1) == k, "down: expected [R, ", k, "], got ", down.sizes());
  const int64_t r = down.size(0);
  const bool eight_bits = kind == Codes::kInt8, is_signed = eight_bits || kind == Codes::kInt4;
  const at::ScalarType scale_type = eight_bits                ? at::kFloat
                                    : kind == Codes::kE2M1 ? at::kFloat8_e4m3fn
                                                           : x.scalar_type();
  const bool carried = (kind == Codes::kInt4 || kind == Codes::kUint4) && carries_e4m3(spelling.c_str());
  const at::ScalarType code_type = carried ? at::kFloat8_e4m3fn : is_signed ? at::kChar : at::kByte;
  Tensor codes = at::empty({m, k}, x.options().dtype(code_type));
  Tensor scales = carried ? scales_by_group(x, k / group)
                          : at::empty({m, eight_bits ? 1 : k / group}, x.options().dtype(scale_type));
  Tensor hidden = at::empty({m, r}, x.options().dtype(at::kFloat));
  if (m) {
    Tensor kept[3];
    const Quantize args = {kind,
                           m,
                           k,
                           r,
                           matrix(x, "x", kept[0]),
                           vector(smooth, "smooth", kept[1]),
                           matrix(down, "down", kept[2]),
                           static_cast<float>(shift),
                           codes.mutable_data_ptr(),
                           scales.mutable_data_ptr(),
                           hidden.mutable_data_ptr<float>(),
                           carried ? scales.stride(1) : 0};
    check_launch(quantize(args, launch(spelling)), spelling);
  }
  return {codes, scales, hidden};
}

std::tuple<Tensor, Tensor, Tensor> quantize_int4(const Tensor& x, const Tensor& smooth, const Tensor& down,
                                                 std::string spelling) {
  return quantize_as(Codes::kInt4, x, smooth, down, 0.0, spelling);
}

std::tuple<Tensor, Tensor, Tensor> quantize_int4_unsigned(const Tensor& x, const Tensor& smooth, const Tensor& down,
                                                          double shift, std::string spelling) {
  return quantize_as(Codes::kUint4, x, smooth, down, shift, spelling);
}

std::tuple<Tensor, Tensor, Tensor> quantize_nvfp4(const Tensor& x, const Tensor& smooth, const Tensor& down,
                                                  std::string spelling) {
  return quantize_as(Codes::kE2M1, x, smooth, down, 0.0, spelling);
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8(const Tensor& x, const Tensor& smooth, const Tensor& down,
                                                 double shift, std::string spelling) {
  return quantize_as(Codes::kInt8, x, smooth, down, shift, spelling);
}

void check_packed(const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.scalar_type() == at::kByte, "weight_codes: expected packed uint8 [N, K/2], got ",
                    t.scalar_type(), " ", t.sizes());
}

void check_type(const Tensor& t, const char* name, at::ScalarType expected) {
  TORCH_CHECK_VALUE(t.scalar_type() == expected, name, ": expected ", expected, ", got ", t.scalar_type());
}

// Rows may lie apart, but neither the numbers in a row nor the rows over each other.
Output output(const Tensor& out, int64_t m, int64_t n) {
  const at::ScalarType dtype = out.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "out: expected fp32, bf16 or fp16, got ", dtype);
  check_shape(out, "out", {m, n});
  TORCH_CHECK_VALUE((n <= 1 || out.stride(1) == 1) && (m <= 1 || out.stride(0) >= n),
                    "out: expected rows of neighbouring numbers, none over another, got strides ", out.strides());
  return {out.mutable_data_ptr(), dtype_of(out, "out"), out.stride(0)};
}

Floats addend_of(const std::optional<Tensor>& addend, int64_t m, int64_t n, Tensor& kept) {
  if (!addend) return {};
  check_type(*addend, "addend", at::kFloat);
  check_shape(*addend, "addend", {m, n});
  return matrix(*addend, "addend", kept);
}

// What a 4-bit product multiplies, checked, without where it goes. `kept` owns what had to be copied.
Gemm product_of(Codes kind, const Tensor& codes, const Tensor& scales, const Tensor& hidden, const Tensor& weight_codes,
                const Tensor& weight_scales, const Tensor& up, const std::optional<Tensor>& bias, Tensor (&kept)[7]) {
  const int64_t m = codes.size(0), n = weight_codes.size(0), k = weight_codes.size(1) * 2, group = group_size(kind);
  const int64_t r = up.size(-1);
  check_columns(k);
  const at::ScalarType type = codes.scalar_type();
  const bool carried = kind == Codes::kE4M3;
  TORCH_CHECK_VALUE(carried ? type == at::kFloat8_e4m3fn : type == at::kChar || type == at::kByte, "codes: expected ",
                    carried ? "float8_e4m3fn" : "int8 or uint8", " for this spelling, got ", type,
                    ". Quantize and multiply with the same one.");
  check_type(hidden, "hidden", at::kFloat);
  check_shape(codes, "codes", {m, k});
  check_shape(scales, "scales", {m, k / group});
  check_shape(hidden, "hidden", {m, r});
  check_shape(weight_scales, "weight_scales", {n, k / group});
  check_shape(up, "up", {n, r});
  if (bias) check_shape(*bias, "bias", {n});
  kept[0] = codes.contiguous(), kept[1] = hidden.contiguous(), kept[2] = weight_codes.contiguous();
  Gemm args = {};
  args.kind = kind, args.m = m, args.n = n, args.k = k, args.r = r;
  args.codes = kept[0].const_data_ptr(), args.hidden = kept[1].const_data_ptr<float>();
  args.weight_codes = kept[2].const_data_ptr<uint8_t>();
  args.scales = carried ? read_by_group(scales) : matrix(scales, "scales", kept[3]);
  args.weight_scales = matrix(weight_scales, "weight_scales", kept[4]);
  args.up = matrix(up, "up", kept[5]);
  if (bias) args.bias = vector(*bias, "bias", kept[6]);
  return args;
}

// One number for all rows, or one a row.
Floats second_scale_of(const Tensor& second, int64_t n, Tensor& kept) {
  TORCH_CHECK_VALUE(second.numel() == 1 || second.numel() == n, "second_scale: expected 1 or ", n, " numbers, got ",
                    second.numel());
  Floats found = vector(second, "second_scale", kept);
  if (second.numel() == 1) found.stride = 0;
  return found;
}

void gemm_as(Codes kind, const Tensor& codes, const Tensor& scales, const Tensor& hidden, const Tensor& weight_codes,
             const Tensor& weight_scales, const std::optional<Tensor>& second_scale, const Tensor& up,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, const Tensor& out,
             const std::string& spelling) {
  check_packed(weight_codes);
  check_device(codes, {{"scales", &scales},
                       {"hidden", &hidden},
                       {"weight_codes", &weight_codes},
                       {"weight_scales", &weight_scales},
                       {"second_scale", if_any(second_scale, codes)},
                       {"up", &up},
                       {"bias", if_any(bias, codes)},
                       {"addend", if_any(addend, codes)},
                       {"out", &out}});
  const OnDevice here(codes);
  Tensor kept[7], also[2];
  Gemm args = product_of(kind, codes, scales, hidden, weight_codes, weight_scales, up, bias, kept);
  args.out = output(out, args.m, args.n);
  args.addend = addend_of(addend, args.m, args.n, also[0]);
  if (args.m == 0 || args.n == 0) return;
  if (second_scale) args.second_scale = second_scale_of(*second_scale, args.n, also[1]);
  Scratch scratch = {hidden.options(), {}};
  check_launch(gemm(args, launch(spelling, scratch)), spelling);
}

void gemm_int4(const Tensor& codes, const Tensor& scales, const Tensor& hidden, const Tensor& weight_codes,
               const Tensor& weight_scales, const Tensor& up, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& addend, const Tensor& out, std::string spelling) {
  const Codes integers = codes.scalar_type() == at::kByte ? Codes::kUint4 : Codes::kInt4;
  const Codes kind = carries_e4m3(spelling.c_str()) ? Codes::kE4M3 : integers;
  gemm_as(kind, codes, scales, hidden, weight_codes, weight_scales, {}, up, bias, addend, out, spelling);
}

void gemm_nvfp4(const Tensor& codes, const Tensor& scales, const Tensor& hidden, const Tensor& weight_codes,
                const Tensor& weight_scales, const Tensor& second_scale, const Tensor& up,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, const Tensor& out,
                std::string spelling) {
  gemm_as(Codes::kE2M1, codes, scales, hidden, weight_codes, weight_scales, second_scale, up, bias, addend, out,
          spelling);
}

#ifdef SVDQUANT_GPU
// A product, GELU and the next layer's quantizer, whose codes, scales and hidden values it returns.
std::tuple<Tensor, Tensor, Tensor> gemm_gelu_as(Codes kind, const Tensor& codes, const Tensor& scales,
                                                const Tensor& hidden, const Tensor& weight_codes,
                                                const Tensor& weight_scales, const std::optional<Tensor>& second_scale,
                                                const Tensor& up, const std::optional<Tensor>& bias,
                                                const Tensor& smooth, const Tensor& down, double shift,
                                                at::ScalarType dtype, const std::string& spelling) {
  check_packed(weight_codes);
  check_device(codes, {{"scales", &scales},
                       {"hidden", &hidden},
                       {"weight_codes", &weight_codes},
                       {"weight_scales", &weight_scales},
                       {"second_scale", if_any(second_scale, codes)},
                       {"up", &up},
                       {"bias", if_any(bias, codes)},
                       {"next_smooth", &smooth},
                       {"next_down", &down}});
  const OnDevice here(codes);
  const bool floats = kind == Codes::kE2M1;
  if (!floats) check_type(codes, "codes", at::kChar);
  Tensor kept[7], also[3];
  GemmGelu args = {};
  args.product = product_of(kind, codes, scales, hidden, weight_codes, weight_scales, up, bias, kept);
  const int64_t m = args.product.m, n = args.product.n, group = group_size(kind), r = down.size(0);
  TORCH_CHECK_VALUE(n % group == 0, "weight_codes: expected rows in groups of ", group, ", got ", n);
  check_shape(smooth, "next_smooth", {n});
  check_shape(down, "next_down", {r, n});
  Tensor next_codes = at::empty({m, n}, codes.options().dtype(floats || shift ? at::kByte : at::kChar));
  Tensor next_scales = at::empty({m, n / group}, codes.options().dtype(floats ? at::kFloat8_e4m3fn : dtype));
  Tensor next_hidden = at::empty({m, r}, hidden.options());
  if (m == 0 || n == 0) return {next_codes, next_scales, next_hidden};
  if (second_scale) args.product.second_scale = second_scale_of(*second_scale, n, also[2]);
  args.product.out.dtype = dtype_of(dtype, "dtype");
  args.next = {shift ? Codes::kUint4 : kind,
               m,
               n,
               r,
               {nullptr, args.product.out.dtype, 0},
               vector(smooth, "next_smooth", also[0]),
               matrix(down, "next_down", also[1]),
               static_cast<float>(shift),
               next_codes.mutable_data_ptr(),
               next_scales.mutable_data_ptr(),
               next_hidden.mutable_data_ptr<float>()};
  Scratch scratch = {hidden.options(), {}};
  check_launch(gemm_gelu(args, launch(spelling, scratch)), spelling);
  return {next_codes, next_scales, next_hidden};
}

std::tuple<Tensor, Tensor, Tensor> gemm_int4_gelu(const Tensor& codes, const Tensor& scales, const Tensor& hidden,
                                                  const Tensor& weight_codes, const Tensor& weight_scales,
                                                  const Tensor& up, const std::optional<Tensor>& bias,
                                                  const Tensor& smooth, const Tensor& down, double shift,
                                                  at::ScalarType dtype, std::string spelling) {
  return gemm_gelu_as(Codes::kInt4, codes, scales, hidden, weight_codes, weight_scales, {}, up, bias, smooth, down,
                      shift, dtype, spelling);
}

std::tuple<Tensor, Tensor, Tensor> gemm_nvfp4_gelu(const Tensor& codes, const Tensor& scales, const Tensor& hidden,
                                                   const Tensor& weight_codes, const Tensor& weight_scales,
                                                   const Tensor& second_scale, const Tensor& up,
                                                   const std::optional<Tensor>& bias, const Tensor& smooth,
                                                   const Tensor& down, at::ScalarType dtype, std::string spelling) {
  return gemm_gelu_as(Codes::kE2M1, codes, scales, hidden, weight_codes, weight_scales, second_scale, up, bias, smooth,
                      down, 0.0, dtype, spelling);
}
#endif

void gemm_int8_op(const Tensor& codes, const Tensor& scales, const Tensor& hidden, const Tensor& weight_codes,
                  const Tensor& weight_scales, const Tensor& up, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& addend, const Tensor& out, std::string spelling) {
  check_type(codes, "codes", at::kChar);
  check_type(weight_codes, "weight_codes", at::kChar);
  for (const auto& [name, t] : {std::pair{"scales", &scales}, {"hidden", &hidden}, {"weight_scales", &weight_scales}}) {
    check_type(*t, name, at::kFloat);
  }
  TORCH_CHECK_VALUE(weight_codes.dim() == 2, "weight_codes: expected [N, K], got ", weight_codes.sizes());
  check_device(codes, {{"scales", &scales},
                       {"hidden", &hidden},
                       {"weight_codes", &weight_codes},
                       {"weight_scales", &weight_scales},
                       {"up", &up},
                       {"bias", if_any(bias, codes)},
                       {"addend", if_any(addend, codes)},
                       {"out", &out}});
  const OnDevice here(codes);
  const int64_t m = codes.size(0), n = weight_codes.size(0), k = weight_codes.size(1), r = up.size(-1);
  check_columns(k);
  check_shape(codes, "codes", {m, k});
  check_shape(scales, "scales", {m, 1});
  check_shape(hidden, "hidden", {m, r});
  check_shape(weight_scales, "weight_scales", {n, 1});
  check_shape(up, "up", {n, r});
  if (bias) check_shape(*bias, "bias", {n});
  Tensor kept[3];
  const Output to = output(out, m, n);
  const Floats added = addend_of(addend, m, n, kept[2]);
  if (m == 0 || n == 0) return;
  const Tensor own[] = {codes.contiguous(), scales.contiguous(), hidden.contiguous(), weight_codes.contiguous(),
                        weight_scales.contiguous()};
  GemmInt8 args = {m,
                   n,
                   k,
                   r,
                   own[0].const_data_ptr<int8_t>(),
                   own[1].const_data_ptr<float>(),
                   own[2].const_data_ptr<float>(),
                   own[3].const_data_ptr<int8_t>(),
                   own[4].const_data_ptr<float>(),
                   matrix(up, "up", kept[0]),
                   {},
                   added,
                   to};
  if (bias) args.bias = vector(*bias, "bias", kept[1]);
  check_launch(gemm_int8(args, launch(spelling)), spelling);
}

void gemv_awq_op(const Tensor& x, const Tensor& weight_codes, const Tensor& weight_scales, const Tensor& zeros,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, const Tensor& out,
                 std::string spelling) {
  check_packed(weight_codes);
  TORCH_CHECK_VALUE(x.dim() == 2, "x: expected [M, K], got ", x.sizes());
  check_device(x, {{"weight_codes", &weight_codes},
                   {"weight_scales", &weight_scales},
                   {"zeros", &zeros},
                   {"bias", if_any(bias, x)},
                   {"addend", if_any(addend, x)},
                   {"out", &out}});
  const OnDevice here(x);
  const int64_t m = x.size(0), n = weight_codes.size(0), k = weight_codes.size(1) * 2;
  const int64_t groups = weight_scales.size(-1), group = groups ? k / groups : 0;
  TORCH_CHECK_VALUE(group && group % 64 == 0 && groups * group == k, "weight_scales: expected one for every 64 (or a ",
                    "multiple of 64) of ", k, " columns, got ", groups, " a row");
  check_shape(x, "x", {m, k});
  check_shape(weight_scales, "weight_scales", {n, groups});
  check_shape(zeros, "zeros", {n, groups});
  if (bias) check_shape(*bias, "bias", {n});
  Tensor kept[5];
  const Output to = output(out, m, n);
  const Floats added = addend_of(addend, m, n, kept[4]);
  if (m == 0 || n == 0) return;
  const Tensor own_weight = weight_codes.contiguous();
  Gemv args = {m,
               n,
               k,
               group,
               matrix(x, "x", kept[0]),
               own_weight.const_data_ptr<uint8_t>(),
               matrix(weight_scales, "weight_scales", kept[1]),
               matrix(zeros, "zeros", kept[2]),
               {},
               added,
               to};
  if (bias) args.bias = vector(*bias, "bias", kept[3]);
  check_launch(gemv_awq(args, launch(spelling)), spelling);
}

std::string spellings_op(const Tensor& device) {
  const OnDevice here(device);
  return spellings();
}

}  // namespace

TORCH_LIBRARY_IMPL(svdquant, SVDQUANT_DEVICE, m) {
  m.impl("spellings", spellings_op);
  m.impl("quantize_int4", quantize_int4);
  m.impl("quantize_int4_unsigned", quantize_int4_unsigned);
  m.impl("quantize_nvfp4", quantize_nvfp4);
  m.impl("quantize_int8", quantize_int8);
  m.impl("gemm_int4", gemm_int4);
  m.impl("gemm_nvfp4", gemm_nvfp4);
  m.impl("gemm_int8", gemm_int8_op);
  m.impl("gemv_awq", gemv_awq_op);
#ifdef SVDQUANT_GPU
  m.impl("gemm_int4_gelu", gemm_int4_gelu);
  m.impl("gemm_nvfp4_gelu", gemm_nvfp4_gelu);
#endif
}

}  // namespace svdquant
