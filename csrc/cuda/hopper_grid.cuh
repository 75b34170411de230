// How a product is divided on Hopper: the size of its tiles, whether blocks work alone or in clusters, and the order in
// which tiles are taken. Pure functions of sizes.
#pragma once

#include "hopper_tile.cuh"

namespace svdquant::cuda {

// ---- which tile ----

struct TileShape {
  int columns;               // of a tile, which has kTileRows rows
  int down = 1, across = 1;  // tiles of a cluster
  constexpr int blocks() const { return down * across; }
};

// Of the second-level cache, a clock and SM: H100's delivers some 5.5 to 7 TB/s.
constexpr int kCacheBytes = 28;

// What one step of all tiles takes, in clocks. Products of 128 rows by a column take 4 for 128 bytes of K, and a tile
// some 32 columns' time for its beginning and its end. A cluster reads each of its tokens and weights once. The greater
// of the two counts, and a quarter of the lesser, as one never hides the other altogether.
constexpr int64_t step_clocks(int64_t m, int64_t n, int64_t sms, const TileShape& s) {
  const int64_t rows = ceil_div(m, kTileRows * s.down), columns = ceil_div(n, s.columns * s.across);
  const int64_t at_once = sms < s.blocks() ? 1 : sms / s.blocks();
  const int64_t products = ceil_div(rows * columns, at_once) * (s.columns + 32) * 4;
  const int64_t reads = (m * columns + n * rows) * kStepBytes / (kCacheBytes * sms);
  return products > reads ? products + reads / 4 : reads + products / 4;
}

// The quickest; of equals the first.
template <int kCount>
constexpr TileShape choose_tile(int64_t m, int64_t n, int64_t sms, const TileShape (&shapes)[kCount]) {
  TileShape best = shapes[0];
  for (const TileShape& s : shapes) {
    if (step_clocks(m, n, sms, s) < step_clocks(m, n, sms, best)) best = s;
  }
  return best;
}

// W8A8: 256, 192, 128 or 96 columns, for a block alone or for two above each other.
constexpr TileShape kW8A8Shapes[] = {{256, 2}, {192, 2}, {128, 2}, {96, 2}, {256}, {192}, {128}, {96}};
constexpr TileShape kW8A8Alone[] = {{256}, {192}, {128}, {96}};

constexpr TileShape choose_w8a8_tile(int64_t m, int64_t n, int64_t sms, bool in_clusters) {
  return in_clusters ? choose_tile(m, n, sms, kW8A8Shapes) : choose_tile(m, n, sms, kW8A8Alone);
}

// Exact W4A4: 128 columns, for a block alone or for four in a square.
constexpr TileShape kW4A4Shapes[] = {{128, 2, 2}, {128}};
constexpr TileShape kW4A4Alone[] = {{128}};

constexpr TileShape choose_w4a4_tile(int64_t m, int64_t n, int64_t sms, bool in_clusters) {
  return in_clusters ? choose_tile(m, n, sms, kW4A4Shapes) : choose_tile(m, n, sms, kW4A4Alone);
}

// ---- in which order ----

struct TileGrid {
  int rows, columns;  // of tiles, or of clusters' tiles
  int workers;        // blocks or clusters that share them
  int band;           // rows that are taken together
  __host__ __device__ constexpr int tiles() const { return rows * columns; }
};

struct TileAt {
  int row, column;  // counted in tiles
};

// About sixteen tiles down before one to the right: the tiles that some 130 SMs hold at a time are then about as high
// as wide, and share most of what they read in the second-level cache.
constexpr int kTilesDown = 16;

constexpr TileGrid divide(int64_t m, int64_t n, const TileShape& s, int64_t at_once) {
  const int64_t rows = ceil_div(m, kTileRows * s.down), columns = ceil_div(n, s.columns * s.across);
  const int64_t bands = ceil_div(rows, kTilesDown / s.down);
  return {static_cast<int>(rows), static_cast<int>(columns),
          static_cast<int>(rows * columns < at_once ? rows * columns : at_once),
          static_cast<int>(ceil_div(rows, bands))};
}

__host__ __device__ constexpr TileAt tile_at(const TileGrid& grid, int tile) {
  const int first = tile / (grid.band * grid.columns) * grid.band;
  const int down = grid.rows - first < grid.band ? grid.rows - first : grid.band;
  const int within = tile - first * grid.columns;
  return {first + within % down, within / down};
}

// The tiles of a block, one after the other.
template <class T>
struct Walk {
  using C = typename T::Cluster;
  const TileGrid& grid;
  int tile = blockIdx.x / C::kBlocks;

  __device__ __forceinline__ explicit Walk(const TileGrid& of) : grid(of) {}
  __device__ __forceinline__ bool goes_on() const { return tile < grid.tiles(); }
  __device__ __forceinline__ void advance() { tile += grid.workers; }
  __device__ __forceinline__ TileAt at() const {
    const TileAt first = tile_at(grid, tile);
    const C cluster;
    return {first.row * C::kDown + cluster.row(), first.column * C::kAcross + cluster.column()};
  }
};

}  // namespace svdquant::cuda
