// Matmuls of any number of rows. Each entry is summed over the depth in order by fused multiply-adds, so a row's result
// is bitwise independent of the other rows.

#pragma once

#include "rows.h"

namespace jaxmoe {

constexpr int64_t kFewRows = 16;    // up to this many, the matrix is streamed; for more, panels of it are packed
constexpr int64_t kRowBlock = 192;  // rows that share a packed panel and fit a core's L2 cache
constexpr int64_t kPanelDepth = 256;
#ifdef __AVX512F__
constexpr int64_t kTileRows = 12;
#else
constexpr int64_t kTileRows = 6;
#endif
constexpr int64_t kPanelColumns = 2 * kLanes;

// out[r, 0:kPanelColumns] += x[0:depth, r] * panel[0:depth, 0:kPanelColumns] for R rows; x is packed, kTileRows per k.
template <int R>
void AddTile(const float* __restrict__ x, const float* __restrict__ panel, int64_t depth, float* __restrict__ out,
             int64_t out_stride) {
  Floats sums[R][2];
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < 2; ++s) sums[r][s] = Load(out + r * out_stride + s * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    const Floats low = Load(panel + k * kPanelColumns), high = Load(panel + k * kPanelColumns + kLanes);
    for (int r = 0; r < R; ++r) {
      const float value = x[k * kTileRows + r];
      sums[r][0] = MultiplyAdd(value, low, sums[r][0]);
      sums[r][1] = MultiplyAdd(value, high, sums[r][1]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < 2; ++s) Store(sums[r][s], out + r * out_stride + s * kLanes);
}

inline void AddTileOf(int64_t rows, const float* x, const float* panel, int64_t depth, float* out, int64_t out_stride) {
  switch (rows) {
    case 1: return AddTile<1>(x, panel, depth, out, out_stride);
    case 2: return AddTile<2>(x, panel, depth, out, out_stride);
    case 3: return AddTile<3>(x, panel, depth, out, out_stride);
    case 4: return AddTile<4>(x, panel, depth, out, out_stride);
    case 5: return AddTile<5>(x, panel, depth, out, out_stride);
    case 6: return AddTile<6>(x, panel, depth, out, out_stride);
#ifdef __AVX512F__
    case 7: return AddTile<7>(x, panel, depth, out, out_stride);
    case 8: return AddTile<8>(x, panel, depth, out, out_stride);
    case 9: return AddTile<9>(x, panel, depth, out, out_stride);
    case 10: return AddTile<10>(x, panel, depth, out, out_stride);
    case 11: return AddTile<11>(x, panel, depth, out, out_stride);
    default: return AddTile<12>(x, panel, depth, out, out_stride);
#endif
  }
}

// panel[k, 0:kPanelColumns] = w[k, 0:columns] for k below depth, zeros beyond the columns.
template <typename T>
void PackPanel(const T* w, int64_t stride, int64_t depth, int64_t columns, float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    float* to = panel + k * kPanelColumns;
    const T* from = w + k * stride;
    if (columns == kPanelColumns) {
      Store(Load(from), to);
      Store(Load(from + kLanes), to + kLanes);
    } else {
      for (int64_t c = 0; c < kPanelColumns; ++c) to[c] = c < columns ? Widen(from[c]) : 0.0f;
    }
  }
}

// to[tile, k, 0:kTileRows] = x[rows of the tile, k] for k below depth, zeros beyond the rows.
inline void PackRows(const float* x, int64_t stride, int64_t rows, int64_t depth, float* to) {
  for (int64_t first = 0; first < rows; first += kTileRows, to += depth * kTileRows)
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t k = 0; k < depth; ++k) to[k * kTileRows + r] = first + r < rows ? x[(first + r) * stride + k] : 0.0f;
}

// out[r, 0:columns] += x[r, 0:depth] * w[0:depth, 0:columns] for at most kRowBlock rows.
template <typename T>
__attribute__((noinline)) void AddRowBlock(int64_t rows, const float* x, int64_t x_stride, const T* w, int64_t stride, int64_t depth,
                 int64_t columns, float* out, int64_t out_stride) {
  static thread_local std::vector<float> packed(kRowBlock * kPanelDepth), panel(kPanelDepth * kPanelColumns),
      edge(kTileRows * kPanelColumns);
  for (int64_t k = 0; k < depth; k += kPanelDepth) {
    const int64_t deep = std::min(kPanelDepth, depth - k);
    PackRows(x + k, x_stride, rows, deep, packed.data());
    for (int64_t c = 0; c < columns; c += kPanelColumns) {
      const int64_t wide = std::min(kPanelColumns, columns - c);
      PackPanel(w + k * stride + c, stride, deep, wide, panel.data());
      const float* from = packed.data();
      for (int64_t r = 0; r < rows; r += kTileRows, from += deep * kTileRows) {
        const int64_t tall = std::min(kTileRows, rows - r);
        float* to = out + r * out_stride + c;
        if (wide == kPanelColumns) {
          AddTileOf(tall, from, panel.data(), deep, to, out_stride);
          continue;
        }
        for (int64_t i = 0; i < tall; ++i) std::copy_n(to + i * out_stride, wide, edge.data() + i * kPanelColumns);
        AddTileOf(tall, from, panel.data(), deep, edge.data(), kPanelColumns);
        for (int64_t i = 0; i < tall; ++i) std::copy_n(edge.data() + i * kPanelColumns, wide, to + i * out_stride);
      }
    }
  }
}

// out[r, 0:columns] += x[r, 0:depth] * w[0:depth, 0:columns] for any number of rows, by the faster method.
template <typename T>
void Add(int64_t rows, const float* x, int64_t x_stride, const T* w, int64_t stride, int64_t depth, int64_t columns,
         float* out, int64_t out_stride) {
  if (rows <= kFewRows)
    AddProduct(rows, x, x_stride, w, stride, depth, columns, out, out_stride);
  else
    for (int64_t r = 0; r < rows; r += kRowBlock)
      AddRowBlock(std::min(kRowBlock, rows - r), x + r * x_stride, x_stride, w, stride, depth, columns,
                  out + r * out_stride, out_stride);
}

}  // namespace jaxmoe
