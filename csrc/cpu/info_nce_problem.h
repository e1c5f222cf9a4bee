// One InfoNCE problem: rows of queries against the same columns (the keys of their batch element,
// shared negatives, both or neither). A batch is a list of problems. Here is what belongs to single
// rows and columns; info_nce_passes.h walks the matrix between them.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "../common/logit_blocks.h"
#include "../common/unit_rows.h"

namespace fastnce {

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

  bool needs_row_products() const { return weights != nullptr && need_query; }
};

// The softmax weights of all rows, or of all columns (see SoftmaxValues).
template <class T>
struct SoftmaxSide {
  Buffer<T> offset, weight, center;
  SoftmaxSide() = default;
  explicit SoftmaxSide(int64_t size) : offset(size, T(0)), weight(size, T(0)), center(size, T(0)) {}

  void set(int64_t i, double offset_, double weight_, double center_) {
    offset[i] = static_cast<T>(offset_);
    weight[i] = static_cast<T>(weight_);
    center[i] = static_cast<T>(center_);
  }
  // From a sum of exponentials: weight_ times the softmax.
  void set(int64_t i, const ExpSum& total, double weight_, double center_) {
    const T shift = static_cast<T>(total.maximum);
    set(i, shift, weight_ / total.sum * std::exp(shift - total.maximum), center_);
  }
  T gradient(int64_t i, double z) const {
    return static_cast<T>(weight[i] * std::exp(z - offset[i]));
  }
  double moment(int64_t i, double z) const {
    return weight[i] * std::exp(z - offset[i]) * (z - center[i]);
  }
  SoftmaxValues<T> at(int64_t i) const { return {&offset[i], &weight[i], &center[i]}; }
};

template <class T>
struct InfoNceProblem {
  const TileKernels<T>& kernels;
  const InfoNceCall<T>& call;
  const int64_t first, rows;  // in the flattened rows of the call
  SlabMatrix<T> queries;      // unit rows / temperature
  Columns<T> keys;
  std::vector<const Columns<T>*> segments;
  int64_t slabs = 0;
  Buffer<double> positive;  // z of the positive
  std::vector<ExpSum> sums;
  Buffer<T> column_maximum;  // symmetric only, padded to whole slabs
  Buffer<double> column_sum;
  SoftmaxSide<T> row_side, column_side;

  InfoNceProblem(const TileKernels<T>& kernels_, const InfoNceCall<T>& call_, int64_t first_,
                 int64_t rows_, const Columns<T>* shared)
      : kernels(kernels_), call(call_), first(first_), rows(rows_), positive(rows_, 0.0) {
    pack_unit_rows<T>(kernels, call.query, first, rows, call.normalize, 1 / call.temperature,
                      &queries, nullptr);
    if (call.in_batch) {
      pack_unit_rows<T>(kernels, call.key, first, rows, call.normalize, 1.0,
                        call.needs_row_products() ? &keys.straight : nullptr, &keys.transposed);
      if (wants_gradients() && call.need_key) {
        keys.gradient = SlabMatrix<T>(rows, call.depth, kernels.width);
        keys.gradient.fill_zero();
      }
      segments.push_back(&keys);
    }
    if (shared != nullptr) segments.push_back(shared);
    for (const Columns<T>* columns : segments) slabs += columns->transposed.slabs();
    if (!call.in_batch) dot_positives();
  }

  bool wants_gradients() const { return call.weights != nullptr; }
  int64_t padded_rows() const { return slab_count(rows, kernels.width) * kernels.width; }
  // Half of the loss is the row's and half the column's in the symmetric form.
  double side_weight(int64_t i) const {
    return call.weights[first + i] * (call.symmetric ? 0.5 : 1.0);
  }

  void dot_positives() {
    run_blocks(rows, 16, 8 * call.depth, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> reader(kernels, call.key, call.normalize);
      Buffer<T> query(call.depth), key(call.depth);
      for (int64_t i = begin; i < end; ++i) {
        queries.copy_row_out(i, query.data());
        reader.read(first + i, 1.0, key.data());
        positive[i] = logit(kernels, call.depth, query.data(), key.data());
      }
    });
  }

  // Starts the rows' sums with the logits that are not products of the matrix.
  void start_sums() {
    sums.assign(rows, ExpSum());
    if (call.symmetric) {
      column_maximum = Buffer<T>(padded_rows(), -std::numeric_limits<T>::infinity());
      column_sum = Buffer<double>(padded_rows(), 0.0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (!call.in_batch) sums[i].add_logit(positive[i]);
      if (call.constant_logit) sums[i].add_logit(*call.constant_logit);
    }
    const int64_t count = call.own_negatives, depth = call.depth;
    if (count == 0) return;
    run_tasks(rows, 4 * count * depth, [&](int64_t i) {
      UnitRowReader<T> reader(kernels, call.negatives, call.normalize);
      Buffer<T> query(depth), negative(depth);
      queries.copy_row_out(i, query.data());
      for (int64_t m = 0; m < count; ++m) {
        reader.read((first + i) * count + m, 1.0, negative.data());
        sums[i].add_logit(logit(kernels, depth, query.data(), negative.data()));
      }
    });
  }

  ExpSum column_total(int64_t i) const {
    ExpSum total;
    const double maximum = column_maximum[i];
    total.add(std::isfinite(maximum) ? maximum : 0.0, column_sum[i]);
    return total;
  }

  void store_loss(int64_t i) const {
    double loss = sums[i].log_minus(positive[i]);
    call.row_lse[first + i] = static_cast<T>(sums[i].log());
    if (call.symmetric) {
      const ExpSum column = column_total(i);
      loss = 0.5 * (loss + column.log_minus(positive[i]));
      call.column_lse[first + i] = static_cast<T>(column.log());
    }
    call.loss[first + i] = static_cast<T>(loss);
  }

  void sides_from_sums() {
    row_side = SoftmaxSide<T>(rows);
    if (call.symmetric) column_side = SoftmaxSide<T>(padded_rows());
    for (int64_t i = 0; i < rows; ++i) {
      row_side.set(i, sums[i], side_weight(i), positive[i]);
      if (call.symmetric) column_side.set(i, column_total(i), side_weight(i), positive[i]);
    }
  }

  void sides_from_lse(const T* row_lse, const T* column_lse) {
    if (call.in_batch && call.need_temperature) dot_positives();
    row_side = SoftmaxSide<T>(rows);
    if (call.symmetric) column_side = SoftmaxSide<T>(padded_rows());
    for (int64_t i = 0; i < rows; ++i) {
      row_side.set(i, row_lse[first + i], side_weight(i), positive[i]);
      if (call.symmetric) column_side.set(i, column_lse[first + i], side_weight(i), positive[i]);
    }
  }

  // Calls body(row, its element) for the positives among rows [begin, end) of a slab.
  template <class Body>
  void for_positives(const Columns<T>& columns, int64_t slab, int64_t begin, int64_t end, T* z,
                     const Body& body) const {
    if (&columns != &keys) return;
    const int64_t c0 = slab * kernels.width, c1 = c0 + kernels.width;
    for (int64_t i = std::max(begin, c0); i < std::min(end, c1); ++i) {
      body(i, z[(i - begin) * kernels.width + (i - c0)]);
    }
  }

  void subtract_targets(const Columns<T>& columns, int64_t slab, int64_t begin, int64_t end,
                        T* z) const {
    for_positives(columns, slab, begin, end, z,
                  [&](int64_t i, T& g) { g -= static_cast<T>(call.weights[first + i]); });
  }

  // The rest of the gradients of rows [r0, ...): logits outside the matrix, then the way from unit
  // rows back to the inputs. `products` holds sum_j G_ij k_j over the matrix; it may be empty.
  void finish_rows(int64_t r0, int64_t count, const SlabMatrix<T>& products) const {
    const int64_t depth = call.depth;
    const int64_t work = depth * (16 + 8 * call.own_negatives);
    run_blocks(count, call.own_negatives > 0 ? 1 : 16, work, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> queries_in(kernels, call.query, call.normalize);
      Buffer<T> gradient(depth), scaled(depth), row(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        if (products) {
          products.copy_row_out(i - r0, gradient.data());
        } else {
          std::fill_n(gradient.data(), depth, T(0));
        }
        queries.copy_row_out(i, scaled.data());
        double term = target_term(i);
        if (call.constant_logit) term += row_side.moment(i, *call.constant_logit);
        if (!call.in_batch) {
          term += row_side.moment(i, positive[i]);
          positive_gradient(i, scaled.data(), gradient.data(), row.data());
        }
        if (call.own_negatives > 0) {
          term += own_negatives_gradient(i, scaled.data(), gradient.data(), row.data());
        }
        call.temperature_terms[first + i] += term;
        if (!call.need_query) continue;
        queries_in.read(first + i, 1.0, scaled.data());
        kernels.scale(depth, gradient.data(), 1 / call.temperature, gradient.data());
        queries_in.project(gradient.data(), scaled.data());
        call.grad_query.store(first + i, scaled.data());
      }
    });
  }

  // What the positive, with weight -1, adds to sum_j G_ij (z_ij - center).
  double target_term(int64_t i) const {
    double t = positive[i] - row_side.center[i];
    if (call.symmetric) t = 0.5 * (t + positive[i] - column_side.center[i]);
    return -call.weights[first + i] * t;
  }

  void positive_gradient(int64_t i, const T* query, T* gradient, T* row) const {
    UnitRowReader<T> reader(kernels, call.key, call.normalize);
    reader.read(first + i, 1.0, row);
    const T g = row_side.gradient(i, positive[i]) - static_cast<T>(call.weights[first + i]);
    kernels.add_scaled(call.depth, g, row, gradient);
    if (!call.need_key) return;
    kernels.scale(call.depth, query, g, row);
    reader.project(row, row);
    call.grad_key.store(first + i, row);
  }

  // Returns the negatives' part of sum_j G_ij (z_ij - center).
  double own_negatives_gradient(int64_t i, const T* query, T* gradient, T* row) const {
    constexpr int64_t kBlock = 64;  // summed apart, which bounds the rounding error
    UnitRowReader<T> reader(kernels, call.negatives, call.normalize);
    Buffer<T> partial(call.depth);
    double moment = 0;
    for (int64_t m = 0; m < call.own_negatives; ++m) {
      if (m % kBlock == 0) std::fill_n(partial.data(), call.depth, T(0));
      const int64_t source = (first + i) * call.own_negatives + m;
      reader.read(source, 1.0, row);
      const T z = logit(kernels, call.depth, query, row), g = row_side.gradient(i, z);
      moment += row_side.moment(i, z);
      kernels.add_scaled(call.depth, g, row, partial.data());
      if ((m + 1) % kBlock == 0 || m + 1 == call.own_negatives) {
        kernels.add_scaled(call.depth, T(1), partial.data(), gradient);
      }
      if (!call.need_negatives) continue;
      kernels.scale(call.depth, query, g, row);
      reader.project(row, row);
      call.grad_negatives.store(source, row);
    }
    return moment;
  }

  void finish_keys() const {
    if (!keys.gradient) return;
    store_row_gradients(kernels, call.key, first, call.normalize, keys.gradient, call.grad_key);
  }
};

}  // namespace fastnce
