"""PatchNCE, the patchwise contrastive loss of CUT."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastnce.ops import _checks
from fastnce.ops.info_nce import info_nce_reduced

# CUT overwrites each patch's similarity with its own key among the negatives by this value before dividing by the temperature.
# It is no -inf: at a temperature near 1 the term exp(-10 / t) is part of the published loss.
SELF_LOGIT = -10.0


def patch_nce(
    query_features: Tensor | Sequence[Tensor],
    key_features: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    negatives: str = "image",
    backend: str | None = None,
) -> Tensor:
    r"""CUT's PatchNCE (Park et al. 2020, https://arxiv.org/abs/2007.15651), for one layer or all layers at once.

    .. math:: \ell_i = \log \Big( e^{-10 / \tau} + \sum_j e^{s_{ij} / \tau} \Big) - s_{ii} / \tau

    averaged over patches, images and layers; s is the cosine of a patch of the translated image with the patches of the input.
    Plain PyTorch for one layer: ``cross_entropy(cat([diagonal, similarity with -10 on its diagonal]) / temperature, 0)``.

    Args:
        query_features: (B, S, C), S patches of each of B images, already projected; float64, float32, bfloat16 or float16.
            Normalisation is part of the op. Or a list, one entry per layer, S and C may differ.
        key_features: like ``query_features``; patch s of image b is the positive of that query. Gradients are computed only
            if it requires them (CUT detaches it).
        temperature: positive float, or 0-d tensor, which gets its gradient.
        negatives: ``"image"``: the other patches of the same image; ``"batch"``: those of all images.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, a scalar, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> layers = [torch.randn(2, 64, 256) for _ in range(4)]
        >>> fastnce.patch_nce(layers, layers).item() < 0.1
        True
    """
    op = "patch_nce"
    queries, keys = _as_layers(op, query_features, key_features)
    _checks.expect_choice(op, "negatives", negatives, ("image", "batch"))
    loss = None
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        suffix = "" if isinstance(query_features, Tensor) else f"[{layer}]"
        query, key = _checked(op, query, key, suffix)
        layer_temperature = _checks.expect_temperature(op, temperature, query)
        if negatives == "batch":
            query, key = query.flatten(0, 1).unsqueeze(0), key.flatten(0, 1).unsqueeze(0)
        layer_loss = info_nce_reduced(
            op,
            query,
            key,
            None,
            layer_temperature,
            normalize=True,
            symmetric=False,
            in_batch=True,
            self_logit=SELF_LOGIT,
            weight=1 / (query.shape[0] * query.shape[1] * len(queries)),
            backend=backend,
        )
        loss = layer_loss if loss is None else loss + layer_loss
    return loss


def _as_layers(op: str, queries: object, keys: object) -> tuple[list, list]:
    if isinstance(queries, Tensor) and isinstance(keys, Tensor):
        return [queries], [keys]
    for name, value in (("query_features", queries), ("key_features", keys)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                f"{op}: query_features and key_features must both be tensors (B, S, C) or both be lists of them, one per layer; "
                f"{name} is {type(value).__name__}."
            )
    if not queries or len(queries) != len(keys):
        raise ValueError(
            f"{op}: query_features and key_features must have the same number of layers, at least one; "
            f"got {len(queries)} and {len(keys)}."
        )
    return list(queries), list(keys)


def _checked(op: str, query: Tensor, key: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
    query, key = _checks.same_dtype_under_autocast(query, key)
    query_name, key_name = f"query_features{suffix}", f"key_features{suffix}"
    _checks.expect_float_tensor(op, query_name, query, (3,), "(B, S, C)")
    _checks.expect_float_tensor(op, key_name, key, (3,), "(B, S, C)")
    _checks.expect_shape(op, key_name, key, tuple(query.shape), f"the shape of {query_name}")
    _checks.expect_alike(op, key_name, key, query_name, query)
    return query, key
