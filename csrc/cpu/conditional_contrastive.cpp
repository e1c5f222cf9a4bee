// ContraGAN's conditional contrastive loss (2C) on the CPU. The similarity of the embeddings with
// themselves is symmetric, so the gradient of a row and of a column meet in the same logit:
// d L / d e_i = sum_j (G_ij + G_ji) e_j / t needs one product, and half of the logits are enough.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <optional>
#include <tuple>

#include "conditional_contrastive_maximum.h"
#include "conditional_contrastive_rows.h"
#include "self_similarity.h"

namespace fastnce::conditional_contrastive {
namespace {

void check(const Arguments& a) {
  const ScalarType dtype = a.embeddings.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), a.op, ": embeddings has the unsupported dtype ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(a.embeddings.dim() == 2, a.op, ": embeddings must be (N, D).");
  check_rows(a.op, "embeddings", a.embeddings, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "proxies", a.proxies, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "labels", a.labels, ScalarType::Long, {a.rows()});
}

// One exponential for a logit's row and column, for numerator and denominator.
template <class T>
class FixedOffset {
 public:
  explicit FixedOffset(Rows<T>& rows)
      : r_(rows),
        offset_(static_cast<T>(1 / r_.a.temperature)),
        similarity_(r_.kernels, r_.embedding_rows, r_.rows, r_.a.temperature) {
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
    other_ = Buffer<T>(r_.padded, T(0));
    same_ = Buffer<T>(r_.padded, T(0));
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

// Calls run(rows, scheme) with the scheme that the temperature allows.
template <class Run>
void solve(const Arguments& a, const Run& run) {
  const auto with_rows = [&](auto zero) {
    using T = decltype(zero);
    Rows<T> rows(a);
    if (a.temperature >= kFixedOffsetTemperature) {
      FixedOffset<T> scheme(rows);
      run(rows, scheme);
    } else {
      RunningMaximum<T> scheme(rows);
      run(rows, scheme);
    }
  };
  a.acc() == ScalarType::Double ? with_rows(double{}) : with_rows(float{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conditional_contrastive_forward(
    const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature,
    std::optional<double> grad_scale, bool mean, bool need_embeddings, bool need_proxies,
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
  solve(a, [&](auto& rows, auto& scheme) {
    using T = typename std::remove_reference_t<decltype(rows)>::Number;
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
  const Tensor sums = torch::stable::contiguous(lse);
  solve(a, [&](auto& rows, auto& scheme) {
    using T = typename std::remove_reference_t<decltype(rows)>::Number;
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
