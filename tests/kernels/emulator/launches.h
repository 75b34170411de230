// Launches: asked for by the host code of a .cu file and recorded instead of run, where a test wants that; or asked for
// by a kernel's name, as csrc's kernels are started where no C++ leads to them.
#pragma once

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "block.h"

namespace emulator {

struct Grid {
  int64_t x, y;
  int threads, shared_bytes, cluster;
};

struct Launched {
  const void* kernel;
  Grid grid;
  std::vector<unsigned char> params;
};

struct Allocated {
  const void* at;
  int64_t bytes;
};

struct Named {
  std::string name;
  const void* kernel;
  std::function<const char*(const void* params, const Grid& grid)> run;
};

struct Launches {
  bool recording = false;
  std::vector<Launched> recorded;
  std::vector<Allocated> allocated;  // scratch memory for them
  std::vector<Named> named;

  static Launches& current() {
    static Launches launches;
    return launches;
  }

  const char* name_of(const void* kernel) const {
    for (const Named& n : named) {
      if (n.kernel == kernel) return n.name.c_str();
    }
    return "a kernel without a name";
  }
};

inline void allocated(const void* at, int64_t bytes) {
  Launches& all = Launches::current();
  if (all.recording) all.allocated.push_back({at, bytes});
}

template <class Params>
const char* run(void (*kernel)(Params), const Params& params, const Grid& grid) {
  Launches& all = Launches::current();
  if (all.recording) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(&params);
    all.recorded.push_back({reinterpret_cast<const void*>(kernel), grid, {bytes, bytes + sizeof(Params)}});
    return nullptr;
  }
  return Block::current().run([&] { kernel(params); }, grid.x, grid.y, grid.threads, grid.shared_bytes,
                              grid.cluster);
}

// Called while the library is loaded.
template <class Params>
bool know(const char* name, void (*kernel)(Params)) {
  Launches::current().named.push_back({name, reinterpret_cast<const void*>(kernel), [=](const void* params, const Grid& grid) {
                                         Params copy;  // which may have to lie at a multiple of more bytes
                                         std::memcpy(static_cast<void*>(&copy), params, sizeof copy);
                                         return run(kernel, copy, grid);
                                       }});
  return true;
}

}  // namespace emulator
