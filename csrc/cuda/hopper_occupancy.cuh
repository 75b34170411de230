// How many clusters of a kernel a card runs at one time: not all SMs have enough others beside them. For the host.
#pragma once

#include "run.cuh"

#ifdef __CUDACC__
#include <map>
#include <mutex>
#include <utility>
#endif

namespace svdquant::cuda {

// What is wrong, the launch will say; until then an estimate does.
inline int64_t estimated_clusters(const Grid& grid, int sms) { return ceil_div(sms, grid.cluster); }

#ifdef __CUDACC__
template <class Params>
int64_t ask_for_clusters(void (*kernel)(Params), const Grid& grid, int sms) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.cluster);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  int found = 0;
  const bool granted = !grant_memory(reinterpret_cast<const void*>(kernel), grid);
  const bool known = granted && !words(cudaOccupancyMaxActiveClusters(&found, kernel, &config));
  return known && found ? found : estimated_clusters(grid, sms);
}

// Of the current card, which is asked once for each kernel.
template <class Params>
int64_t clusters_at_once(void (*kernel)(Params), const Grid& grid, int sms) {
  if (grid.cluster == 1) return sms;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> answers;
  int card = 0;
  cudaGetDevice(&card);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [answer, is_new] = answers.try_emplace({reinterpret_cast<const void*>(kernel), card});
  if (is_new) answer->second = ask_for_clusters(kernel, grid, sms);
  return answer->second;
}
#else
template <class Params>
int64_t clusters_at_once(void (*)(Params), const Grid& grid, int sms) {
  return estimated_clusters(grid, sms);
}
#endif

}  // namespace svdquant::cuda
