// Register-blocked products of slabs. Every element is a chain of multiply-adds over blocks of the
// summed dimension in a fixed order, so neither the tile that computes it nor the thread changes
// it.
#pragma once

#include "vector.h"

namespace fastnce::FASTNCE_ISA {

// Summed in one run: bounds rounding error, and keeps the block of b in the first-level cache.
template <class T>
constexpr int64_t kDepthBlock = (144 / kWidth<T>)*kWidth<T>;

// c (kRows, kVectors * lanes) += sum over k < depth of a(row, k) b(k, :).
// Untransposed, a's rows are kWidth apart and k crosses slabs; transposed, k runs down one slab.
template <class T, bool kTransposed, int kRows, int kVectors>
inline __attribute__((always_inline)) void tile(int64_t depth, const T* a, int64_t a_slab,
                                                const T* b, T* c, bool accumulate) {
  Vector<T> sum[kRows][kVectors] = {};
  const int64_t run = kTransposed ? depth : kWidth<T>;
  for (int64_t start = 0; start < depth; start += run, a += a_slab) {
    const int64_t count = depth - start < run ? depth - start : run;
    for (int64_t k = 0; k < count; ++k, b += kWidth<T>) {
      Vector<T> row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const T x = kTransposed ? a[k * kWidth<T> + i] : a[i * kWidth<T> + k];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] += x * row[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* p = c + i * kWidth<T> + v * kLanes<T>;
      store(p, accumulate ? load(p) + sum[i][v] : sum[i][v]);
    }
  }
}

// All rows of c for one block of depth: full tiles, then halves of what is left.
template <class T, bool kTransposed, int kRows, int kVectors>
void rows_of_tiles(int64_t rows, int64_t depth, const T* a, int64_t a_slab, const T* b, T* c,
                   bool accumulate) {
  const int64_t a_step = kTransposed ? 1 : kWidth<T>;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    tile<T, kTransposed, kRows, kVectors>(depth, a + i * a_step, a_slab, b, c + i * kWidth<T>,
                                          accumulate);
  }
  if constexpr (kRows > 1) {
    if (i < rows) {
      rows_of_tiles<T, kTransposed, kRows / 2, kVectors>(rows - i, depth, a + i * a_step, a_slab, b,
                                                         c + i * kWidth<T>, accumulate);
    }
  }
}

template <class T, bool kTransposed, int kVectors>
void product(int64_t rows, int64_t depth, const T* a, int64_t a_slab, const T* b, T* c,
             bool accumulate) {
  // Blocks of about the same depth: a short last one would mostly load and store c.
  const int64_t blocks = (depth + kDepthBlock<T> - 1) / kDepthBlock<T>;
  const int64_t slabs = (depth + kWidth<T> - 1) / kWidth<T>;
  const int64_t run = (slabs + blocks - 1) / blocks * kWidth<T>;
  for (int64_t k = 0; k < depth; k += run) {
    const int64_t count = depth - k < run ? depth - k : run;
    const T* block = kTransposed ? a + k * kWidth<T> : a + k / kWidth<T> * a_slab;
    // Narrow tiles are higher, so that as many sums are in flight.
    constexpr int kRows = kTileRows * kTileVectors / kVectors;
    rows_of_tiles<T, kTransposed, kRows, kVectors>(rows, count, block, a_slab, b + k * kWidth<T>, c,
                                                   accumulate || k > 0);
  }
}

template <class T, bool kTransposed>
void product_of_lanes(int64_t rows, int64_t depth, int64_t lanes, const T* a, int64_t a_slab,
                      const T* b, T* c, bool accumulate) {
  const int64_t vectors = (lanes + kLanes<T> - 1) / kLanes<T>;
  if (vectors == 1) {
    product<T, kTransposed, 1>(rows, depth, a, a_slab, b, c, accumulate);
  } else if (vectors == 2) {
    product<T, kTransposed, 2>(rows, depth, a, a_slab, b, c, accumulate);
  } else {
    product<T, kTransposed, kTileVectors>(rows, depth, a, a_slab, b, c, accumulate);
  }
}

template <class T>
void multiply(int64_t rows, int64_t depth, int64_t lanes, const T* a, int64_t a_slab, const T* b,
              T* c, bool accumulate) {
  product_of_lanes<T, false>(rows, depth, lanes, a, a_slab, b, c, accumulate);
}

template <class T>
void multiply_transposed(int64_t columns, int64_t depth, int64_t lanes, const T* a, const T* b,
                         T* c) {
  product_of_lanes<T, true>(columns, depth, lanes, a, 0, b, c, true);
}

}  // namespace fastnce::FASTNCE_ISA
