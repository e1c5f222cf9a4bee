// From tiles of logits (pairs_tile.cuh) to the coefficients G = d L / d z.
#pragma once

#include "pairs_tile.cuh"

namespace fastnce::cuda {

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
  return g - (kind == Kind::kSupCon
                  ? s.third
                  : s.weight * exp2_fast(z - s.third * static_cast<float>(kLog2E)));
}

template <bool kTerm>
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
      row[h] = {s[0] * static_cast<float>(kLog2E), s[total], s[2 * total]};
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
        const Statistics column = {data.statistics[0][j] * static_cast<float>(kLog2E),
                                   data.statistics[1][j], data.statistics[2][j]};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float z = tile[n][2 * h + c];
          const bool same = labels && rows.label[h] == data.label[j];
          float g = 0.0f;
          if (by_row) g += coefficient(z, row[h], same, kind);
          if (by_column) g += coefficient(z, column, same, kind);
          if (z == FASTNCE_NO_LOGIT) g = 0.0f;
          if constexpr (kTerm) term[h] += g == 0.0f ? 0.0f : g * z;
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
