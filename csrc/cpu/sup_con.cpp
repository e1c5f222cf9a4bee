// The supervised contrastive loss on the CPU, and NT-Xent as its case of two rows per class.
//
// The labels never meet the matrix of similarities. Positives enter linearly, through the sums of
// the rows of each class; only the log-sum-exp over all other rows needs the matrix, without its
// diagonal. Its gradient G + G^T is symmetric like the similarities: blocks on and right of the
// diagonal are enough, each used for its rows and, transposed, for its columns.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/logit_blocks.h"
#include "../common/op_arguments.h"
#include "../common/unit_rows.h"

namespace fastnce {
namespace {

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

void check(const Arguments& a) {
  const ScalarType dtype = a.features.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), a.op, ": features has the unsupported dtype ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(a.features.dim() == 2, a.op, ": features must be (N, D).");
  check_rows(a.op, "features", a.features, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "labels", a.labels, ScalarType::Long, {a.rows()});
}

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

// Below it, exp(z - 1 / t) of unit rows may leave the range of float: z >= -1 / t, and exp(-87) is
// the smallest normal number.
constexpr double kFixedOffsetTemperature = 0.023;

// Up to this size the other rows of a class are added one by one for each of its rows; in larger
// ones, they are the sum of the class less the row itself.
constexpr int64_t kSmallClass = 8;

template <class T>
class Problem {
 public:
  explicit Problem(const Arguments& a)
      : kernels_(tile_kernels<T>()),
        a_(a),
        scale_(1 / std::sqrt(a.temperature)),
        rows_(a.rows()),
        padded_(slab_count(rows_, kernels_.width) * kernels_.width),
        fixed_offset_(a.temperature >= kFixedOffsetTemperature),
        offset_(static_cast<T>(1 / a.temperature)),
        feature_rows_(a.features),
        classes_(a.labels, rows_) {
    pack_unit_rows<T, T>(kernels_, feature_rows_, 0, rows_, true, scale_, {&scaled_, &transposed_});
    number_large_classes();
  }

  // loss, has_positive, lse (N,).
  void forward(T* loss, bool* has_positive, T* lse) {
    sums_.resize(rows_);
    fixed_offset_ ? sum_symmetric() : sum_rows();
    const Buffer<double> class_sums = sum_classes(nullptr);
    run_blocks(rows_, 16, 8 * a_.depth(), [&](int64_t begin, int64_t end) {
      Buffer<T> row(a_.depth()), other(a_.depth());
      for (int64_t i = begin; i < end; ++i) {
        has_positive[i] = classes_.positives(i) > 0;
        lse[i] = sums_[i].sum == 0 ? T(0) : static_cast<T>(sums_[i].log());
        loss[i] = T(0);
        if (!has_positive[i]) continue;
        const double positive = mean_positive(i, class_sums, row.data(), other.data());
        loss[i] = static_cast<T>(sums_[i].log_minus(positive));
      }
    });
  }

  void weights_from_sums(double grad_scale, bool mean) {
    int64_t count = 0;
    for (int64_t i = 0; i < rows_; ++i) count += classes_.positives(i) > 0;
    set_weights([&](int64_t) { return mean && count > 0 ? grad_scale / count : grad_scale; });
    if (rows_ == 1) return;  // an empty sum
    for (int64_t i = 0; i < rows_; ++i) set_softmax(i, sums_[i].maximum, 1 / sums_[i].sum);
  }

  void weights_from_lse(const std::vector<double>& grad_loss, const T* lse) {
    set_weights([&](int64_t i) { return grad_loss[i]; });
    for (int64_t i = 0; i < rows_; ++i) set_softmax(i, lse[i], 1);
  }

  // Fills the gradient of the features if it is needed; returns that of the temperature.
  double gradients(const Tensor& grad_features) {
    const OutputRows out(grad_features);
    const int64_t width = kernels_.width, limit = run_slabs(), panel = panel_height(limit);
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    if (rows_ > panel) {
      column_gradient_ = SlabMatrix<T>(rows_, a_.depth(), width);
      column_gradient_.fill_zero();
    }
    const Buffer<double> class_sums = sum_classes(nullptr), weighted = sum_classes(&weights_);
    std::vector<double> terms(rows_, 0.0);
    for (int64_t r0 = 0; r0 < rows_; r0 += panel) {
      const int64_t rows = std::min(panel, rows_ - r0), first = r0 / width;
      SlabMatrix<T> products(rows, a_.depth(), width);
      for (int64_t s0 = first; s0 < transposed_.slabs(); s0 += limit) {
        const int64_t s1 = std::min(transposed_.slabs(), s0 + limit);
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
      finish_rows(r0, products, class_sums, weighted, out, terms.data());
    }
    // Every logit is counted once for its row and once for its column.
    return -std::accumulate(terms.begin(), terms.end(), 0.0) / (2 * a_.temperature);
  }

 private:
  int64_t run_slabs() const { return std::min(transposed_.slabs(), block_slabs(kernels_)); }

  // Rows of a panel: whole slabs, so that no block lies on both sides of the diagonal blocks' edge.
  // Few rows have lower panels, for the blocks on the diagonal are computed on both sides of it.
  int64_t panel_height(int64_t limit) const {
    constexpr int64_t kLeast = 96;
    const int64_t width = kernels_.width;
    const int64_t most = std::min(panel_rows<T>(limit * width), std::max(kLeast, rows_ / 8));
    return std::min(padded_, std::max(width, most / width * width));
  }

  void sum_symmetric() {
    const int64_t width = kernels_.width, limit = run_slabs(), panel = panel_height(limit);
    Buffer<T> sum(limit * panel);
    Buffer<double> total(padded_, 0.0);
    for (int64_t r0 = 0; r0 < rows_; r0 += panel) {
      const int64_t rows = std::min(panel, rows_ - r0), end_of_panel = r0 + rows;
      for (int64_t s0 = r0 / width; s0 < transposed_.slabs(); s0 += limit) {
        const int64_t s1 = std::min(transposed_.slabs(), s0 + limit);
        // Sums run down the columns in order, so there each slab must be one task.
        const int64_t per_task = s1 * width > end_of_panel ? rows : task_rows(rows, s1 - s0);
        for_logits<T>(kernels_, scaled_, r0, rows, transposed_, s0, s1, nullptr, per_task,
                      [&](int64_t slab, int64_t begin, int64_t end, T* z) {
                        const int64_t c0 = slab * width;
                        fill_diagonal(slab, r0 + begin, r0 + end, z, -kInfinity);
                        kernels_.exp_sums(end - begin, transposed_.lanes(slab), z, offset_,
                                          &sum[(slab - s0) * rows + begin],
                                          c0 < end_of_panel ? nullptr : &total[c0]);
                      });
        run_blocks(rows, kTaskRows, 4 * (s1 - s0), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t at = r; at < (s1 - s0) * rows; at += rows) total[r0 + r] += sum[at];
          }
        });
      }
    }
    for (int64_t i = 0; i < rows_; ++i) sums_[i].add(offset_, total[i]);
  }

  // With a maximum for each row, so row by row.
  void sum_rows() {
    const int64_t limit = run_slabs(), slabs = transposed_.slabs();
    const int64_t panel = std::min(kPanelRows, rows_), size = limit * panel;
    Buffer<T> offset(size), sum(size), moment(size);
    for (int64_t r0 = 0; r0 < rows_; r0 += panel) {
      const int64_t rows = std::min(panel, rows_ - r0);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits<T>(kernels_, scaled_, r0, rows, transposed_, s0, s1, nullptr,
                      task_rows(rows, s1 - s0),
                      [&](int64_t slab, int64_t begin, int64_t end, T* z) {
                        const int64_t at = (slab - s0) * rows + begin;
                        fill_diagonal(slab, r0 + begin, r0 + end, z, -kInfinity);
                        kernels_.exp_rows(end - begin, transposed_.lanes(slab), z, &offset[at],
                                          &sum[at], &moment[at]);
                      });
        run_blocks(rows, kTaskRows, 16 * (s1 - s0), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t at = r; at < (s1 - s0) * rows; at += rows) {
              sums_[r0 + r].add(offset[at], sum[at]);
            }
          }
        });
      }
    }
  }

  // Sets z_ii of rows [begin, end) where the slab has it.
  void fill_diagonal(int64_t slab, int64_t begin, int64_t end, T* z, T value) const {
    const int64_t width = kernels_.width, c0 = slab * width;
    for (int64_t i = std::max(begin, c0); i < std::min(end, c0 + width); ++i) {
      z[(i - begin) * width + (i - c0)] = value;
    }
  }

  void number_large_classes() {
    large_number_.assign(classes_.count(), -1);
    for (int64_t c = 0; c < classes_.count(); ++c) {
      if (classes_.size(c) <= kSmallClass) continue;
      large_number_[c] = static_cast<int64_t>(large_.size());
      large_.push_back(c);
    }
  }

  // For each large class, the sum of its scaled rows, weighted if `weights` is not null.
  Buffer<double> sum_classes(const Buffer<double>* weights) const {
    const int64_t depth = a_.depth(), count = static_cast<int64_t>(large_.size());
    Buffer<double> sums(count * depth, 0.0);
    run_tasks(count, 4 * depth * kSmallClass, [&](int64_t task) {
      Buffer<T> row(depth);
      double* sum = sums.data() + task * depth;
      const int64_t* member = classes_.begin(large_[task]);
      for (int64_t m = 0; m < classes_.size(large_[task]); ++m) {
        scaled_.copy_row_out(member[m], row.data());
        const double weight = weights == nullptr ? 1.0 : (*weights)[member[m]];
        for (int64_t d = 0; d < depth; ++d) sum[d] += weight * row[d];
      }
    });
    return sums;
  }

  // The mean logit of row i with its positives, of which it has at least one.
  double mean_positive(int64_t i, const Buffer<double>& class_sums, T* row, T* other) const {
    const int64_t depth = a_.depth(), c = classes_.of(i);
    double total = 0;
    scaled_.copy_row_out(i, row);
    if (large_number_[c] >= 0) {
      const double* sum = class_sums.data() + large_number_[c] * depth;
      for (int64_t d = 0; d < depth; ++d) total += row[d] * (sum[d] - row[d]);
    } else {
      for (int64_t m = 0; m < classes_.size(c); ++m) {
        const int64_t j = classes_.begin(c)[m];
        if (j == i) continue;
        scaled_.copy_row_out(j, other);
        total += kernels_.dot(depth, row, other);
      }
    }
    return total / static_cast<double>(classes_.positives(i));
  }

  // Subtracts sum over the positives j of row i of (w_i + w_j) / |P| times their scaled rows.
  void subtract_targets(int64_t i, const Buffer<double>& class_sums, const Buffer<double>& weighted,
                        T* row, double* target, T* gradient) const {
    const int64_t depth = a_.depth(), c = classes_.of(i);
    if (classes_.size(c) == 1) return;
    const double each = 1 / static_cast<double>(classes_.positives(i)), own = weights_[i];
    if (large_number_[c] >= 0) {
      const double* sum = class_sums.data() + large_number_[c] * depth;
      const double* weighted_sum = weighted.data() + large_number_[c] * depth;
      scaled_.copy_row_out(i, row);
      for (int64_t d = 0; d < depth; ++d) {
        target[d] = own * (sum[d] - row[d]) + (weighted_sum[d] - own * row[d]);
      }
    } else {
      std::fill_n(target, depth, 0.0);
      for (int64_t m = 0; m < classes_.size(c); ++m) {
        const int64_t j = classes_.begin(c)[m];
        if (j == i) continue;
        scaled_.copy_row_out(j, row);
        const double weight = own + weights_[j];
        for (int64_t d = 0; d < depth; ++d) target[d] += weight * row[d];
      }
    }
    for (int64_t d = 0; d < depth; ++d) {
      gradient[d] = static_cast<T>(gradient[d] - each * target[d]);
    }
  }

  // Weights are kept relative to the largest: exp(offset - lse) alone nearly fills float's range.
  template <class Weight>
  void set_weights(const Weight& weight) {
    weights_ = Buffer<double>(rows_, 0.0);
    largest_weight_ = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      if (classes_.positives(i) == 0) continue;
      weights_[i] = weight(i);
      largest_weight_ = std::max(largest_weight_, std::abs(weights_[i]));
    }
    if (largest_weight_ == 0 || !std::isfinite(largest_weight_)) largest_weight_ = 1;
    for (int64_t i = 0; i < rows_; ++i) weights_[i] /= largest_weight_;
    for (Buffer<T>* b : {&softmax_offset_, &softmax_weight_, &center_}) {
      *b = Buffer<T>(padded_, T(0));
    }
  }

  // The row's softmax is factor * exp(z - maximum). Rows without a weight need their offset as
  // well: 0 times an exp that overflows would be NaN.
  void set_softmax(int64_t i, double maximum, double factor) {
    const T offset = fixed_offset_ ? offset_ : static_cast<T>(maximum);
    softmax_offset_[i] = offset;
    softmax_weight_[i] = static_cast<T>(weights_[i] * factor * std::exp(offset - maximum));
  }

  SoftmaxValues<T> side(int64_t i) const {
    return {&softmax_offset_[i], &softmax_weight_[i], &center_[i]};
  }

  // Logits of rows [begin, end) to G + G^T of the log-sum-exps.
  void logits_to_gradient(int64_t slab, int64_t begin, int64_t end, T* z, T* moment) const {
    const int64_t c0 = slab * kernels_.width, lanes = transposed_.lanes(slab);
    if (fixed_offset_) {
      kernels_.exp_weights(end - begin, lanes, z, offset_, &softmax_weight_[begin],
                           &softmax_weight_[c0]);
    } else {
      kernels_.softmax_both(end - begin, lanes, z, side(begin), side(c0), moment);
    }
    fill_diagonal(slab, begin, end, z, T(0));
  }

  void add_to_columns(int64_t r0, int64_t rows, int64_t slab, int64_t d, const T* block) const {
    kernels_.multiply_transposed(transposed_.lanes(slab), rows, scaled_.lanes(d), block,
                                 scaled_.at(r0, d), column_gradient_.at(slab * kernels_.width, d));
  }

  // Adds what earlier panels left for these rows, and the targets, and goes back from unit rows to
  // the features.
  void finish_rows(int64_t r0, const SlabMatrix<T>& products, const Buffer<double>& class_sums,
                   const Buffer<double>& weighted, const OutputRows& out, double* terms) const {
    const int64_t depth = a_.depth();
    run_blocks(products.rows(), 16, 16 * depth, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> features(kernels_, feature_rows_, true);
      Buffer<T> gradient(depth), work(depth);
      Buffer<double> target(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        products.copy_row_out(i - r0, gradient.data());
        if (column_gradient_) {
          column_gradient_.copy_row_out(i, work.data());
          kernels_.add_scaled(depth, T(1), work.data(), gradient.data());
        }
        subtract_targets(i, class_sums, weighted, work.data(), target.data(), gradient.data());
        kernels_.scale(depth, gradient.data(), scale_ * largest_weight_, gradient.data());
        features.read(i, 1.0, work.data());
        terms[i] = features.project(gradient.data(), work.data());
        if (a_.need_features) out.store(i, work.data());
      }
    });
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  const TileKernels<T>& kernels_;
  const Arguments& a_;
  // On both sides of every product, so that z_ij and z_ji are the same number to the last bit.
  const double scale_;
  const int64_t rows_, padded_;
  const bool fixed_offset_;  // offset_ for all logits, and one exp for both of their sides
  const T offset_;
  const TensorRows feature_rows_;
  const Classes classes_;
  SlabMatrix<T> scaled_, transposed_;  // unit features times scale_
  std::vector<ExpSum> sums_;
  std::vector<int64_t> large_, large_number_;  // classes above kSmallClass, and their place there
  Buffer<double> weights_;                     // d L / d loss_i / largest_weight_
  double largest_weight_ = 1;
  Buffer<T> softmax_offset_, softmax_weight_, center_;  // padded to whole slabs
  SlabMatrix<T> column_gradient_;                       // what panels leave for the rows below them
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sup_con_forward(
    const Tensor& features, const Tensor& labels, const std::optional<Tensor>& temperature_tensor,
    double temperature, std::optional<double> grad_scale, bool mean, bool need_features,
    bool need_temperature) {
  const char* op = "sup_con_forward";
  const bool wanted = grad_scale.has_value();
  const Arguments a{op,
                    features,
                    labels,
                    temperature_value(op, temperature_tensor, temperature),
                    wanted && need_features,
                    wanted && need_temperature};
  check(a);
  const Tensor loss = new_tensor(features, {a.rows()}, a.acc());
  const Tensor has_positive = new_tensor(features, {a.rows()}, ScalarType::Bool);
  const Tensor lse = new_tensor(features, {a.rows()}, a.acc());
  const Tensor grad_features = new_gradient(features, a.need_features);
  double grad_temperature = 0;
  const auto solve = [&](auto zero) {
    using T = decltype(zero);
    Problem<T> problem(a);
    problem.forward(loss.mutable_data_ptr<T>(), has_positive.mutable_data_ptr<bool>(),
                    lse.mutable_data_ptr<T>());
    if (!a.need_features && !a.need_temperature) return;
    problem.weights_from_sums(*grad_scale, mean);
    grad_temperature = problem.gradients(grad_features);
  };
  a.acc() == ScalarType::Double ? solve(double{}) : solve(float{});
  return {loss, has_positive, lse, grad_features,
          new_scalar(features, a.need_temperature, grad_temperature)};
}

std::tuple<Tensor, Tensor> sup_con_backward(const Tensor& grad_loss, const Tensor& features,
                                            const Tensor& labels,
                                            const std::optional<Tensor>& temperature_tensor,
                                            double temperature, const Tensor& lse,
                                            bool need_features, bool need_temperature) {
  const char* op = "sup_con_backward";
  const Arguments a{op,
                    features,
                    labels,
                    temperature_value(op, temperature_tensor, temperature),
                    need_features,
                    need_temperature};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.rows()});
  check_rows(op, "lse", lse, a.acc(), {a.rows()});
  const Tensor grad_features = new_gradient(features, need_features);
  double grad_temperature = 0;
  const auto solve = [&](auto zero) {
    using T = decltype(zero);
    Problem<T> problem(a);
    problem.weights_from_lse(to_vector<double>(grad_loss),
                             torch::stable::contiguous(lse).const_data_ptr<T>());
    grad_temperature = problem.gradients(grad_features);
  };
  a.acc() == ScalarType::Double ? solve(double{}) : solve(float{});
  return {grad_features, new_scalar(features, need_temperature, grad_temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("sup_con_forward", TORCH_BOX(&sup_con_forward));
  m.impl("sup_con_backward", TORCH_BOX(&sup_con_backward));
}

}  // namespace
}  // namespace fastnce
