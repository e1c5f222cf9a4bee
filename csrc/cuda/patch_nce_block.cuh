// What a block of patch_nce has in shared memory, and how rows come there.
#pragma once

#include <type_traits>

#include "patch_nce.h"
#include "patch_nce_products.cuh"
#include "scalars.cuh"

namespace fastnce::cuda {

constexpr int kStages = 2;          // tiles of columns: one at work, one on its way
constexpr int kCombined = 64;       // depth of what warps add up at once
constexpr int kCombinedPitch = 72;  // so that rows are in different banks

__device__ __forceinline__ float load_element(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[at];
  if (dtype == Dtype::kBfloat16) return to_float(static_cast<const bfloat16*>(data)[at]);
  return to_float(static_cast<const float16*>(data)[at]);
}
__device__ __forceinline__ void store_element(void* data, Dtype dtype, int64_t at, float x) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[at] = x;
  } else if (dtype == Dtype::kBfloat16) {
    static_cast<bfloat16*>(data)[at] = from_float<bfloat16>(x);
  } else {
    static_cast<float16*>(data)[at] = from_float<float16>(x);
  }
}

// P_: what the products multiply. A block has RowTiles times 16 rows, and Splits warps for each 16.
template <class P_, int Depth, int RowTiles, int Splits>
struct Shape {
  using P = P_;
  static constexpr int kDepth = Depth, kRowTiles = RowTiles, kSplits = Splits;
  static constexpr int kWarps = RowTiles * Splits, kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * RowTiles, kColumns = 16 * Splits;  // of a block, of a tile
  static constexpr int kRowPitch = kPitch<P, Depth>;
};

// Rows as they are multiplied are x' = power x, with a norm for which products neither overflow nor
// vanish; x^ = unit x'.
template <int Count>
struct Scales {
  float unit[Count], power[Count];
};

// What a block works on. It is in shared memory so that it does not take registers, of which the
// sums of products leave few.
struct Problem {
  PatchLayer layer;
  bool whole_rows, whole_columns;  // can be copied 16 bytes at a time
  int columns;                     // and as many rows
  int image, first;                // the block's first row
  const float* column_lse;         // of the image where columns are queries, else null
  __device__ __forceinline__ int64_t of_image(int row) const {
    return int64_t{image} * columns + row;
  }
};

template <class S>
struct Shared {
  alignas(16) typename S::P rows[S::kRows * S::kRowPitch];
  union alignas(16) {
    typename S::P columns[kStages][S::kColumns * S::kRowPitch];
    float products[S::kWarps][16][kCombinedPitch];  // after the last tile
  };
  Problem problem;
  Scales<S::kRows> row_scales;
  Scales<S::kColumns> column_scales;  // of the tile at work
  // Of each row: its positive, and that one's logit to base 2 ...
  Scales<S::kRows> positive_scales;
  float positive[S::kRows];
  // ... the sums of each warp, with largest: of exp, of exp times logit, and x' . product; largest
  // then becomes the factor from the warp's sums to the softmax ...
  float largest[S::kSplits][S::kRows], sum[S::kSplits][S::kRows];
  float term[S::kSplits][S::kRows], along[S::kSplits][S::kRows];
  // ... and what makes the gradient.
  float missing[S::kRows], along_row[S::kRows];
  float loss[S::kRows], by_temperature[S::kRows];
};

// Rows first ... first + count - 1 of an image; zeros beyond the last row and beyond the depth.
template <class S>
__device__ __forceinline__ void load_rows(typename S::P* to, int count, const RowsView& view,
                                          int image, int first, bool whole) {
  using P = typename S::P;
  constexpr int V = 16 / sizeof(P), kVectors = S::kDepth / V;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count * kVectors; i += S::kThreads) {
    const int row = i / kVectors, d = i % kVectors * V;
    P* at = to + row * S::kRowPitch + d;
    const bool there = first + row < view.rows && d < view.depth;
    const int64_t from =
        there ? image * view.strides[0] + (first + row) * view.strides[1] + d * view.strides[2] : 0;
    if (whole) {
      copy_async<16>(at, static_cast<const P*>(view.data) + from, there);
    } else {
#pragma unroll 1
      for (int v = 0; v < V; ++v) {
        const bool inside = there && d + v < view.depth;
        at[v] = from_float<P>(
            inside ? load_element(view.data, view.dtype, from + v * view.strides[2]) : 0.0f);
      }
    }
  }
}

// Squares that need no power of two. float16 has so few exponents that coefficients are divided by
// norms near 1 alone.
template <class P>
constexpr bool kNarrow = std::is_same_v<P, float16>;
template <class P>
constexpr float kLeastSquares = kNarrow<P> ? 0.25f : 0x1p-40f;
template <class P>
constexpr float kMostSquares = kNarrow<P> ? 4.0f : 0x1p40f;

// Runs run(x) on this lane's quarter of a row, 16 bytes at a time.
template <class S, class Run>
__device__ __forceinline__ void for_quarter(typename S::P* at, const Run& run) {
  using P = typename S::P;
  constexpr int V = 16 / sizeof(P);
#pragma unroll 2  // the sums of products have most registers
  for (int i = 0; i < S::kDepth / (4 * V); ++i) {
    auto* const vector = reinterpret_cast<uint4*>(at + 4 * V * i);
    uint4 bits = *vector;
    P x[V];
    memcpy(x, &bits, 16);
    if (run(x)) {
      memcpy(&bits, x, 16);
      *vector = bits;
    }
  }
}

// The sum over a row of the squares of scale x, from four lanes.
template <class S>
__device__ __forceinline__ float squares_of(typename S::P* at, float scale) {
  constexpr int V = 16 / sizeof(typename S::P);
  float sums[V] = {};
  for_quarter<S>(at, [&](auto& x) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += (to_float(x[v]) * scale) * (to_float(x[v]) * scale);
    return false;
  });
  float total = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) total += sums[v];
  total += shuffle_xor(total, 1);
  return total + shuffle_xor(total, 2);
}

// Fills the scales, and multiplies rows with their powers.
template <class S, int Count>
__device__ __forceinline__ void scale_rows(typename S::P* rows, Scales<Count>& scales) {
  using P = typename S::P;
  constexpr int V = 16 / sizeof(P);
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / kWarp * 8 + lane / 4; row < Count;
       row += S::kWarps * 8) {
    P* const at = rows + row * S::kRowPitch + lane % 4 * V;
    float squares = squares_of<S>(at, 1.0f), power = 1;
    const bool scaled = !(squares >= kLeastSquares<P> && squares <= kMostSquares<P>);
    if (ballot(scaled) != 0) {
      float largest = 0;
      for_quarter<S>(at, [&](auto& x) {
#pragma unroll
        for (int v = 0; v < V; ++v) largest = fmaxf(largest, fabsf(to_float(x[v])));
        return false;
      });
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      const float by_largest = power_of_two(largest), again = squares_of<S>(at, by_largest);
      const float by_norm = again > 0 ? power_of_two(sqrtf(again)) : 1.0f;
      if (scaled) {
        power = by_largest * by_norm;
        squares = again * by_norm * by_norm;
        for_quarter<S>(at, [&](auto& x) {
#pragma unroll
          for (int v = 0; v < V; ++v) x[v] = from_float<P>(to_float(x[v]) * power);
          return true;
        });
      }
    }
    if (lane % 4 == 0) {
      scales.unit[row] = squares == 0 ? 0.0f : 1 / sqrtf(squares);
      scales.power[row] = power;
    }
  }
}

}  // namespace fastnce::cuda
