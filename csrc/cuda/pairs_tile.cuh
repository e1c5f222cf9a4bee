// A tile of the matrix of similarities in registers, as the matrix instructions leave it (mma.sync
// and wgmma alike): with g = lane / 4, t = lane % 4, a thread has rows g and g + 8 of its warp's
// 16, and of every 8 columns 2t and 2t + 1,
//   tile[n] = {(g, 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1)}.
// Four neighbouring lanes (a quad) share rows. A pair that does not count has the logit -inf.
#pragma once

#include "device.cuh"
#include "pairs.h"

namespace fastnce::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;
#define FASTNCE_NO_LOGIT (-__int_as_float(0x7f800000))  // -inf

// exp(z - offset) with this much of exp's range above the offset 1 / t - kExponentTop ...
constexpr float kExponentTop = 40.0f;
// ... has a normal float for every cosine while 1 / t does not exceed this. Beyond, the running
// maximum.
constexpr float kLargestFixedLogit = 60.0f;

__device__ __forceinline__ double value_of(const Temperature& t) {
  if (t.tensor == nullptr) return t.value;
  return t.is_double ? *static_cast<const double*>(t.tensor) : *static_cast<const float*>(t.tensor);
}

// scale / t in units of log 2, rounded once.
__device__ __forceinline__ float to_base_2(float scale, double temperature) {
  return static_cast<float>(scale * (kLog2E / temperature));
}

// What exponentials are relative to: one number, or each row's running maximum.
struct Offset {
  bool running;
  float fixed;
};
__device__ __forceinline__ Offset offset_of(const Pairs& pairs, double temperature) {
  const auto largest = static_cast<float>(1 / temperature);
  // fp16 products need exponentials of at most 1.
  const bool bounded = pairs.unit_rows && pairs.dtype != Dtype::kFloat16;
  return {!(bounded && largest <= kLargestFixedLogit),
          fmaxf(largest - kExponentTop, 0.0f) * static_cast<float>(kLog2E)};
}

// Where a block works: on the `row_block` rows of number `block` (blocks do not cross problems),
// and on part blockIdx.y of the columns, in whole tiles of `tile` columns.
struct Span {
  int64_t first_row;     // of the block, in x
  int64_t first_column;  // of the problem, in y
  int row, rows;         // the block's first row in the problem, and the problem's rows
  int columns;           // of the problem
  int begin, end;        // columns of the part, in the problem
};
__device__ __forceinline__ Span span_of(const Pairs& pairs, int64_t block, int row_block,
                                        int tile) {
  const auto rows = static_cast<int>(pairs.rows), columns = static_cast<int>(pairs.columns);
  const int blocks = (rows + row_block - 1) / row_block;
  const int64_t problem = block / blocks;
  const int row = static_cast<int>(block % blocks) * row_block;
  const int tiles = (columns + tile - 1) / tile;
  const int step = (tiles + static_cast<int>(gridDim.y) - 1) / static_cast<int>(gridDim.y);
  const int64_t begin = int64_t{step} * blockIdx.y * tile;
  const auto part = static_cast<int>(begin < columns ? begin : columns);
  const int64_t end = part + int64_t{step} * tile;
  return {problem * pairs.rows + row,
          problem * pairs.columns,
          row,
          rows,
          columns,
          part,
          static_cast<int>(end < columns ? end : columns)};
}

// What a tile's columns need besides y itself, in shared memory.
template <int kColumns>
struct ColumnData {
  int64_t label[kColumns];
  float scale[kColumns];
  float statistics[3][kColumns];
};

// The background copy of it, by a whole block; zeros beyond the problem's columns.
template <int kColumns>
__device__ __forceinline__ void copy_column_data(ColumnData<kColumns>& to, const Pairs& pairs,
                                                 const float* statistics, const Span& span,
                                                 int first) {
  const int64_t total = pairs.problems * pairs.columns;
  for (unsigned j = threadIdx.x; j < kColumns; j += blockDim.x) {
    const bool valid = first + static_cast<int>(j) < span.columns;
    const int64_t at = span.first_column + first + j;
    copy_async<4>(&to.scale[j], pairs.y_scale + at, valid);
    if (pairs.y_labels != nullptr) copy_async<8>(&to.label[j], pairs.y_labels + at, valid);
    if (statistics != nullptr) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        copy_async<4>(&to.statistics[i][j], statistics + i * total + at, valid);
      }
    }
  }
}

// A thread's two rows.
struct ThreadRows {
  int warp_row;      // the warp's first row, in the problem
  int row[2];        // in the problem
  int64_t at[2];     // in x; beyond the problem's end its last row
  float scale[2];    // to base 2
  int64_t label[2];  // of labelled kinds
};
__device__ __forceinline__ ThreadRows rows_of_thread(const Pairs& pairs, const Span& span, int warp,
                                                     double temperature) {
  ThreadRows out;
  out.warp_row = span.row + 16 * warp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    out.row[h] = out.warp_row + static_cast<int>(threadIdx.x % kWarp) / 4 + 8 * h;
    const int inside = out.row[h] < span.rows ? out.row[h] : span.rows - 1;
    out.at[h] = span.first_row + (inside - span.row);
    out.scale[h] = to_base_2(pairs.x_scale[out.at[h]], temperature);
    out.label[h] = pairs.x_labels != nullptr ? pairs.x_labels[out.at[h]] : 0;
  }
  return out;
}

// From the products x . y to the logits of a tile whose first column is `first`.
template <int kTiles, class Data>
__device__ __forceinline__ void to_logits(float (&tile)[kTiles][4], const Data& data,
                                          const ThreadRows& rows, const Span& span, int first,
                                          Kind kind) {
  const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tile[n][i] = tile[n][i] * rows.scale[i / 2] * data.scale[8 * n + t2 + i % 2];
    }
  }
  const bool own = kind != Kind::kQueue;
  const int last = first + 8 * kTiles, last_row = rows.warp_row + 16;
  if (last <= span.columns && last_row <= span.rows &&
      !(own && first < last_row && rows.warp_row < last)) {
    return;  // the most frequent case: all pairs count
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = rows.row[i / 2], column = first + 8 * n + t2 + i % 2;
      const bool counts = row < span.rows && column < span.columns && !(own && row == column);
      if (!counts) tile[n][i] = FASTNCE_NO_LOGIT;
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void scale_columns(float (&tile)[kTiles][4], const float* scale) {
  const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[n][i] *= scale[8 * n + t2 + i % 2];
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
// A maximum as something to subtract: 0 where there is none yet.
__device__ __forceinline__ float finite(float largest) {
  return largest == FASTNCE_NO_LOGIT ? 0.0f : largest;
}

}  // namespace fastnce::cuda
