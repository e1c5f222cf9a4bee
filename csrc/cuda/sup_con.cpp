// The supervised contrastive loss; NT-Xent is the one with two rows of each label.
//
// Launches of a loss with its gradients: packing, sums, losses, products, gradients of rows; one
// more for the temperature's gradient.
#include <tuple>

#include "self_similarity.h"

namespace fastnce::cuda {
namespace {

class SupCon : public SelfSimilarity {
 public:
  SupCon(const RowsCall& call, const Tensor& features, const Tensor& labels, bool forward,
         bool need_features, bool need_temperature)
      : SelfSimilarity(call, Kind::kSupCon, features, labels, forward, need_features,
                       need_temperature) {
    workspace_.want(&counts_, forward ? 0 : total_);
    workspace_.allocate(features);
    const Pack pack{rows_of(c_.op, features), rows_};
    launch_pack(&pack, 1, c_.pack_options(), c_.stream);
  }

  void forward(const Tensor& loss, const Tensor& has_positive, const Tensor& lse, float grad_scale,
               bool mean) {
    sum();
    SupConLosses l = losses(lse);
    l.rows = {out_.largest, out_.sum, sums_.splits};
    l.positive_logits = out_.label_a;
    l.positive_counts = out_.label_b;
    l.count_parts = sums_.splits;
    l.loss = loss.mutable_data_ptr<float>();
    l.has_positive = has_positive.mutable_data_ptr<bool>();
    l.grad_scale = grad_scale;
    l.mean = mean;
    l.grad_loss.upstream = upstream_;
    launch_sup_con_losses(l, c_.machine.multiprocessors, c_.stream);
    gradients({mean ? upstream_ : nullptr, grad_scale});
  }

  void backward(const Tensor& grad_loss, const Tensor& lse) {
    launch_label_counts(c_.op, labels_, total_, counts_, c_.stream);
    SupConLosses l = losses(lse);
    l.positive_counts = counts_;
    l.count_parts = 1;
    l.grad_loss = arriving(grad_loss);
    launch_sup_con_losses(l, c_.machine.multiprocessors, c_.stream);
    gradients({upstream_, 0});
  }

 private:
  SupConLosses losses(const Tensor& lse) const {
    SupConLosses l{};
    l.op = c_.op;
    l.total = total_;
    l.lse = const_cast<float*>(lse.const_data_ptr<float>());
    l.statistics = statistics_;
    return l;
  }

  void gradients(const Upstream& upstream) {
    multiply();
    if (need_rows_) {
      const RowGradient g = row_gradient();
      launch_row_gradients(&g, 1, c_.gradient_options(upstream), c_.stream);
    }
    if (need_temperature_) launch_temperature_gradient(temperature_gradient(upstream), c_.stream);
  }

  float* counts_;
};

void check(const char* op, const Tensor& features, const Tensor& labels) {
  STD_TORCH_CHECK(features.dim() == 2, op, ": features must be (N, D).");
  check_tensor(op, "features", features, features.scalar_type(),
               {features.size(0), features.size(1)});
  check_tensor(op, "labels", labels, ScalarType::Long, {features.size(0)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sup_con_forward(
    const Tensor& features, const Tensor& labels, const std::optional<Tensor>& temperature_tensor,
    double temperature, bool /*bfloat16_products*/, std::optional<double> grad_scale, bool mean,
    bool need_features, bool need_temperature) {
  const char* op = "sup_con_forward";
  check(op, features, labels);
  const RowsCall call(op, features, temperature_tensor, temperature, true);
  const bool now = grad_scale.has_value();
  const Tensor in_order = torch::stable::contiguous(labels);
  SupCon run(call, features, in_order, true, now && need_features, now && need_temperature);
  const std::vector<int64_t> shape = {features.size(0)};
  const Tensor loss = new_tensor(features, shape, ScalarType::Float);
  const Tensor has_positive = new_tensor(features, shape, ScalarType::Bool);
  const Tensor lse = new_tensor(features, shape, ScalarType::Float);
  run.forward(loss, has_positive, lse, static_cast<float>(grad_scale.value_or(1)), now && mean);
  return {loss, has_positive, lse, run.grad_rows, run.grad_temperature};
}

std::tuple<Tensor, Tensor> sup_con_backward(const Tensor& grad_loss, const Tensor& features,
                                            const Tensor& labels,
                                            const std::optional<Tensor>& temperature_tensor,
                                            double temperature, const Tensor& lse,
                                            bool /*bfloat16_products*/, bool need_features,
                                            bool need_temperature) {
  const char* op = "sup_con_backward";
  check(op, features, labels);
  const std::vector<int64_t> shape = {features.size(0)};
  check_tensor(op, "grad_loss", grad_loss, ScalarType::Float, shape);
  check_tensor(op, "lse", lse, ScalarType::Float, shape);
  const RowsCall call(op, features, temperature_tensor, temperature, true);
  const Tensor in_order = torch::stable::contiguous(labels);
  SupCon run(call, features, in_order, false, need_features, need_temperature);
  run.backward(grad_loss, torch::stable::contiguous(lse));
  return {run.grad_rows, run.grad_temperature};
}

FASTNCE_CUDA_LIBRARY_IMPL(m) {
  m.impl("sup_con_forward", FASTNCE_CUDA_BOX(&sup_con_forward));
  m.impl("sup_con_backward", FASTNCE_CUDA_BOX(&sup_con_backward));
}

}  // namespace
}  // namespace fastnce::cuda
