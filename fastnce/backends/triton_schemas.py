"""The operators ``torch.ops.fastnce_triton.*``; where gradients are not needed, they return empty tensors."""

SCHEMAS = (
    "info_nce_forward(Tensor query, Tensor key, Tensor? negatives, Tensor? temperature_tensor, float temperature, "
    "bool normalize, bool symmetric, bool in_batch, float? self_logit, bool fp8, float? grad_scale, bool mean, bool need_query, "
    "bool need_key, "
    "bool need_negatives, bool need_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "info_nce_backward(Tensor grad_loss, Tensor query, Tensor key, Tensor? negatives, Tensor? temperature_tensor, "
    "float temperature, Tensor lse, bool normalize, bool symmetric, bool in_batch, float? self_logit, bool fp8, "
    "bool need_query, bool need_key, bool need_negatives, bool need_temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    "patch_nce_forward(Tensor[] queries, Tensor[] keys, Tensor? temperature_tensor, float temperature, float self_logit, "
    "float[] loss_scales, float[] grad_scales, int loss_layers, int grad_layers, bool[] need_queries, bool[] need_keys, bool need_temperature) "
    "-> (Tensor, Tensor[], Tensor[], Tensor)",
    "conditional_contrastive_forward(Tensor embeddings, Tensor proxies, Tensor labels, Tensor? temperature_tensor, "
    "float temperature, float? grad_scale, bool mean, bool need_embeddings, bool need_proxies, bool need_temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "conditional_contrastive_backward(Tensor grad_loss, Tensor embeddings, Tensor proxies, Tensor labels, "
    "Tensor? temperature_tensor, float temperature, Tensor lse, bool need_embeddings, bool need_proxies, "
    "bool need_temperature) -> (Tensor, Tensor, Tensor)",
    "sup_con_forward(Tensor features, Tensor labels, Tensor? temperature_tensor, float temperature, float? grad_scale, "
    "bool mean, bool need_features, bool need_temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sup_con_backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor? temperature_tensor, float temperature, "
    "Tensor lse, bool need_features, bool need_temperature) -> (Tensor, Tensor)",
    "sample_patches_forward(Tensor[] features, Tensor[] patch_ids, bool normalize) -> (Tensor[], Tensor[])",
    "sample_patches_backward(Tensor[] grad_patches, Tensor[] patches, Tensor[] inverse_norms, Tensor[] patch_ids, "
    "Tensor[] feature_likes, bool normalize) -> Tensor[]",
    "pairwise_cosine_similarity_forward(Tensor x, Tensor y, Tensor? temperature_tensor, float temperature) -> Tensor",
    "pairwise_cosine_similarity_backward(Tensor grad, Tensor x, Tensor y, Tensor? temperature_tensor, float temperature, "
    "bool need_x, bool need_y, bool need_temperature) -> (Tensor, Tensor, Tensor)",
    "labelled_lse_forward(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? temperature_tensor, "
    "float temperature, bool own) -> Tensor",
    "labelled_lse_backward(Tensor x, Tensor y, Tensor x_labels, Tensor y_labels, Tensor? temperature_tensor, "
    "float temperature, Tensor x_state, Tensor y_state, bool own) -> (Tensor, Tensor)",
)
