// The supervised contrastive loss on the CPU, and NT-Xent as its case of two rows per class.
//
// The labels never meet the matrix of similarities. Positives enter linearly, through the sums of
// the rows of each class; only the log-sum-exp over all other rows needs the matrix, without its
// diagonal.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"
#include "self_similarity.h"
#include "unit_rows.h"

namespace fastnce::sup_con {
namespace {

struct Arguments {
  const char* op;
  const Tensor& features;
  const Tensor& labels;
  double temperature;
  bool bfloat16_products, need_features, need_temperature;

  int64_t rows() const { return features.size(0); }
  int64_t depth() const { return features.size(1); }
  ScalarType acc() const { return accumulation_type(features.scalar_type()); }
};

void check(const Arguments& a) {
  check_floating(a.op, "features", a.features, 2, "(N, D)");
  check_rows(a.op, "features", a.features, a.features.scalar_type(), {a.rows(), a.depth()});
  check_rows(a.op, "labels", a.labels, ScalarType::Long, {a.rows()});
}

// The rows of each class, in order.
class Classes {
 public:
  Classes(const Tensor& labels, int64_t rows) : members_(rows), class_of_(rows) {
    const std::vector<int64_t> values = label_values(labels);
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

// What both schemes share: the classes, and what belongs to single rows.
template <class T>
class Rows {
 public:
  explicit Rows(const Arguments& arguments)
      : kernels(tile_kernels<T>()),
        a(arguments),
        scale(1 / std::sqrt(a.temperature)),
        rows(a.rows()),
        padded(fastnce::padded(rows, kernels.width)),
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

// One exponential for a logit's row and column.
template <class T>
class FixedOffset {
 public:
  explicit FixedOffset(Rows<T>& rows)
      : r_(rows),
        similarity_(r_.kernels, r_.feature_rows, r_.rows, r_.a.temperature, r_.a.bfloat16_products),
        offset_(r_.kernels.width, static_cast<T>(1 / r_.a.temperature)) {}

  const SlabMatrix<T>& units() const { return similarity_.units(); }

  void sum() {
    std::array<Buffer<double>, 2> total;
    similarity_.sum(1, exponentials(), total);
    for (int64_t i = 0; i < r_.rows; ++i) r_.sums[i].add(offset_[0], total[0][i]);
  }

  // Fills the gradient of the features if it is needed; returns that of the temperature.
  double gradients(const Tensor& grad_features) {
    Buffer<T> weight(r_.padded, T(0));
    for (int64_t i = 0; i < r_.rows; ++i) weight[i] = r_.softmax_weight(i, offset_[0]);
    similarity_.multiply(exponentials(), [&](const Tile<T>& tile) {
      r_.kernels.block_scale_both(tile.rows, tile.lanes, tile.values, &weight[tile.c0],
                                  &weight[tile.r0]);
    });
    r_.sum_targets(units());
    std::vector<double> terms(r_.rows);
    r_.finish_rows(
        0, r_.rows, units(),
        [&](int64_t i, T* gradient) { similarity_.gradient().copy_row_out(i, gradient); },
        OutputRows(grad_features), terms.data());
    return r_.temperature_gradient(terms);
  }

 private:
  auto exponentials() const {
    return [this](const Tile<T>& tile, const typename SelfSimilarity<T>::TileSums& sums) {
      std::fill_n(sums.row[0], tile.rows, T(0));
      r_.kernels.block_exp(tile.rows, tile.lanes, tile.values, offset_.data(), sums.column[0],
                           sums.row[0]);
    };
  }

  Rows<T>& r_;
  SelfSimilarity<T> similarity_;
  const Buffer<T> offset_;  // 1 / t, a slab's width of it
};

// With a maximum for each row: for temperatures at which one offset for all logits would let exp
// leave its range.
//
// All logits are computed for the sums. The gradient's matrix G + G^T is symmetric like the
// similarities: blocks on and right of the diagonal are enough, each used for its rows and,
// transposed, for its columns.
template <class T>
class RunningMaximum {
 public:
  explicit RunningMaximum(Rows<T>& rows) : r_(rows), kernels_(rows.kernels) {
    pack_unit_rows<T, T>(kernels_, r_.feature_rows, 0, r_.rows, true, r_.scale,
                         {&scaled_, &transposed_});
  }

  const SlabMatrix<T>& units() const { return scaled_; }

  void sum() {
    sum_logits<T, 1>(kernels_, scaled_, transposed_, {&r_.sums},
                     [&](int64_t slab, int64_t begin, int64_t end, T* z, const auto& parts) {
                       fill_diagonal(slab, begin, end, z, -kInfinity);
                       kernels_.exp_rows(end - begin, transposed_.lanes(slab), z, parts[0].offset,
                                         parts[0].sum);
                     });
  }

  // Fills the gradient of the features if it is needed; returns that of the temperature.
  double gradients(const Tensor& grad_features) {
    const OutputRows out(grad_features);
    set_softmax();
    r_.sum_targets(scaled_);
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_)), panel = panel_height(limit);
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    if (r_.rows > panel) {
      column_gradient_ = SlabMatrix<T>(r_.rows, r_.a.depth(), width);
      column_gradient_.fill_zero();
    }
    std::vector<double> terms(r_.rows, 0.0);
    for (int64_t r0 = 0; r0 < r_.rows; r0 += panel) {
      const int64_t rows = std::min(panel, r_.rows - r0), first = r0 / width;
      SlabMatrix<T> products(rows, r_.a.depth(), width);
      for (int64_t s0 = first; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        const int64_t per_task = task_rows(rows, s1 - s0), cuts = (rows + per_task - 1) / per_task;
        for_logits(kernels_, scaled_, r0, rows, transposed_, s0, s1, z.data(), per_task,
                   [&](int64_t slab, int64_t begin, int64_t end, T* block) {
                     logits_to_gradient(slab, r0 + begin, r0 + end, block,
                                        &moment[(slab - s0) * rows + begin]);
                     if (cuts > 1 || slab * width < r0 + rows) return;
                     for (int64_t d = 0; d < scaled_.slabs(); ++d) {
                       add_to_columns(r0, rows, slab, d, block);
                     }
                   });
        // Where a block was cut into tasks, its columns wait until it is whole.
        const int64_t beyond = std::max(s0, (r0 + rows + width - 1) / width);
        if (cuts > 1 && beyond < s1) {
          run_tasks((s1 - beyond) * scaled_.slabs(), rows * width * width, [&](int64_t task) {
            const int64_t slab = beyond + task / scaled_.slabs();
            add_to_columns(r0, rows, slab, task % scaled_.slabs(), &z[(slab - s0) * rows * width]);
          });
        }
        add_row_gradient(kernels_, rows, z.data(), scaled_, s0, s1, products, s0 > first);
      }
      r_.finish_rows(
          r0, r0 + rows, scaled_, [&](int64_t i, T* gradient) { load(i, products, r0, gradient); },
          out, terms.data());
    }
    return r_.temperature_gradient(terms);
  }

 private:
  // Rows of a panel: whole slabs, so that no block lies on both sides of the diagonal blocks' edge.
  // Few rows have lower panels, for the blocks on the diagonal are computed on both sides of it.
  int64_t panel_height(int64_t limit) const {
    constexpr int64_t kLeast = 96;
    const int64_t width = kernels_.width;
    const int64_t most = std::min(panel_rows<T>(limit * width), std::max(kLeast, r_.rows / 8));
    return std::min(r_.padded, std::max(width, most / width * width));
  }

  // Sets z_ii of rows [begin, end) where the slab has it.
  void fill_diagonal(int64_t slab, int64_t begin, int64_t end, T* z, T value) const {
    const int64_t width = kernels_.width, c0 = slab * width;
    for (int64_t i = std::max(begin, c0); i < std::min(end, c0 + width); ++i) {
      z[(i - begin) * width + (i - c0)] = value;
    }
  }

  // Rows without a weight need their offset as well: 0 times an exp that overflows would be NaN.
  void set_softmax() {
    for (Buffer<T>* b : {&softmax_offset_, &softmax_weight_, &center_}) {
      *b = Buffer<T>(r_.padded, T(0));
    }
    for (int64_t i = 0; i < r_.rows; ++i) {
      if (r_.sums[i].sum != 0) softmax_offset_[i] = static_cast<T>(r_.sums[i].maximum);
      softmax_weight_[i] = r_.softmax_weight(i, softmax_offset_[i]);
    }
  }

  SoftmaxValues<T> side(int64_t i) const {
    return {&softmax_offset_[i], &softmax_weight_[i], &center_[i]};
  }

  // Logits of rows [begin, end) to G + G^T of the log-sum-exps.
  void logits_to_gradient(int64_t slab, int64_t begin, int64_t end, T* z, T* moment) const {
    const int64_t c0 = slab * kernels_.width;
    kernels_.softmax_both(end - begin, transposed_.lanes(slab), z, side(begin), side(c0), moment);
    fill_diagonal(slab, begin, end, z, T(0));
  }

  void add_to_columns(int64_t r0, int64_t rows, int64_t slab, int64_t d, const T* block) const {
    kernels_.multiply_transposed(transposed_.lanes(slab), rows, scaled_.lanes(d), block,
                                 scaled_.at(r0, d), column_gradient_.at(slab * kernels_.width, d));
  }

  // What the panel from row r0 on and those before it give to row i.
  void load(int64_t i, const SlabMatrix<T>& products, int64_t r0, T* gradient) const {
    products.copy_row_out(i - r0, gradient);
    if (!column_gradient_) return;
    Buffer<T> left(r_.a.depth());
    column_gradient_.copy_row_out(i, left.data());
    kernels_.add_scaled(r_.a.depth(), T(1), left.data(), gradient);
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  Rows<T>& r_;
  const TileKernels<T>& kernels_;
  SlabMatrix<T> scaled_, transposed_;                   // unit features times the scale
  Buffer<T> softmax_offset_, softmax_weight_, center_;  // padded to whole slabs
  SlabMatrix<T> column_gradient_;                       // what panels leave for the rows below them
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sup_con_forward(
    const Tensor& features, const Tensor& labels, const std::optional<Tensor>& temperature_tensor,
    double temperature, bool bfloat16_products, std::optional<double> grad_scale, bool mean,
    bool need_features, bool need_temperature) {
  const char* op = "sup_con_forward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  need_features = need_features && grad_scale.has_value();
  need_temperature = need_temperature && grad_scale.has_value();
  const Arguments a{op, features, labels, tau, bfloat16_products, need_features, need_temperature};
  check(a);
  const Tensor loss = new_tensor(features, {a.rows()}, a.acc());
  const Tensor has_positive = new_tensor(features, {a.rows()}, ScalarType::Bool);
  const Tensor lse = new_tensor(features, {a.rows()}, a.acc());
  const Tensor grad_features = new_gradient(features, a.need_features);
  double grad_temperature = 0;
  with_scheme<Rows, FixedOffset, RunningMaximum>(a, [&](auto& rows, auto& scheme, auto zero) {
    using T = decltype(zero);
    scheme.sum();
    rows.store_losses(scheme.units(), loss.mutable_data_ptr<T>(),
                      has_positive.mutable_data_ptr<bool>(), lse.mutable_data_ptr<T>());
    if (!a.need_features && !a.need_temperature) return;
    rows.weights_of_sum(*grad_scale, mean);
    grad_temperature = scheme.gradients(grad_features);
  });
  return {loss, has_positive, lse, grad_features,
          new_scalar(features, a.need_temperature, grad_temperature)};
}

std::tuple<Tensor, Tensor> sup_con_backward(const Tensor& grad_loss, const Tensor& features,
                                            const Tensor& labels,
                                            const std::optional<Tensor>& temperature_tensor,
                                            double temperature, const Tensor& lse,
                                            bool bfloat16_products, bool need_features,
                                            bool need_temperature) {
  const char* op = "sup_con_backward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Arguments a{op, features, labels, tau, bfloat16_products, need_features, need_temperature};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.rows()});
  check_rows(op, "lse", lse, a.acc(), {a.rows()});
  const Tensor grad_features = new_gradient(features, need_features);
  double grad_temperature = 0;
  const Tensor sums = torch::stable::contiguous(lse);
  const std::vector<double> weights = to_vector<double>(grad_loss);
  with_scheme<Rows, FixedOffset, RunningMaximum>(a, [&](auto& rows, auto& scheme, auto zero) {
    using T = decltype(zero);
    rows.sums_from_lse(sums.template const_data_ptr<T>());
    rows.set_weights([&](int64_t i) { return weights[i]; });
    grad_temperature = scheme.gradients(grad_features);
  });
  return {grad_features, new_scalar(features, need_temperature, grad_temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("sup_con_forward", TORCH_BOX(&sup_con_forward));
  m.impl("sup_con_backward", TORCH_BOX(&sup_con_backward));
}

}  // namespace
}  // namespace fastnce::sup_con
