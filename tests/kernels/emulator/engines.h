// What works beside the threads on sm_90a, and the barriers in shared memory that tell of it.
#pragma once

#include "products.h"

namespace emulator {

struct Engines {
  Barriers barriers;
  Copies copies;
  Products products;

  explicit Engines(Shared& memory) : barriers(memory), copies(memory, barriers), products(memory) {}

  void reset(int blocks, int threads) {
    barriers.reset(blocks);
    copies.reset();
    products.reset(threads);
  }
};

}  // namespace emulator
