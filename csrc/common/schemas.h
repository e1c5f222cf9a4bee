// The schemas of the ops that both libraries have, each under its own namespace: fastnce,
// fastnce_cuda.
//
// Common to all: floating inputs are float64, float32, bfloat16 or float16, of one dtype per call
// and with any strides. `acc` is float64 for float64 and float32 otherwise. Sums, losses and the
// gradient of the temperature are in acc; other gradients are contiguous and of the input's dtype.
// An output that was not asked for is an empty tensor of shape (0,). The temperature is the float,
// or, if given, the 0-d tensor of float32 or float64. bfloat16_products: the large products
// multiply numbers rounded to bfloat16, where the processor has instructions for it and acc is
// float32.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastnce {

inline void define_shared_ops(torch::stable::detail::StableLibrary& m) {
  // query, key (B, N, D); negatives none, (M, D) shared, or (B, N, M, D) each query's own.
  // Row (b, i) has the logits of q_i with k_j for all j (in_batch) or with k_i alone, with its
  // negatives, and the constant self_logit, all divided by the temperature; rows are L2-normalised
  // first if `normalize`.
  //   loss (B, N) = lse - positive / temperature; symmetric: the mean with the loss of the columns
  //   lse  (B, N), symmetric (2, B, N): of rows, of columns
  // If grad_scale g is given, also the gradients of g * sum(loss) that need_* ask for, or, if
  // `mean`, of g times the mean: no number of rows is an argument, for a compiler would take it
  // for a constant.
  m.def(
      "info_nce_forward(Tensor query, Tensor key, Tensor? negatives, Tensor? temperature_tensor, "
      "float temperature, bool normalize, bool symmetric, bool in_batch, float? self_logit, "
      "bool bfloat16_products, float? grad_scale, bool mean, bool need_query, bool need_key, "
      "bool need_negatives, bool need_temperature) -> (Tensor loss, Tensor lse, "
      "Tensor grad_query, Tensor grad_key, Tensor grad_negatives, Tensor grad_temperature)");

  // The gradients of sum(grad_loss * loss), grad_loss (B, N) in acc, from the lse of the forward.
  m.def(
      "info_nce_backward(Tensor grad_loss, Tensor query, Tensor key, Tensor? negatives, "
      "Tensor? temperature_tensor, float temperature, Tensor lse, bool normalize, bool symmetric, "
      "bool in_batch, float? self_logit, bool bfloat16_products, bool need_query, bool need_key, "
      "bool need_negatives, bool need_temperature) -> (Tensor grad_query, Tensor grad_key, "
      "Tensor grad_negatives, Tensor grad_temperature)");

  // CUT's loss of all layers at once: the sum over layers of loss_scale * sum(loss), the losses
  // those of info_nce_forward with normalize, in_batch and self_logit; queries[l], keys[l] (B, N,
  // D), sizes may differ. If grad_scales is not empty, also the gradients that need_* ask for: of
  // layer l those of grad_scale * sum(loss), of the temperature that of the loss returned. Where
  // loss_layers is not 0, each layer's loss_scale is divided by loss_layers times its rows (B * N);
  // grad_layers does that to the grad_scales.
  m.def(
      "patch_nce_forward(Tensor[] queries, Tensor[] keys, Tensor? temperature_tensor, "
      "float temperature, float self_logit, bool bfloat16_products, float[] loss_scales, "
      "float[] grad_scales, int loss_layers, int grad_layers, bool[] need_queries, "
      "bool[] need_keys, bool need_temperature) -> "
      "(Tensor loss, Tensor[] grad_queries, Tensor[] grad_keys, Tensor grad_temperature)");

  // embeddings e, proxies p (N, D), labels y (N,) int64; rows are L2-normalised, t the temperature.
  //   den_i = exp(e_i . p_i / t) + sum over j != i of exp(e_i . e_j / t), num_i its part with
  //   y_j = y_i
  //   loss (N,) = log den - log num; lse (2, N) = [log den, log num]
  m.def(
      "conditional_contrastive_forward(Tensor embeddings, Tensor proxies, Tensor labels, "
      "Tensor? temperature_tensor, float temperature, float? grad_scale, bool mean, "
      "bool need_embeddings, bool need_proxies, bool need_temperature) -> (Tensor loss, Tensor "
      "lse, "
      "Tensor grad_embeddings, Tensor grad_proxies, Tensor grad_temperature)");
  m.def(
      "conditional_contrastive_backward(Tensor grad_loss, Tensor embeddings, Tensor proxies, "
      "Tensor labels, Tensor? temperature_tensor, float temperature, Tensor lse, "
      "bool need_embeddings, bool need_proxies, bool need_temperature) -> "
      "(Tensor grad_embeddings, Tensor grad_proxies, Tensor grad_temperature)");

  // features f (N, D), labels y (N,) int64; rows are L2-normalised, t the temperature.
  //   has_positive (N,) bool: another row has the label
  //   loss (N,) = lse - mean over p != i with y_p = y_i of f_i . f_p / t; 0 without a positive
  //   lse (N,) = log of the sum over j != i of exp(f_i . f_j / t); 0 for a single row
  // Of g * sum(loss) as above, or, if `mean`, divided by the number of rows with a positive.
  m.def(
      "sup_con_forward(Tensor features, Tensor labels, Tensor? temperature_tensor, "
      "float temperature, float? grad_scale, bool mean, bool need_features, "
      "bool need_temperature) -> (Tensor loss, Tensor has_positive, Tensor lse, "
      "Tensor grad_features, Tensor grad_temperature)");
  m.def(
      "sup_con_backward(Tensor grad_loss, Tensor features, Tensor labels, "
      "Tensor? temperature_tensor, float temperature, Tensor lse, bool need_features, "
      "bool need_temperature) -> (Tensor grad_features, Tensor grad_temperature)");

  // For each layer l: features[l] (B, C, H, W) any strides, patch_ids[l] (S_l,) int64 positions in
  // H * W, which may repeat -> patches[l] (B, S_l, C), divided by their L2 norm if `normalize`;
  // inverse_norms[l] (B, S_l) in acc, 0 for a zero row; no inverse norms without `normalize`.
  m.def(
      "sample_patches_forward(Tensor[] features, Tensor[] patch_ids, bool normalize) -> "
      "(Tensor[] patches, Tensor[] inverse_norms)");

  // Gradients shaped and laid out like feature_likes[l] (only their sizes and strides are read);
  // patches and inverse_norms may be empty lists unless `normalize`. Zero where nothing was
  // sampled, summed where a position was sampled more than once.
  m.def(
      "sample_patches_backward(Tensor[] grad_patches, Tensor[] patches, Tensor[] inverse_norms, "
      "Tensor[] patch_ids, Tensor[] feature_likes, bool normalize) -> Tensor[]");

  // Adds those gradients to maps (B, C, H, W), without overlaps in memory, in place.
  m.def(
      "sample_patches_add_(Tensor(a!)[] maps, Tensor[] grad_patches, Tensor[] patches, "
      "Tensor[] inverse_norms, Tensor[] patch_ids, bool normalize) -> ()");
}

}  // namespace fastnce
