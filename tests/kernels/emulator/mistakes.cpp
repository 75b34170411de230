// What the emulator is tested with: single instructions of a warp, and kernels that each make one mistake.
#include "mma.cuh"

using namespace svdquant::cuda;
using emulator::Block;

namespace {

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

int thread() { return static_cast<int>(threadIdx.x); }

// Each is run by two warps with 4096 bytes of shared memory; `global` holds 64 floats.
struct Mistake {
  const char* name;
  void (*kernel)(float* global);
};

const Mistake kMistakes[] = {
    {"none",
     [](float* global) {
       cp_async<16>(shared_memory() + 16 * thread(), global, true);
       cp_async_commit();
       cp_async_wait<0>();
       barrier();
       st_global(global + thread(), ld_shared(shared_floats() + (thread() ^ 32) * 4));
     }},
    {"no-barrier-before-write",
     [](float*) {
       st_shared(shared_floats() + thread(), 1.0f);
       barrier();
       if (thread() < 32) ld_shared(shared_floats() + thread());
       if (thread() >= 32) st_shared(shared_floats() + thread() - 32, 2.0f);
     }},
    {"no-barrier-before-read",
     [](float*) {
       st_shared(shared_floats() + thread(), 1.0f);
       shuffle_xor(1.0f, 1);
       ld_shared(shared_floats() + (thread() ^ 1));
     }},
    {"refill-too-early",
     [](float* global) {
       cp_async<16>(shared_memory() + 16 * thread(), global, true);
       cp_async_commit();
       cp_async_wait<0>();
       barrier();
       st_global(global + thread(), ld_shared(shared_floats() + (thread() ^ 32) * 4));
       cp_async<16>(shared_memory() + 16 * thread(), global, true);
     }},
    {"no-wait",
     [](float* global) {
       cp_async<16>(shared_memory() + 16 * thread(), global, true);
       cp_async_commit();
       barrier();
       st_global(global + thread(), ld_shared(shared_floats() + thread() * 4));
     }},
    {"no-barrier-after-wait",
     [](float* global) {
       cp_async<16>(shared_memory() + 16 * thread(), global, true);
       cp_async_commit();
       barrier();
       cp_async_wait<0>();
       st_global(global + thread(), ld_shared(shared_floats() + (thread() ^ 32) * 4));
     }},
    {"written-twice", [](float*) { st_shared(shared_floats() + thread() / 2, 1.0f); }},
    {"never-written", [](float* global) { st_global(global + thread(), ld_shared(shared_floats() + thread())); }},
    {"divergent-barrier",
     [](float*) {
       if (thread() < 40) barrier();
     }},
    {"half-a-warp",
     [](float*) {
       if (thread() % 32 < 16) shuffle_xor(1.0f, 1);
     }},
    {"two-instructions",
     [](float*) {
       if (thread() % 32 < 16) {
         shuffle_xor(1.0f, 1);
       } else {
         shuffle_xor(1u, 1);
       }
     }},
    {"load-behind-the-end", [](float* global) { ld_global(global + thread() + 1); }},
    {"store-to-an-input", [](float* global) { st_global(global - 16 + thread() % 16, 1.0f); }},
    {"unaligned-vector", [](float* global) { ld_global(reinterpret_cast<const uint4*>(global + 1)); }},
    {"beyond-shared-memory", [](float*) { st_shared(shared_floats() + 1000 + 2 * thread(), 1.0f); }},
    {"unaligned-shared", [](float*) { st_shared(reinterpret_cast<uint2*>(shared_floats() + 1), uint2{0, 0}); }},
};

// Lane i reads `bytes` from word i * stride on, of shared memory or of global.
template <bool kShared>
void touch_apart(const unsigned* from, int bytes, int stride) {
  const unsigned* at = from + thread() * stride;
  if (bytes == 4) kShared ? ld_shared(at) : ld_global(at);
  if (bytes == 8) kShared ? ld_shared(reinterpret_cast<const uint2*>(at)) : ld_global(reinterpret_cast<const uint2*>(at));
  if (bytes == 16) kShared ? ld_shared(reinterpret_cast<const uint4*>(at)) : ld_global(reinterpret_cast<const uint4*>(at));
}

// One instruction of a warp: registers of 32 lanes, side by side.
template <int kA, int kB, int kC, class C, class F>
const char* run_lanes(const unsigned* a, const unsigned* b, void* c, const F& instruction) {
  return emulator::run(
      [&] {
        unsigned mine[kA], right[kB];
        C sums[kC];
        for (int i = 0; i < kA; ++i) mine[i] = a[thread() * kA + i];
        for (int i = 0; i < kB; ++i) right[i] = b[thread() * kB + i];
        C* to = static_cast<C*>(c) + thread() * kC;
        for (int i = 0; i < kC; ++i) sums[i] = to[i];
        instruction(sums, mine, right);
        for (int i = 0; i < kC; ++i) to[i] = sums[i];
      },
      1, 1, 32, 0);
}

template <class C>
using Instruction = void (*)(C (&)[4], const unsigned (&)[4], const unsigned (&)[2]);
using SmallInstruction = void (*)(int&, int&, unsigned, unsigned);

}  // namespace

extern "C" {

const char* make_mistake(const char* name, float* global) {
  for (const Mistake& m : kMistakes) {
    if (!std::strcmp(m.name, name)) return emulator::run([&] { m.kernel(global); }, 1, 1, 64, 4096);
  }
  return "no such mistake";
}

const char* read_apart(const unsigned*, int bytes, int stride) {
  constexpr int kWords = 32 * 40;
  return emulator::run(
      [&] {
        unsigned* words = reinterpret_cast<unsigned*>(shared_memory());
        for (int i = thread(); i < kWords; i += 32) st_shared(words + i, 0u);
        barrier();
        touch_apart<true>(words, bytes, stride);
      },
      1, 1, 32, kWords * 4);
}

const char* load_apart(const unsigned* from, int bytes, int stride) {
  return emulator::run([&] { touch_apart<false>(from, bytes, stride); }, 1, 1, 32, 0);
}

const char* run_instruction(const char* name, const unsigned* a, const unsigned* b, void* c) {
  const struct {
    const char* name;
    Instruction<int> run;
  } integer[] = {{"m16n8k32_s8", mma_m16n8k32_s8}, {"m16n8k64_s4", mma_m16n8k64_s4}, {"m16n8k64_u4", mma_m16n8k64_u4}};
  const struct {
    const char* name;
    Instruction<float> run;
  } floating[] = {{"m16n8k16_f16", mma_m16n8k16_f16}, {"m16n8k16_bf16", mma_m16n8k16_bf16}};
  const struct {
    const char* name;
    SmallInstruction run;
  } small[] = {{"m8n8k16_s8", mma_m8n8k16_s8}, {"m8n8k32_s4", mma_m8n8k32_s4}, {"m8n8k32_u4", mma_m8n8k32_u4}};
  for (const auto& i : integer) {
    if (!std::strcmp(i.name, name)) return run_lanes<4, 2, 4, int>(a, b, c, i.run);
  }
  for (const auto& i : floating) {
    if (!std::strcmp(i.name, name)) return run_lanes<4, 2, 4, float>(a, b, c, i.run);
  }
  for (const auto& i : small) {
    const auto run = [&](int(&s)[2], const unsigned(&x)[1], const unsigned(&y)[1]) { i.run(s[0], s[1], x[0], y[0]); };
    if (!std::strcmp(i.name, name)) return run_lanes<1, 1, 2, int>(a, b, c, run);
  }
  if (!std::strcmp("m16n8k8_f16", name)) {
    return run_lanes<2, 1, 4, float>(a, b, c, [](float(&s)[4], const unsigned(&x)[2], const unsigned(&y)[1]) {
      mma_m16n8k8_f16(s, x[0], x[1], y[0]);
    });
  }
  return "no such instruction";
}

// The product with block scales: `scales` holds A's and B's register of each lane.
const char* run_scaled(const unsigned* a, const unsigned* b, const unsigned* scales, float* c) {
  return run_lanes<4, 2, 4, float>(a, b, c, [&](float(&s)[4], const unsigned(&x)[4], const unsigned(&y)[2]) {
    mma_m16n8k64_mxf4(s, x, y, scales[2 * thread()], scales[2 * thread() + 1]);
  });
}

const char* round_16(const float* from, unsigned short* bf16, unsigned short* f16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bf16[i] = to_bf16(from[i]), f16[i] = to_f16(from[i]);
  return nullptr;
}

const char* widen_f16(const unsigned short* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_f16(from[i]);
  return nullptr;
}
}
