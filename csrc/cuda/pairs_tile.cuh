// A tile of the matrix of similarities in registers, as the matrix instructions leave it (mma.sync
// and wgmma alike): with g = lane / 4, t = lane % 4, a thread has rows g and g + 8 of its warp's
// 16, and of every 8 columns 2t and 2t + 1,
//   tile[n] = {(g, 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1)}.
// Four neighbouring lanes (a quad) share rows. A pair that does not count has the logit -inf.
//
// What a tile becomes as the first factor of a product over its columns, in 16 bits: 16 columns to
// an operand of the instructions,
//   factor[n / 2][2 (n % 2) + h] = the pair of columns of tile[n] in row g + 8 h.
//
// Below: a block's tiles and their logits; sums of exponentials; coefficients G = d L / d z. What
// differs between calls is asked for once a tile, and is a constant to the loops over its elements.
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
  float scale[2];    // to base 2
  int64_t label[2];  // of labelled kinds

  // In x; beyond the problem's end its last row.
  __device__ __forceinline__ int64_t at(const Span& span, int h) const {
    const int inside = row[h] < span.rows ? row[h] : span.rows - 1;
    return span.first_row + (inside - span.row);
  }
};
__device__ __forceinline__ ThreadRows rows_of_thread(const Pairs& pairs, const Span& span, int warp,
                                                     double temperature) {
  ThreadRows out;
  out.warp_row = span.row + 16 * warp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    out.row[h] = out.warp_row + static_cast<int>(threadIdx.x % kWarp) / 4 + 8 * h;
    const int64_t at = out.at(span, h);
    out.scale[h] = to_base_2(pairs.x_scale[at], base_2_factor(temperature));
    out.label[h] = pairs.x_labels != nullptr ? pairs.x_labels[at] : 0;
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
using Factor = uint32_t[kTiles / 2][4];

// Exponentials with the scales of their columns.
template <class T, int kTiles>
__device__ __forceinline__ void scale_columns(Factor<kTiles>& factor,
                                              const float (&tile)[kTiles][4], const float* scale) {
  const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float low = scale[8 * n + t2], high = scale[8 * n + t2 + 1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[n / 2][2 * (n % 2) + h] =
          pack_pair<T>(tile[n][2 * h] * low, tile[n][2 * h + 1] * high);
    }
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

// Of a thread's two rows, over its columns; the terms e z for the temperature's gradient on
// request.
struct RowSums {
  Offset offset;
  bool with_term;
  float largest[2], sum[2], term[2];

  __device__ __forceinline__ RowSums(Offset o, bool with_term) : offset(o), with_term(with_term) {
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
        term[h] *= shrink[h];
      }
    }
    with_term ? add_tile<true>(tile, relative) : add_tile<false>(tile, relative);
  }

  __device__ __forceinline__ void store(const Sums& out, const ThreadRows& rows, const Span& span,
                                        int64_t part) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float all = quad_sum(sum[h]), all_terms = quad_sum(term[h]);
      if (threadIdx.x % 4 != 0 || rows.row[h] >= span.rows) continue;
      out.largest[part + rows.at(span, h)] = largest[h];
      out.sum[part + rows.at(span, h)] = all;
      if (with_term) out.term[part + rows.at(span, h)] = all_terms * kLn2;
    }
  }

 private:
  // The tile's own sums first: a sum of thousands of numbers one by one would be rounded as often.
  template <bool kTerm, int kTiles>
  __device__ __forceinline__ void add_tile(float (&tile)[kTiles][4], const float (&relative)[2]) {
    float own[2] = {0.0f, 0.0f}, own_term[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = tile[n][i], e = exp2_fast(z - relative[i / 2]);
        own[i / 2] += e;
        if constexpr (kTerm) own_term[i / 2] += z == FASTNCE_NO_LOGIT ? 0.0f : e * z;
        tile[n][i] = e;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += own[h];
      term[h] += own_term[h];
    }
  }
};

// Of the positives by label: of SupCon their logits and their number, of 2C maximum and sum of
// their exponentials. Each thread has a maximum of its own until the end.
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

  template <int kTiles, class Data>
  __device__ __forceinline__ void add(const float (&tile)[kTiles][4], const Data& data,
                                      const ThreadRows& rows) {
    if (kind == Kind::kSupCon) {
      for_positives(tile, data, rows, [&](float z, int h) {
        a[h] += z == FASTNCE_NO_LOGIT ? 0.0f : z;
        b[h] += z == FASTNCE_NO_LOGIT ? 0.0f : 1.0f;
      });
      return;
    }
    if (running) {
      float top[2] = {a[0], a[1]};
      for_positives(tile, data, rows, [&](float z, int h) { top[h] = fmaxf(top[h], z); });
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        b[h] *= exp2_fast(a[h] - finite(top[h]));
        a[h] = top[h];
      }
    }
    const float relative[2] = {finite(a[0]), finite(a[1])};
    for_positives(tile, data, rows, [&](float z, int h) { b[h] += exp2_fast(z - relative[h]); });
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
      out.label_a[part + rows.at(span, h)] = all_a;
      out.label_b[part + rows.at(span, h)] = all_b;
    }
  }

 private:
  // Calls run(logit, which of the rows) for all pairs; those that are no positives have no logit.
  template <int kTiles, class Data, class Run>
  static __device__ __forceinline__ void for_positives(const float (&tile)[kTiles][4],
                                                       const Data& data, const ThreadRows& rows,
                                                       Run run) {
    const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool same = rows.label[i / 2] == data.label[8 * n + t2 + i % 2];
        run(same ? tile[n][i] : FASTNCE_NO_LOGIT, i / 2);
      }
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

// A warp's 16 rows: of logits with a maximum of their own where the offset is running, else of
// exponentials.
template <bool kRunning, int kTiles, int kColumns, int kWarps>
__device__ __forceinline__ void sum_columns_of_warp(const float (&tile)[kTiles][4], Offset offset,
                                                    ColumnScratch<kColumns, kWarps>& scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float first = tile[n][i], second = tile[n][i + 2], top = offset.fixed;
      if constexpr (kRunning) {
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

struct Coefficients {
  const bool by_row, by_column;
  const Kind kind;
  const bool with_term;
  Statistics row[2];
  float term[2] = {0.0f, 0.0f};

  __device__ __forceinline__ Coefficients(const Pairs& pairs, const Products& out, const Span& span,
                                          const ThreadRows& rows, bool with_term)
      : by_row(out.x_statistics != nullptr),
        by_column(out.y_statistics != nullptr),
        kind(pairs.kind),
        with_term(with_term) {
    const int64_t total = pairs.problems * pairs.rows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = {0.0f, 0.0f, 0.0f};
      if (!by_row) continue;
      const float* s = out.x_statistics + rows.at(span, h);
      row[h] = {s[0] * kLog2E, s[total], s[2 * total]};
    }
  }

  // From logits G_ij times the scale of column j and `scale` of the row (base 1).
  template <class T, int kTiles, class Data>
  __device__ __forceinline__ void find(Factor<kTiles>& factor, const float (&tile)[kTiles][4],
                                       const Data& data, const ThreadRows& rows,
                                       const float (&scale)[2]) {
    with_term ? find_by_kind<T, true>(factor, tile, data, rows, scale)
              : find_by_kind<T, false>(factor, tile, data, rows, scale);
  }

  __device__ __forceinline__ void store_term(float* out, const ThreadRows& rows, const Span& span,
                                             int64_t part) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float all = quad_sum(term[h]);
      if (threadIdx.x % 4 == 0 && rows.row[h] < span.rows)
        out[part + rows.at(span, h)] = all * kLn2;
    }
  }

 private:
  template <class T, bool kTerm, int kTiles, class Data>
  __device__ __forceinline__ void find_by_kind(Factor<kTiles>& factor,
                                               const float (&tile)[kTiles][4], const Data& data,
                                               const ThreadRows& rows, const float (&scale)[2]) {
    // Rows of labelled kinds are columns too, so that both have statistics.
    if (kind == Kind::kSupCon) {
      find_all<T, kTerm, true, true, Kind::kSupCon>(factor, tile, data, rows, scale);
    } else if (kind == Kind::kTwoC) {
      find_all<T, kTerm, true, true, Kind::kTwoC>(factor, tile, data, rows, scale);
    } else if (by_row && by_column) {
      find_all<T, kTerm, true, true, Kind::kQueue>(factor, tile, data, rows, scale);
    } else if (by_row) {
      find_all<T, kTerm, true, false, Kind::kQueue>(factor, tile, data, rows, scale);
    } else {  // terms are of rows
      find_all<T, false, false, true, Kind::kQueue>(factor, tile, data, rows, scale);
    }
  }

  // d loss / d z at a pair is weight softmax, less the target for a positive.
  template <class T, bool kTerm, bool kByRow, bool kByColumn, Kind kKind, int kTiles, class Data>
  __device__ __forceinline__ void find_all(Factor<kTiles>& factor, const float (&tile)[kTiles][4],
                                           const Data& data, const ThreadRows& rows,
                                           const float (&scale)[2]) {
    const int t2 = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float pairs[2][2];  // of two rows
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = 8 * n + t2 + c;
        Statistics column;
        if constexpr (kByColumn) {
          column = {data.statistics[0][j] * kLog2E, data.statistics[1][j], data.statistics[2][j]};
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float z = tile[n][2 * h + c];
          float g = 0.0f;
          if constexpr (kByRow) g += row[h].weight * exp2_fast(z - row[h].lse);
          if constexpr (kByColumn) g += column.weight * exp2_fast(z - column.lse);
          if constexpr (kKind != Kind::kQueue) {
            const float target = target_of<kKind>(z, row[h]) + target_of<kKind>(z, column);
            g -= rows.label[h] == data.label[j] ? target : 0.0f;
            g = z == FASTNCE_NO_LOGIT ? 0.0f : g;
          }
          if constexpr (kTerm) term[h] += g == 0.0f ? 0.0f : g * z;
          pairs[h][c] = g * (data.scale[j] * scale[h]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[n / 2][2 * (n % 2) + h] = pack_pair<T>(pairs[h][0], pairs[h][1]);
      }
    }
  }

  template <Kind kKind>
  static __device__ __forceinline__ float target_of(float z, const Statistics& s) {
    if constexpr (kKind == Kind::kSupCon) return s.third;
    return s.weight * exp2_fast(z - s.third * kLog2E);
  }
};

}  // namespace fastnce::cuda
