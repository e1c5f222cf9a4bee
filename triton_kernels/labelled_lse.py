"""The log-sum-exps of one block of a larger matrix, and its part in the gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .columns import Columns
from .gradients import Coefficients, RowGradients, both_products, largest_weight, statistics
from .labelled import labelled_sums
from .rows import Rows, pack
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

    Arguments and results: ``fastnce.reference.labelled_lse_forward``.
    """
    rows, columns = _block(x, y, x_labels, y_labels, own)
    parts = labelled_sums(rows, columns, temperature, x.dtype)
    # In fp64: the lse of other blocks joins it.
    lses = [
        torch.logsumexp(largest.double() * math.log(2) + sums.double().log(), 0)
        for largest, sums in ((parts.largest, parts.sum), (parts.a, parts.b))
    ]
    return torch.stack(lses, dim=1)


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

    Arguments and results: ``fastnce.reference.labelled_lse_backward``.
    """
    rows, columns = _block(x, y, x_labels, y_labels, own)
    top = largest_weight(torch.cat([x_state[:, 2:], y_state[:, 2:]]))
    of_x = RowGradients(rows, temperature, top, torch.float32)

    def of_losses(state: Tensor) -> Tensor:
        all_lse, same_lse, all_weight, same_weight = state.unbind(1)
        return statistics(all_lse, all_weight / top, same_lse, same_weight / top).float()

    by_losses = Coefficients(rows, columns, temperature, of_losses(x_state), of_losses(y_state))
    _, _, term = both_products(by_losses, want_x=True, want_y=False, want_term=True, of_x=of_x)
    return of_x.out, -term.sum(dtype=torch.float64) * top / temperature


def _block(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, own: bool
) -> tuple[Rows, Columns]:
    kind = TWO_C if own else LABELLED
    labels = y_labels.contiguous()
    columns = Columns(pack(y, True), kind.value, labels=labels, x_labels=x_labels.contiguous())
    return pack(x, True), columns
