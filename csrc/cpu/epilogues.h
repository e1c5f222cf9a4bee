// What is done to a slab of logits z = q . k / temperature after its product: softmax sums and the
// weights of the gradient. Lanes that hold no column are selected away, never multiplied by zero,
// so whatever their memory holds has no effect.
#pragma once

#include "tile_kernels.h"
#include "vector.h"

namespace fastnce::FASTNCE_ISA {

// Visits the vectors of a row: body(index of the first lane, mask of lanes that hold a column).
template <class T, class Body>
inline __attribute__((always_inline)) void for_vectors(int64_t lanes, Body body) {
  const Signed<T> number = lane_numbers<T>();
  for (int64_t j = 0; j < lanes; j += kLanes<T>) {
    const auto left = static_cast<LaneInteger<T>>(lanes - j);
    body(j, number < left);
  }
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// The offset under which exp is summed: the maximum, or 0 where that would make inf - inf.
template <class T>
inline T finite_or_zero(T maximum) {
  return maximum - maximum == 0 ? maximum : T(0);
}

template <class T>
void exp_rows(int64_t rows, int64_t lanes, const T* z, T* offset, T* sum) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Vector<T> maximum = splat(-kInfinity<T>);
    for_vectors<T>(lanes, [&](int64_t j, Signed<T> valid) {
      const Vector<T> x = load(z + j);
      maximum = Max::apply(valid ? x : maximum, maximum);
    });
    const T shift = finite_or_zero(reduce<Max, T>(maximum));
    Vector<T> total = {};
    for_vectors<T>(lanes, [&](int64_t j, Signed<T> valid) {
      total += valid ? exp(load(z + j) - shift) : Vector<T>{};
    });
    offset[r] = shift;
    sum[r] = reduce<Sum, T>(total);
  }
}

template <class T>
void scale_rows(int64_t rows, int64_t lanes, T* z, const T* factor) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    for (int64_t j = 0; j < lanes; j += kLanes<T>) store(z + j, load(z + j) * factor[r]);
  }
}

// Per-column values are read a vector at a time; the caller pads them to the slab's width.
template <class T>
void softmax_both(int64_t rows, int64_t lanes, T* z, const SoftmaxValues<T>& row,
                  const SoftmaxValues<T>& column, T* moment) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Vector<T> weighted = {};
    for_vectors<T>(lanes, [&](int64_t j, Signed<T> valid) {
      const Vector<T> x = load(z + j), g = exp(x - row.offset[r]) * row.weight[r];
      const Vector<T> by_column = exp(x - load(column.offset + j)) * load(column.weight + j);
      store(z + j, g + by_column);
      const Vector<T> moments = g * (x - row.center[r]) + by_column * (x - load(column.center + j));
      weighted += valid ? moments : Vector<T>{};
    });
    moment[r] = reduce<Sum, T>(weighted);
  }
}

// Lanes of the vector at j that are allowed in row r (not the row itself), and those of its class.
template <class T>
struct LabelMasks {
  Signed<T> allowed, same;
  LabelMasks(Signed<T> valid, int64_t j, int64_t self, LaneInteger<T> row_label,
             const LaneInteger<T>* column_label) {
    // self may lie anywhere outside the slab; clamped, the comparison fits a lane.
    const int64_t lane = self - j < -1 ? -1 : self - j > kLanes<T> ? kLanes<T> : self - j;
    allowed = valid & (lane_numbers<T>() != static_cast<LaneInteger<T>>(lane));
    same = allowed & (load(column_label + j) == row_label);
  }
};

template <class T>
void label_sums(int64_t rows, int64_t lanes, const T* z, int64_t self,
                const LaneInteger<T>* row_label, const LaneInteger<T>* column_label,
                const LabelSums<T>& out) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Vector<T> all_top = splat(-kInfinity<T>), same_top = all_top;
    for_vectors<T>(lanes, [&](int64_t j, Signed<T> valid) {
      const LabelMasks<T> mask(valid, j, self + r, row_label[r], column_label);
      const Vector<T> x = load(z + j);
      all_top = Max::apply(mask.allowed ? x : all_top, all_top);
      same_top = Max::apply(mask.same ? x : same_top, same_top);
    });
    const T all_shift = finite_or_zero(reduce<Max, T>(all_top));
    const T same_shift = finite_or_zero(reduce<Max, T>(same_top));
    Vector<T> all_total = {}, same_total = {};
    for_vectors<T>(lanes, [&](int64_t j, Signed<T> valid) {
      const LabelMasks<T> mask(valid, j, self + r, row_label[r], column_label);
      const Vector<T> x = load(z + j);
      all_total += mask.allowed ? exp(x - all_shift) : Vector<T>{};
      same_total += mask.same ? exp(x - same_shift) : Vector<T>{};
    });
    out.all_offset[r] = all_shift;
    out.all_sum[r] = reduce<Sum, T>(all_total);
    out.same_offset[r] = same_shift;
    out.same_sum[r] = reduce<Sum, T>(same_total);
  }
}

template <class T>
void label_gradient(int64_t rows, int64_t lanes, T* z, int64_t self,
                    const LaneInteger<T>* row_label, const LaneInteger<T>* column_label,
                    const LabelWeights<T>& row, const LabelWeights<T>& column, T* moment) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Vector<T> weighted = {};
    for_vectors<T>(lanes, [&](int64_t j, Signed<T> valid) {
      const LabelMasks<T> mask(valid, j, self + r, row_label[r], column_label);
      const Vector<T> x = load(z + j);
      const Vector<T> all = exp(x - row.all_offset[r]) * row.all_weight[r];
      const Vector<T> all_by_column =
          exp(x - load(column.all_offset + j)) * load(column.all_weight + j);
      // Where the class differs these may overflow, and are selected away.
      const Vector<T> same = exp(x - row.same_offset[r]) * row.same_weight[r];
      const Vector<T> same_by_column =
          exp(x - load(column.same_offset + j)) * load(column.same_weight + j);
      const Vector<T> by_row = all - (mask.same ? same : Vector<T>{});
      const Vector<T> by_column = all_by_column - (mask.same ? same_by_column : Vector<T>{});
      store(z + j, mask.allowed ? by_row + by_column : Vector<T>{});
      weighted += mask.allowed ? by_row * (x - row.center[r]) : Vector<T>{};
    });
    moment[r] = reduce<Sum, T>(weighted);
  }
}

template <class T, int kVectors>
void label_exp_of(int64_t rows, int64_t lanes, T* z, T offset, const LaneInteger<T>* row_label,
                  const LaneInteger<T>* column_label, const LabelExpSums<T>& out) {
  constexpr int64_t kLast = (kVectors - 1) * kLanes<T>;
  const Signed<T> valid = lane_numbers<T>() < static_cast<LaneInteger<T>>(lanes - kLast);
  Vector<T> all_down[kVectors] = {}, same_down[kVectors] = {};
  Signed<T> label[kVectors];
  for (int v = 0; v < kVectors; ++v) label[v] = load(column_label + v * kLanes<T>);
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Vector<T> all = {}, same = {};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> e = exp(load(z + v * kLanes<T>) - offset);
      store(z + v * kLanes<T>, e);
      const Vector<T> real = v + 1 < kVectors ? e : valid ? e : Vector<T>{};
      const Vector<T> alike = label[v] == row_label[r] ? real : Vector<T>{};
      all += real;
      same += alike;
      all_down[v] += real;
      same_down[v] += alike;
    }
    out.row_all[r] = reduce<Sum, T>(all);
    out.row_same[r] = reduce<Sum, T>(same);
  }
  for (int v = 0; v < kVectors; ++v) {
    store(out.column_all + v * kLanes<T>, all_down[v]);
    store(out.column_same + v * kLanes<T>, same_down[v]);
  }
}

template <class T>
void label_exp(int64_t rows, int64_t lanes, T* z, T offset, const LaneInteger<T>* row_label,
               const LaneInteger<T>* column_label, const LabelExpSums<T>& out) {
  with_vectors<T>(lanes, [&](auto count) {
    label_exp_of<T, decltype(count)::value>(rows, lanes, z, offset, row_label, column_label, out);
  });
}

template <class T>
void label_scale(int64_t rows, int64_t lanes, T* e, const LaneInteger<T>* row_label,
                 const LaneInteger<T>* column_label, const LabelFactors<T>& row,
                 const LabelFactors<T>& column) {
  for (int64_t r = 0; r < rows; ++r, e += kWidth<T>) {
    const T other = row.other[r], same = row.same[r];
    for (int64_t j = 0; j < lanes; j += kLanes<T>) {
      const Signed<T> alike = load(column_label + j) == row_label[r];
      store(e + j,
            load(e + j) * (alike ? load(column.same + j) + same : load(column.other + j) + other));
    }
  }
}

// Rows of a block are keys and its lanes are queries, so that sums over keys run down the lanes.

template <class T>
void block_maximum(int64_t rows, int64_t lanes, const T* z, T* maximum) {
  for (int64_t j = 0; j < lanes; j += kLanes<T>) {
    Vector<T> top = load(maximum + j);
    for (int64_t r = 0; r < rows; ++r) top = Max::apply(load(z + r * kWidth<T> + j), top);
    store(maximum + j, top);
  }
}

template <class T, int kVectors, bool kColumns>
void exp_vectors(int64_t rows, int64_t lanes, T* z, const T* offset, T* sum, T* column_sum) {
  Vector<T> by[kVectors], total[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) by[v] = load(offset + v * kLanes<T>);
  const Signed<T> number = lane_numbers<T>();
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Vector<T> across = {};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> e = exp(load(z + v * kLanes<T>) - by[v]);
      store(z + v * kLanes<T>, e);
      total[v] += e;
      if constexpr (kColumns) {
        const auto left = static_cast<LaneInteger<T>>(lanes - v * kLanes<T>);
        across += number < left ? e : Vector<T>{};
      }
    }
    if constexpr (kColumns) column_sum[r] += reduce<Sum, T>(across);
  }
  for (int v = 0; v < kVectors; ++v) store(sum + v * kLanes<T>, total[v]);
}

template <class T>
void block_exp(int64_t rows, int64_t lanes, T* z, const T* offset, T* sum, T* column_sum) {
  with_vectors<T>(lanes, [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    if (column_sum == nullptr) {
      exp_vectors<T, kVectors, false>(rows, lanes, z, offset, sum, column_sum);
    } else {
      exp_vectors<T, kVectors, true>(rows, lanes, z, offset, sum, column_sum);
    }
  });
}

template <class T>
void block_scale_both(int64_t rows, int64_t lanes, T* e, const T* lane_weight,
                      const T* row_weight) {
  for (int64_t r = 0; r < rows; ++r, e += kWidth<T>) {
    const T row = row_weight[r];
    for (int64_t j = 0; j < lanes; j += kLanes<T>) {
      store(e + j, load(e + j) * (load(lane_weight + j) + row));
    }
  }
}

template <class T>
void block_exp_both(int64_t rows, int64_t lanes, T* z, const T* lane_offset, const T* lane_weight,
                    const T* row_offset, const T* row_weight) {
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    const T offset = row_offset[r], weight = row_weight[r];
    for (int64_t j = 0; j < lanes; j += kLanes<T>) {
      const Vector<T> x = load(z + j);
      store(z + j,
            exp(x - load(lane_offset + j)) * load(lane_weight + j) + exp(x - offset) * weight);
    }
  }
}

template <class T, int kVectors>
void exclude_equal_vectors(int64_t rows, T* z, const LaneInteger<T>* row_id,
                           const LaneInteger<T>* lane_id) {
  constexpr LaneInteger<T> kEvery = kEveryId;
  Signed<T> id[kVectors], every[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    id[v] = load(lane_id + v * kLanes<T>);
    every[v] = id[v] == kEvery;
  }
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    const Signed<T> of_row = splat(row_id[r]);
    const Signed<T> whole_row = of_row == kEvery;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Signed<T> out = (id[v] == of_row) | every[v] | whole_row;
      T* x = z + v * kLanes<T>;
      store(x, out ? splat(-kInfinity<T>) : load(x));
    }
  }
}

template <class T>
void block_exclude_equal(int64_t rows, int64_t lanes, T* z, const LaneInteger<T>* row_id,
                         const LaneInteger<T>* lane_id) {
  with_vectors<T>(lanes, [&](auto count) {
    exclude_equal_vectors<T, decltype(count)::value>(rows, z, row_id, lane_id);
  });
}

template <class T>
void block_exclude_positive(int64_t rows, int64_t lanes, const T* guide, T* z) {
  for (int64_t r = 0; r < rows; ++r, guide += kWidth<T>, z += kWidth<T>) {
    for (int64_t j = 0; j < lanes; j += kLanes<T>) {
      store(z + j, load(guide + j) > 0 ? splat(-kInfinity<T>) : load(z + j));
    }
  }
}

template <class T, int kVectors, bool kRows>
void count_above_vectors(int64_t rows, int64_t lanes, const T* z, const T* lane_bound,
                         LaneInteger<T>* lane_count, const T* row_bound,
                         LaneInteger<T>* row_count) {
  Vector<T> bound[kVectors];
  Signed<T> valid[kVectors], count[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    bound[v] = load(lane_bound + v * kLanes<T>);
    count[v] = load(lane_count + v * kLanes<T>);
    valid[v] = lane_numbers<T>() < static_cast<LaneInteger<T>>(lanes - v * kLanes<T>);
  }
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
    Signed<T> across = {};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {  // a comparison that holds is -1
      const Vector<T> x = load(z + v * kLanes<T>);
      count[v] -= x > bound[v];
      if constexpr (kRows) across -= valid[v] & (x > row_bound[r]);
    }
    if constexpr (kRows) row_count[r] += reduce<Sum, LaneInteger<T>>(across);
  }
  for (int v = 0; v < kVectors; ++v) store(lane_count + v * kLanes<T>, count[v]);
}

template <class T>
void block_count_above(int64_t rows, int64_t lanes, const T* z, const T* lane_bound,
                       LaneInteger<T>* lane_count, const T* row_bound, LaneInteger<T>* row_count) {
  with_vectors<T>(lanes, [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    if (row_count == nullptr) {
      count_above_vectors<T, kVectors, false>(rows, lanes, z, lane_bound, lane_count, row_bound,
                                              row_count);
    } else {
      count_above_vectors<T, kVectors, true>(rows, lanes, z, lane_bound, lane_count, row_bound,
                                             row_count);
    }
  });
}

// log(1 + t) of t from 0 to 1, also of small t to a few ulp: 2 artanh(u), where u is at most 1/3.
template <class T>
inline Vector<T> log_of_one_plus(Vector<T> t) {
  constexpr int kTerms = sizeof(T) == sizeof(double) ? 16 : 7;
  const Vector<T> u = t / (t + 2), square = u * u;
  Vector<T> sum = splat(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k > 0; --k) sum = sum * square + T(1) / (2 * k - 1);
  return 2 * u * sum;
}

template <class T, int kVectors, bool kGradient>
void sigmoid_vectors(int64_t rows, T* z, T bias, const LaneInteger<T>* row_label,
                     const LaneInteger<T>* lane_label, const T* lane_weight, T* loss, T* sum) {
  Vector<T> losses[kVectors] = {}, sums[kVectors] = {};
  for (int64_t r = 0; r < rows; ++r, z += kWidth<T>) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Signed<T> same = load(lane_label + v * kLanes<T>) == row_label[r];
      const Vector<T> logit = load(z + v * kLanes<T>) + bias, x = same ? -logit : logit;
      const Vector<T> t = exp(x < 0 ? x : -x);
      losses[v] += (x < 0 ? Vector<T>{} : x) + log_of_one_plus<T>(t);
      if constexpr (kGradient) {
        const Vector<T> sigmoid = (x < 0 ? t : splat(T(1))) / (t + 1);
        const Vector<T> g = (same ? -sigmoid : sigmoid) * load(lane_weight + v * kLanes<T>);
        store(z + v * kLanes<T>, g);
        sums[v] += g;
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(loss + v * kLanes<T>, losses[v]);
    store(sum + v * kLanes<T>, sums[v]);
  }
}

template <class T>
void sigmoid_block(int64_t rows, int64_t lanes, T* z, T bias, const LaneInteger<T>* row_label,
                   const LaneInteger<T>* lane_label, const T* lane_weight, T* loss, T* sum) {
  with_vectors<T>(lanes, [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    if (lane_weight == nullptr) {
      sigmoid_vectors<T, kVectors, false>(rows, z, bias, row_label, lane_label, lane_weight, loss,
                                          sum);
    } else {
      sigmoid_vectors<T, kVectors, true>(rows, z, bias, row_label, lane_label, lane_weight, loss,
                                         sum);
    }
  });
}

}  // namespace fastnce::FASTNCE_ISA
