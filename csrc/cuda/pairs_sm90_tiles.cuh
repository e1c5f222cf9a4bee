// What is done to a tile of 64 rows x kColumns similarities in the registers of a warp group, as
// wgmma_tiles leaves it: element 4 i + 2 h + r of a thread is row `16 warp + g + 8 h`, column `8 i
// + 2 t + r`.
#pragma once

#include "pairs_sm90_work.cuh"

namespace fastnce::cuda::sm90 {

// exp(z - offset) with this much of exp's range above the offset 1 / t - kExponentTop has a normal
// float for every cosine while 1 / t does not exceed kLargestFixedLogit. Beyond, the running
// maximum.
constexpr float kExponentTop = 40.0f, kLargestFixedLogit = 60.0f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ double read_temperature(const Temperature& t) {
  if (t.tensor == nullptr) return t.value;
  return t.is_double ? *static_cast<const double*>(t.tensor) : *static_cast<const float*>(t.tensor);
}
// x / temperature in units of log 2, rounded once.
__device__ __forceinline__ float to_base_2(float x, double temperature) {
  return static_cast<float>(x * (1.4426950408889634 / temperature));
}

// What a thread knows about its two rows, and where it is.
struct Lane {
  int t;           // columns 8 i + 2 t and the next
  int first, end;  // row h is first + 8 h of the problem, if that is below end
  float scale[2];  // to logits of base 2
  int64_t label[2];
  __device__ __forceinline__ int row(int h) const { return first + 8 * h; }
  __device__ __forceinline__ bool inside(int h) const { return row(h) < end; }
};

// Sum over the four threads that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float2 pair_of(const float* values, int i, const Lane& lane) {
  return *reinterpret_cast<const float2*>(values + 8 * i + 2 * lane.t);
}

// From products to logits; -inf for pairs that do not count.
template <int kColumns>
__device__ __forceinline__ void to_logits(float (&s)[kColumns / 2], const Lane& lane,
                                          const ColumnValues<kColumns>& values, int first_column,
                                          int columns, bool whole, bool without_own) {
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    const float2 scale = pair_of(values.scale, i, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s[4 * i + 2 * h] = s[4 * i + 2 * h] * lane.scale[h] * scale.x;
      s[4 * i + 2 * h + 1] = s[4 * i + 2 * h + 1] * lane.scale[h] * scale.y;
    }
  }
  if (whole) return;
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = first_column + 8 * i + 2 * lane.t + e % 2, h = e / 2;
      const bool counts =
          column < columns && lane.inside(h) && !(without_own && column == lane.row(h));
      if (!counts) s[4 * i + e] = -infinity();
    }
  }
}

// Which elements have the row's label: one bit each, and none that does not count.
template <int kColumns>
__device__ __forceinline__ uint64_t same_label(const float (&z)[kColumns / 2], const Lane& lane,
                                               const ColumnValues<kColumns>& values) {
  uint64_t same = 0;
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t label = values.label[8 * i + 2 * lane.t + e % 2];
      const bool equal = label == lane.label[e / 2] && z[4 * i + e] != -infinity();
      same |= static_cast<uint64_t>(equal) << (4 * i + e);
    }
  }
  return same;
}

// A maximum that more logits may raise, as `finite` what to subtract, and in `shrink` what earlier
// sums are multiplied by.
struct Reference {
  float largest = -infinity();
  __device__ __forceinline__ float raise(float candidate, float& finite) {
    const float raised = fmaxf(largest, quad_max(candidate));
    finite = raised == -infinity() ? 0.0f : raised;
    const float shrink = exp2_fast(largest - finite);
    largest = raised;
    return shrink;
  }
};

// Sums of a thread's two rows, over its columns; `largest` is the same for the four threads of a
// row.
struct RowSums {
  Reference top[2], label_top[2];
  float sum[2] = {0, 0}, term[2] = {0, 0}, label_a[2] = {0, 0}, label_b[2] = {0, 0};
};

// The positives' share of a tile of logits.
template <int kColumns>
__device__ __forceinline__ void add_labels(RowSums& sums, const float (&z)[kColumns / 2],
                                           const Lane& lane, const ColumnValues<kColumns>& values,
                                           Kind kind, bool running, float offset) {
  const uint64_t same = same_label<kColumns>(z, lane, values);
  const auto is_same = [=](int i) { return (same >> i & 1) != 0; };
  if (kind == Kind::kSupCon) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      sums.label_a[i / 2 % 2] += is_same(i) ? z[i] : 0.0f;
      sums.label_b[i / 2 % 2] += is_same(i) ? 1.0f : 0.0f;
    }
    return;
  }
  float finite[2] = {offset, offset};
  if (running) {
    float top[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      if (is_same(i)) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], z[i]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sums.label_b[h] *= sums.label_top[h].raise(top[h], finite[h]);
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    if (is_same(i)) sums.label_b[i / 2 % 2] += exp2_fast(z[i] - finite[i / 2 % 2]);
  }
}

// From logits to exponentials, which are added up; returns in `shrink` what the rows' earlier sums
// were multiplied by.
template <int kColumns>
__device__ __forceinline__ void to_exponentials(float (&z)[kColumns / 2], RowSums& sums,
                                                bool running, float offset, bool with_term,
                                                float (&shrink)[2]) {
  float finite[2] = {offset, offset};
  shrink[0] = shrink[1] = 1.0f;
  if (running) {
    float top[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], z[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      shrink[h] = sums.top[h].raise(top[h], finite[h]);
      sums.sum[h] *= shrink[h];
      sums.term[h] *= shrink[h];
    }
  }
  if (with_term) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const float weighted = exp2_fast(z[i] - finite[i / 2 % 2]) * z[i];
      sums.term[i / 2 % 2] += z[i] == -infinity() ? 0.0f : weighted;
    }
  }
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    z[i] = exp2_fast(z[i] - finite[i / 2 % 2]);
    sums.sum[i / 2 % 2] += z[i];
  }
}

// --- coefficients ---

// [log-sum-exp, weight, third] of a row's loss, the first and for kTwoC the last to base 2; zeros
// without a loss.
struct Statistics {
  float lse[2] = {0, 0}, weight[2] = {0, 0}, third[2] = {0, 0};
};

// From logits to G = d L / d z; `term` gets sum G z.
template <int kColumns>
__device__ __forceinline__ void to_coefficients(float (&z)[kColumns / 2], const Lane& lane,
                                                const ColumnValues<kColumns>& values,
                                                const Statistics& rows, Kind kind, bool by_row,
                                                bool by_column, bool with_term, float (&term)[2]) {
  const bool has_labels = kind == Kind::kSupCon || kind == Kind::kTwoC;
  const uint64_t same = has_labels ? same_label<kColumns>(z, lane, values) : 0;
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    const float2 lse = pair_of(values.lse, i, lane), weight = pair_of(values.weight, i, lane);
    const float2 third = pair_of(values.third, i, lane);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int h = e / 2;
      const float logit = z[4 * i + e];
      float g = 0.0f;
      if (by_row) g += rows.weight[h] * exp2_fast(logit - rows.lse[h]);
      const float column_weight = e % 2 == 0 ? weight.x : weight.y;
      if (by_column) g += column_weight * exp2_fast(logit - (e % 2 == 0 ? lse.x : lse.y));
      if (has_labels && (same >> (4 * i + e) & 1) != 0) {
        const float column_third = !by_column ? 0.0f : e % 2 == 0 ? third.x : third.y;
        if (kind == Kind::kSupCon) {
          g -= rows.third[h] + column_third;
        } else {
          if (by_row) g -= rows.weight[h] * exp2_fast(logit - rows.third[h]);
          if (by_column) g -= column_weight * exp2_fast(logit - column_third);
        }
      }
      if (with_term) term[h] += logit == -infinity() ? 0.0f : g * logit;
      z[4 * i + e] = g;
    }
  }
}

// The first factor of the product with y: coefficients times the columns' scales, rounded, in the
// order of wgmma_registers.
template <class T, int kColumns>
__device__ __forceinline__ void pack_factor(uint32_t (&p)[kColumns / 16][4],
                                            const float (&e)[kColumns / 2], const Lane& lane,
                                            const ColumnValues<kColumns>& values, float factor) {
#pragma unroll
  for (int i = 0; i < kColumns / 8; ++i) {
    float2 scale = pair_of(values.scale, i, lane);
    scale.x *= factor;
    scale.y *= factor;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      p[i / 2][2 * (i % 2) + h] =
          pack_pair<T>(e[4 * i + 2 * h] * scale.x, e[4 * i + 2 * h + 1] * scale.y);
    }
  }
}

}  // namespace fastnce::cuda::sm90
