"""What the operators return, in shapes and dtypes alone: for torch.compile and meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gradient_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape if needed else (0,))


def _scalar_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(() if needed else (0,), dtype=_acc(x))


def _fake_info_nce_gradients(query, key, negatives, needs) -> tuple[Tensor, ...]:
    need_query, need_key, need_negatives, need_temperature = needs
    need_negatives = need_negatives and negatives is not None
    return (
        _gradient_like(query, need_query),
        _gradient_like(key, need_key),
        _gradient_like(negatives if need_negatives else query, need_negatives),
        _scalar_like(query, need_temperature),
    )


def _fake_info_nce_forward(
    query,
    key,
    negatives,
    temperature_tensor,
    temperature,
    normalize,
    symmetric,
    in_batch,
    self_logit,
    bfloat16_products,
    grad_scale,
    mean,
    *needs,
):
    rows = tuple(query.shape[:2])
    loss = query.new_empty(rows, dtype=_acc(query))
    lse = query.new_empty((2, *rows) if symmetric else rows, dtype=_acc(query))
    needs = needs if grad_scale is not None else (False,) * 4
    return loss, lse, *_fake_info_nce_gradients(query, key, negatives, needs)


def _fake_info_nce_backward(
    grad_loss,
    query,
    key,
    negatives,
    temperature_tensor,
    temperature,
    lse,
    normalize,
    symmetric,
    in_batch,
    self_logit,
    bfloat16_products,
    *needs,
):
    return _fake_info_nce_gradients(query, key, negatives, needs)


def _fake_patch_nce_forward(
    queries,
    keys,
    temperature_tensor,
    temperature,
    self_logit,
    bfloat16_products,
    loss_scales,
    grad_scales,
    loss_layers,
    grad_layers,
    need_queries,
    need_keys,
    need_temperature,
):
    now = len(grad_scales) > 0

    def gradients(rows, needs):
        return [_gradient_like(x, now and need) for x, need in zip(rows, needs, strict=True)]

    return (
        _scalar_like(queries[0], True),
        gradients(queries, need_queries),
        gradients(keys, need_keys),
        _scalar_like(queries[0], now and need_temperature),
    )


def _fake_conditional_contrastive_gradients(embeddings, proxies, needs) -> tuple[Tensor, ...]:
    return (
        _gradient_like(embeddings, needs[0]),
        _gradient_like(proxies, needs[1]),
        _scalar_like(embeddings, needs[2]),
    )


def _fake_conditional_contrastive_forward(
    embeddings, proxies, labels, temperature_tensor, temperature, grad_scale, mean, *needs
):
    rows = embeddings.shape[0]
    loss = embeddings.new_empty((rows,), dtype=_acc(embeddings))
    lse = embeddings.new_empty((2, rows), dtype=_acc(embeddings))
    needs = needs if grad_scale is not None else (False,) * 3
    return loss, lse, *_fake_conditional_contrastive_gradients(embeddings, proxies, needs)


def _fake_conditional_contrastive_backward(
    grad_loss, embeddings, proxies, labels, temperature_tensor, temperature, lse, *needs
):
    return _fake_conditional_contrastive_gradients(embeddings, proxies, needs)


def _fake_sup_con_gradients(features, needs) -> tuple[Tensor, ...]:
    return _gradient_like(features, needs[0]), _scalar_like(features, needs[1])


def _fake_sup_con_forward(
    features, labels, temperature_tensor, temperature, grad_scale, mean, *needs
):
    rows = features.shape[0]
    loss, lse = (features.new_empty((rows,), dtype=_acc(features)) for _ in range(2))
    has_positive = features.new_empty((rows,), dtype=torch.bool)
    needs = needs if grad_scale is not None else (False,) * 2
    return loss, has_positive, lse, *_fake_sup_con_gradients(features, needs)


def _fake_sup_con_backward(
    grad_loss, features, labels, temperature_tensor, temperature, lse, *needs
):
    return _fake_sup_con_gradients(features, needs)


def _fake_pairwise_cosine_similarity_forward(
    x, y, temperature_tensor, temperature, bfloat16_products
):
    columns = x if y is None else y
    return x.new_empty((*x.shape[:-1], columns.shape[-2]))


def _fake_pairwise_cosine_similarity_backward(
    grad, x, y, temperature_tensor, temperature, bfloat16_products, *needs
):
    need_x, need_y, need_temperature = needs
    need_y = need_y and y is not None
    return (
        _gradient_like(x, need_x),
        _gradient_like(y if need_y else x, need_y),
        _scalar_like(x, need_temperature),
    )


def _fake_sample_patches_forward(features, patch_ids, normalize):
    pairs = list(zip(features, patch_ids, strict=True))
    patches = [x.new_empty((x.shape[0], ids.shape[0], x.shape[1])) for x, ids in pairs]
    norms = [x.new_empty((x.shape[0], ids.shape[0]), dtype=_acc(x)) for x, ids in pairs]
    return patches, norms if normalize else []


def _fake_sample_patches_backward(
    grad_patches, patches, inverse_norms, patch_ids, feature_likes, normalize
):
    return [torch.empty_like(x) for x in feature_likes]


def _fake_sample_patches_add_(maps, grad_patches, patches, inverse_norms, patch_ids, normalize):
    return None


def _fake_labelled_lse_forward(x, y, x_labels, y_labels, temperature_tensor, temperature, own):
    return x.new_empty((x.shape[0], 2), dtype=torch.float64)


def _fake_labelled_lse_backward(
    x, y, x_labels, y_labels, temperature_tensor, temperature, x_state, y_state, own
):
    return x.new_empty(x.shape, dtype=_acc(x)), x.new_empty((), dtype=torch.float64)


FAKES: dict[str, Callable] = {
    "info_nce_forward": _fake_info_nce_forward,
    "info_nce_backward": _fake_info_nce_backward,
    "patch_nce_forward": _fake_patch_nce_forward,
    "conditional_contrastive_forward": _fake_conditional_contrastive_forward,
    "conditional_contrastive_backward": _fake_conditional_contrastive_backward,
    "sup_con_forward": _fake_sup_con_forward,
    "sup_con_backward": _fake_sup_con_backward,
    "pairwise_cosine_similarity_forward": _fake_pairwise_cosine_similarity_forward,
    "pairwise_cosine_similarity_backward": _fake_pairwise_cosine_similarity_backward,
    "labelled_lse_forward": _fake_labelled_lse_forward,
    "labelled_lse_backward": _fake_labelled_lse_backward,
    "sample_patches_forward": _fake_sample_patches_forward,
    "sample_patches_backward": _fake_sample_patches_backward,
    "sample_patches_add_": _fake_sample_patches_add_,
}


def register(namespace: str, fakes: Mapping[str, Callable] = FAKES) -> None:
    """For those operators that ``torch.ops.<namespace>`` has."""
    for name, fake in fakes.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", fake)
