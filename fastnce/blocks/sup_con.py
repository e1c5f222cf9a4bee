"""SupCon in blocks: two products where one block has all logits, else one more for their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce.blocks.labelled_lse import Logits, State
from fastnce.blocks.tiles import Rows


def sup_con_forward(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    rows = Rows(features, True)
    logits = Logits(rows, rows, labels, labels, temperature, own=True)
    positives = _positives(labels)
    has_positive, divisor = positives > 0, positives.clamp(min=1).to(rows.units.dtype)
    lse, of_positives = logits.sums(linear=True)
    if len(lse) == 1:
        lse.zero_()  # the sum of nothing
    losses = (lse - of_positives / divisor).where(has_positive, 0)
    if grad_scale is None:
        return losses, has_positive, lse, (None, None)
    weights = has_positive.to(lse.dtype) * grad_scale
    if mean:
        weights /= has_positive.sum().clamp(min=1)
    return losses, has_positive, lse, _gradients(logits, lse, weights, divisor, needs)


def sup_con_backward(
    grad_loss: Tensor,
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    rows = Rows(features, True)
    logits = Logits(rows, rows, labels, labels, temperature, own=True)
    positives = _positives(labels)
    weights = grad_loss.to(lse.dtype).where(positives > 0, 0)
    return _gradients(logits, lse, weights, positives.clamp(min=1), needs)


def _positives(labels: Tensor) -> Tensor:
    """The number (N,) of the other rows with a row's label."""
    labels = labels.contiguous()
    found = labels.sort().values
    return torch.searchsorted(found, labels, right=True) - torch.searchsorted(found, labels) - 1


def _gradients(
    logits: Logits, lse: Tensor, weights: Tensor, divisor: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    state = State(lse, weights, linear=-weights / divisor)
    of_units, moment = logits.gradient(state, state, needs[1])
    of_temperature = None if moment is None else (-moment / logits.tau).to(of_units.dtype)
    return logits.x.gradient(of_units) if needs[0] else None, of_temperature
