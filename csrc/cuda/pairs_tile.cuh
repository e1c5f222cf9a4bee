// A tile of the matrix of similarities in registers, as the matrix instructions leave it (mma.sync
// and wgmma alike): with g = lane / 4, t = lane % 4, a thread has rows g and g + 8 of its warp's
// 16, and of every 8 columns 2t and 2t + 1,
//   tile[n] = {(g, 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1)}.
// Four neighbouring lanes (a quad) share rows. A pair that does not count has the logit -inf.
//
// Below: a block's tiles and their logits; sums of exponentials; coefficients G = d L / d z.
#pragma once

#include "pairs.h"
#include "scalars.cuh"

namespace fastnce::cuda {

#define FASTNCE_NO_LOGIT (-__int_as_float(0x7f800000))  // -inf

// exp(z - offset) with this much of exp's range above the offset 1 / t - kExponentTop ...
constexpr float kExponentTop = 40.0f;
// ... has a normal float for every cosine while 1 / t does not exceed this. Beyond, the running
// maximum.
constexpr float kLargestFixedLogit = 60.0f;

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
          fmaxf(largest - kExponentTop, 0.0f) * kLog2E};
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

// The background copy of it, by `thread` of `threads`; zeros beyond the problem's columns.
template <int kColumns>
__device__ __forceinline__ void copy_column_data(ColumnData<kColumns>& to, const Pairs& pairs,
                                                 const float* statistics, const Span& span,
                                                 int first, unsigned thread, unsigned threads) {
  const int64_t total = pairs.problems * pairs.columns;
#pragma unroll 1
  for (unsigned j = thread; j < kColumns; j += threads) {
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
    out.scale[h] = to_base_2(pairs.x_scale[out.at[h]], base_2_factor(temperature));
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

// --- sums of exponentials ---

// Of a thread's two rows, over its columns.
template <bool kTerm>
struct RowSums {
  Offset offset;
  float largest[2], sum[2], term[2];

  __device__ __forceinline__ explicit RowSums(Offset o) : offset(o) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = o.running ? FASTNCE_NO_LOGIT : o.fixed;
      sum[h] = term[h] = 0.0f;
    }
  }

  // Turns logits into exponentials; `shrink` is what brings earlier sums into the new units. All
  // lanes take part.
  template <int kTiles>
  __device__ __forceinline__ void add(float (&tile)[kTiles][4], float (&shrink)[2]) {
    float relative[2] = {offset.fixed, offset.fixed};
    shrink[0] = shrink[1] = 1.0f;
    if (offset.running) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = fmaxf(tile[0][2 * h], tile[0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kTiles; ++n) {
          top = fmaxf(top, fmaxf(tile[n][2 * h], tile[n][2 * h + 1]));
        }
        top = fmaxf(largest[h], quad_max(top));
        relative[h] = finite(top);
        shrink[h] = exp2_fast(largest[h] - relative[h]);
        largest[h] = top;
        sum[h] *= shrink[h];
        if constexpr (kTerm) term[h] *= shrink[h];
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = tile[n][i], e = exp2_fast(z - relative[i / 2]);
        sum[i / 2] += e;
        if constexpr (kTerm) term[i / 2] += z == FASTNCE_NO_LOGIT ? 0.0f : e * z;
        tile[n][i] = e;
      }
    }
  }

  __device__ __forceinline__ void store(const Sums& out, const ThreadRows& rows, const Span& span,
                                        int64_t part) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float all = quad_sum(sum[h]), all_terms = kTerm ? quad_sum(term[h]) : 0.0f;
      if (threadIdx.x % 4 != 0 || rows.row[h] >= span.rows) continue;
      out.largest[part + rows.at[h]] = largest[h];
      out.sum[part + rows.at[h]] = all;
      if constexpr (kTerm) {
        if (out.term != nullptr) out.term[part + rows.at[h]] = all_terms * kLn2;
      }
    }
  }
};

// Of the positives by label. Each thread has a maximum of its own, as few exponentials are
// positives'.
struct LabelSums {
  Kind kind;
  bool running;
  float a[2], b[2];

  __device__ __forceinline__ LabelSums(Kind k, Offset offset) : kind(k), running(offset.running) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      a[h] = k == Kind::kSupCon ? 0.0f : running ? FASTNCE_NO_LOGIT : offset.fixed;
      b[h] = 0.0f;
    }
  }

  __device__ __forceinline__ void add_one(float z, int h) {
    if (kind == Kind::kSupCon) {
      a[h] += z;
      b[h] += 1.0f;
      return;
    }
    if (running && !(z <= a[h])) {
      b[h] *= exp2_fast(a[h] - finite(z));
      a[h] = z;
    }
    b[h] += exp2_fast(z - finite(a[h]));
  }

  template <int kTiles, class Data>
  __device__ __forceinline__ void add(const float (&tile)[kTiles][4], const Data& data,
                                      const ThreadRows& rows) {
    const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = tile[n][i];
        const bool same = rows.label[i / 2] == data.label[8 * n + t2 + i % 2];
        if (same && z != FASTNCE_NO_LOGIT) add_one(z, i / 2);
      }
    }
  }

  __device__ __forceinline__ void store(const Sums& out, const ThreadRows& rows, const Span& span,
                                        int64_t part) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool two_c = kind == Kind::kTwoC;
      const float top = quad_max(a[h]);
      const float all_a = two_c ? top : quad_sum(a[h]) * kLn2;
      const float all_b = quad_sum(two_c ? b[h] * exp2_fast(a[h] - finite(top)) : b[h]);
      if (threadIdx.x % 4 != 0 || rows.row[h] >= span.rows) continue;
      out.label_a[part + rows.at[h]] = all_a;
      out.label_b[part + rows.at[h]] = all_b;
    }
  }
};

// Maximum and sum of a tile's columns over the rows of the block; with a fixed offset the
// exponentials are the rows'.
template <int kColumns, int kWarps>
struct ColumnScratch {
  float largest[kWarps][kColumns];
  float sum[kWarps][kColumns];
};

__device__ __forceinline__ float over_rows_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 4));
  x = fmaxf(x, shuffle_xor(x, 8));
  return fmaxf(x, shuffle_xor(x, 16));
}
__device__ __forceinline__ float over_rows_sum(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}

// A warp's 16 rows: of logits with a maximum of their own if the offset is running, else of
// exponentials.
template <int kTiles, int kColumns, int kWarps>
__device__ __forceinline__ void sum_columns_of_warp(const float (&tile)[kTiles][4], Offset offset,
                                                    ColumnScratch<kColumns, kWarps>& scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float first = tile[n][i], second = tile[n][i + 2], top = offset.fixed;
      if (offset.running) {
        top = over_rows_max(fmaxf(first, second));
        first = exp2_fast(first - finite(top));
        second = exp2_fast(second - finite(top));
      }
      const float sum = over_rows_sum(first + second);
      if (lane < 4) {
        scratch.largest[warp][8 * n + 2 * lane + i] = top;
        scratch.sum[warp][8 * n + 2 * lane + i] = sum;
      }
    }
  }
}

// The warps together, after a barrier, for one column, whose sums go to `at`; what is there is of
// earlier rows if `more`.
template <int kWarps, int kColumns>
__device__ __forceinline__ void store_column(const float (&largest)[kWarps][kColumns],
                                             const float (&sum)[kWarps][kColumns], int warps,
                                             int column, const Sums& out, int64_t at, bool more) {
  const float old = more ? out.column_largest[at] : FASTNCE_NO_LOGIT;
  float top = old;
#pragma unroll
  for (int w = 0; w < warps; ++w) top = fmaxf(top, largest[w][column]);
  float total = more ? out.column_sum[at] * exp2_fast(old - finite(top)) : 0.0f;
#pragma unroll
  for (int w = 0; w < warps; ++w)
    total += sum[w][column] * exp2_fast(largest[w][column] - finite(top));
  out.column_largest[at] = top;
  out.column_sum[at] = total;
}

// --- coefficients ---

// fp16 has too few small numbers for the weights of many columns; statistics' weights are at
// most 1.
__host__ __device__ constexpr float coefficient_scale(Dtype dtype) {
  return dtype == Dtype::kFloat16 ? 1024.0f : 1.0f;
}

// The statistics of a row's or a column's loss, see pairs.h; log-sum-exps to base 2.
struct Statistics {
  float lse, weight, third;
};

// d loss / d z at a pair: weight softmax, less the target for a positive (`same`).
__device__ __forceinline__ float coefficient(float z, const Statistics& s, bool same, Kind kind) {
  const float g = s.weight * exp2_fast(z - s.lse);
  if (!same) return g;
  return g - (kind == Kind::kSupCon ? s.third : s.weight * exp2_fast(z - s.third * kLog2E));
}

struct Coefficients {
  const bool by_row, by_column;
  const Kind kind;
  Statistics row[2];
  float term[2] = {0.0f, 0.0f};

  __device__ __forceinline__ Coefficients(const Pairs& pairs, const Products& out,
                                          const ThreadRows& rows)
      : by_row(out.x_statistics != nullptr),
        by_column(out.y_statistics != nullptr),
        kind(pairs.kind) {
    const int64_t total = pairs.problems * pairs.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = {0.0f, 0.0f, 0.0f};
      if (!by_row) continue;
      const float* s = out.x_statistics + rows.at[h];
      row[h] = {s[0] * kLog2E, s[total], s[2 * total]};
    }
  }

  // Turns logits into G_ij times the scale of column j and `scale` of the row (base 1).
  template <int kTiles, class Data>
  __device__ __forceinline__ void replace(float (&tile)[kTiles][4], const Data& data,
                                          const ThreadRows& rows, const float (&scale)[2]) {
    const int t2 = 2 * (threadIdx.x % 4);
    const bool labels = kind == Kind::kSupCon || kind == Kind::kTwoC;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = 8 * n + t2 + c;
        const Statistics column = {data.statistics[0][j] * kLog2E, data.statistics[1][j],
                                   data.statistics[2][j]};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float z = tile[n][2 * h + c];
          const bool same = labels && rows.label[h] == data.label[j];
          float g = 0.0f;
          if (by_row) g += coefficient(z, row[h], same, kind);
          if (by_column) g += coefficient(z, column, same, kind);
          if (z == FASTNCE_NO_LOGIT) g = 0.0f;
          term[h] += g == 0.0f ? 0.0f : g * z;
          tile[n][2 * h + c] = g * (data.scale[j] * scale[h]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_term(float* out, const ThreadRows& rows, const Span& span,
                                             int64_t part) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float all = quad_sum(term[h]);
      if (threadIdx.x % 4 == 0 && rows.row[h] < span.rows) out[part + rows.at[h]] = all * kLn2;
    }
  }
};

}  // namespace fastnce::cuda
