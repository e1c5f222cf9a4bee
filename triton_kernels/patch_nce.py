"""PatchNCE: the layers of one depth, and all their images, are one set of problems for the passes of InfoNCE."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import Columns, Ragged
from .info_nce import Problem, gradients, info_nce_forward, solve
from .launch import kept_for_graphs
from .rows import pack_pairs, resident_depth
from .sums import offset_kind
from .tiles import IN_BATCH

Gradients = tuple[Tensor | None, ...]


def patch_nce_forward(
    queries: list[Tensor],
    keys: list[Tensor],
    temperature: float | Tensor,
    *,
    self_logit: float,
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
    grad_scales = _of_means(grad_scales, grad_layers, queries) if grad_scales else None
    depths: dict[int, list[int]] = {}
    for layer, query in enumerate(queries):
        depths.setdefault(query.shape[-1], []).append(layer)
    loss = grad_temperature = None
    grad_queries: list[Tensor | None] = [None] * len(queries)
    grad_keys: list[Tensor | None] = [None] * len(queries)
    for depth, all_of_depth in depths.items():
        resident = depth <= resident_depth(queries[0])
        for layers in [all_of_depth] if resident else [[layer] for layer in all_of_depth]:
            function = _together if resident else _alone
            part, dq, dk, dt = function(
                [queries[layer] for layer in layers],
                [keys[layer] for layer in layers],
                temperature,
                self_logit,
                [loss_scales[layer] for layer in layers],
                None if grad_scales is None else [grad_scales[layer] for layer in layers],
                ([needs[0][i] for i in layers], [needs[1][i] for i in layers], needs[2]),
            )
            loss = part if loss is None else loss + part
            if dt is not None:
                grad_temperature = dt if grad_temperature is None else grad_temperature + dt
            for layer, query_grad, key_grad in zip(layers, dq, dk, strict=True):
                grad_queries[layer], grad_keys[layer] = query_grad, key_grad
    return loss, (grad_queries, grad_keys, grad_temperature)


def _of_means(scales: Sequence[float], layers: int, rows: Sequence[Tensor]) -> Sequence[float]:
    if not layers:
        return scales
    return [scale / (x.shape[:-1].numel() * layers) for scale, x in zip(scales, rows, strict=True)]


def _together(queries, keys, temperature, self_logit, loss_scales, grad_scales, needs):
    """Layers of one depth, in one launch of each kernel."""
    shapes = [query.shape for query in queries]
    query, key = (torch.cat([x.flatten(0, 1) for x in layers]) for layers in (queries, keys))
    q, k, positive = pack_pairs(query, key, True)
    ragged = Ragged(tuple(n for batch, n, _ in shapes for _ in range(batch)))
    problem = Problem(
        q,
        k,
        positive,
        [Columns(k, IN_BATCH.value, ragged=ragged)],
        temperature,
        offset_kind(temperature, True, query.dtype),
        self_logit=self_logit,
    )
    now = grad_scales is not None
    need_query, need_key, need_temperature = any(needs[0]), any(needs[1]), needs[2]
    want_row = now and (need_query or need_temperature)
    solution = solve(problem, with_product=want_row, with_term=now and need_temperature)
    counts = tuple(batch * n for batch, n, _ in shapes)
    in_loss = kept_for_graphs(_per_row(counts, tuple(loss_scales), query.device))
    loss = (solution.loss * in_loss).sum()
    nothing = (None,) * len(queries)
    if not now:
        return loss, nothing, nothing, None

    largest = max(grad_scales)
    weights = tuple(scale / largest for scale in grad_scales)
    weight = kept_for_graphs(_per_row(counts, weights, query.device))
    needed = (need_query, need_key, False, False)
    dq, dk, _, _ = gradients(problem, solution, weight, largest, needed, query.dtype)
    grad_temperature = None
    if need_temperature:
        by_row = solution.term - solution.missing * solution.logit
        grad_temperature = -(by_row * in_loss).sum() / temperature

    def layers_of(gradient: Tensor | None, wanted: Sequence[bool]) -> Gradients:
        if gradient is None:
            return nothing
        parts = zip(gradient.split(counts), shapes, wanted, strict=True)
        return tuple(part.view(shape) if want else None for part, shape, want in parts)

    return loss, layers_of(dq, needs[0]), layers_of(dk, needs[1]), grad_temperature


@functools.lru_cache(maxsize=64)
def _per_row(counts: tuple[int, ...], values: tuple[float, ...], device: torch.device) -> Tensor:
    """Each layer's value for each of its rows; copied to the device once, not with every call."""
    each = torch.tensor(values).repeat_interleave(torch.tensor(counts))
    return each.to(device)


def _alone(queries, keys, temperature, self_logit, loss_scales, grad_scales, needs):
    """A layer too deep for tiles of whole rows."""
    needed = (needs[0][0], needs[1][0], False, needs[2])
    losses, _, (dq, dk, _, dt) = info_nce_forward(
        queries[0],
        keys[0],
        None,
        temperature,
        normalize=True,
        symmetric=False,
        in_batch=True,
        self_logit=self_logit,
        grad_scale=None if grad_scales is None else grad_scales[0],
        needs=needed,
    )
    dt = None if dt is None else dt * (loss_scales[0] / grad_scales[0])
    return losses.sum() * loss_scales[0], (dq,), (dk,), dt
