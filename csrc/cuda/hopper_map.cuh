// Telling the copy engine about a matrix: from the host, once a launch.
#pragma once

#include "hopper_ptx.cuh"

#ifdef __CUDACC__
#include <cudaTypedefs.h>
#endif

namespace svdquant::cuda {

// A matrix as the copy engine reads it: boxes of box_rows x box_columns elements, zeros outside the matrix.
struct MatrixMap {
  const void* data;
  int64_t rows, columns, row_bytes;
  int box_rows, box_columns;
  int element_bytes;  // 1, whose boxes of 128 columns are swizzled, or 4
};

#ifdef __CUDACC__
// The driver's function that encodes a map, found at run time: nothing links to the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Makes the current device's context the thread's own, as launches do but the driver's functions do not: a thread whose
// first work on a GPU this is has none.
inline void bind_context() {
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaSetDevice(device);
}

inline const char* encode_map(const MatrixMap& m, TensorMap& to) {
  static const auto encode = tensor_map_encoder();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled; version 525 or later is needed";
  bind_context();
  const bool bytes = m.element_bytes == 1;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.row_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(m.box_columns), static_cast<cuuint32_t>(m.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result =
      encode(&to, bytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2,
             const_cast<void*>(m.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             bytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}
#else
inline const char* encode_map(const MatrixMap& m, TensorMap& to) {
  to = {static_cast<const unsigned char*>(m.data), m.rows, m.columns, m.row_bytes, m.box_rows, m.box_columns,
        m.element_bytes, m.element_bytes == 1};
  return to.problem();
}

inline int multiprocessors() { return emulator::Block::current().multiprocessors; }
#endif

}  // namespace svdquant::cuda
