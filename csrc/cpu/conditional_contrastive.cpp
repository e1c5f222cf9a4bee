// ContraGAN's conditional contrastive loss (2C) on the CPU. The similarity of the embeddings with
// themselves is symmetric, so the gradient of a row and of a column meet in the same logit:
// d L / d e_i = sum_j (G_ij + G_ji) e_j / t needs one product, and half of the logits are enough.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "labelled_logits.h"
#include "self_similarity.h"
#include "unit_rows.h"

namespace fastnce::conditional_contrastive {
namespace {

struct Arguments {
  const char* op;
  const Tensor& embeddings;
  const Tensor& proxies;
  const Tensor& labels;
  double temperature;
  bool bfloat16_products, need_embeddings, need_proxies, need_temperature;

  int64_t rows() const { return embeddings.size(0); }
  int64_t depth() const { return embeddings.size(1); }
  ScalarType acc() const { return accumulation_type(embeddings.scalar_type()); }
};

void check(const Arguments& a) {
  check_floating(a.op, "embeddings", a.embeddings, 2, "(N, D)");
  const ScalarType dtype = a.embeddings.scalar_type();
  check_rows(a.op, "embeddings", a.embeddings, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "proxies", a.proxies, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "labels", a.labels, ScalarType::Long, {a.rows()});
}

// What both schemes share: the labels, what belongs to single rows, and the proxies, which meet
// their own rows alone.
template <class T>
class Rows {
 public:
  explicit Rows(const Arguments& arguments)
      : kernels(tile_kernels<T>()),
        a(arguments),
        scale(1 / std::sqrt(a.temperature)),
        rows(a.rows()),
        embedding_rows(a.embeddings),
        proxy_rows(a.proxies),
        labels(padded(rows, kernels.width), -1),
        all(rows),
        same(rows),
        weights(rows),
        proxy_logit_(rows),
        proxy_inverse_(rows) {
    const std::vector<int64_t> values = label_values(a.labels);
    number_classes(values, values, labels);
  }

  // Starts the sums with the proxies. `units`: rows / sqrt(t).
  void add_proxies(const SlabMatrix<T>& units) {
    run_blocks(rows, 16, 8 * a.depth(), [&](int64_t begin, int64_t end) {
      UnitRowReader<T> reader(kernels, proxy_rows, true);
      Buffer<T> embedding(a.depth()), proxy(a.depth());
      for (int64_t i = begin; i < end; ++i) {
        units.copy_row_out(i, embedding.data());
        reader.read(i, scale, proxy.data());
        proxy_inverse_[i] = reader.inverse();
        proxy_logit_[i] = logit(kernels, a.depth(), embedding.data(), proxy.data());
        all[i].add_logit(proxy_logit_[i]);
        same[i].add_logit(proxy_logit_[i]);
      }
    });
  }

  // loss (N,), lse (2, N).
  void store_losses(T* loss, T* lse) const {
    for (int64_t i = 0; i < rows; ++i) {
      const double shift = all[i].maximum - same[i].maximum;
      loss[i] = static_cast<T>(shift + (std::log(all[i].sum) - std::log(same[i].sum)));
      lse[i] = static_cast<T>(all[i].log());
      lse[rows + i] = static_cast<T>(same[i].log());
    }
  }

  void sums_from_lse(const T* lse) {
    for (int64_t i = 0; i < rows; ++i) {
      all[i] = {lse[i], 1};
      same[i] = {lse[rows + i], 1};
    }
  }

  double proxy_logit(int64_t i) const { return proxy_logit_[i]; }
  // d L / d of the proxy's logit.
  double proxy_gradient(int64_t i) const {
    return weights[i] * (std::exp(proxy_logit_[i] - all[i].maximum) / all[i].sum -
                         std::exp(proxy_logit_[i] - same[i].maximum) / same[i].sum);
  }

  // Adds the proxies' part to rows r0 and on of the gradient with respect to unit rows, of which
  // `products` times `factor` is the embeddings' part, and goes back to the inputs. after_row(i,
  // u . gradient) is called for each row.
  template <class AfterRow>
  void finish_rows(int64_t r0, const SlabMatrix<T>& products, double factor,
                   const double* inverse_norms, const OutputRows& embeddings_out,
                   const OutputRows& proxies_out, const AfterRow& after_row) const {
    const int64_t depth = a.depth();
    run_blocks(products.rows(), 16, 16 * depth, [&](int64_t begin, int64_t end) {
      Buffer<T> gradient(depth), embedding_row(depth), proxy_row(depth), out_row(depth);
      for (int64_t i = r0 + begin; i < r0 + end; ++i) {
        const double g = proxy_gradient(i) / a.temperature;
        const T* embedding = embedding_rows.read(i, embedding_row.data());
        const T* proxy = proxy_rows.read(i, proxy_row.data());
        products.copy_row_out(i - r0, gradient.data());
        T* out = a.need_embeddings ? embeddings_out.begin(i, out_row.data()) : out_row.data();
        after_row(
            i, unit_row_gradient(kernels, depth, embedding, true, inverse_norms[i], factor * scale,
                                 gradient.data(), g * proxy_inverse_[i], proxy, 1.0, out));
        if (a.need_embeddings) embeddings_out.finish(i, out);
        if (!a.need_proxies) continue;
        out = proxies_out.begin(i, out_row.data());
        unit_row_gradient(kernels, depth, proxy, true, proxy_inverse_[i], g * inverse_norms[i],
                          embedding, 0.0, embedding, 1.0, out);
        proxies_out.finish(i, out);
      }
    });
  }

  const TileKernels<T>& kernels;
  const Arguments& a;
  // On both sides of every product, so that z_ij and z_ji are the same number to the last bit.
  const double scale;
  const int64_t rows;
  const TensorRows embedding_rows, proxy_rows;
  const Buffer<typename TileKernels<T>::Label> labels;  // padded to whole slabs
  std::vector<ExpSum> all, same;
  std::vector<double> weights;  // d L / d loss_i

 private:
  Buffer<double> proxy_logit_, proxy_inverse_;
};

// One exponential for a logit's row and column, for numerator and denominator.
template <class T>
class FixedOffset {
 public:
  explicit FixedOffset(Rows<T>& rows)
      : r_(rows),
        offset_(static_cast<T>(1 / r_.a.temperature)),
        similarity_(r_.kernels, r_.embedding_rows, r_.rows, r_.a.temperature,
                    r_.a.bfloat16_products) {
    r_.add_proxies(similarity_.units());
  }

  void sum() {
    std::array<Buffer<double>, 2> total;
    similarity_.sum(2, exponentials(), total);
    for (int64_t i = 0; i < r_.rows; ++i) {
      r_.all[i].add(offset_, total[0][i]);
      r_.same[i].add(offset_, total[1][i]);
    }
  }

  double gradients(const Tensor& grad_embeddings, const Tensor& grad_proxies) {
    const double largest = set_factors();
    similarity_.multiply(exponentials(), [&](const Tile<T>& tile) {
      r_.kernels.label_scale(tile.rows, tile.lanes, tile.values, &r_.labels[tile.r0],
                             &r_.labels[tile.c0], {&other_[tile.r0], &same_[tile.r0]},
                             {&other_[tile.c0], &same_[tile.c0]});
    });
    std::vector<double> terms(r_.rows);
    r_.finish_rows(0, similarity_.gradient(), largest, similarity_.inverse_norms.data(),
                   OutputRows(grad_embeddings), OutputRows(grad_proxies),
                   [&](int64_t i, double along) {
                     // A logit of the matrix counts for its row and its column, a proxy's once.
                     terms[i] = 0.5 * (along + r_.proxy_gradient(i) * r_.proxy_logit(i));
                   });
    return -std::accumulate(terms.begin(), terms.end(), 0.0) / r_.a.temperature;
  }

 private:
  auto exponentials() const {
    return [this](const Tile<T>& tile, const typename SelfSimilarity<T>::TileSums& sums) {
      r_.kernels.label_exp(tile.rows, tile.lanes, tile.values, offset_, &r_.labels[tile.r0],
                           &r_.labels[tile.c0],
                           {sums.row[0], sums.row[1], sums.column[0], sums.column[1]});
    };
  }

  // What e is multiplied by, between rows of different classes and of the same. Kept relative to
  // the largest weight, which is returned: exp(offset - lse) alone nearly fills float's range.
  double set_factors() {
    double largest = 0;
    for (double weight : r_.weights) largest = std::max(largest, std::abs(weight));
    if (largest == 0 || !std::isfinite(largest)) largest = 1;
    other_ = Buffer<T>(r_.labels.size(), T(0));
    same_ = Buffer<T>(r_.labels.size(), T(0));
    const auto softmax = [&](const ExpSum& total) {
      return std::exp(offset_ - total.maximum) / total.sum;
    };
    for (int64_t i = 0; i < r_.rows; ++i) {
      const double weight = r_.weights[i] / largest, all = softmax(r_.all[i]);
      other_[i] = static_cast<T>(weight * all);
      same_[i] = static_cast<T>(weight * (all - softmax(r_.same[i])));
    }
    return largest;
  }

  Rows<T>& r_;
  const T offset_;
  SelfSimilarity<T> similarity_;
  Buffer<T> other_, same_;  // padded to whole slabs
};

// With a maximum for each row: for temperatures at which one offset for all logits would let exp
// leave its range.
template <class T>
class RunningMaximum {
 public:
  explicit RunningMaximum(Rows<T>& rows) : r_(rows), inverse_(rows.rows) {
    pack_unit_rows<T, T>(r_.kernels, r_.embedding_rows, 0, r_.rows, true, r_.scale,
                         {&scaled_, &transposed_, nullptr, inverse_.data()});
    r_.add_proxies(scaled_);
  }

  void sum() { logits().sum(r_.all, r_.same); }

  // Fills the gradients that are needed; returns that of the temperature.
  double gradients(const Tensor& grad_embeddings, const Tensor& grad_proxies) {
    const LabelStatistics<T> statistics(r_.labels.size());
    for (int64_t i = 0; i < r_.rows; ++i) {
      statistics.center[i] = static_cast<T>(r_.proxy_logit(i));
      statistics.set(i, r_.all[i], r_.weights[i], r_.same[i], r_.weights[i]);
    }
    const OutputRows embeddings_out(grad_embeddings), proxies_out(grad_proxies);
    std::vector<double> terms(r_.rows, 0.0);
    logits().gradients(
        statistics, statistics,
        [&](int64_t r0, int64_t rows, int64_t slabs, const T* moments) {
          for (int64_t s = 0; s < slabs; ++s) {
            for (int64_t r = 0; r < rows; ++r) terms[r0 + r] += moments[s * rows + r];
          }
        },
        // The proxies add nothing to the moments, which are taken relative to their logits.
        [&](int64_t r0, const SlabMatrix<T>& products) {
          r_.finish_rows(r0, products, 1.0, inverse_.data(), embeddings_out, proxies_out,
                         [](int64_t, double) {});
        });
    return -std::accumulate(terms.begin(), terms.end(), 0.0) / r_.a.temperature;
  }

 private:
  LabelledLogits<T> logits() const {
    return {r_.kernels, scaled_, transposed_, scaled_, r_.labels, r_.labels, true};
  }

  Rows<T>& r_;
  Buffer<double> inverse_;             // 1 / ||x|| of the embeddings
  SlabMatrix<T> scaled_, transposed_;  // unit embeddings times the scale
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conditional_contrastive_forward(
    const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool bfloat16_products,
    std::optional<double> grad_scale, bool mean, bool need_embeddings, bool need_proxies,
    bool need_temperature) {
  const char* op = "conditional_contrastive_forward";
  const bool wanted = grad_scale.has_value();
  const double tau = temperature_value(op, temperature_tensor, temperature);
  need_embeddings = need_embeddings && wanted, need_proxies = need_proxies && wanted;
  need_temperature = need_temperature && wanted;
  const Arguments a{
      op,           embeddings,      proxies, labels, tau, bfloat16_products, need_embeddings,
      need_proxies, need_temperature};
  check(a);
  const Tensor loss = new_tensor(embeddings, {a.rows()}, a.acc());
  const Tensor lse = new_tensor(embeddings, {2, a.rows()}, a.acc());
  const Tensor grad_embeddings = new_gradient(embeddings, a.need_embeddings);
  const Tensor grad_proxies = new_gradient(proxies, a.need_proxies);
  double grad_temperature = 0;
  with_scheme<Rows, FixedOffset, RunningMaximum>(a, [&](auto& rows, auto& scheme, auto zero) {
    using T = decltype(zero);
    scheme.sum();
    rows.store_losses(loss.mutable_data_ptr<T>(), lse.mutable_data_ptr<T>());
    if (!wanted) return;
    const double count = mean ? static_cast<double>(a.rows()) : 1;
    std::fill(rows.weights.begin(), rows.weights.end(), *grad_scale / count);
    grad_temperature = scheme.gradients(grad_embeddings, grad_proxies);
  });
  return {loss, lse, grad_embeddings, grad_proxies,
          new_scalar(embeddings, a.need_temperature, grad_temperature)};
}

std::tuple<Tensor, Tensor, Tensor> conditional_contrastive_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature, const Tensor& lse,
    bool bfloat16_products, bool need_embeddings, bool need_proxies, bool need_temperature) {
  const char* op = "conditional_contrastive_backward";
  const double tau = temperature_value(op, temperature_tensor, temperature);
  const Arguments a{
      op,           embeddings,      proxies, labels, tau, bfloat16_products, need_embeddings,
      need_proxies, need_temperature};
  check(a);
  check_rows(op, "grad_loss", grad_loss, a.acc(), {a.rows()});
  check_rows(op, "lse", lse, a.acc(), {2, a.rows()});
  const Tensor grad_embeddings = new_gradient(embeddings, need_embeddings);
  const Tensor grad_proxies = new_gradient(proxies, need_proxies);
  double grad_temperature = 0;
  const Tensor sums = torch::stable::contiguous(lse);
  with_scheme<Rows, FixedOffset, RunningMaximum>(a, [&](auto& rows, auto& scheme, auto zero) {
    using T = decltype(zero);
    rows.sums_from_lse(sums.template const_data_ptr<T>());
    rows.weights = to_vector<double>(grad_loss);
    grad_temperature = scheme.gradients(grad_embeddings, grad_proxies);
  });
  return {grad_embeddings, grad_proxies,
          new_scalar(embeddings, need_temperature, grad_temperature)};
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("conditional_contrastive_forward", TORCH_BOX(&conditional_contrastive_forward));
  m.impl("conditional_contrastive_backward", TORCH_BOX(&conditional_contrastive_backward));
}

}  // namespace
}  // namespace fastnce::conditional_contrastive
