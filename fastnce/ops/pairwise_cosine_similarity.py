"""Pairwise cosine similarity."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Form, Make, Op, Operator, Sample, declare


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

    Examples:
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
    kernels = backends.select(op, x, backend, x, y)
    with _common.no_autocast(x):
        if kernels is backends.reference:
            return plain(x, x if y is None else y, temperature)
        _checks.expect_fusable(op, x)
        other = None if y is x else y
        return PairwiseCosineSimilarityFunction.apply(x, other, temperature, kernels)


def _form(x: Tensor, y: Tensor | None) -> Form:
    columns = x if y is None else y
    return Form("any", x.numel() * columns.shape[-2], x.shape[-1])


def _expect_rows(op: str, name: str, rows: object, shape: str) -> None:
    _checks.expect_tensor(op, name, rows, shape)
    _checks.expect_float_tensor(op, name, rows, (max(rows.dim(), 2),), shape)


def plain(x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
    """``s_ij = x_i . y_j / (||x_i|| ||y_j|| t)``: (..., N, D), (..., M, D) -> (..., N, M), in the inputs' dtype."""
    dtype = accumulation_dtype(x.dtype)
    similarity = normalize_rows(x.to(dtype)) @ normalize_rows(y.to(dtype)).mT
    return over_temperature(similarity, temperature).to(x.dtype)


class PairwiseCosineSimilarityFunction(torch.autograd.Function):
    """Autograd of ``pairwise_cosine_similarity`` over the kernels of any fused backend; ``y`` None is ``x`` itself.

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


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample("two", {"x": make(12, 20), "y": make(7, 20)})
    yield Sample("itself", {"x": make(12, 20)})
    batched = {"x": make(2, 3, 12, 20), "y": make(2, 3, 7, 20)}
    yield Sample("batched", {**batched, "temperature": torch.tensor(0.2, requires_grad=True)})


def _similarities(x: Tensor, y: Tensor | None, **_: object) -> Tensor:
    columns = x if y is None else y
    return x.new_empty((*x.shape[:-1], columns.shape[-2]))


_NAME = "pairwise_cosine_similarity"
declare(
    Op(
        _NAME,
        function=pairwise_cosine_similarity,
        samples=_samples,
        is_loss=False,
        form=_form,
    ),
    # x (..., N, D), y (..., M, D), none for x itself -> (..., N, M) in their dtype.
    Operator(
        f"{_NAME}_forward(Tensor x, Tensor? y, Tensor? temperature_tensor, float temperature, bool bfloat16_products) -> Tensor",
        _similarities,
    ),
    # The gradients of sum(grad * result), grad (..., N, M) of any strides. Without y that of x is the sum over both its uses.
    Operator(
        f"{_NAME}_backward(Tensor grad, Tensor x, Tensor? y, Tensor? temperature_tensor, float temperature, "
        "bool bfloat16_products, bool need_x, bool need_y, bool need_temperature) -> "
        "(Tensor grad_x, Tensor grad_y, Tensor grad_temperature)",
    ),
    pairwise_cosine_similarity=plain,
)
