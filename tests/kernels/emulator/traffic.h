// What a card's memory pipes would count, where a test asks for it. A warp's accesses are one request each; lanes run
// one after the other here, so requests are put together again: the n-th time since they last waited for each other that
// two lanes come by the same line is the same request. Lanes that come by more often than others are reported ("uneven"),
// as they might have been matched wrongly.
//
// Shared memory has 32 banks of 4 bytes. A request of up to 4 bytes a lane is served at once, one of 8 in two halves of a
// warp, one of 16 in four quarters; each takes as many wavefronts as there are different words in its fullest bank.
// Global memory is moved in sectors of 32 bytes: least is what the different bytes asked for would fill.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "shadow.h"

namespace emulator {

// Where in the kernel's source an access stands: a default argument of what the kernel calls.
struct Site {
  const char *function, *file;
  int line;

  static constexpr Site here(const char* function = __builtin_FUNCTION(), const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
    return {function, file, line};
  }
};

constexpr int kInShared = -1;  // instead of a tensor's number

struct Tally {
  int64_t requests = 0, lanes = 0, moved = 0, least = 0;
  bool uneven = false;
};

class Traffic {
 public:
  bool counting = false;

  void reset() {
    warps_.clear();
    tallies_.clear();
  }

  // `at` is an offset in shared memory or an address; `tensor` its number, or kInShared.
  void note(int thread, const char* kind, const Site& site, int tensor, uintptr_t at, size_t bytes) {
    const size_t warp = thread / kWarp;
    if (warps_.size() <= warp) warps_.resize(warp + 1);
    Line& line = warps_[warp][{site.function, site.line, kind, tensor, bytes}];
    const int lane = thread % kWarp, turn = line.turns[lane]++;
    if (turn == static_cast<int>(line.requests.size())) line.requests.emplace_back();
    line.requests[turn].push_back({lane, at});
  }

  // The lanes of a warp have met: no request goes on behind this.
  void close(int warp) {
    if (warp >= static_cast<int>(warps_.size())) return;
    for (auto& [key, line] : warps_[warp]) {
      Tally& tally = tallies_[key];
      const bool shared = std::get<3>(key) == kInShared;
      for (const Request& request : line.requests) {
        ++tally.requests;
        tally.lanes += static_cast<int64_t>(request.size());
        (shared ? count_banks : count_sectors)(request, std::get<4>(key), tally);
      }
      for (int turns : line.turns) tally.uneven |= turns && turns != static_cast<int>(line.requests.size());
    }
    warps_[warp].clear();
  }

  void close_all() {
    for (size_t warp = 0; warp < warps_.size(); ++warp) close(static_cast<int>(warp));
  }

  // "function line kind tensor bytes requests lanes moved least uneven", a line each.
  std::string report() const {
    std::string text;
    for (const auto& [key, t] : tallies_) {
      const auto& [function, line, kind, tensor, bytes] = key;
      text += function + ' ' + std::to_string(line) + ' ' + kind;
      for (int64_t n : {static_cast<int64_t>(tensor), static_cast<int64_t>(bytes), t.requests, t.lanes, t.moved,
                        t.least, static_cast<int64_t>(t.uneven)}) {
        text += ' ' + std::to_string(n);
      }
      text += '\n';
    }
    return text;
  }

 private:
  struct Part {
    int lane;
    uintptr_t at;
  };
  using Request = std::vector<Part>;
  struct Line {
    int turns[kWarp] = {};
    std::vector<Request> requests;
  };
  using Key = std::tuple<std::string, int, std::string, int, size_t>;

  static void count_banks(const Request& request, size_t bytes, Tally& tally) {
    const int lanes = bytes <= 4 ? kWarp : bytes == 8 ? kWarp / 2 : kWarp / 4;  // that are served together
    for (int first = 0; first < kWarp; first += lanes) {
      std::set<uintptr_t> words;
      for (const Part& part : request) {
        if (part.lane < first || part.lane >= first + lanes) continue;
        for (uintptr_t word = part.at / 4; word <= (part.at + bytes - 1) / 4; ++word) words.insert(word);
      }
      int in_bank[32] = {};
      for (uintptr_t word : words) ++in_bank[word % 32];
      tally.moved += *std::max_element(in_bank, in_bank + 32);
      tally.least += !words.empty();
    }
  }

  static void count_sectors(const Request& request, size_t bytes, Tally& tally) {
    std::map<uintptr_t, uint32_t> sectors;  // and which of their bytes
    for (const Part& part : request) {
      for (uintptr_t at = part.at; at < part.at + bytes; ++at) sectors[at / 32] |= 1u << at % 32;
    }
    int64_t wanted = 0;
    for (const auto& sector : sectors) wanted += __builtin_popcount(sector.second);
    tally.moved += static_cast<int64_t>(sectors.size());
    tally.least += (wanted + 31) / 32;
  }

  std::vector<std::map<Key, Line>> warps_;
  std::map<Key, Tally> tallies_;
};

}  // namespace emulator
