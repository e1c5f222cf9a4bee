// The supervised contrastive loss on the CPU, and NT-Xent as its case of two rows per class.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "self_similarity.h"
#include "sup_con_maximum.h"
#include "sup_con_rows.h"

namespace fastnce::sup_con {
namespace {

void check(const Arguments& a) {
  const ScalarType dtype = a.features.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), a.op, ": features has the unsupported dtype ",
                  torch::headeronly::toString(dtype), ".");
  STD_TORCH_CHECK(a.features.dim() == 2, a.op, ": features must be (N, D).");
  check_rows(a.op, "features", a.features, dtype, {a.rows(), a.depth()});
  check_rows(a.op, "labels", a.labels, ScalarType::Long, {a.rows()});
}

// One exponential for a logit's row and column.
template <class T>
class FixedOffset {
 public:
  explicit FixedOffset(Rows<T>& rows)
      : r_(rows),
        similarity_(r_.kernels, r_.feature_rows, r_.rows, r_.a.temperature),
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
  solve(a, [&](auto& rows, auto& scheme) {
    using T = typename std::remove_reference_t<decltype(rows)>::Number;
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
  const Tensor sums = torch::stable::contiguous(lse);
  const std::vector<double> weights = to_vector<double>(grad_loss);
  solve(a, [&](auto& rows, auto& scheme) {
    using T = typename std::remove_reference_t<decltype(rows)>::Number;
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
