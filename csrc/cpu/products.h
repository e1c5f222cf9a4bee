// Register-blocked products of slabs. Every element is a chain of multiply-adds over blocks of the
// summed dimension in a fixed order, so neither the tile that computes it nor the thread changes
// it.
#pragma once

#include "tile_kernels.h"
#include "vector.h"

namespace fastnce::FASTNCE_ISA {

// Operands summed in one run: bounds rounding error, and keeps the block of b in the first-level
// cache.
template <class P>
constexpr int64_t kDepthBlock = (144 / kWidth<P>)*kWidth<P>;

// The type of the sums of products of P.
template <class P>
struct SumOf {
  using type = P;
};
template <>
struct SumOf<Pair> {
  using type = float;
};
template <class P>
using SumType = typename SumOf<P>::type;

template <class T>
inline Vector<T> multiply_add(T x, Vector<T> y, Vector<T> sum) {
  return sum + x * y;
}
#ifdef __AVX512BF16__
inline Vector<float> multiply_add(Pair x, Vector<Pair> y, Vector<float> sum) {
  return (Vector<float>)_mm512_dpbf16_ps(
      (__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)y);
}
#endif

// c (kRows, kVectors * lanes) += sum over k < depth of a(row, k) b(k, :).
// Untransposed, a's rows are kWidth apart and k crosses slabs; transposed, k runs down one slab.
template <class P, bool kTransposed, int kRows, int kVectors>
inline __attribute__((always_inline)) void tile(int64_t depth, const P* a, int64_t a_slab,
                                                const P* b, SumType<P>* c, bool accumulate) {
  using T = SumType<P>;
  Vector<T> sum[kRows][kVectors] = {};
  const int64_t run = kTransposed ? depth : kWidth<P>;
  for (int64_t start = 0; start < depth; start += run, a += a_slab) {
    const int64_t count = depth - start < run ? depth - start : run;
    for (int64_t k = 0; k < count; ++k, b += kWidth<P>) {
      Vector<P> row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes<P>);
#pragma GCC unroll 24
      for (int i = 0; i < kRows; ++i) {
        const P x = kTransposed ? a[k * kWidth<P> + i] : a[i * kWidth<P> + k];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(x, row[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* p = c + i * kWidth<P> + v * kLanes<P>;
      store(p, accumulate ? load(p) + sum[i][v] : sum[i][v]);
    }
  }
}

// All rows of c for one block of depth: full tiles, then halves of what is left.
template <class P, bool kTransposed, int kRows, int kVectors>
void rows_of_tiles(int64_t rows, int64_t depth, const P* a, int64_t a_slab, const P* b,
                   SumType<P>* c, bool accumulate) {
  const int64_t a_step = kTransposed ? 1 : kWidth<P>;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    tile<P, kTransposed, kRows, kVectors>(depth, a + i * a_step, a_slab, b, c + i * kWidth<P>,
                                          accumulate);
  }
  if constexpr (kRows > 1) {
    if (i < rows) {
      rows_of_tiles<P, kTransposed, kRows / 2, kVectors>(rows - i, depth, a + i * a_step, a_slab, b,
                                                         c + i * kWidth<P>, accumulate);
    }
  }
}

template <class P, bool kTransposed, int kVectors>
void product(int64_t rows, int64_t depth, const P* a, int64_t a_slab, const P* b, SumType<P>* c,
             bool accumulate) {
  // Blocks of about the same depth: a short last one would mostly load and store c.
  const int64_t blocks = (depth + kDepthBlock<P> - 1) / kDepthBlock<P>;
  const int64_t slabs = (depth + kWidth<P> - 1) / kWidth<P>;
  const int64_t run = (slabs + blocks - 1) / blocks * kWidth<P>;
  for (int64_t k = 0; k < depth; k += run) {
    const int64_t count = depth - k < run ? depth - k : run;
    const P* block = kTransposed ? a + k * kWidth<P> : a + k / kWidth<P> * a_slab;
    // Narrow tiles are higher, so that as many sums are in flight.
    constexpr int kRows = kTileRows * kTileVectors / kVectors;
    rows_of_tiles<P, kTransposed, kRows, kVectors>(rows, count, block, a_slab, b + k * kWidth<P>, c,
                                                   accumulate || k > 0);
  }
}

template <class P, bool kTransposed>
void product_of_lanes(int64_t rows, int64_t depth, int64_t lanes, const P* a, int64_t a_slab,
                      const P* b, SumType<P>* c, bool accumulate) {
  with_vectors<P>(lanes, [&](auto count) {
    product<P, kTransposed, decltype(count)::value>(rows, depth, a, a_slab, b, c, accumulate);
  });
}

template <class P>
void multiply(int64_t rows, int64_t depth, int64_t lanes, const P* a, int64_t a_slab, const P* b,
              SumType<P>* c, bool accumulate) {
  product_of_lanes<P, false>(rows, depth, lanes, a, a_slab, b, c, accumulate);
}

template <class P>
void multiply_transposed(int64_t columns, int64_t depth, int64_t lanes, const P* a, const P* b,
                         SumType<P>* c) {
  product_of_lanes<P, true>(columns, depth, lanes, a, 0, b, c, true);
}

}  // namespace fastnce::FASTNCE_ISA
