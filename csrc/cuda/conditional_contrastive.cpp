// ContraGAN's 2C loss: the other samples, and a sample's own proxy beside them.
//
// Launches of a loss with its gradients: packing, sums, losses, products, gradients of rows; one
// more for the temperature's gradient.
#include <tuple>

#include "self_similarity.h"

namespace fastnce::cuda {
namespace {

class ConditionalContrastive : public SelfSimilarity {
 public:
  const Tensor grad_proxies;

  ConditionalContrastive(const RowsCall& call, const Tensor& embeddings, const Tensor& proxies,
                         const Tensor& labels, bool forward, bool need_embeddings,
                         bool need_proxies, bool need_temperature)
      : SelfSimilarity(call, Kind::kTwoC, embeddings, labels, forward, need_embeddings,
                       need_temperature),
        grad_proxies(new_gradient(proxies, need_proxies)),
        need_proxies_(need_proxies) {
    const bool any = need_embeddings || need_proxies || need_temperature;
    workspace_.want(&packed_proxies_, total_, c_.padded);
    workspace_.want(&proxy_products_, total_);
    workspace_.want(&logit_, any ? total_ : 0);
    workspace_.want(&weight_, any ? total_ : 0);
    workspace_.allocate(embeddings);
    const Pack pack{rows_of(c_.op, embeddings), rows_, rows_of(c_.op, proxies), packed_proxies_,
                    proxy_products_};
    launch_pack(&pack, 1, c_.pack_options(), c_.stream);
  }

  void forward(const Tensor& loss, const Tensor& lse, float grad_scale) {
    sum();
    ConditionalContrastiveLosses l = losses(lse);
    l.rows = {out_.largest, out_.sum, sums_.splits};
    l.same = {out_.label_a, out_.label_b, sums_.splits};
    l.loss = loss.mutable_data_ptr<float>();
    launch_conditional_contrastive_losses(l, c_.machine.multiprocessors, c_.stream);
    gradients({nullptr, grad_scale});
  }

  void backward(const Tensor& grad_loss, const Tensor& lse) {
    ConditionalContrastiveLosses l = losses(lse);
    l.grad_loss = arriving(grad_loss);
    launch_conditional_contrastive_losses(l, c_.machine.multiprocessors, c_.stream);
    gradients({upstream_, 0});
  }

 private:
  ConditionalContrastiveLosses losses(const Tensor& lse) const {
    ConditionalContrastiveLosses l{};
    l.op = c_.op;
    l.total = total_;
    l.temperature = c_.temperature;
    l.proxy = {proxy_products_, rows_.scale, packed_proxies_.scale, logit_, weight_};
    l.lse = const_cast<float*>(lse.const_data_ptr<float>());
    l.statistics = statistics_;
    return l;
  }

  void gradients(const Upstream& upstream) {
    multiply();
    RowGradient rows[2];
    int count = 0;
    if (need_rows_) {
      rows[count] = row_gradient();
      rows[count].pair = packed_proxies_;
      rows[count++].pair_weight = weight_;
    }
    if (need_proxies_) {
      rows[count] = {packed_proxies_, total_};
      rows[count].pair = rows_;
      rows[count].pair_weight = weight_;
      rows[count++].out = grad_proxies.mutable_data_ptr();
    }
    if (count > 0) launch_row_gradients(rows, count, c_.gradient_options(upstream), c_.stream);
    if (!need_temperature_) return;
    TemperatureGradient g = temperature_gradient(upstream);
    g.pair_weight = weight_;
    g.pair_logit = logit_;
    launch_temperature_gradient(g, c_.stream);
  }

  const bool need_proxies_;
  PackedRows packed_proxies_;
  float *proxy_products_, *logit_, *weight_;
};

void check(const char* op, const Tensor& embeddings, const Tensor& proxies, const Tensor& labels) {
  STD_TORCH_CHECK(embeddings.dim() == 2, op, ": embeddings must be (N, D).");
  const std::vector<int64_t> shape = {embeddings.size(0), embeddings.size(1)};
  check_tensor(op, "embeddings", embeddings, embeddings.scalar_type(), shape);
  check_tensor(op, "proxies", proxies, embeddings.scalar_type(), shape);
  check_tensor(op, "labels", labels, ScalarType::Long, {shape[0]});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conditional_contrastive_forward(
    const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool /*bfloat16_products*/,
    std::optional<double> grad_scale, bool mean, bool need_embeddings, bool need_proxies,
    bool need_temperature) {
  const char* op = "conditional_contrastive_forward";
  check(op, embeddings, proxies, labels);
  if (grad_scale && mean) *grad_scale /= static_cast<double>(embeddings.size(0));
  const RowsCall call(op, embeddings, temperature_tensor, temperature, true);
  const bool now = grad_scale.has_value();
  const Tensor in_order = torch::stable::contiguous(labels);
  ConditionalContrastive run(call, embeddings, proxies, in_order, true, now && need_embeddings,
                             now && need_proxies, now && need_temperature);
  const int64_t total = embeddings.size(0);
  const Tensor loss = new_tensor(embeddings, {total}, ScalarType::Float);
  const Tensor lse = new_tensor(embeddings, {2, total}, ScalarType::Float);
  run.forward(loss, lse, static_cast<float>(grad_scale.value_or(1)));
  return {loss, lse, run.grad_rows, run.grad_proxies, run.grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor> conditional_contrastive_backward(
    const Tensor& grad_loss, const Tensor& embeddings, const Tensor& proxies, const Tensor& labels,
    const std::optional<Tensor>& temperature_tensor, double temperature, const Tensor& lse,
    bool /*bfloat16_products*/, bool need_embeddings, bool need_proxies, bool need_temperature) {
  const char* op = "conditional_contrastive_backward";
  check(op, embeddings, proxies, labels);
  const int64_t total = embeddings.size(0);
  check_tensor(op, "grad_loss", grad_loss, ScalarType::Float, {total});
  check_tensor(op, "lse", lse, ScalarType::Float, {2, total});
  const RowsCall call(op, embeddings, temperature_tensor, temperature, true);
  const Tensor in_order = torch::stable::contiguous(labels);
  ConditionalContrastive run(call, embeddings, proxies, in_order, false, need_embeddings,
                             need_proxies, need_temperature);
  run.backward(grad_loss, torch::stable::contiguous(lse));
  return {run.grad_rows, run.grad_proxies, run.grad_temperature};
}

FASTNCE_CUDA_LIBRARY_IMPL(m) {
  m.impl("conditional_contrastive_forward", FASTNCE_CUDA_BOX(&conditional_contrastive_forward));
  m.impl("conditional_contrastive_backward", FASTNCE_CUDA_BOX(&conditional_contrastive_backward));
}

}  // namespace
}  // namespace fastnce::cuda
