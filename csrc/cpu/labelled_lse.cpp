// One block of a larger matrix of similarities: rows against the columns of another process, with
// labels. The forward gives each row's log-sum-exp over all columns and over those of its label;
// merged over the blocks, these are the sums of supervised contrastive losses. The backward gives a
// block's part in the rows' gradient, as rows and as columns of the symmetric whole:
// d L / d u_i = sum_j (G_ij + G_ji) v_j / t.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "labelled_logits.h"
#include "unit_rows.h"

namespace fastnce::labelled_lse {
namespace {

struct Arguments {
  const char* op;
  const Tensor &x, &y, &x_labels, &y_labels;
  double temperature;
  bool own;  // row i leaves out column i

  int64_t rows() const { return x.size(0); }
  int64_t columns() const { return y.size(0); }
  int64_t depth() const { return x.size(1); }
  ScalarType acc() const { return accumulation_type(x.scalar_type()); }
};

void check(const Arguments& a) {
  check_floating(a.op, "x", a.x, 2, "(N, D)");
  check_floating(a.op, "y", a.y, 2, "(M, D)");
  const ScalarType dtype = a.x.scalar_type();
  STD_TORCH_CHECK(!a.own || a.rows() == a.columns(), a.op, ": own needs as many columns as rows.");
  check_rows(a.op, "x", a.x, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "y", a.y, dtype, {a.columns(), a.depth()});
  check_rows(a.op, "x_labels", a.x_labels, ScalarType::Long, {a.rows()});
  check_rows(a.op, "y_labels", a.y_labels, ScalarType::Long, {a.columns()});
}

// A side's state in the backward, (count, 4) double: the lse of all and of the same label, and the
// gradients that arrive for them.
template <class T>
LabelStatistics<T> statistics(const char* op, const char* name, const Tensor& state, int64_t count,
                              int64_t padded) {
  check_rows(op, name, state, ScalarType::Double, {count, 4});
  const std::vector<double> values = to_vector<double>(state);
  LabelStatistics<T> out(padded);
  for (int64_t i = 0; i < count; ++i) {
    const double* v = &values[4 * i];
    out.set(i, {v[0], 1}, v[2], {v[1], 1}, -v[3]);  // label_gradient subtracts
  }
  return out;
}

template <class T>
class Block {
 public:
  explicit Block(const Arguments& arguments)
      : kernels_(tile_kernels<T>()),
        a_(arguments),
        scale_(1 / std::sqrt(a_.temperature)),
        x_(a_.x),
        y_(a_.y),
        inverse_(a_.rows()),
        x_labels_(padded(a_.rows(), kernels_.width), -1),
        y_labels_(padded(a_.columns(), kernels_.width), -1) {
    const std::vector<int64_t> x = label_values(a_.x_labels), y = label_values(a_.y_labels);
    std::vector<int64_t> all = x;
    all.insert(all.end(), y.begin(), y.end());
    number_classes(x, all, x_labels_);
    number_classes(y, all, y_labels_);
    pack_unit_rows<T, T>(kernels_, x_, 0, a_.rows(), true, scale_,
                         {&queries_, nullptr, nullptr, inverse_.data()});
  }

  // Fills lse (N, 2).
  void sum(double* lse) {
    pack_unit_rows<T, T>(kernels_, y_, 0, a_.columns(), true, scale_, {nullptr, &transposed_});
    std::vector<ExpSum> all(a_.rows()), same(a_.rows());
    logits().sum(all, same);
    for (int64_t i = 0; i < a_.rows(); ++i) {
      lse[2 * i] = all[i].log();
      lse[2 * i + 1] = same[i].log();
    }
  }

  // Fills the gradient of x (N, D), in T; returns that of the temperature.
  double gradients(const Tensor& x_state, const Tensor& y_state, T* grad_x) {
    pack_unit_rows<T, T>(kernels_, y_, 0, a_.columns(), true, scale_, {&straight_, &transposed_});
    double total = 0;
    logits().gradients(
        statistics<T>(a_.op, "x_state", x_state, a_.rows(), x_labels_.size()),
        statistics<T>(a_.op, "y_state", y_state, a_.columns(), y_labels_.size()),
        [&](int64_t, int64_t rows, int64_t slabs, const T* moments) {
          total = std::accumulate(moments, moments + slabs * rows, total);
        },
        [&](int64_t r0, const SlabMatrix<T>& products) { finish_rows(r0, products, grad_x); });
    return -total / a_.temperature;
  }

 private:
  LabelledLogits<T> logits() const {
    return {kernels_, queries_, transposed_, straight_, x_labels_, y_labels_, a_.own};
  }

  void finish_rows(int64_t r0, const SlabMatrix<T>& products, T* grad_x) const {
    const int64_t depth = a_.depth();
    run_blocks(products.rows(), 16, 8 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), row(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        products.copy_row_out(i - r0, gradient.data());
        unit_row_gradient(kernels_, depth, x_.read(i, row.data()), true, inverse_[i], scale_,
                          gradient.data(), 0.0, gradient.data(), 1.0, grad_x + i * depth);
      }
    });
  }

  using Label = typename TileKernels<T>::Label;

  const TileKernels<T>& kernels_;
  const Arguments& a_;
  const double scale_;
  const TensorRows x_, y_;
  Buffer<double> inverse_;
  const Buffer<Label> x_labels_, y_labels_;
  SlabMatrix<T> queries_, transposed_, straight_;
};

Tensor labelled_lse_forward(const Tensor& x, const Tensor& y, const Tensor& x_labels,
                            const Tensor& y_labels, const std::optional<Tensor>& temperature_tensor,
                            double temperature, bool own) {
  const char* op = "labelled_lse_forward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Arguments a{op, x, y, x_labels, y_labels, tau, own};
  check(a);
  const Tensor lse = new_tensor(x, {a.rows(), 2}, ScalarType::Double);
  with_sums(a.acc(),
            [&](auto zero) { Block<decltype(zero)>(a).sum(lse.mutable_data_ptr<double>()); });
  return lse;
}

std::tuple<Tensor, Tensor> labelled_lse_backward(const Tensor& x, const Tensor& y,
                                                 const Tensor& x_labels, const Tensor& y_labels,
                                                 const std::optional<Tensor>& temperature_tensor,
                                                 double temperature, const Tensor& x_state,
                                                 const Tensor& y_state, bool own) {
  const char* op = "labelled_lse_backward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Arguments a{op, x, y, x_labels, y_labels, tau, own};
  check(a);
  const Tensor grad_x = new_tensor(x, {a.rows(), a.depth()}, a.acc());
  const Tensor grad_temperature = new_tensor(x, {}, ScalarType::Double);
  with_sums(a.acc(), [&](auto zero) {
    using T = decltype(zero);
    *grad_temperature.mutable_data_ptr<double>() =
        Block<T>(a).gradients(x_state, y_state, grad_x.mutable_data_ptr<T>());
  });
  return {grad_x, grad_temperature};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("labelled_lse_forward", TORCH_BOX(&labelled_lse_forward));
  m.impl("labelled_lse_backward", TORCH_BOX(&labelled_lse_backward));
}

}  // namespace
}  // namespace fastnce::labelled_lse
