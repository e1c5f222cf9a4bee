// PatchNCE of all layers in one call: the kernel for many small problems, and InfoNCE for layers of
// 16 bits beyond it.
#include "patch_nce.h"

#include <tuple>
#include <utility>

#include "info_nce.h"
#include "op.h"

namespace fastnce::cuda {
namespace {

constexpr const char* kOp = "patch_nce_forward";

void check_layer(const Tensor& query, const Tensor& key, const Tensor& first) {
  STD_TORCH_CHECK(query.dim() == 3, kOp, ": queries must have the shape (B, N, D), got ",
                  query.dim(), " dimensions.");
  const std::vector<int64_t> shape = {query.size(0), query.size(1), query.size(2)};
  check_tensor(kOp, "queries", query, first.scalar_type(), shape);
  check_tensor(kOp, "keys", key, first.scalar_type(), shape);
}

// Which losses there are.
struct Form {
  bool symmetric, query_negatives, detach_keys;
  // Whether a row's gradient is complete where its loss is.
  bool at_once() const { return !query_negatives && (!symmetric || detach_keys); }
};

// The layers that one launch solves, or two: the losses, with those gradients that they make at
// once, and the other gradients.
struct Small {
  Form form;
  std::vector<PatchLayer> losses, gradients;
  Tensors workspace;

  // Gradients that are wanted are defined.
  void add(const Tensor& query, const Tensor& key, double loss_scale, double grad_scale,
           const Tensor& grad_query, const Tensor& grad_key) {
    const RowsView sides[2] = {rows_of(kOp, query), rows_of(kOp, key)};
    const Tensor* grads[2] = {&grad_query, &grad_key};
    const bool lost[2] = {true, form.symmetric};
    const double part = form.symmetric ? 0.5 : 1.0;
    PatchStatistics statistics[2];
    const auto later = [&](int side) {
      return grads[side]->defined() && !(form.at_once() && lost[side]);
    };
    for (int side = 0; side < 2; ++side) {
      if (!lost[side] || !(later(0) || later(1))) continue;
      const int64_t rows = query.size(0) * query.size(1);
      workspace.push_back(new_tensor(query, {2, rows}, ScalarType::Float));
      auto* const data = workspace.back().mutable_data_ptr<float>();
      statistics[side] = {data, data + rows};
    }
    for (int side = 0; side < 2; ++side) {
      PatchLayer layer{sides[side], sides[1 - side], form.query_negatives && lost[side]};
      layer.loss_scale = static_cast<float>(part * loss_scale);
      layer.grad_scale = static_cast<float>(part * grad_scale);
      layer.of_rows = statistics[side];
      void* const gradient = grads[side]->defined() ? grads[side]->mutable_data_ptr() : nullptr;
      if (lost[side]) {
        losses.push_back(layer);
        if (!later(side)) losses.back().gradient = gradient;
      }
      if (!later(side)) continue;
      if (!form.detach_keys) layer.of_columns = statistics[1 - side];
      layer.gradient = gradient;
      gradients.push_back(layer);
    }
  }
};

Tensors those_needed(const Tensors& gradients) {
  Tensors found;
  for (const Tensor& x : gradients) {
    if (x.defined()) found.push_back(x);
  }
  return found;
}

std::tuple<Tensor, Tensors, Tensors, Tensor> patch_nce_forward(
    const Tensors& queries, const Tensors& keys, const std::optional<Tensor>& temperature_tensor,
    double temperature, double self_logit, bool symmetric, bool query_negatives, bool detach_keys,
    bool bfloat16_products, std::vector<double> loss_scales, std::vector<double> grad_scales,
    int64_t loss_layers, int64_t grad_layers, const std::vector<bool>& need_queries,
    const std::vector<bool>& need_keys, bool need_temperature) {
  const size_t count = queries.size();
  const bool now = !grad_scales.empty();
  STD_TORCH_CHECK(count > 0 && keys.size() == count && loss_scales.size() == count &&
                      (!now || grad_scales.size() == count) && need_queries.size() == count &&
                      need_keys.size() == count,
                  kOp, ": the lists differ in length.");
  need_temperature = need_temperature && now;
  const Tensor& first = queries[0];
  const Dtype dtype = dtype_of(kOp, first);
  const Stream stream = current_stream(first);
  const PatchCall call{bfloat16_products, temperature_of(kOp, temperature_tensor, temperature),
                       static_cast<float>(self_logit), compute_capability(first),
                       multiprocessors(first)};
  Tensors grad_queries, grad_keys;
  Small small{Form{symmetric, query_negatives, detach_keys}};
  std::vector<size_t> large;
  for (size_t l = 0; l < count; ++l) {
    check_layer(queries[l], keys[l], first);
    const int64_t rows = queries[l].size(0) * queries[l].size(1);
    if (loss_layers > 0) loss_scales[l] /= static_cast<double>(rows * loss_layers);
    if (grad_layers > 0 && now) grad_scales[l] /= static_cast<double>(rows * grad_layers);
    const bool alone = dtype == Dtype::kFloat32 || symmetric || query_negatives;
    const bool is_small = can_run_patch_nce(queries[l].size(2), alone ? 1 : queries[l].size(1));
    STD_TORCH_CHECK(is_small || !alone, kOp,
                    ": the CUDA kernel takes features in float32, both directions and query "
                    "negatives of up to 256 channels, got ",
                    queries[l].size(2), ". Use backend='blocks'.");
    grad_queries.push_back(new_gradient(queries[l], is_small && now && need_queries[l]));
    grad_keys.push_back(new_gradient(keys[l], is_small && now && need_keys[l]));
    if (is_small) {
      small.add(queries[l], keys[l], loss_scales[l], now ? grad_scales[l] : 0, grad_queries[l],
                grad_keys[l]);
    } else {
      large.push_back(l);
    }
  }

  const int64_t blocks = patch_nce_blocks(small.losses, call);
  const int64_t parts = blocks + static_cast<int64_t>(large.size());
  Tensor part = new_tensor(first, {parts, 2}, ScalarType::Float);
  float* const data = part.mutable_data_ptr<float>();
  launch_patch_nce(small.losses, call, data, stream);
  launch_patch_nce_gradients(small.gradients, call, stream);
  for (size_t i = 0; i < large.size(); ++i) {
    const size_t l = large[i];
    std::optional<double> grad_scale;
    if (now) grad_scale = grad_scales[l];
    const auto [loss, lse, grad_query, grad_key, none, grad_temperature] = info_nce_forward(
        queries[l], keys[l], std::nullopt, temperature_tensor, temperature, /*normalize=*/true,
        /*symmetric=*/false, /*in_batch=*/true, self_logit, bfloat16_products, grad_scale,
        /*mean=*/false, need_queries[l], need_keys[l], /*need_negatives=*/false, need_temperature);
    grad_queries[l] = grad_query, grad_keys[l] = grad_key;
    LargeLayer layer{loss.const_data_ptr<float>(), loss.numel(),
                     static_cast<float>(loss_scales[l])};
    if (need_temperature) {
      layer.grad_temperature = grad_temperature.const_data_ptr<float>();
      layer.to_loss_scale = static_cast<float>(loss_scales[l] / grad_scales[l]);
    }
    launch_sum_of_layer(layer, data + 2 * (blocks + static_cast<int64_t>(i)), stream);
  }
  Tensor loss = new_scalar(first, true), grad_temperature = new_scalar(first, need_temperature);
  launch_sum_of_parts(data, parts, loss.mutable_data_ptr<float>(),
                      need_temperature ? grad_temperature.mutable_data_ptr<float>() : nullptr,
                      stream);
  return {loss, those_needed(grad_queries), those_needed(grad_keys), grad_temperature};
}

FASTNCE_CUDA_LIBRARY_IMPL(m) { m.impl("patch_nce_forward", FASTNCE_CUDA_BOX(&patch_nce_forward)); }

}  // namespace
}  // namespace fastnce::cuda
