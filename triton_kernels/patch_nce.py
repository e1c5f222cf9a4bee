"""PatchNCE: layers of one size, and all their images, are the batch of one call of InfoNCE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .info_nce import info_nce_forward

Gradients = list[Tensor | None]


def patch_nce_forward(
    queries: list[Tensor],
    keys: list[Tensor],
    temperature: float | Tensor,
    *,
    self_logit: float,
    symmetric: bool = False,
    query_negatives: bool = False,
    detach_keys: bool = False,
    loss_scales: Sequence[float],
    grad_scales: Sequence[float],
    loss_layers: int = 0,
    grad_layers: int = 0,
    needs: tuple[Sequence[bool], Sequence[bool], bool],
) -> tuple[Tensor, tuple[Gradients, Gradients, Tensor | None]]:
    """InfoNCE of several layers in one call: ``sum_l loss_scales[l] * losses_l.sum()`` and its gradients.

    Arguments and results: those of the operator, see ``fastnce/ops/patch_nce.py``.
    """
    loss_scales = _of_means(loss_scales, loss_layers, queries)
    grad_scales = _of_means(grad_scales, grad_layers, queries)
    now = len(grad_scales) > 0
    alike: dict[tuple, list[int]] = {}
    for layer, query in enumerate(queries):
        scales = (loss_scales[layer], grad_scales[layer] if now else None)
        alike.setdefault((*query.shape[1:], *scales), []).append(layer)
    loss = grad_temperature = None
    grad_queries: Gradients = [None] * len(queries)
    grad_keys: Gradients = [None] * len(queries)
    for (_, _, loss_scale, grad_scale), layers in alike.items():
        need_query, need_key = (any(need[layer] for layer in layers) for need in needs[:2])
        losses, _, (dq, dk, _, dt) = info_nce_forward(
            torch.cat([queries[layer] for layer in layers]),
            torch.cat([keys[layer] for layer in layers]),
            None,
            temperature,
            normalize=True,
            symmetric=False,
            in_batch=True,
            self_logit=self_logit,
            grad_scale=grad_scale,
            needs=(need_query, need_key, False, needs[2]),
        )
        loss = _sum(loss, losses.sum() * loss_scale)
        if dt is not None:  # that of the loss returned
            grad_temperature = _sum(grad_temperature, dt * (loss_scale / grad_scale))
        images = [len(queries[layer]) for layer in layers]
        for gradient, need, found in ((dq, needs[0], grad_queries), (dk, needs[1], grad_keys)):
            if gradient is None:
                continue
            for layer, part in zip(layers, gradient.split(images), strict=True):
                found[layer] = part if need[layer] else None
    return loss, (grad_queries, grad_keys, grad_temperature)


def _of_means(scales: Sequence[float], layers: int, rows: Sequence[Tensor]) -> Sequence[float]:
    if not layers or not scales:
        return scales
    return [scale / (x.shape[:-1].numel() * layers) for scale, x in zip(scales, rows, strict=True)]


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
