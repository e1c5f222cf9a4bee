// InfoNCE's operators, for other ops as well; the schemas say what they do.
#pragma once

#include <tuple>

#include "op.h"

namespace fastnce::cuda {

// (loss, lse, grad_query, grad_key, grad_negatives, grad_temperature)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_forward(
    const Tensor& query, const Tensor& key, const std::optional<Tensor>& negatives,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
    bool symmetric, bool in_batch, std::optional<double> self_logit, bool bfloat16_products,
    std::optional<double> grad_scale, bool mean, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature);

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward(
    const Tensor& grad_loss, const Tensor& query, const Tensor& key,
    const std::optional<Tensor>& negatives, const std::optional<Tensor>& temperature_tensor,
    double temperature, const Tensor& lse, bool normalize, bool symmetric, bool in_batch,
    std::optional<double> self_logit, bool bfloat16_products, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature);

}  // namespace fastnce::cuda
