"""Pairwise cosine similarity."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends, reference
from fastnce.ops import _checks, _common


def pairwise_cosine_similarity(
    x: Tensor,
    y: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""The cosine of every row of ``x`` with every row of ``y``, divided by the temperature.

    .. math:: s_{ij} = \frac{x_i \cdot y_j}{\lVert x_i \rVert \lVert y_j \rVert \tau}

    Plain PyTorch: ``normalize(x, dim=-1) @ normalize(y, dim=-1).mT / temperature``.

    Args:
        x: (..., N, D); float64, float32, bfloat16 or float16.
        y: (..., M, D), with the leading dimensions of ``x``; None for ``x`` itself.
        temperature: positive float, or tensor of one element, which gets its gradient.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        (..., N, M), in the dtype of ``x``; computed in at least float32. An all-zero row has cosine 0 with everything.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> fastnce.pairwise_cosine_similarity(torch.randn(3, 5), torch.randn(4, 5)).shape
        torch.Size([3, 4])
    """
    op = "pairwise_cosine_similarity"
    x, y = _checks.same_dtype_under_autocast(x, y)
    _expect_rows(op, "x", x, "(..., N, D)")
    if y is not None:
        _expect_rows(op, "y", y, "(..., M, D)")
        expected = (*x.shape[:-2], y.shape[-2], x.shape[-1])
        _checks.expect_shape(op, "y", y, expected, "x is", x)
        _checks.expect_alike(op, "y", y, "x", x)
    temperature = _checks.expect_temperature(op, temperature, x)
    kernels = backends.select(op, x, backend)
    with _common.no_autocast(x):
        if kernels is reference:
            return reference.pairwise_cosine_similarity(x, x if y is None else y, temperature)
        _checks.expect_fusable(op, x)
        other = None if y is x else y
        return PairwiseCosineSimilarityFunction.apply(x, other, temperature, kernels)


def _expect_rows(op: str, name: str, rows: object, shape: str) -> None:
    _checks.expect_tensor(op, name, rows, shape)
    _checks.expect_float_tensor(op, name, rows, (max(rows.dim(), 2),), shape)


class PairwiseCosineSimilarityFunction(torch.autograd.Function):
    """Autograd of :func:`pairwise_cosine_similarity` over the kernels of any fused backend; ``y`` None is ``x`` itself.

    The backward needs the inputs and the gradient that arrives, not the similarities.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, y: Tensor | None, temperature: float | Tensor, kernels: ModuleType
    ) -> Tensor:
        ctx.kernels, ctx.needs = kernels, ctx.needs_input_grad[:3]
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(x, y, temperature if ctx.temperature is None else None)
        return kernels.pairwise_cosine_similarity_forward(x, y, temperature)

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        x, y, temperature = saved
        temperature = ctx.temperature if temperature is None else temperature
        grads = ctx.kernels.pairwise_cosine_similarity_backward(
            grad, x, y, temperature, needs=ctx.needs
        )
        return *grads, None
