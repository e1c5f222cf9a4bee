"""PatchNCE: layers of one size, and all their images, are the batch of one call of InfoNCE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import Columns
from .gradients import Coefficients, RowGradients, both_products, statistics
from .info_nce import Problem, info_nce_forward, solve
from .rows import pack_pairs
from .sums import offset_kind
from .tiles import BOTH_SIDES, DETACHED

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
    """Losses of several layers in one call: ``sum_l loss_scales[l] * losses_l.sum()`` and its gradients.

    Arguments and results: those of the operator, see ``fastnce/ops/patch_nce.py``.
    """
    loss_scales = _of_means(loss_scales, loss_layers, queries)
    grad_scales = _of_means(grad_scales, grad_layers, queries)
    # Where each direction has rows and losses of its own.
    if symmetric and (query_negatives or detach_keys):
        loss_scales, grad_scales = ([0.5 * x for x in each] for each in (loss_scales, grad_scales))
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
        losses, (dq, dk, dt) = (_with_query_negatives if query_negatives else _with_keys)(
            torch.cat([queries[layer] for layer in layers]),
            torch.cat([keys[layer] for layer in layers]),
            temperature,
            self_logit,
            symmetric,
            detach_keys,
            grad_scale,
            (need_query, need_key, needs[2]),
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


def _with_keys(query, key, temperature, self_logit, symmetric, detach_keys, grad_scale, needs):
    """The losses, and the gradients of ``grad_scale`` times their sum: InfoNCE.

    With detached keys, the two directions are problems of their own, each with a gradient of its queries.
    """
    need_query, need_key, need_temperature = needs
    apart = symmetric and detach_keys
    if apart:
        query, key = torch.cat([query, key]), torch.cat([key, query])
        need_query, need_key = need_query or need_key, False
    losses, _, (dq, dk, _, dt) = info_nce_forward(
        query,
        key,
        None,
        temperature,
        normalize=True,
        symmetric=symmetric and not apart,
        in_batch=True,
        self_logit=self_logit,
        grad_scale=grad_scale,
        needs=(need_query, need_key, False, need_temperature),
    )
    if apart and dq is not None:
        dq, dk = dq.chunk(2)
    return losses, (dq, dk, dt)


def _with_query_negatives(
    query, key, temperature, self_logit, symmetric, detach_keys, grad_scale, needs
):
    """As ``_with_keys``: rows and columns are an image's queries and then its keys."""
    images, pairs, _ = query.shape
    rows, partners, positive = pack_pairs(
        torch.cat([query, key], 1), torch.cat([key, query], 1), normalize=True
    )
    columns = Columns(rows, (DETACHED if detach_keys else BOTH_SIDES).value, images)
    offset = offset_kind(temperature, True, query.dtype)
    problem = Problem(
        rows, partners, positive, [columns], temperature, offset, False, self_logit, self_count=2
    )
    solution = solve(problem, with_product=False, with_term=False)
    losses = solution.loss.view(images, 2, pairs)[:, : 1 + symmetric]
    need_query, need_key, need_temperature = needs
    if grad_scale is None or not any(needs):
        return losses, (None, None, None)

    weight, at_positive = torch.ones_like(solution.lse), solution.at_positive
    if not symmetric:
        weight.view(images, 2, pairs)[:, 1] = 0
        at_positive = weight * at_positive
    of_losses, by_row = statistics(solution.lse, weight), at_positive * solution.logit
    if not detach_keys:  # the losses of a pair have one positive
        both = at_positive.view(images, 2, pairs)
        at_positive = (both + both.flip(1)).view(-1)
    of_rows = None
    if need_query or need_key:
        of_rows = RowGradients(rows, temperature, grad_scale, query.dtype, partners, at_positive)
    _, _, term = both_products(
        Coefficients(rows, columns, temperature, of_losses, of_losses),
        want_x=of_rows is not None,
        want_y=False,
        want_term=need_temperature,
        of_x=of_rows,
    )
    sides = (None, None)
    if of_rows is not None:
        sides = of_rows.out.view(images, 2, pairs, -1).transpose(0, 1).contiguous()
    grad_temperature = None
    if need_temperature:
        constant = self_logit / temperature
        by_row = by_row + term + 2 * weight * torch.exp(constant - solution.lse) * constant
        grad_temperature = -by_row.sum() * (grad_scale / temperature)
    return losses, (*sides, grad_temperature)


def _of_means(scales: Sequence[float], layers: int, rows: Sequence[Tensor]) -> Sequence[float]:
    if not layers or not scales:
        return scales
    return [scale / (x.shape[:-1].numel() * layers) for scale, x in zip(scales, rows, strict=True)]


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
