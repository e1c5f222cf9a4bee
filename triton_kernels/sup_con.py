"""The supervised contrastive loss; NT-Xent is the one with two rows of each label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .gradients import RowGradients
from .info_nce import relative_weights, statistics
from .launch import cdiv, launch
from .parts import Parts
from .row_losses import merged
from .rows import Rows, pack
from .self_similarity import self_products, self_sums
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
    rows, columns, parts = _sums(features, labels, temperature)
    loss, lse, positives = _losses(parts)
    has_positive = positives > 0
    grads: Gradients = (None,) * 2
    if grad_scale is not None:
        upstream = grad_scale / has_positive.sum().clamp(min=1) if mean else grad_scale
        weight = torch.ones_like(loss)
        grads = _gradients(
            rows, columns, temperature, lse, positives, weight, upstream, needs, features.dtype
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
    rows = pack(features, True)
    columns = Columns(rows, SUP_CON.value, labels=labels.contiguous())
    weight, upstream = relative_weights(grad_loss)
    positives = _label_counts(labels)
    return _gradients(
        rows, columns, temperature, lse, positives, weight, upstream, needs, features.dtype
    )


def _sums(
    features: Tensor, labels: Tensor, temperature: float | Tensor
) -> tuple[Rows, Columns, Parts]:
    rows = pack(features, True)
    columns = Columns(rows, SUP_CON.value, labels=labels.contiguous())
    return rows, columns, self_sums(rows, columns, temperature, features.dtype)


def _label_counts(labels: Tensor) -> Tensor:
    """How many other rows have each row's label."""
    ordered = labels.sort().values
    ends = [
        torch.searchsorted(ordered, labels.contiguous(), right=right) for right in (True, False)
    ]
    return (ends[0] - ends[1] - 1).float()


def _losses(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, log-sum-exps and the numbers of positives."""
    total = parts.sum.shape[1]
    loss, lse, positives = (parts.sum.new_empty((total,)) for _ in range(3))
    launch(
        _losses_kernel,
        (cdiv(total, _BLOCK),),
        {"num_warps": 4, "num_stages": 2},
        largest=parts.largest,
        sums=parts.sum,
        same=parts.a,
        counts=parts.b,
        loss=loss,
        lse=lse,
        positives=positives,
        parts=parts.sum.shape[0],
        total=total,
        BLOCK=_BLOCK,
    )
    return loss, lse, positives


def _gradients(
    rows, columns, temperature, lse, positives, weight, upstream, needs, dtype
) -> Gradients:
    need_rows, need_temperature = needs
    if not (need_rows or need_temperature):
        return None, None
    weight = weight * (positives > 0)
    of_losses = statistics(lse, weight, weight / positives.clamp(min=1))
    of_rows = RowGradients(rows, temperature, upstream, dtype) if need_rows else None
    term = self_products(rows, columns, temperature, of_losses, of_rows, need_temperature)
    return (
        None if of_rows is None else of_rows.out,
        -term * (upstream / temperature) if need_temperature else None,
    )


@triton.jit(do_not_specialize=["parts", "total"])
def _losses_kernel(
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
    for part in range(parts):
        first = tl.cast(part, tl.int64) * total
        logits += tl.load(same + first + at, mask=there, other=0.0)
        number += tl.load(counts + first + at, mask=there, other=0.0)
    log_sum = tl.where(sum_ == 0, 0.0, (top + tl.log2(sum_)) * LN_2)  # 0 for a single row
    own = log_sum - logits / tl.maximum(number, 1.0)
    tl.store(loss + at, tl.where(number > 0, own, 0.0), mask=there)
    tl.store(lse + at, log_sum, mask=there)
    tl.store(positives + at, number, mask=there)
