"""PatchNCE in blocks: layers of the same shape are one batch of InfoNCE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce.blocks.info_nce import Problem
from fastnce.blocks.tiles import Rows

# Elements up to which layers of the same shape are one batch on a CPU: larger ones, one at a time, stay in its cache.
_JOINED_ON_CPU = 1 << 14


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
) -> tuple[Tensor, tuple[list[Tensor | None], list[Tensor | None], Tensor | None]]:
    need_queries, need_keys, need_temperature = needs
    alike: dict[tuple, list[int]] = {}
    for layer, query in enumerate(queries):
        count = query.shape[:2].numel()
        loss_scale = loss_scales[layer] / (loss_layers * count if loss_layers else 1)
        grad_scale = None
        if len(grad_scales) > 0:
            grad_scale = grad_scales[layer] / (grad_layers * count if grad_layers else 1)
        needed = need_queries[layer], need_keys[layer]
        alone = layer if query.device.type == "cpu" and query.numel() > _JOINED_ON_CPU else None
        kind = query.shape, loss_scale, grad_scale, needed, alone
        alike.setdefault(kind, []).append(layer)

    loss, of_temperature = None, None
    grads: tuple[list, list] = ([None] * len(queries), [None] * len(queries))
    for (shape, loss_scale, grad_scale, needed, _), layers in alike.items():
        both = Rows(torch.cat([x[layer] for x in (queries, keys) for layer in layers]), True)
        half = len(both.units) // 2
        problem = Problem(
            both[:half], both[half:], None, temperature, in_batch=True, self_logit=self_logit
        )
        losses, _, found = problem.run(grad_scale, (*needed, False, need_temperature))
        part, scale = losses.mean(), loss_scale * losses.numel()
        part = part if scale == 1 else part * scale
        loss = part if loss is None else loss + part
        for side, grad in zip(grads, found, strict=False):
            if grad is not None:
                for layer, part in zip(layers, grad.split(shape[0]), strict=True):
                    side[layer] = part
        if found[3] is not None:  # the temperature's is that of the loss
            part = found[3] * (loss_scale / grad_scale)
            of_temperature = part if of_temperature is None else of_temperature + part
    return loss, (*grads, of_temperature)
