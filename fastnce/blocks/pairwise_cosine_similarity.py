"""Cosine similarities: products of unit rows, whose gradients need no similarity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastnce.blocks.tiles import Buffer, Rows, Similarities, number, product


def pairwise_cosine_similarity_forward(
    x: Tensor, y: Tensor | None, temperature: float | Tensor
) -> Tensor:
    rows, columns = _sides(x, y)
    similarities = Similarities(rows, number(temperature))
    found = similarities(..., columns, Buffer(rows.units))
    return found.view(*x.shape[:-1], found.shape[-1]).to(x.dtype)


def pairwise_cosine_similarity_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    temperature: float | Tensor,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_y, need_temperature = needs
    rows, columns = _sides(x, y)
    grad = grad.to(rows.factors.dtype).reshape(*rows.units.shape[:2], -1)
    of_x = of_y = of_temperature = None
    if need_x or need_temperature:
        of_x = _times(grad, columns).div_(temperature)
    if need_temperature:
        of_temperature = -(rows.units * of_x).sum() / temperature
    if need_y or (y is None and need_x):
        of_y = _times(grad.mT, rows).div_(temperature)
    if y is None and need_x:
        of_x, of_y = of_x.add_(of_y), None
    return (
        rows.gradient(of_x).view(x.shape) if need_x else None,
        columns.gradient(of_y).view(y.shape) if need_y and of_y is not None else None,
        of_temperature,
    )


def _times(grad: Tensor, rows: Rows) -> Tensor:
    """The gradient that arrives, times unit rows. Its sum is not bounded: what 16 bits leave of the rows counts, too."""
    found = product(grad, rows.factors)
    if rows.inverse is not None:
        rest = (rows.units - rows.factors).to(rows.factors.dtype)
        product(grad, rest, found, keep=1)
    return found


def _sides(x: Tensor, y: Tensor | None) -> tuple[Rows, Rows]:
    """The unit rows, (B, N, D) and (B, M, D)."""
    first, *second = (Rows(z.reshape(-1, *z.shape[-2:]), True) for z in (x, y) if z is not None)
    return first, second[0] if second else first
