"""Differentiable sums over all other samples of all ranks, told apart by their labels."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce.distributed._exchange import Exchange
from fastnce.ops import _common
from fastnce.reference.normalize import accumulation_dtype


class LabelledLSE(torch.autograd.Function):
    """``[log sum_{j != i} exp(s_ij / t), log sum_{j != i, of the label of i} exp(s_ij / t)]`` over the rows j of all ranks.

    (N, D), t, (N,) -> (N, 2) float64. The matrix is symmetric: with the lse of the other rank's rows and the gradients that
    arrive for them, each rank finds its own rows' gradient alone, so that no gradient travels.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        temperature: float | Tensor,
        labels: Tensor,
        exchange: Exchange,
        kernels: ModuleType,
    ) -> Tensor:
        lse = []
        for step, (y, y_labels) in exchange.trip((x, labels)):
            if len(x) > 0 and len(y) > 0:
                lse.append(
                    kernels.labelled_lse_forward(x, y, labels, y_labels, temperature, own=step == 0)
                )
        total = (
            torch.stack(lse).logsumexp(dim=0) if lse else x.new_empty((0, 2), dtype=torch.float64)
        )
        ctx.exchange, ctx.kernels = exchange, kernels
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(x, labels, total, saved)
        return total

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, grad: Tensor):
        x, labels, lse, temperature = ctx.saved_tensors
        tau = ctx.temperature if temperature is None else temperature
        state = torch.cat([lse, grad], dim=1)  # (N, 4)
        grad_x = x.new_zeros(x.shape, dtype=accumulation_dtype(x.dtype))
        grad_temperature = x.new_zeros((), dtype=torch.float64)
        for step, (y, y_labels, y_state) in ctx.exchange.trip((x, labels, state)):
            if len(x) > 0 and len(y) > 0:
                found, found_temperature = ctx.kernels.labelled_lse_backward(
                    x, y, labels, y_labels, tau, state, y_state, own=step == 0
                )
                grad_x += found
                grad_temperature += found_temperature
        if temperature is None:
            return grad_x.to(x.dtype), None, None, None, None
        return grad_x.to(x.dtype), grad_temperature.to(temperature.dtype), None, None, None
