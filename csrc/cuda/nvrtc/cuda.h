// What the kernels use of <cuda.h>, for NVRTC, which has no toolkit beside it.
#pragma once

struct alignas(128) CUtensorMap {
  unsigned long long opaque[16];
};
