"""The matrix of cosines itself; its gradients are the passes of the losses with coefficients from memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .gradients import Coefficients, RowGradients, both_products, largest_weight
from .launch import cdiv, launch, temperature_arguments
from .rows import Rows, input_precision, pack
from .tiles import GIVEN, inside, products_of_chunks, span

Gradients = tuple[Tensor | None, ...]


def pairwise_cosine_similarity_forward(
    x: Tensor, y: Tensor | None, temperature: float | Tensor
) -> Tensor:
    """``x_i . y_j / (||x_i|| ||y_j|| t)``: (..., N, D), (..., M, D) -> (..., N, M) in the dtype of ``x``; without ``y`` of x."""
    y = x if y is None else y
    rows, columns = _packed(x, y)
    out = x.new_empty((*x.shape[:-1], y.shape[-2]))
    tile = columns.tile(rows, "sums")
    row_blocks = columns.row_blocks(rows, tile.m)
    launch(
        _similarity_kernel,
        (row_blocks * cdiv(y.shape[-2], tile.n),),  # in one dimension: others end at 65535
        tile.options,
        x=rows.x,
        x_scale=rows.scale,
        y=columns.y.x,
        y_scale=columns.y.scale,
        out=out,
        rows=x.shape[-2],
        columns=y.shape[-2],
        row_blocks=row_blocks,
        depth=rows.padded,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=rows.chunk(tile.d),
        PRECISION=input_precision(rows.x),
        **temperature_arguments(temperature),
    )
    return out


def pairwise_cosine_similarity_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, temperature: float | Tensor, *, needs: Sequence[bool]
) -> Gradients:
    """The gradients of ``(grad * similarity).sum()`` for x, y and the temperature; ``grad`` (..., N, M), any strides.

    Without ``y`` that of x is the sum over both its uses.
    """
    if y is None:
        both = (needs[0], needs[0], needs[2])
        first, second, term = pairwise_cosine_similarity_backward(
            grad, x, x, temperature, needs=both
        )
        return (first + second if needs[0] else None), None, term
    rows, columns = _packed(x, y)
    need_x, need_y, need_temperature = needs
    given = grad.reshape(columns.problems, x.shape[-2], y.shape[-2])
    # fp16 multiplies coefficients of at most 1, of whatever size those are that arrive.
    unit = largest_weight(grad) if rows.x.dtype == torch.float16 else None
    upstream = 1.0 if unit is None else unit
    of_x, of_y = (
        RowGradients(of, temperature, upstream, x.dtype) if needed else None
        for of, needed in ((rows, need_x), (columns.y, need_y))
    )
    _, found_y, term = both_products(
        Coefficients(rows, columns, temperature, given=given, given_unit=unit),
        want_x=need_x,
        want_y=need_y,
        want_term=need_temperature,
        of_x=of_x,
    )
    return (
        of_x.out.view(x.shape) if need_x else None,
        of_y.finish(found_y).view(y.shape) if need_y else None,
        -term.sum() * (upstream / temperature) if need_temperature else None,
    )


def _packed(x: Tensor, y: Tensor) -> tuple[Rows, Columns]:
    problems = x.shape[:-2].numel()
    rows, columns = (pack(v.reshape(problems, *v.shape[-2:]), True) for v in (x, y))
    return rows, Columns(columns, GIVEN.value, problems)


@triton.jit(do_not_specialize=["rows", "columns", "row_blocks"])
def _similarity_kernel(
    x,
    x_scale,
    y,
    y_scale,
    temperature,
    out,
    rows,
    columns,
    row_blocks,
    depth,
    TENSOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, first_row, first_y = span(tl.program_id(0) % row_blocks, rows, columns, BLOCK_M)
    j = tl.program_id(0) // row_blocks * BLOCK_N
    row = start + tl.arange(0, BLOCK_M)
    column = j + tl.arange(0, BLOCK_N)
    x_offsets = inside(start, rows, BLOCK_M)
    y_offsets = inside(j, columns, BLOCK_N)
    first_row += start
    first_y += j
    if TENSOR:
        temperature = tl.load(temperature)
    row_scale = tl.load(x_scale + first_row + x_offsets) / temperature
    column_scale = tl.load(y_scale + first_y + y_offsets)
    s = products_of_chunks(
        x + first_row * depth, x_offsets, y + first_y * depth, y_offsets,
        depth, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    s = s * row_scale[:, None] * column_scale[None, :]
    at = (first_row + tl.arange(0, BLOCK_M))[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + at, s.to(out.dtype.element_ty), mask=mask)
