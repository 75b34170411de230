// What ops.cpp uses of torch's header, where tensors of the CPU stand for those of a GPU.
#pragma once

namespace c10 {
struct Device;
namespace cuda {

struct CUDAGuard {
  explicit CUDAGuard(const Device&) {}
};

}  // namespace cuda
}  // namespace c10
