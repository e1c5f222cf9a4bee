"""Differentiable sums over all other samples of all ranks, told apart by their labels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce.distributed._exchange import Exchange
from fastnce.ops import _common
from fastnce.reference.normalize import accumulation_dtype


class LabelledLSE(torch.autograd.Function):
    """``[log sum_j exp(s_ij / t), log sum_{j of the label of i} exp(s_ij / t)]`` over the rows j of all ranks but i itself.

    (N, D), t, (N,) -> (N, 2) float64. The rows are ``views`` blocks of the same length; of all views of a row none is in its sums.
    The matrix is symmetric: with the lse of the other rank's rows and the gradients that arrive for them, each rank finds its
    own rows' gradient alone, so that no gradient travels.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        temperature: float | Tensor,
        labels: Tensor,
        exchange: Exchange,
        kernels: ModuleType,
        views: int,
    ) -> Tensor:
        lse = x.new_full((len(x), 2), -torch.inf, dtype=torch.float64)
        for step, (y, y_labels) in exchange.trip((x, labels)):
            for rows, columns, own in _parts(len(x), len(y), step == 0, views):
                lse[rows] = torch.logaddexp(
                    lse[rows],
                    kernels.labelled_lse_forward(
                        x[rows], y[columns], labels[rows], y_labels[columns], temperature, own=own
                    ),
                )
        ctx.exchange, ctx.kernels, ctx.views = exchange, kernels, views
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(x, labels, lse, saved)
        return lse

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        x, labels, lse, temperature = saved
        tau = ctx.temperature if temperature is None else temperature
        state = torch.cat([lse, grad], dim=1)  # (N, 4)
        grad_x = x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype))
        grad_tau = x.new_zeros((), dtype=torch.float64)
        for step, (y, y_labels, y_state) in ctx.exchange.trip((x, labels, state)):
            for rows, columns, own in _parts(len(x), len(y), step == 0, ctx.views):
                part, part_tau = ctx.kernels.labelled_lse_backward(
                    x[rows],
                    y[columns],
                    labels[rows],
                    y_labels[columns],
                    tau,
                    state[rows],
                    y_state[columns],
                    own=own,
                )
                grad_x[rows] += part
                grad_tau += part_tau
        grad_tau = None if temperature is None else grad_tau.to(temperature.dtype)
        return grad_x.to(x.dtype), grad_tau, None, None, None, None


def _parts(rows: int, columns: int, own: bool, views: int) -> list[tuple[slice, slice, bool]]:
    """The parts of a block: rows, columns, and whether a row leaves out the column of its number."""
    if rows == 0 or columns == 0:
        return []
    if not own:
        return [(slice(rows), slice(columns), False)]
    each = rows // views
    view = [slice(start, start + each) for start in range(0, rows, each)]
    return [(mine, other, True) for mine in view for other in view]


class SameLabelSum(torch.autograd.Function):
    """The sum over the rows of all ranks that have the row's label, its own among them: (N, C), (N,) -> (N, C).

    As a matrix it is symmetric, so that its backward is itself.
    """

    @staticmethod
    def forward(ctx, x: Tensor, labels: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(labels)
        return _same_label_sum(x, labels, exchange)

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor], grad: Tensor):
        (labels,) = saved
        return _same_label_sum(grad.contiguous(), labels, ctx.exchange), None, None


def _same_label_sum(x: Tensor, labels: Tensor, exchange: Exchange) -> Tensor:
    """One sum per row that is the first of its label in sorted order, and one for all labels that no own row has."""
    found = labels.sort().values
    sums = x.new_zeros((len(x) + 1, x.shape[1]))
    for _, (y, y_labels) in exchange.trip((x, labels)):
        if len(x) > 0:
            place = torch.searchsorted(found, y_labels)
            is_here = found[place.clamp(max=len(x) - 1)] == y_labels
            sums.index_add_(0, place.where(is_here, len(x)), y)
    return sums[torch.searchsorted(found, labels)]
