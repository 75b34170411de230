// Starting a kernel: grid, threads, shared memory, stream; nullptr, or CUDA's own sentence about what went wrong.
#pragma once

#include "sizes.cuh"

namespace svdquant::cuda {

struct Grid {
  int64_t x, y = 1;
  int threads;
  int shared_bytes;
};

#ifdef __CUDACC__
// 75, 80, 86, 89, 90, 100, 120: of the current device.
inline int device_arch() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

template <class Params>
const char* run(void (*kernel)(Params), const Grid& grid, const Launch& launch, const Params& params) {
  if (grid.shared_bytes > 48 * 1024) {  // more than every card grants unasked
    const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (e != cudaSuccess) return cudaGetErrorString(e);
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  kernel<<<blocks, grid.threads, grid.shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(params);
  const cudaError_t e = cudaGetLastError();
  return e == cudaSuccess ? nullptr : cudaGetErrorString(e);
}
#else
inline int device_arch() { return SVDQUANT_ARCH; }

template <class Params>
const char* run(void (*kernel)(Params), const Grid& grid, const Launch&, const Params& params) {
  return emulator::run(kernel, params, {grid.x, grid.y, grid.threads, grid.shared_bytes});
}
#endif

}  // namespace svdquant::cuda
