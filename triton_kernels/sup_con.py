"""SupCon; NT-Xent is the one with two rows of each label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .gradients import RowGradients, relative_weights, statistics
from .labelled import self_products, self_sums
from .launch import cdiv, launch
from .parts import PARTS, merged, some_parts
from .rows import pack
from .tiles import LN_2, SUP_CON

Gradients = tuple[Tensor | None, ...]
_BLOCK = 128


def sup_con_forward(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Losses, has_positive and lse, all (N,), and, if ``grad_scale`` is given, the gradients, as in InfoNCE.

    Arguments and results: those of the operator, see ``fastnce/ops/sup_con.py``.
    """
    columns = Columns(pack(features, True), SUP_CON.value, labels=labels.contiguous())
    parts = self_sums(columns, temperature, features.dtype)
    loss, lse, positives = (parts.sum.new_empty((len(labels),)) for _ in range(3))
    launch(
        _sup_con_kernel,
        (cdiv(len(labels), _BLOCK),),
        largest=parts.largest,
        sums=parts.sum,
        same=parts.a,
        counts=parts.b,
        loss=loss,
        lse=lse,
        positives=positives,
        parts=parts.sum.shape[0],
        total=len(labels),
        BLOCK=_BLOCK,
    )
    has_positive = positives > 0
    grads: Gradients = (None,) * 2
    if grad_scale is not None:
        upstream = grad_scale / has_positive.sum().clamp(min=1) if mean else grad_scale
        weight = torch.ones_like(loss)
        grads = _sup_con_gradients(
            columns, temperature, lse, positives, weight, upstream, needs, features.dtype
        )
    return loss, has_positive, lse, grads


def sup_con_backward(
    grad_loss: Tensor,
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward."""
    columns = Columns(pack(features, True), SUP_CON.value, labels=labels.contiguous())
    weight, upstream = relative_weights(grad_loss)
    ordered = labels.sort().values
    last, first = (
        torch.searchsorted(ordered, columns.labels, right=right) for right in (True, False)
    )
    positives = (last - first - 1).float()
    return _sup_con_gradients(
        columns, temperature, lse, positives, weight, upstream, needs, features.dtype
    )


def _sup_con_gradients(
    columns, temperature, lse, positives, weight, upstream, needs, dtype
) -> Gradients:
    weight = weight * (positives > 0)
    of_losses = statistics(lse, weight, weight / positives.clamp(min=1))
    of_rows = RowGradients(columns.y, temperature, upstream, dtype) if needs[0] else None
    term = self_products(columns, temperature, of_losses, of_rows, needs[1])
    return (
        None if of_rows is None else of_rows.out,
        -term * (upstream / temperature) if needs[1] else None,
    )


@triton.jit(do_not_specialize=["parts", "total"])
def _sup_con_kernel(
    largest,
    sums,
    same,
    counts,
    loss,
    lse,
    positives,
    parts,
    total,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    none = tl.full((BLOCK,), float("-inf"), tl.float32)
    top, sum_ = merged(largest, sums, at, there, parts, total, none)
    number = tl.zeros((BLOCK,), tl.float32)
    logits = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, parts, PARTS):
        where, mask = some_parts(begin, parts, at, there, total)
        logits += tl.sum(tl.load(same + where, mask=mask, other=0.0), 0)
        number += tl.sum(tl.load(counts + where, mask=mask, other=0.0), 0)
    log_sum = tl.where(sum_ == 0, 0.0, (top + tl.log2(sum_)) * LN_2)  # 0 for a single row
    own = log_sum - logits / tl.maximum(number, 1.0)
    tl.store(loss + at, tl.where(number > 0, own, 0.0), mask=there)
    tl.store(lse + at, log_sum, mask=there)
    tl.store(positives + at, number, mask=there)
