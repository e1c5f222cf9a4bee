// What patch_nce.cu is made of: the products of a warp, what a block has in shared memory and how
// rows come there, and what a warp does between the tiles of columns that its block loads.
#pragma once

#include <type_traits>

#include "patch_nce.h"
#include "scalars.cuh"

namespace fastnce::cuda {

// --- products ---
//
// The two products of a warp of patch_nce: 16 rows with 16 columns, both in shared memory, and 16 x
// 16 coefficients with those columns. Elements of the 16 x 16 results lie as multiply_* leaves
// them: with g = lane / 4, t = lane % 4, s[n][i] is of row g + 8 (i / 2) and column 8 n + 2 t + i
// % 2.

// Elements from one row to the next: 16 bytes more than a row, so that 8 rows at one depth are in
// different banks.
template <class P, int Depth>
constexpr int kPitch = Depth + 16 / static_cast<int>(sizeof(P));

// 16-bit elements. Fragments of rows stay in registers up to a depth of 128; beyond, the sums need
// them.
template <class P, int Depth>
struct Products {
  static constexpr int kRowPitch = kPitch<P, Depth>;
  static constexpr int kSteps = Depth / 16, kHeld = kSteps < 8 ? kSteps : 8;
  const P* rows;
  uint32_t held[kHeld][4];

  __device__ __forceinline__ void load(const P* x, int lane) {
    rows = x + (lane % 16) * kRowPitch + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < kHeld; ++d) load_matrix_x4(held[d], rows + 16 * d);
  }

  // s = x y^T. Even and odd steps have sums of their own: half the length of the chain of dependent
  // instructions.
  __device__ __forceinline__ void similarities(float (&s)[2][4], const P* y, int lane) const {
    const P* at = y + (lane / 16 * 8 + lane % 8) * kRowPitch + lane / 8 % 2 * 8;
    float odd[2][4] = {};
    const auto add = [&](float (&sum)[2][4], const uint32_t (&a)[4], int d) {
      uint32_t b[4];
      load_matrix_x4(b, at + 16 * d);
      multiply_m16n8k16<P>(sum[0], a, {b[0], b[1]});
      multiply_m16n8k16<P>(sum[1], a, {b[2], b[3]});
    };
#pragma unroll
    for (int d = 0; d < kHeld; ++d) add(d % 2 ? odd : s, held[d], d);
#pragma unroll 1
    for (int d = kHeld; d < kSteps; d += 2) {
      uint32_t a[2][4];
      load_matrix_x4(a[0], rows + 16 * d);
      load_matrix_x4(a[1], rows + 16 * d + 16);
      add(s, a[0], d);
      add(odd, a[1], d + 1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] += odd[i / 4][i % 4];
  }

  // sum += e y, the coefficients rounded.
  __device__ __forceinline__ void accumulate(float (&sum)[Depth / 8][4], const float (&e)[2][4],
                                             const P* y, int lane) const {
    const uint32_t a[4] = {pack_pair<P>(e[0][0], e[0][1]), pack_pair<P>(e[0][2], e[0][3]),
                           pack_pair<P>(e[1][0], e[1][1]), pack_pair<P>(e[1][2], e[1][3])};
    const P* at = y + (lane % 16) * kRowPitch + lane / 16 * 8;
#pragma unroll
    for (int d = 0; d < Depth / 16; ++d) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, at + 16 * d);
      multiply_m16n8k16<P>(sum[2 * d], a, {b[0], b[1]});
      multiply_m16n8k16<P>(sum[2 * d + 1], a, {b[2], b[3]});
    }
  }
};

// float32 as the sum of two tf32 numbers, of 11 significant bits each: the instructions do not look
// at the last 13 bits of a register. Of the four products the smallest is left out, which is below
// float's rounding. What the instructions cannot hold in their accumulator they cut off, each a
// little more. So no sum stays in it: what they add up of 8 elements is added to c in float,
// rounded.
struct Split {
  uint32_t high, low;
  __device__ __forceinline__ explicit Split(float x) {
    high = (__float_as_uint(x) + 0x1000) & ~0x1fffu;   // to the nearest
    low = __float_as_uint(x - __uint_as_float(high));  // NaN, where x is
  }
};
__device__ __forceinline__ void multiply_split(float (&c)[4], const Split (&a)[4],
                                               const Split (&b)[2]) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  float own[4] = {};
  multiply_m16n8k8_tf32(own, {a[0].low, a[1].low, a[2].low, a[3].low}, {b[0].high, b[1].high});
  multiply_m16n8k8_tf32(own, high, {b[0].low, b[1].low});
  multiply_m16n8k8_tf32(own, high, {b[0].high, b[1].high});
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += own[i];
}

template <int Depth>
struct Products<float, Depth> {
  static constexpr int kRowPitch = kPitch<float, Depth>;
  const float* rows;

  __device__ __forceinline__ void load(const float* x, int) { rows = x; }

  __device__ __forceinline__ void similarities(float (&s)[2][4], const float* y, int lane) const {
    const int at = lane / 4 * kRowPitch + lane % 4;
#pragma unroll 4
    for (int d = 0; d < Depth; d += 8) {
      const float* x = rows + at + d;
      const Split a[4] = {Split(x[0]), Split(x[8 * kRowPitch]), Split(x[4]),
                          Split(x[8 * kRowPitch + 4])};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float* column = y + at + d + 8 * n * kRowPitch;
        multiply_split(s[n], a, {Split(column[0]), Split(column[4])});
      }
    }
  }

  // The instruction's k = t and t + 4 are the columns 2 t and 2 t + 1, which is how the
  // coefficients lie.
  __device__ __forceinline__ void accumulate(float (&sum)[Depth / 8][4], const float (&e)[2][4],
                                             const float* y, int lane) const {
#pragma unroll 1  // side by side they have not registers enough
    for (int n = 0; n < 2; ++n) {
      const auto of = [&](int i) { return Split(n == 0 ? e[0][i] : e[1][i]); };
      const Split a[4] = {of(0), of(2), of(1), of(3)};
      const float* column = y + (8 * n + 2 * (lane % 4)) * kRowPitch + lane / 4;
#pragma unroll
      for (int d = 0; d < Depth / 8; ++d) {
        multiply_split(sum[d], a, {Split(column[8 * d]), Split(column[8 * d + kRowPitch])});
      }
    }
  }
};

// --- a block's shared memory ---

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
  bool whole_rows, whole_columns;       // can be copied 16 bytes at a time
  int columns;                          // of a side, and as many rows
  int image, first;                     // the block's first row
  bool by_lse;                          // coefficients are softmaxes, from the statistics
  PatchStatistics of_rows, of_columns;  // of the image
  __device__ __forceinline__ int64_t of_image(int row) const {
    return int64_t{image} * columns + row;
  }
  __device__ __forceinline__ PatchStatistics of_image(const PatchStatistics& all) const {
    return all.lse == nullptr ? all
                              : PatchStatistics{all.lse + of_image(0), all.missing + of_image(0)};
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

// --- a warp ---

// The work of one warp: its 16 rows, of which a lane has two, with its share of the columns.
template <class S>
struct Warp {
  using P = typename S::P;
  Products<P, S::kDepth> products;
  float total[S::kDepth / 8][4] = {};  // sum of exp times x^
  float largest[2], sum[2], term[2];  // of this lane's columns; the maximum is of all of the warp's
  float scale[2];                     // from x' . y^ to a logit to base 2
  int lane, split, row;               // of the block: the first of the two, the other is 8 behind

  __device__ __forceinline__ void start(const Shared<S>& shared, float constant, float to_logit) {
    lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    split = warp / S::kRowTiles;
    row = warp % S::kRowTiles * 16 + lane / 4;
    products.load(shared.rows + warp % S::kRowTiles * 16 * S::kRowPitch, lane);
    const Problem& problem = shared.problem;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // The constant logit is one column of the first warp.
      largest[h] = split == 0 ? constant : -INFINITY;
      const float times = problem.layer.own_side ? 2.0f : 1.0f;
      sum[h] = split == 0 && lane % 4 == 0 ? times : 0.0f;
      term[h] = sum[h] * constant;
      scale[h] = shared.row_scales.unit[row + 8 * h] * to_logit;
      if (!problem.by_lse) continue;
      const int at = problem.first + row + 8 * h;
      const bool lost = problem.of_rows.lse != nullptr && at < problem.columns;
      largest[h] = lost ? problem.of_rows.lse[at] : INFINITY;
    }
  }

  // This warp's columns of a tile that begins at the column `begin` of the other side, or the own.
  __device__ __forceinline__ void step(Shared<S>& shared, const P* tile, int begin, bool own_side) {
    const Problem& problem = shared.problem;
    const float* const lse = own_side ? problem.of_rows.lse : problem.of_columns.lse;
    const int columns = problem.columns, first = problem.first;
    const P* y = tile + 16 * split * S::kRowPitch;
    float z[2][4] = {};
    products.similarities(z, y, lane);
    float unit[2][2];
    float top[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int in_tile = 16 * split + 8 * n + 2 * (lane % 4) + i % 2, h = i / 2;
        const int column = begin + in_tile;
        unit[n][i % 2] = shared.column_scales.unit[in_tile];
        z[n][i] *= scale[h] * unit[n][i % 2];
        const bool own = column == first + row + 8 * h;
        if (own && !own_side) shared.positive[row + 8 * h] = z[n][i];
        if (own || column >= columns) z[n][i] = -INFINITY;
        top[h] = fmaxf(top[h], z[n][i]);
      }
    }
    if (problem.by_lse) {
      top[0] = largest[0], top[1] = largest[1];
    } else {
      move_maximum(top);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2, column = begin + 16 * split + 8 * n + 2 * (lane % 4) + i % 2;
        float e = exp2_fast(z[n][i] - top[h]);
        if (problem.by_lse && lse != nullptr) {
          e += exp2_fast(z[n][i] - (column < columns ? lse[column] : 0.0f));
        }
        sum[h] += e;
        term[h] += z[n][i] == -INFINITY ? 0.0f : e * z[n][i];
        z[n][i] = e * unit[n][i % 2];
      }
    }
    if (problem.layer.gradient != nullptr) products.accumulate(total, z, y, lane);
  }

  // To the maximum over the lanes that have a row; `top` becomes a finite stand-in for it.
  __device__ __forceinline__ void move_maximum(float (&top)[2]) {
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], shuffle_xor(top[h], 1));
      top[h] = fmaxf(top[h], shuffle_xor(top[h], 2));
      const float old = largest[h];
      largest[h] = top[h];
      if (top[h] == -INFINITY) top[h] = 0;
      shrink[h] = exp2_fast(old - top[h]);
      sum[h] *= shrink[h];
      term[h] *= shrink[h];
    }
    if (ballot(shrink[0] != 1 || shrink[1] != 1) == 0) return;
#pragma unroll
    for (auto& tile : total) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile[i] *= shrink[i / 2];
    }
  }

  // Sums over the lanes that have a row, into shared memory.
  __device__ __forceinline__ void finish(Shared<S>& shared) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const P* x = shared.rows + (row + 8 * h) * S::kRowPitch + 2 * (lane % 4);
      float along = 0;
#pragma unroll
      for (int n = 0; n < S::kDepth / 8; ++n) {
        along += total[n][2 * h] * to_float(x[8 * n]);
        along += total[n][2 * h + 1] * to_float(x[8 * n + 1]);
      }
      float all[3] = {sum[h], term[h], along};
#pragma unroll
      for (float& each : all) {
        each += shuffle_xor(each, 1);
        each += shuffle_xor(each, 2);
      }
      if (lane % 4 != 0) continue;
      shared.largest[split][row + 8 * h] = largest[h];
      shared.sum[split][row + 8 * h] = all[0];
      shared.term[split][row + 8 * h] = all[1];
      shared.along[split][row + 8 * h] = all[2];
    }
  }

  // A part of the products, into shared memory.
  __device__ __forceinline__ void store_part(Shared<S>& shared, int part) const {
    auto& to = shared.products[threadIdx.x / kWarp];
#pragma unroll
    for (int n = 0; n < kCombined / 8; ++n) {
      const auto& from = total[part * kCombined / 8 + n];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        auto* const pair = &to[lane / 4 + 8 * h][8 * n + 2 * (lane % 4)];
        *reinterpret_cast<float2*>(pair) = make_float2(from[2 * h], from[2 * h + 1]);
      }
    }
  }
};

}  // namespace fastnce::cuda
