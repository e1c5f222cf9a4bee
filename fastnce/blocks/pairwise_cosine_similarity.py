"""Cosine similarities: products of unit rows, whose gradients need no similarity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastnce.blocks.tiles import Rows


def pairwise_cosine_similarity_forward(
    x: Tensor, y: Tensor | None, temperature: float | Tensor
) -> Tensor:
    rows = Rows(x, True)
    columns = rows if y is None else Rows(y, True)
    return ((rows.units / temperature) @ columns.units.mT).to(x.dtype)


def pairwise_cosine_similarity_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    temperature: float | Tensor,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_y, need_temperature = needs
    rows = Rows(x, True)
    columns = rows if y is None else Rows(y, True)
    grad = grad.to(rows.units.dtype)
    of_x = of_y = of_temperature = None
    if need_x or need_temperature:
        of_x = grad @ columns.units / temperature
    if need_temperature:
        of_temperature = -(rows.units * of_x).sum() / temperature
    if need_y or (y is None and need_x):
        of_y = grad.mT @ rows.units / temperature
    if y is None and need_x:
        of_x, of_y = of_x + of_y, None
    return (
        rows.gradient(of_x) if need_x else None,
        columns.gradient(of_y) if need_y and of_y is not None else None,
        of_temperature,
    )
