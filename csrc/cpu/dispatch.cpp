// Which spellings this processor can run.
#include <cstring>
#include <string>

#include "spelling.h"
#include "target.h"

#if defined(SVDQUANT_X86) && defined(_MSC_VER)
#include <intrin.h>
#elif defined(SVDQUANT_X86)
#include <cpuid.h>
#elif defined(SVDQUANT_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(SVDQUANT_ARM64) && defined(_WIN32)
#include <windows.h>
#endif

namespace svdquant {
namespace cpu {

#ifdef SVDQUANT_X86

namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf) {
  Registers r;
#ifdef _MSC_VER
  __cpuidex(reinterpret_cast<int*>(&r), static_cast<int>(leaf), 0);
#else
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// Register files that the operating system saves: bit 1 SSE, bit 2 AVX, bits 5 to 7 AVX-512.
bool saves(uint32_t files) {
  if (!(cpuid(1).c >> 27 & 1)) return false;
#ifdef _MSC_VER
  const uint32_t enabled = static_cast<uint32_t>(_xgetbv(0));
#else
  uint32_t enabled, high;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
#endif
  return (enabled & files) == files;
}

bool has(uint32_t word, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if (!(word >> bit & 1)) return false;
  }
  return true;
}

}  // namespace

// Kept: a virtual machine answers cpuid in tens of microseconds.
bool has_avx2() {
  static const bool answer = saves(0x06) && has(cpuid(1).c, {12, 29}) && has(cpuid(7).b, {5});
  return answer;
}

bool has_avx512() {
  static const bool answer = has_avx2() && saves(0xe6) && has(cpuid(7).b, {16, 30}) && has(cpuid(7).c, {11});
  return answer;
}

bool has_dotprod() { return false; }

#else

bool has_avx2() { return false; }
bool has_avx512() { return false; }

bool has_dotprod() {
#if defined(SVDQUANT_ARM64) && defined(__APPLE__)
  return true;  // every Apple Silicon
#elif defined(SVDQUANT_ARM64) && defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;
#elif defined(SVDQUANT_ARM64) && defined(_WIN32)
  return IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE);
#else
  return false;
#endif
}

#endif

namespace {

const Spelling* const* candidates() {
  static const Spelling* const list[] = {avx512(), avx2(), neon(), portable()};
  return list;
}

constexpr int kCandidates = 4;

}  // namespace

const Spelling* find(const char* name) {
  for (int i = 0; i < kCandidates; ++i) {
    const Spelling* s = candidates()[i];
    if (s && !std::strcmp(s->name, name) && s->supported()) return s;
  }
  return nullptr;
}

}  // namespace cpu

const char* spellings() {
  static const std::string names = [] {
    std::string text;
    for (int i = 0; i < cpu::kCandidates; ++i) {
      const cpu::Spelling* s = cpu::candidates()[i];
      if (s && s->supported()) text += (text.empty() ? "" : " ") + std::string(s->name);
    }
    return text;
  }();
  return names.c_str();
}

bool carries_e4m3(const char*) { return false; }

}  // namespace svdquant
