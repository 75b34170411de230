// Scratch memory for a call, as a GPU's allocator gives it: it begins at 256 bytes, with whatever was there before.
#pragma once

#include <algorithm>
#include <vector>

#include "block.h"
#include "cuda_launch.h"

namespace emulator {

struct Scratch {
  struct alignas(256) Piece {
    unsigned words[64];
    Piece() { std::fill(std::begin(words), std::end(words), ~0u); }
  };
  std::vector<std::vector<Piece>> kept;

  svdquant::Launch launch(const char* spelling) {
    svdquant::Launch l;
    l.spelling = spelling, l.allocate = allocate, l.owner = this;
    return l;
  }

  static void* allocate(void* owner, int64_t bytes) {
    auto& kept = static_cast<Scratch*>(owner)->kept;
    kept.emplace_back((bytes + sizeof(Piece) - 1) / sizeof(Piece));
    const uintptr_t at = reinterpret_cast<uintptr_t>(kept.back().data());
    Block::current().ranges.push_back({at, at + static_cast<uintptr_t>(bytes), true});
    return kept.back().data();
  }
};

}  // namespace emulator
