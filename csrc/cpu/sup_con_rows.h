// What both schemes of the supervised contrastive loss share: the classes, and what belongs to
// single rows.
//
// The labels never meet the matrix of similarities. Positives enter linearly, through the sums of
// the rows of each class; only the log-sum-exp over all other rows needs the matrix, without its
// diagonal.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"
#include "unit_rows.h"

namespace fastnce::sup_con {

struct Arguments {
  const char* op;
  const Tensor& features;
  const Tensor& labels;
  double temperature;
  bool need_features, need_temperature;

  int64_t rows() const { return features.size(0); }
  int64_t depth() const { return features.size(1); }
  ScalarType acc() const { return accumulation_type(features.scalar_type()); }
};

// The rows of each class, in order.
class Classes {
 public:
  Classes(const Tensor& labels, int64_t rows) : members_(rows), class_of_(rows) {
    const int64_t* data = labels.const_data_ptr<int64_t>();
    const int64_t stride = labels.stride(0);
    std::vector<int64_t> values(rows);
    for (int64_t i = 0; i < rows; ++i) values[i] = data[i * stride];
    std::iota(members_.begin(), members_.end(), int64_t{0});
    std::stable_sort(members_.begin(), members_.end(),
                     [&](int64_t i, int64_t j) { return values[i] < values[j]; });
    for (int64_t at = 0; at < rows; ++at) {
      if (at == 0 || values[members_[at]] != values[members_[at - 1]]) starts_.push_back(at);
      class_of_[members_[at]] = static_cast<int64_t>(starts_.size()) - 1;
    }
    starts_.push_back(rows);
  }

  int64_t count() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t of(int64_t row) const { return class_of_[row]; }
  int64_t size(int64_t c) const { return starts_[c + 1] - starts_[c]; }
  const int64_t* begin(int64_t c) const { return members_.data() + starts_[c]; }
  int64_t positives(int64_t row) const { return size(of(row)) - 1; }

 private:
  std::vector<int64_t> members_, class_of_, starts_;
};

// Up to this size the other rows of a class are added one by one for each of its rows; in larger
// ones, they are the sum of the class less the row itself.
constexpr int64_t kSmallClass = 8;

template <class T>
class Rows {
 public:
  using Number = T;

  explicit Rows(const Arguments& arguments)
      : kernels(tile_kernels<T>()),
        a(arguments),
        scale(1 / std::sqrt(a.temperature)),
        rows(a.rows()),
        padded(slab_count(rows, kernels.width) * kernels.width),
        feature_rows(a.features),
        sums(rows),
        classes_(a.labels, rows) {
    number_large_classes();
  }

  // loss, has_positive, lse (N,). `units`: rows / sqrt(t).
  void store_losses(const SlabMatrix<T>& units, T* loss, bool* has_positive, T* lse) const {
    const Buffer<double> class_sums = sum_classes(units, nullptr);
    run_blocks(rows, 16, 8 * a.depth(), [&](int64_t begin, int64_t end) {
      Buffer<T> row(a.depth()), other(a.depth());
      for (int64_t i = begin; i < end; ++i) {
        has_positive[i] = classes_.positives(i) > 0;
        lse[i] = sums[i].sum == 0 ? T(0) : static_cast<T>(sums[i].log());
        loss[i] = T(0);
        if (!has_positive[i]) continue;
        const double positive = mean_positive(units, i, class_sums, row.data(), other.data());
        loss[i] = static_cast<T>(sums[i].log_minus(positive));
      }
    });
  }

  void sums_from_lse(const T* lse) {
    for (int64_t i = 0; i < rows; ++i) sums[i] = {lse[i], 1};
  }

  void weights_of_sum(double grad_scale, bool mean) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) count += classes_.positives(i) > 0;
    set_weights([&](int64_t) { return mean && count > 0 ? grad_scale / count : grad_scale; });
  }

  // weight(i): d L / d loss_i. Kept relative to the largest: exp(offset - lse) alone nearly fills
  // float's range.
  template <class Weight>
  void set_weights(const Weight& weight) {
    weights_ = Buffer<double>(rows, 0.0);
    largest_weight_ = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (classes_.positives(i) == 0) continue;
      weights_[i] = weight(i);
      largest_weight_ = std::max(largest_weight_, std::abs(weights_[i]));
    }
    if (largest_weight_ == 0 || !std::isfinite(largest_weight_)) largest_weight_ = 1;
    for (int64_t i = 0; i < rows; ++i) weights_[i] /= largest_weight_;
  }

  // The row's part of the gradient with respect to its logits is this times exp(z - offset).
  T softmax_weight(int64_t i, T offset) const {
    if (sums[i].sum == 0) return T(0);  // a single row's sum is empty
    return static_cast<T>(weights_[i] / sums[i].sum * std::exp(offset - sums[i].maximum));
  }

  // Weighted sums of the classes, which finish_rows needs.
  void sum_targets(const SlabMatrix<T>& units) {
    class_sums_ = sum_classes(units, nullptr);
    weighted_sums_ = sum_classes(units, &weights_);
  }

  // From the softmaxes' part of the gradient with respect to unit rows, which load(i, row) fills
  // in, less the targets, to the features. Sets terms[i] to the row's part of what the gradient of
  // the temperature is a sum of.
  template <class Load>
  void finish_rows(int64_t first, int64_t last, const SlabMatrix<T>& units, const Load& load,
                   const OutputRows& out, double* terms) const {
    const int64_t depth = a.depth();
    run_blocks(last - first, 16, 16 * depth, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> features(kernels, feature_rows, true);
      Buffer<T> gradient(depth), work(depth);
      Buffer<double> target(depth);
      for (int64_t i = first + begin; i < first + end; ++i) {
        load(i, gradient.data());
        subtract_targets(units, i, work.data(), target.data(), gradient.data());
        kernels.scale(depth, gradient.data(), scale * largest_weight_, gradient.data());
        features.read(i, 1.0, work.data());
        terms[i] = features.project(gradient.data(), work.data());
        if (a.need_features) out.store(i, work.data());
      }
    });
  }

  // Every logit is counted once for its row and once for its column.
  double temperature_gradient(const std::vector<double>& terms) const {
    return -std::accumulate(terms.begin(), terms.end(), 0.0) / (2 * a.temperature);
  }

  const TileKernels<T>& kernels;
  const Arguments& a;
  // On both sides of every product, so that z_ij and z_ji are the same number to the last bit.
  const double scale;
  const int64_t rows, padded;
  const TensorRows feature_rows;
  std::vector<ExpSum> sums;  // over all other rows

 private:
  void number_large_classes() {
    large_number_.assign(classes_.count(), -1);
    for (int64_t c = 0; c < classes_.count(); ++c) {
      if (classes_.size(c) <= kSmallClass) continue;
      large_number_[c] = static_cast<int64_t>(large_.size());
      large_.push_back(c);
    }
  }

  // For each large class, the sum of its scaled rows, weighted if `weights` is not null.
  Buffer<double> sum_classes(const SlabMatrix<T>& units, const Buffer<double>* weights) const {
    const int64_t depth = a.depth(), count = static_cast<int64_t>(large_.size());
    Buffer<double> sums(count * depth, 0.0);
    run_tasks(count, 4 * depth * kSmallClass, [&](int64_t task) {
      Buffer<T> row(depth);
      double* sum = sums.data() + task * depth;
      const int64_t* member = classes_.begin(large_[task]);
      for (int64_t m = 0; m < classes_.size(large_[task]); ++m) {
        units.copy_row_out(member[m], row.data());
        const double weight = weights == nullptr ? 1.0 : (*weights)[member[m]];
        for (int64_t d = 0; d < depth; ++d) sum[d] += weight * row[d];
      }
    });
    return sums;
  }

  // The mean logit of row i with its positives, of which it has at least one.
  double mean_positive(const SlabMatrix<T>& units, int64_t i, const Buffer<double>& class_sums,
                       T* row, T* other) const {
    const int64_t depth = a.depth(), c = classes_.of(i);
    double total = 0;
    units.copy_row_out(i, row);
    if (large_number_[c] >= 0) {
      const double* sum = class_sums.data() + large_number_[c] * depth;
      for (int64_t d = 0; d < depth; ++d) total += row[d] * (sum[d] - row[d]);
    } else {
      for (int64_t m = 0; m < classes_.size(c); ++m) {
        const int64_t j = classes_.begin(c)[m];
        if (j == i) continue;
        units.copy_row_out(j, other);
        total += kernels.dot(depth, row, other);
      }
    }
    return total / static_cast<double>(classes_.positives(i));
  }

  // Subtracts sum over the positives j of row i of (w_i + w_j) / |P| times their scaled rows.
  void subtract_targets(const SlabMatrix<T>& units, int64_t i, T* row, double* target,
                        T* gradient) const {
    const int64_t depth = a.depth(), c = classes_.of(i);
    if (classes_.size(c) == 1) return;
    const double each = 1 / static_cast<double>(classes_.positives(i)), own = weights_[i];
    if (large_number_[c] >= 0) {
      const double* sum = class_sums_.data() + large_number_[c] * depth;
      const double* weighted_sum = weighted_sums_.data() + large_number_[c] * depth;
      units.copy_row_out(i, row);
      for (int64_t d = 0; d < depth; ++d) {
        target[d] = own * (sum[d] - row[d]) + (weighted_sum[d] - own * row[d]);
      }
    } else {
      std::fill_n(target, depth, 0.0);
      for (int64_t m = 0; m < classes_.size(c); ++m) {
        const int64_t j = classes_.begin(c)[m];
        if (j == i) continue;
        units.copy_row_out(j, row);
        const double weight = own + weights_[j];
        for (int64_t d = 0; d < depth; ++d) target[d] += weight * row[d];
      }
    }
    for (int64_t d = 0; d < depth; ++d) {
      gradient[d] = static_cast<T>(gradient[d] - each * target[d]);
    }
  }

  const Classes classes_;
  std::vector<int64_t> large_, large_number_;  // classes above kSmallClass, and their place there
  Buffer<double> weights_;                     // d L / d loss_i / largest_weight_
  Buffer<double> class_sums_, weighted_sums_;
  double largest_weight_ = 1;
};

}  // namespace fastnce::sup_con
