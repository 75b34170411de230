// Starting a kernel: grid, threads, shared memory, stream; nullptr, or CUDA's own sentence about what went wrong.
#pragma once

#include "sizes.cuh"

namespace svdquant::cuda {

struct Grid {
  int64_t x, y = 1;
  int threads;
  int shared_bytes;
  int cluster = 1;  // blocks; the kernel's own __cluster_dims__
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

// CUDA's sentence about an error, nullptr if there is none. CUDA forgets it, or torch would blame its own next kernel.
inline const char* words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

inline const char* grant_memory(const void* kernel, const Grid& grid) {
  if (grid.shared_bytes <= 48 * 1024) return nullptr;  // which every card grants unasked
  return words(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes));
}

template <class Params>
const char* run(void (*kernel)(Params), const Grid& grid, const Launch& launch, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const char* problem = grant_memory(function, grid)) return problem;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  void* arguments[] = {const_cast<Params*>(&params)};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return words(cudaLaunchKernel(function, blocks, dim3(grid.threads), arguments, grid.shared_bytes, stream));
}
#else
inline int device_arch() { return SVDQUANT_ARCH; }

template <class Params>
const char* run(void (*kernel)(Params), const Grid& grid, const Launch&, const Params& params) {
  return emulator::run(kernel, params, {grid.x, grid.y, grid.threads, grid.shared_bytes, grid.cluster});
}
#endif

// Memory of the device that lives as long as the call, nullptr if there is none.
inline void* scratch(const Launch& launch, int64_t bytes) {
  void* memory = launch.allocate ? launch.allocate(launch.owner, bytes) : nullptr;
#ifndef __CUDACC__
  emulator::allocated(memory, bytes);
#endif
  return memory;
}

}  // namespace svdquant::cuda
