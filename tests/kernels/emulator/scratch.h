// Scratch memory for a call, as a GPU's allocator gives it: with whatever was there before.
#pragma once

#include <vector>

#include "block.h"
#include "cuda_launch.h"

namespace emulator {

struct Scratch {
  struct alignas(16) Piece {
    unsigned words[4] = {~0u, ~0u, ~0u, ~0u};
  };
  std::vector<std::vector<Piece>> kept;

  svdquant::Launch launch(const char* spelling) {
    svdquant::Launch l;
    l.spelling = spelling, l.allocate = allocate, l.owner = this;
    return l;
  }

  static void* allocate(void* owner, int64_t bytes) {
    auto& kept = static_cast<Scratch*>(owner)->kept;
    kept.emplace_back((bytes + 15) / 16);
    const uintptr_t at = reinterpret_cast<uintptr_t>(kept.back().data());
    Block::current().ranges.push_back({at, at + static_cast<uintptr_t>(bytes), true});
    return kept.back().data();
  }
};

}  // namespace emulator
