// One block of a larger matrix of similarities: rows against the columns of another process, with
// labels. The forward gives each row's log-sum-exp over all columns and over those of its label;
// merged over the blocks, these are the sums of supervised contrastive losses. The backward gives a
// block's part in the rows' gradient, as rows and as columns of the symmetric whole:
// d L / d u_i = sum_j (G_ij + G_ji) v_j / t.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"
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
  const ScalarType dtype = a.x.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), a.op, ": x has the unsupported dtype ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(a.x.dim() == 2 && a.y.dim() == 2, a.op, ": x and y must be (N, D), (M, D).");
  STD_TORCH_CHECK(!a.own || a.rows() == a.columns(), a.op, ": own needs as many columns as rows.");
  check_rows(a.op, "x", a.x, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "y", a.y, dtype, {a.columns(), a.depth()});
  check_rows(a.op, "x_labels", a.x_labels, ScalarType::Long, {a.rows()});
  check_rows(a.op, "y_labels", a.y_labels, ScalarType::Long, {a.columns()});
}

// A side's state in the backward, (count, 4) double as columns of T padded to whole slabs: the lse
// of all and of the same label, and the gradients that arrive for them.
template <class T>
struct State {
  Buffer<T> all_offset, all_weight, same_offset, same_weight, center;

  State(const char* op, const char* name, const Tensor& state, int64_t count, int64_t padded) {
    check_rows(op, name, state, ScalarType::Double, {count, 4});
    for (Buffer<T>* b : {&all_offset, &all_weight, &same_offset, &same_weight, &center}) {
      *b = Buffer<T>(padded, T(0));
    }
    const std::vector<double> values = to_vector<double>(state);
    for (int64_t i = 0; i < count; ++i) {
      const double* v = &values[4 * i];
      set(all_offset[i], all_weight[i], v[0], v[2]);
      set(same_offset[i], same_weight[i], v[1], -v[3]);  // label_gradient subtracts
    }
  }

  LabelWeights<T> at(int64_t i) const {
    return {&all_offset[i], &all_weight[i], &same_offset[i], &same_weight[i], &center[i]};
  }

 private:
  // An empty sum has the lse -inf, and no column that would use it.
  static void set(T& offset, T& weight, double lse, double gradient) {
    if (lse == -std::numeric_limits<double>::infinity()) return;
    offset = static_cast<T>(lse);
    weight = static_cast<T>(gradient * std::exp(static_cast<double>(offset) - lse));
  }
};

template <class T>
class Block {
 public:
  using Number = T;

  explicit Block(const Arguments& arguments)
      : kernels_(tile_kernels<T>()),
        a_(arguments),
        scale_(1 / std::sqrt(a_.temperature)),
        x_(a_.x),
        y_(a_.y),
        inverse_(a_.rows()),
        x_labels_(padded(a_.rows()), -1),
        y_labels_(padded(a_.columns()), -1) {
    number_classes();
    pack_unit_rows<T, T>(kernels_, x_, 0, a_.rows(), true, scale_,
                         {&queries_, nullptr, nullptr, inverse_.data()});
  }

  // Fills lse (N, 2).
  void sum(double* lse) {
    pack_unit_rows<T, T>(kernels_, y_, 0, a_.columns(), true, scale_, {nullptr, &transposed_});
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_));
    const int64_t panel = std::min(kPanelRows, a_.rows()), size = limit * panel;
    Buffer<T> all_offset(size), all_sum(size), same_offset(size), same_sum(size);
    std::vector<ExpSum> all(a_.rows()), same(a_.rows());
    for (int64_t r0 = 0; r0 < a_.rows(); r0 += panel) {
      const int64_t rows = std::min(panel, a_.rows() - r0);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits<T>(
            kernels_, queries_, r0, rows, transposed_, s0, s1, nullptr, task_rows(rows, s1 - s0),
            [&](int64_t slab, int64_t begin, int64_t end, T* z) {
              const int64_t at = (slab - s0) * rows + begin, r = r0 + begin, c0 = slab * width;
              kernels_.label_sums(end - begin, transposed_.lanes(slab), z, self(r, c0),
                                  &x_labels_[r], &y_labels_[c0],
                                  {&all_offset[at], &all_sum[at], &same_offset[at], &same_sum[at]});
            });
        run_blocks(rows, kTaskRows, 32 * (s1 - s0), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t at = r; at < (s1 - s0) * rows; at += rows) {
              all[r0 + r].add(all_offset[at], all_sum[at]);
              same[r0 + r].add(same_offset[at], same_sum[at]);
            }
          }
        });
      }
    }
    for (int64_t i = 0; i < a_.rows(); ++i) {
      lse[2 * i] = all[i].log();
      lse[2 * i + 1] = same[i].log();
    }
  }

  // Fills the gradient of x (N, D), in T; returns that of the temperature.
  double gradients(const Tensor& x_state, const Tensor& y_state, T* grad_x) {
    SlabMatrix<T> straight;
    pack_unit_rows<T, T>(kernels_, y_, 0, a_.columns(), true, scale_, {&straight, &transposed_});
    const State<T> rows_state(a_.op, "x_state", x_state, a_.rows(), padded(a_.rows()));
    const State<T> columns_state(a_.op, "y_state", y_state, a_.columns(), padded(a_.columns()));
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_));
    const int64_t panel = std::min(panel_rows<T>(limit * width), a_.rows());
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    double total = 0;
    for (int64_t r0 = 0; r0 < a_.rows(); r0 += panel) {
      const int64_t rows = std::min(panel, a_.rows() - r0);
      SlabMatrix<T> products(rows, a_.depth(), width);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits(
            kernels_, queries_, r0, rows, transposed_, s0, s1, z.data(), task_rows(rows, s1 - s0),
            [&](int64_t slab, int64_t begin, int64_t end, T* block) {
              const int64_t r = r0 + begin, c0 = slab * width;
              kernels_.label_gradient(end - begin, transposed_.lanes(slab), block, self(r, c0),
                                      &x_labels_[r], &y_labels_[c0], rows_state.at(r),
                                      columns_state.at(c0), &moment[(slab - s0) * rows + begin]);
            });
        total = std::accumulate(moment.data(), moment.data() + (s1 - s0) * rows, total);
        add_row_gradient(kernels_, rows, z.data(), straight, s0, s1, products, s0 > 0);
      }
      finish_rows(r0, products, grad_x);
    }
    return -total / a_.temperature;
  }

 private:
  int64_t padded(int64_t count) const { return slab_count(count, kernels_.width) * kernels_.width; }

  // The column, counted from c0, that row r leaves out.
  int64_t self(int64_t r, int64_t c0) const {
    return a_.own ? r - c0 : std::numeric_limits<int64_t>::min() / 2;
  }

  // Labels as the numbers of their classes, narrow enough to be compared in a logit's lane.
  void number_classes() {
    std::vector<int64_t> x = to_labels(a_.x_labels), y = to_labels(a_.y_labels), classes = x;
    classes.insert(classes.end(), y.begin(), y.end());
    std::sort(classes.begin(), classes.end());
    classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
    const auto number = [&](const std::vector<int64_t>& labels, const Buffer<Label>& out) {
      for (size_t i = 0; i < labels.size(); ++i) {
        const auto at = std::lower_bound(classes.begin(), classes.end(), labels[i]);
        out[static_cast<int64_t>(i)] = static_cast<Label>(at - classes.begin());
      }
    };
    number(x, x_labels_);
    number(y, y_labels_);
  }

  static std::vector<int64_t> to_labels(const Tensor& labels) {
    const int64_t* data = labels.const_data_ptr<int64_t>();
    std::vector<int64_t> out(static_cast<size_t>(labels.size(0)));
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = data[static_cast<int64_t>(i) * labels.stride(0)];
    return out;
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
  // On both sides of every product, so that z_ij and the z_ji of the other process are the same
  // number to the last bit.
  const double scale_;
  const TensorRows x_, y_;
  Buffer<double> inverse_;
  const Buffer<Label> x_labels_, y_labels_;
  SlabMatrix<T> queries_, transposed_;
};

template <class Run>
void with_block(const Arguments& a, const Run& run) {
  if (a.acc() == ScalarType::Double) {
    Block<double> block(a);
    run(block);
  } else {
    Block<float> block(a);
    run(block);
  }
}

Tensor labelled_lse_forward(const Tensor& x, const Tensor& y, const Tensor& x_labels,
                            const Tensor& y_labels, const std::optional<Tensor>& temperature_tensor,
                            double temperature, bool own) {
  const char* op = "labelled_lse_forward";
  const Arguments a{
      op, x, y, x_labels, y_labels, temperature_value(op, temperature_tensor, temperature), own};
  check(a);
  const Tensor lse = new_tensor(x, {a.rows(), 2}, ScalarType::Double);
  with_block(a, [&](auto& block) { block.sum(lse.mutable_data_ptr<double>()); });
  return lse;
}

std::tuple<Tensor, Tensor> labelled_lse_backward(const Tensor& x, const Tensor& y,
                                                 const Tensor& x_labels, const Tensor& y_labels,
                                                 const std::optional<Tensor>& temperature_tensor,
                                                 double temperature, const Tensor& x_state,
                                                 const Tensor& y_state, bool own) {
  const char* op = "labelled_lse_backward";
  const Arguments a{
      op, x, y, x_labels, y_labels, temperature_value(op, temperature_tensor, temperature), own};
  check(a);
  const Tensor grad_x = new_tensor(x, {a.rows(), a.depth()}, a.acc());
  const Tensor grad_temperature = new_tensor(x, {}, ScalarType::Double);
  with_block(a, [&](auto& block) {
    using T = typename std::remove_reference_t<decltype(block)>::Number;
    *grad_temperature.mutable_data_ptr<double>() =
        block.gradients(x_state, y_state, grad_x.mutable_data_ptr<T>());
  });
  return {grad_x, grad_temperature};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("labelled_lse_forward", TORCH_BOX(&labelled_lse_forward));
  m.impl("labelled_lse_backward", TORCH_BOX(&labelled_lse_backward));
}

}  // namespace
}  // namespace fastnce::labelled_lse
