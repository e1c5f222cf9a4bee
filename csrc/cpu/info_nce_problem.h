// One InfoNCE problem: rows of queries against the same columns (the keys of their batch element,
// shared negatives, both or neither). A batch is a list of problems. Here is what belongs to single
// rows; info_nce_sweep.h walks the matrix between them, info_nce_schemes.h says in which order,
// info_nce_jobs.h makes the list and shares it among the threads.
//
// The positive of a row is kept out of the matrix: with s the sum of the other exponentials
// relative to the positive's, loss = log(1 + s) and the gradient at the positive is -s / (1 + s).
// Nothing cancels where the positive dominates, as it does when training works.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "logit_blocks.h"
#include "unit_rows.h"

namespace fastnce {

constexpr int64_t kKeyBlock = 144, kSmallRun = 16;
constexpr int64_t kGroupRows = 96;  // a multiple of every table's width, like the next
constexpr int64_t kPartRows = 48;   // of a small problem, solved by one thread
constexpr int64_t kFewRows = 256;   // no more than one group, where keys are packed on the way
constexpr int64_t kKeptBytes = int64_t{64} << 20;  // of logits kept at a time
constexpr double kSafeBound = 40;                  // exp(-2 * 40) is far from underflow
constexpr double kUsefulBound = 1e3;

// What a call asks for. Rows are flattened: row b * N + i is query i of batch element b.
template <class T>
struct InfoNceCall {
  TensorRows query, key, negatives;
  int64_t depth = 0;
  int64_t own_negatives = 0;  // M of negatives (B, N, M, D), else 0
  bool normalize = true, symmetric = false, in_batch = true;
  double temperature = 1;
  std::optional<double> constant_logit;  // already divided by the temperature
  bool need_query = false, need_key = false, need_negatives = false, need_temperature = false;
  const double* weights = nullptr;  // d L / d loss_i per row; null: no gradients wanted
  OutputRows grad_query, grad_key, grad_negatives;
  double* temperature_terms = nullptr;  // per row: its part of sum_ij G_ij z_ij
  T *loss = nullptr, *row_lse = nullptr, *column_lse = nullptr;
};

// Columns of the matrix.
template <class T, class P>
struct KeySet {
  TensorRows source;
  int64_t first = 0, count = 0;  // rows of the source
  bool own = false;              // key i is the positive of query i
  // Unit rows (count, D) as operands of P, see PackedRows; empty: packed block by block when
  // needed.
  SlabMatrix<P> units, summands;
  Buffer<T> rests;
  SlabMatrix<T> gradient;  // (count, D) with respect to the unit rows, or empty

  void pack(const TileKernels<T>& kernels, bool normalize, double* inverse_norms) {
    if (kPaired<P>) rests = Buffer<T>(count);
    pack_unit_rows<T, P>(
        kernels, source, first, count, normalize, 1.0,
        {&units, nullptr, kPaired<P> ? &summands : nullptr, inverse_norms, rests.data()});
  }
};

// log(1 + exp(d)).
inline double softplus(double d) {
  return d > 0 ? d + std::log1p(std::exp(-d)) : std::log1p(std::exp(d));
}

// log of the other exponentials' sum over the positive's. An infinite positive makes the loss
// inf - inf.
inline double log_ratio(const ExpSum& others, double positive) {
  return others.log() - positive + 0 * std::max(positive, 0.0);
}

// log of the sum of all, `ratio` as above. Infinite logits are those of dot products alone.
inline double log_all(const ExpSum& others, double positive, double ratio) {
  if (std::isinf(positive)) return others.log() + std::max(positive, 0.0);
  return positive + softplus(ratio);
}

// P: what the large products multiply. All else is of T.
template <class T, class P>
struct InfoNceProblem {
  const TileKernels<T>& kernels;
  const InfoNceCall<T>& call;
  const int64_t first, rows;  // in the flattened rows of the call
  KeySet<T, P> keys;
  std::vector<const KeySet<T, P>*> sets;
  Buffer<double> query_inverse, key_inverse;  // 1 / ||x|| of the rows, known once they are packed
  Buffer<double> positive;                    // z of the positive
  Buffer<double> lse;                         // of the row, positive included
  Buffer<double> column_lse;
  Buffer<double> missing;  // the softmax's weight on all but the positive, times the row's weight
  Buffer<T> offset;        // subtracted before exp; padded to whole slabs
  bool fixed_offset = false;  // the same for all rows, from a bound of the logits
  // Symmetric: the same of the columns, and the factors from exponentials to the gradient.
  Buffer<T> column_offset, row_weight, column_weight;

  InfoNceProblem(const TileKernels<T>& kernels_, const InfoNceCall<T>& call_, int64_t first_,
                 int64_t rows_, const KeySet<T, P>* shared)
      : kernels(kernels_),
        call(call_),
        first(first_),
        rows(rows_),
        query_inverse(rows_),
        key_inverse(rows_),
        positive(rows_),
        lse(rows_),
        missing(rows_, 0.0),
        offset(padded_rows(), T(0)) {
    keys.source = call.key;
    keys.first = first;
    keys.own = true;
    if (call.in_batch) {
      keys.count = rows;
      keys.pack(kernels, call.normalize, key_inverse.data());
      sets.push_back(&keys);
    }
    if (wants_gradients() && call.need_key && call.in_batch) {
      keys.gradient = SlabMatrix<T>(rows, call.depth, kernels.width);
      keys.gradient.fill_zero();
    }
    if (shared != nullptr) sets.push_back(shared);
    if (call.symmetric) column_lse = Buffer<double>(rows);
    if (!call.in_batch) dot_positives();
    if (call.loss != nullptr) set_fixed_offset();
  }

  // Leaves it where no fixed offset will do.
  void set_fixed_offset() {
    const double bound = logit_bound();
    if (bound > kUsefulBound) return;
    fixed_offset = true;
    // Beyond the safe bound the top of exp's range is used as well.
    const double top = bound <= kSafeBound ? bound : bound - kSafeBound;
    std::fill_n(offset.data(), offset.size(), static_cast<T>(top));
  }

  // Whether its rows can be solved apart from one another.
  bool separable() const { return !call.symmetric && !wants_column_products(); }
  bool wants_gradients() const { return call.weights != nullptr; }
  bool wants_row_products() const {
    return wants_gradients() && (call.need_query || call.need_temperature);
  }
  bool wants_column_products() const {
    bool any = false;
    for (const KeySet<T, P>* set : sets) any = any || set->gradient;
    return any;
  }
  int64_t columns() const {
    int64_t count = 0;
    for (const KeySet<T, P>* set : sets) count += set->count;
    return count;
  }
  // Rows that a task takes on. Keys that are not packed are best read by a single group.
  int64_t group_rows() const {
    for (const KeySet<T, P>* set : sets) {
      if (!set->units) return rows;
    }
    return kGroupRows;
  }
  int64_t padded_rows() const { return slab_count(rows, kernels.width) * kernels.width; }

  void dot_positives() {
    run_blocks(rows, 16, 8 * call.depth, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> queries(kernels, call.query, call.normalize);
      UnitRowReader<T> reader(kernels, call.key, call.normalize);
      Buffer<T> query(call.depth), key(call.depth);
      for (int64_t i = begin; i < end; ++i) {
        queries.read(first + i, 1 / call.temperature, query.data());
        reader.read(first + i, 1.0, key.data());
        query_inverse[i] = queries.inverse();
        key_inverse[i] = reader.inverse();
        positive[i] = logit(kernels, call.depth, query.data(), key.data());
      }
    });
  }

  // An upper bound of all logits; infinite where it is of no use.
  double logit_bound() const {
    if (call.normalize) return 1 / call.temperature;
    double longest_key = 0;
    for (const KeySet<T, P>* set : sets) {
      longest_key = std::max(longest_key, longest_row(set->source, set->first, set->count));
    }
    const double bound = longest_row(call.query, first, rows) * longest_key / call.temperature;
    return std::isfinite(bound) ? bound : std::numeric_limits<double>::infinity();
  }

  double longest_row(const TensorRows& source, int64_t begin, int64_t count) const {
    constexpr int64_t kBlock = 64;
    std::vector<double> longest((count + kBlock - 1) / kBlock, 0.0);
    run_blocks(count, kBlock, 2 * call.depth, [&](int64_t b, int64_t e) {
      Buffer<T> row(call.depth);
      double top = 0;
      for (int64_t r = b; r < e; ++r) {
        source.load(begin + r, row.data());
        const double norm = row_norm(kernels, call.depth, row.data());
        top = norm > top || std::isnan(norm) ? norm : top;
      }
      longest[b / kBlock] = top;
    });
    double top = 0;
    for (double x : longest) top = x > top || std::isnan(x) ? x : top;
    return top;
  }

  // The row's exponentials that stand neither in the matrix nor for the positive.
  ExpSum other_terms(int64_t i) const {
    ExpSum sum;
    if (call.constant_logit) sum.add_logit(*call.constant_logit);
    if (call.own_negatives == 0) return sum;
    UnitRowReader<T> queries(kernels, call.query, call.normalize);
    UnitRowReader<T> reader(kernels, call.negatives, call.normalize);
    Buffer<T> query(call.depth), negative(call.depth);
    queries.read(first + i, 1 / call.temperature, query.data());
    for (int64_t m = 0; m < call.own_negatives; ++m) {
      reader.read((first + i) * call.own_negatives + m, 1.0, negative.data());
      sum.add_logit(logit(kernels, call.depth, query.data(), negative.data()));
    }
    return sum;
  }

  // Completes rows [begin, end) from sum(i), the matrix's exponentials relative to offset[i].
  template <class RowSum>
  void finish_sums(int64_t begin, int64_t end, const RowSum& sum) {
    const int64_t work = 64 + 4 * call.own_negatives * call.depth;
    run_blocks(end - begin, 16, work, [&](int64_t b, int64_t e) {
      for (int64_t i = begin + b; i < begin + e; ++i) {
        ExpSum others = other_terms(i);
        others.add(offset[i], sum(i));
        const double d = log_ratio(others, positive[i]);
        lse[i] = log_all(others, positive[i], d);
        call.row_lse[first + i] = static_cast<T>(lse[i]);
        call.loss[first + i] = static_cast<T>(softplus(d));
        if (wants_gradients()) missing[i] = call.weights[first + i] / (1 + std::exp(-d));
      }
    });
  }

  // Completes a symmetric problem; both sums are relative to the offsets given.
  template <class RowSum, class ColumnSum>
  void finish_both_sums(const RowSum& row_sum, const ColumnSum& column_sum) {
    for (int64_t i = 0; i < rows; ++i) {
      const ExpSum row = row_sum(i), column = column_sum(i);
      const double d = log_ratio(row, positive[i]), c = log_ratio(column, positive[i]);
      lse[i] = log_all(row, positive[i], d);
      column_lse[i] = log_all(column, positive[i], c);
      call.row_lse[first + i] = static_cast<T>(lse[i]);
      call.column_lse[first + i] = static_cast<T>(column_lse[i]);
      call.loss[first + i] = static_cast<T>(0.5 * (softplus(d) + softplus(c)));
      if (wants_gradients()) {
        missing[i] =
            call.weights[first + i] * 0.5 * (1 / (1 + std::exp(-d)) + 1 / (1 + std::exp(-c)));
      }
    }
  }

  // Adds the gradients of rows [r0, r0 + count) that the matrix does not give and goes back from
  // unit rows to the inputs. `products`: sum_j exp(z_ij - offset) k_j as a sum over its parts, each
  // `count` rows; factor(i): from these to the gradient with respect to z.
  template <class Factor>
  void finish_rows(int64_t r0, int64_t count, const SlabMatrix<T>& products,
                   const Factor& factor) const {
    const int64_t depth = call.depth;
    const int64_t parts = products ? products.rows() / count : 0;
    const int64_t work = depth * (16 + 2 * parts + 8 * call.own_negatives);
    run_blocks(count, call.own_negatives > 0 ? 1 : 16, work, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), part(depth), query_row(depth), key_row(depth), out_row(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        const T* query = call.query.read(first + i, query_row.data());
        const T* key = call.key.read(first + i, key_row.data());
        if (parts == 0) std::fill_n(gradient.data(), depth, T(0));
        for (int64_t p = 0; p < parts; ++p) {
          products.copy_row_out(p * count + i - r0, p == 0 ? gradient.data() : part.data());
          if (p > 0) kernels.add_scaled(depth, T(1), part.data(), gradient.data());
        }
        double scale = factor(i), term = 0;
        if (call.own_negatives > 0) {
          kernels.scale(depth, gradient.data(), scale, gradient.data());
          own_negatives_gradient(i, query, gradient.data());
          scale = 1;
        }
        if (call.constant_logit) {
          const double p = call.weights[first + i] * std::exp(*call.constant_logit - lse[i]);
          term += p * *call.constant_logit;
        }
        // With respect to the unit query: scale * gradient - missing * unit key.
        T* out =
            call.need_query ? call.grad_query.begin(first + i, out_row.data()) : out_row.data();
        term += unit_row_gradient(kernels, depth, query, call.normalize, query_inverse[i], scale,
                                  gradient.data(), -missing[i] * key_inverse[i], key,
                                  1 / call.temperature, out) /
                call.temperature;
        call.temperature_terms[first + i] = term;
        if (call.need_query) call.grad_query.finish(first + i, out);
        if (call.in_batch || !call.need_key) continue;
        out = call.grad_key.begin(first + i, out_row.data());
        unit_row_gradient(kernels, depth, key, call.normalize, key_inverse[i],
                          -missing[i] * query_inverse[i], query, 0.0, query, 1 / call.temperature,
                          out);
        call.grad_key.finish(first + i, out);
      }
    });
  }

  // Adds the gradient with respect to the unit query that its own negatives give.
  void own_negatives_gradient(int64_t i, const T* query, T* gradient) const {
    constexpr int64_t kBlock = 64;  // summed apart, which bounds the rounding error
    UnitRowReader<T> reader(kernels, call.negatives, call.normalize);
    Buffer<T> unit_query(call.depth), row(call.depth), partial(call.depth);
    kernels.scale(call.depth, query, query_inverse[i] / call.temperature, unit_query.data());
    for (int64_t m = 0; m < call.own_negatives; ++m) {
      if (m % kBlock == 0) std::fill_n(partial.data(), call.depth, T(0));
      const int64_t source = (first + i) * call.own_negatives + m;
      reader.read(source, 1.0, row.data());
      const double z = logit(kernels, call.depth, unit_query.data(), row.data());
      const T g = static_cast<T>(call.weights[first + i] * std::exp(z - lse[i]));
      kernels.add_scaled(call.depth, g, row.data(), partial.data());
      if ((m + 1) % kBlock == 0 || m + 1 == call.own_negatives) {
        kernels.add_scaled(call.depth, T(1), partial.data(), gradient);
      }
      if (!call.need_negatives) continue;
      kernels.scale(call.depth, unit_query.data(), g, row.data());
      reader.project(row.data(), row.data());
      call.grad_negatives.store(source, row.data());
    }
  }

  // The gradient of in-batch keys: what the matrix gave, and each key's part as a positive.
  void finish_keys() const {
    if (!keys.gradient) return;
    const int64_t depth = call.depth;
    run_blocks(rows, 16, 16 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), query_row(depth), key_row(depth), out_row(depth);
      for (int64_t i = begin; i < end; ++i) {
        const T* query = call.query.read(first + i, query_row.data());
        const T* key = call.key.read(first + i, key_row.data());
        keys.gradient.copy_row_out(i, gradient.data());
        T* out = call.grad_key.begin(first + i, out_row.data());
        unit_row_gradient(kernels, depth, key, call.normalize, key_inverse[i], 1.0, gradient.data(),
                          -missing[i] * query_inverse[i] / call.temperature, query, 1.0, out);
        call.grad_key.finish(first + i, out);
      }
    });
  }
};

}  // namespace fastnce
