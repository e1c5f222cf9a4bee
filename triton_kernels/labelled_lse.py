"""Log-sum-exp of rows against columns with labels, one block of a larger matrix; and this block's part in its gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .columns import Columns
from .gradients import RowGradients, both_products
from .info_nce import statistics
from .rows import Rows, pack
from .sums import labelled_sums
from .tiles import LABELLED, TWO_C


def labelled_lse_forward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    *,
    own: bool,
) -> Tensor:
    """``[log sum_j exp(s_ij / t), log sum_{j of the label of i} exp(s_ij / t)]``, -inf for an empty sum: (N, 2) float64.

    Arguments and results: :func:`fastnce.reference.labelled_lse_forward`.
    """
    rows, columns = _block(x, y, x_labels, y_labels, own)
    parts = labelled_sums(rows, columns, temperature, x.dtype)
    return torch.stack([_lse(parts.largest, parts.sum), _lse(parts.a, parts.b)], dim=1)


def labelled_lse_backward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    x_state: Tensor,
    y_state: Tensor,
    *,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """This block's part in the gradient of ``x``, as rows and as columns, and of the temperature, as rows alone.

    Arguments and results: :func:`fastnce.reference.labelled_lse_backward`.
    """
    rows, columns = _block(x, y, x_labels, y_labels, own)
    weights = torch.cat([x_state[:, 2:], y_state[:, 2:]])
    top = weights.abs().amax().float()
    top = torch.where((top > 0) & top.isfinite(), top, 1.0)  # fp16 holds weights of at most 1
    of_x = RowGradients(rows, temperature, top, torch.float32)
    _, _, term = both_products(
        rows,
        columns,
        temperature,
        _statistics(x_state, top),
        _statistics(y_state, top),
        want_x=True,
        want_y=False,
        want_term=True,
        of_x=of_x,
    )
    return of_x.out, -term.sum(dtype=torch.float64) * top / temperature


def _block(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, own: bool
) -> tuple[Rows, Columns]:
    kind = TWO_C if own else LABELLED
    labels = y_labels.contiguous()
    columns = Columns(pack(y, True), kind.value, labels=labels, x_labels=x_labels.contiguous())
    return pack(x, True), columns


def _lse(largest: Tensor, sums: Tensor) -> Tensor:
    """Of all parts (P, R) of a row's sum, in fp64: the lse of other blocks joins it."""
    return torch.logsumexp(largest.double() * math.log(2) + sums.double().log(), 0)


def _statistics(state: Tensor, top: Tensor) -> Tensor:
    all_lse, same_lse, all_weight, same_weight = state.unbind(1)
    return statistics(all_lse, all_weight / top, same_lse, same_weight / top).float()
