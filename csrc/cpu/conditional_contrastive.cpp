// ContraGAN's conditional contrastive loss (2C) on the CPU. The similarity of the embeddings with
// themselves is symmetric, so the gradient of a row and of a column meet in the same logit:
// d L / d e_i = sum_j (G_ij + G_ji) e_j / t needs one product of the panel, none of its transpose.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
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
  const Tensor& embeddings;
  const Tensor& proxies;
  const Tensor& labels;
  double temperature;
  bool need_embeddings, need_proxies, need_temperature;

  int64_t rows() const { return embeddings.size(0); }
  int64_t depth() const { return embeddings.size(1); }
  ScalarType acc() const { return accumulation_type(embeddings.scalar_type()); }
};

void check(const Arguments& a) {
  const ScalarType dtype = a.embeddings.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), a.op, ": embeddings has the unsupported dtype ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(a.embeddings.dim() == 2, a.op, ": embeddings must be (N, D).");
  check_rows(a.op, "embeddings", a.embeddings, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "proxies", a.proxies, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "labels", a.labels, ScalarType::Long, {a.rows()});
}

// Labels as the numbers of their classes, narrow enough to be compared in a logit's lane.
template <class Label>
void number_classes(const Tensor& labels, int64_t rows, const Buffer<Label>& out) {
  const int64_t* data = labels.const_data_ptr<int64_t>();
  const int64_t stride = labels.stride(0);
  std::vector<int64_t> values(rows);
  for (int64_t i = 0; i < rows; ++i) values[i] = data[i * stride];
  std::vector<int64_t> classes = values;
  std::sort(classes.begin(), classes.end());
  classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
  for (int64_t i = 0; i < rows; ++i) {
    const auto at = std::lower_bound(classes.begin(), classes.end(), values[i]);
    out[i] = static_cast<Label>(at - classes.begin());
  }
}

template <class T>
class Problem {
 public:
  explicit Problem(const Arguments& a)
      : kernels_(tile_kernels<T>()),
        a_(a),
        scale_(1 / std::sqrt(a.temperature)),
        rows_(a.rows()),
        padded_(slab_count(rows_, kernels_.width) * kernels_.width),
        embedding_rows_(a.embeddings),
        proxy_rows_(a.proxies),
        labels_(padded_, -1),
        proxy_logit_(rows_),
        all_(rows_),
        same_(rows_) {
    number_classes(a.labels, rows_, labels_);
    pack_unit_rows<T, T>(kernels_, embedding_rows_, 0, rows_, true, scale_,
                         {&scaled_, &transposed_});
    run_blocks(rows_, 16, 8 * a.depth(), [&](int64_t begin, int64_t end) {
      UnitRowReader<T> reader(kernels_, proxy_rows_, true);
      Buffer<T> embedding(a.depth()), proxy(a.depth());
      for (int64_t i = begin; i < end; ++i) {
        scaled_.copy_row_out(i, embedding.data());
        reader.read(i, scale_, proxy.data());
        proxy_logit_[i] = logit(kernels_, a.depth(), embedding.data(), proxy.data());
      }
    });
  }

  // loss (N,), lse (2, N).
  void forward(T* loss, T* lse) {
    for (int64_t i = 0; i < rows_; ++i) {
      all_[i].add_logit(proxy_logit_[i]);
      same_[i].add_logit(proxy_logit_[i]);
    }
    sum_pass();
    for (int64_t i = 0; i < rows_; ++i) {
      const double scale = all_[i].maximum - same_[i].maximum;
      loss[i] = static_cast<T>(scale + (std::log(all_[i].sum) - std::log(same_[i].sum)));
      lse[i] = static_cast<T>(all_[i].log());
      lse[rows_ + i] = static_cast<T>(same_[i].log());
    }
  }

  void weights_from_sums(double grad_scale) {
    make_weights();
    for (int64_t i = 0; i < rows_; ++i) {
      set_weight(all_offset_, all_weight_, i, all_[i], grad_scale);
      set_weight(same_offset_, same_weight_, i, same_[i], grad_scale);
    }
  }

  void weights_from_lse(const std::vector<double>& grad_loss, const T* lse) {
    make_weights();
    for (int64_t i = 0; i < rows_; ++i) {
      all_offset_[i] = lse[i];
      same_offset_[i] = lse[rows_ + i];
      all_weight_[i] = same_weight_[i] = static_cast<T>(grad_loss[i]);
    }
  }

  // Fills the gradients that are needed; returns that of the temperature.
  double gradients(const Tensor& grad_embeddings, const Tensor& grad_proxies) {
    const OutputRows embeddings_out(grad_embeddings), proxies_out(grad_proxies);
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_));
    const int64_t panel = std::min(panel_rows<T>(limit * width), rows_);
    Buffer<T> z(panel * limit * width), moment(panel * limit);
    std::vector<double> terms(rows_, 0.0);
    for (int64_t r0 = 0; r0 < rows_; r0 += panel) {
      const int64_t rows = std::min(panel, rows_ - r0);
      SlabMatrix<T> products(rows, a_.depth(), width);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits(kernels_, scaled_, r0, rows, transposed_, s0, s1, z.data(),
                   task_rows(rows, s1 - s0),
                   [&](int64_t slab, int64_t begin, int64_t end, T* block) {
                     const int64_t r = r0 + begin, c0 = slab * width;
                     kernels_.label_gradient(end - begin, transposed_.lanes(slab), block, r - c0,
                                             &labels_[r], &labels_[c0], side(r), side(c0),
                                             &moment[(slab - s0) * rows + begin]);
                   });
        for (int64_t s = 0; s < s1 - s0; ++s) {
          for (int64_t r = 0; r < rows; ++r) terms[r0 + r] += moment[s * rows + r];
        }
        add_row_gradient(kernels_, rows, z.data(), scaled_, s0, s1, products, s0 > 0);
      }
      finish_rows(r0, products, embeddings_out, proxies_out);
    }
    return -std::accumulate(terms.begin(), terms.end(), 0.0) / a_.temperature;
  }

 private:
  void make_weights() {
    for (Buffer<T>* b : {&all_offset_, &all_weight_, &same_offset_, &same_weight_, &center_}) {
      *b = Buffer<T>(padded_, T(0));
    }
    for (int64_t i = 0; i < rows_; ++i) center_[i] = static_cast<T>(proxy_logit_[i]);
  }

  static void set_weight(const Buffer<T>& offset, const Buffer<T>& weight, int64_t i,
                         const ExpSum& total, double scale) {
    offset[i] = static_cast<T>(total.maximum);
    weight[i] = static_cast<T>(scale / total.sum * std::exp(offset[i] - total.maximum));
  }

  LabelWeights<T> side(int64_t i) const {
    return {&all_offset_[i], &all_weight_[i], &same_offset_[i], &same_weight_[i], &center_[i]};
  }

  void sum_pass() {
    const int64_t width = kernels_.width, slabs = transposed_.slabs();
    const int64_t limit = std::min(slabs, block_slabs(kernels_));
    const int64_t panel = std::min(kPanelRows, rows_), size = limit * panel;
    Buffer<T> all_offset(size), all_sum(size), same_offset(size), same_sum(size);
    for (int64_t r0 = 0; r0 < rows_; r0 += panel) {
      const int64_t rows = std::min(panel, rows_ - r0);
      for (int64_t s0 = 0; s0 < slabs; s0 += limit) {
        const int64_t s1 = std::min(slabs, s0 + limit);
        for_logits<T>(
            kernels_, scaled_, r0, rows, transposed_, s0, s1, nullptr, task_rows(rows, s1 - s0),
            [&](int64_t slab, int64_t begin, int64_t end, T* block) {
              const int64_t at = (slab - s0) * rows + begin;
              const int64_t r = r0 + begin, c0 = slab * width;
              kernels_.label_sums(end - begin, transposed_.lanes(slab), block, r - c0, &labels_[r],
                                  &labels_[c0],
                                  {&all_offset[at], &all_sum[at], &same_offset[at], &same_sum[at]});
            });
        run_blocks(rows, kTaskRows, 32 * (s1 - s0), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            for (int64_t at = r; at < (s1 - s0) * rows; at += rows) {
              all_[r0 + r].add(all_offset[at], all_sum[at]);
              same_[r0 + r].add(same_offset[at], same_sum[at]);
            }
          }
        });
      }
    }
  }

  // Adds the proxies' part and goes back from unit rows to the inputs. The proxies add nothing to
  // the moments, which are taken relative to their logits.
  void finish_rows(int64_t r0, const SlabMatrix<T>& products, const OutputRows& embeddings_out,
                   const OutputRows& proxies_out) const {
    const int64_t depth = a_.depth();
    run_blocks(products.rows(), 16, 16 * depth, [&](int64_t begin, int64_t end) {
      UnitRowReader<T> embeddings(kernels_, embedding_rows_, true);
      UnitRowReader<T> proxies(kernels_, proxy_rows_, true);
      Buffer<T> gradient(depth), unit(depth), work(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        const double z = proxy_logit_[i];
        const double g = all_weight_[i] * std::exp(z - all_offset_[i]) -
                         same_weight_[i] * std::exp(z - same_offset_[i]);
        products.copy_row_out(i - r0, gradient.data());
        proxies.read(i, scale_, work.data());
        kernels_.add_scaled(depth, static_cast<T>(g), work.data(), gradient.data());
        kernels_.scale(depth, gradient.data(), scale_, gradient.data());
        if (a_.need_proxies) {
          scaled_.copy_row_out(i, unit.data());
          kernels_.scale(depth, unit.data(), g * scale_, unit.data());
          proxies.project(unit.data(), work.data());
          proxies_out.store(i, work.data());
        }
        if (a_.need_embeddings) {
          embeddings.read(i, 1.0, unit.data());
          embeddings.project(gradient.data(), work.data());
          embeddings_out.store(i, work.data());
        }
      }
    });
  }

  const TileKernels<T>& kernels_;
  const Arguments& a_;
  // On both sides of every product, so that z_ij and z_ji are the same number to the last bit.
  const double scale_;
  const int64_t rows_, padded_;
  const TensorRows embedding_rows_, proxy_rows_;
  const Buffer<typename TileKernels<T>::Label> labels_;
  SlabMatrix<T> scaled_, transposed_;  // unit embeddings times scale_
  Buffer<double> proxy_logit_;
  std::vector<ExpSum> all_, same_;
  std::vector<double> weights_;                                             // d L / d loss_i
  Buffer<T> all_offset_, all_weight_, same_offset_, same_weight_, center_;  // padded to whole slabs
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conditional_contrastive_forward(
    const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature,
    std::optional<double> grad_scale, bool need_embeddings, bool need_proxies,
    bool need_temperature) {
  const char* op = "conditional_contrastive_forward";
  const bool wanted = grad_scale.has_value();
  const Arguments a{op,
                    embeddings,
                    proxies,
                    labels,
                    temperature_value(op, temperature_tensor, temperature),
                    wanted && need_embeddings,
                    wanted && need_proxies,
                    wanted && need_temperature};
  check(a);
  const Tensor loss = new_tensor(embeddings, {a.rows()}, a.acc());
  const Tensor lse = new_tensor(embeddings, {2, a.rows()}, a.acc());
  const Tensor grad_embeddings = new_gradient(embeddings, a.need_embeddings);
  const Tensor grad_proxies = new_gradient(proxies, a.need_proxies);
  double grad_temperature = 0;
  const auto solve = [&](auto zero) {
    using T = decltype(zero);
    Problem<T> problem(a);
    problem.forward(loss.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>());
    if (!wanted) return;
    problem.weights_from_sums(*grad_scale);
    grad_temperature = problem.gradients(grad_embeddings, grad_proxies);
  };
  a.acc() == ScalarType::Double ? solve(double{}) : solve(float{});
  return {loss, lse, grad_embeddings, grad_proxies,
          new_scalar(embeddings, a.need_temperature, grad_temperature)};
}

std::tuple<Tensor, Tensor, Tensor> conditional_contrastive_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature, const Tensor& lse,
    bool need_embeddings, bool need_proxies, bool need_temperature) {
  const char* op = "conditional_contrastive_backward";
  const Arguments a{op,
                    embeddings,
                    proxies,
                    labels,
                    temperature_value(op, temperature_tensor, temperature),
                    need_embeddings,
                    need_proxies,
                    need_temperature};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.rows()});
  check_rows(op, "lse", lse, a.acc(), {2, a.rows()});
  const Tensor grad_embeddings = new_gradient(embeddings, need_embeddings);
  const Tensor grad_proxies = new_gradient(proxies, need_proxies);
  double grad_temperature = 0;
  const auto solve = [&](auto zero) {
    using T = decltype(zero);
    Problem<T> problem(a);
    problem.weights_from_lse(to_vector<double>(grad_loss),
                             torch::stable::contiguous(lse).const_data_ptr<T>());
    grad_temperature = problem.gradients(grad_embeddings, grad_proxies);
  };
  a.acc() == ScalarType::Double ? solve(double{}) : solve(float{});
  return {grad_embeddings, grad_proxies,
          new_scalar(embeddings, need_temperature, grad_temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("conditional_contrastive_forward", TORCH_BOX(&conditional_contrastive_forward));
  m.impl("conditional_contrastive_backward", TORCH_BOX(&conditional_contrastive_backward));
}

}  // namespace
}  // namespace fastnce
