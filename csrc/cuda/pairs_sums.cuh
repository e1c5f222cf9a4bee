// From tiles of logits (pairs_tile.cuh) to sums of exponentials.
#pragma once

#include "pairs_tile.cuh"

namespace fastnce::cuda {

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

// The block's warps together, after a barrier. `part` is where the block's sums of the problem's
// columns begin; what is there is of the block's earlier rows if `more`.
template <int kColumns, int kWarps>
__device__ __forceinline__ void store_column_sums(const ColumnScratch<kColumns, kWarps>& scratch,
                                                  const Sums& out, int64_t part, int first,
                                                  int columns, bool more) {
  const int warps = blockDim.x / kWarp;
  for (int j = threadIdx.x; j < kColumns && first + j < columns; j += blockDim.x) {
    float* const largest = out.column_largest + part + first + j;
    float* const total = out.column_sum + part + first + j;
    const float old = more ? *largest : FASTNCE_NO_LOGIT;
    float top = old, sum = 0.0f;
    for (int w = 0; w < warps; ++w) top = fmaxf(top, scratch.largest[w][j]);
    if (more) sum = *total * exp2_fast(old - finite(top));
    for (int w = 0; w < warps; ++w) {
      sum += scratch.sum[w][j] * exp2_fast(scratch.largest[w][j] - finite(top));
    }
    *largest = top;
    *total = sum;
  }
}

}  // namespace fastnce::cuda
