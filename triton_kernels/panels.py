"""Gradients of deep rows: a panel of coefficients ``G`` at a time goes through memory, and the products are the library's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .columns import Columns
from .launch import cdiv, launch, temperature_arguments
from .rows import Rows, input_precision
from .tiles import (
    GIVEN,
    LABELLED,
    LN_2,
    SUP_CON,
    TWO_C,
    counts,
    inside,
    load_statistics,
    products_of_chunks,
    row_gradient,
    to_base_2,
)

# fp16 has too few small numbers for the weights of many columns; statistics' weights are at most 1.
_SCALE = {torch.float16: 1024.0}


def pass_arguments(x, columns, temperature, x_statistics, y_statistics, given):
    rows, y = x.for_similarity, columns.y.for_similarity
    return {
        "x": rows.x,
        "x_scale": rows.scale,
        "y": y.x,
        "y_scale": y.scale,
        "x_labels": columns.row_labels,
        "y_labels": columns.labels,
        "x_statistics": x_statistics,
        "y_statistics": y_statistics,
        "given": given,
        "given_strides": (0, 0, 0) if given is None else given.stride(),
        "total_columns": len(y),
        "depth": x.padded,
        "KIND": columns.kind,
        "SCALE": _SCALE.get(x.x.dtype, 1.0),
        "PRECISION": input_precision(),
        **temperature_arguments(temperature),
    }


def panel_products(
    x: Rows,
    columns: Columns,
    temperature: float | Tensor,
    x_statistics: Tensor | None,
    y_statistics: Tensor | None,
    take_x: Callable[[slice, Tensor], None] | None,
    raw_y: Tensor | None,
    term: Tensor | None = None,
    given: Tensor | None = None,
) -> None:
    """Both products through panels of coefficients ``G_ij scale_i scale_j``.

    Calls ``take_x`` with ``scale_i sum_j G_ij y^_j`` (r, padded depth) of each r rows as soon as they are complete; adds
    ``scale_j sum_i G_ij x^_i`` to ``raw_y`` (C, padded depth), and fills ``term`` (R,); the rest as in
    :func:`gradients.both_products`; problems are not ragged.
    """
    tile = columns.tile(x, "panel", rich=term is not None)
    problems, count, width = (
        columns.problems,
        len(x) // columns.problems,
        len(columns.y) // columns.problems,
    )
    x_rows = x.x.view(problems, count, -1)
    y_rows = columns.y.x.view(problems, width, -1)
    column_blocks = cdiv(width, tile.n)
    elements = config.panel_elements(len(x), len(columns.y), x.padded)
    height = max(tile.m, min(count, elements // width) // tile.m * tile.m)
    together = max(1, elements // (width * count)) if height >= count else 1
    for problem in range(0, problems, together):
        chosen = slice(problem, min(problem + together, problems))
        for start in range(0, count, height):
            size = min(height, count - start)
            number = chosen.stop - chosen.start
            # Whole vectors in each row, for quick stores.
            panel = x.x.new_empty((number, size, cdiv(width, 16) * 16))[..., :width]
            terms = None
            if term is not None:
                terms = term.new_empty((column_blocks, number * size))
            row_blocks = number * cdiv(size, tile.m)
            launch(
                _panel_kernel,
                (row_blocks * column_blocks,),  # in one dimension: others end at 65535
                tile.options,
                x_value_scale=None if x.rounded is None else x.scale,
                y_value_scale=None if x.rounded is None else columns.y.scale,
                panel=panel,
                part_term=terms,
                first_problem=problem,
                first_row_in_problem=start,
                row_blocks=row_blocks,
                size=size,
                panel_width=panel.stride(1),
                BLOCK_M=tile.m,
                BLOCK_N=tile.n,
                BLOCK_D=x.chunk(tile.d),
                rows=count,
                columns=width,
                total_rows=len(x),
                **pass_arguments(x, columns, temperature, x_statistics, y_statistics, given),
            )
            # Whole problems, or rows of one.
            first = problem * count + start
            rows = slice(first, first + number * size)
            if term is not None:
                term[rows] = terms.sum(0)
            if take_x is not None:
                take_x(rows, _bmm(panel, y_rows[chosen]).flatten(0, 1))
            if raw_y is not None:
                into = raw_y.view(problems, width, -1)[chosen]
                _add_bmm(into, panel.mT, x_rows[chosen, start : start + size])
            del panel  # before the next one


def _add_bmm(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds ``a @ b / SCALE`` to ``into`` (B, M, N), some rows at a time, so that no second array of that size is needed."""
    count = max(128, config.ADDED_ELEMENTS // (len(into) * into.shape[2]))
    for of_into, of_a in zip(into.split(count, 1), a.split(count, 1), strict=True):
        of_into.add_(_bmm(of_a, b))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b / SCALE`` in fp32, by the library's tensor cores."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.device.type == "cpu":  # PyTorch has this product on accelerators alone
        product = torch.bmm(a.float(), b.float())
    else:
        product = torch.bmm(a, b, out_dtype=torch.float32)
    return product.mul_(1 / _SCALE[a.dtype]) if a.dtype in _SCALE else product


@triton.jit
def tile_coefficients(
    s,
    row,
    column,
    first_y,
    y_offsets,
    row_scale,
    column_scale,
    row_labels,
    y_labels,
    x_statistics,
    y_statistics,
    x_lse,
    x_weight,
    x_third,
    x_fourth,
    given,
    given_strides,
    rows,
    columns,
    total_columns,
    KIND: tl.constexpr,
):
    """Coefficients of a tile, from its products ``s``, and their products with the logits."""
    z = s * row_scale[:, None] * column_scale[None, :]
    keep = counts(row, column, columns, KIND)
    if KIND == GIVEN:
        at = row.to(tl.int64)[:, None] * given_strides[1]
        at += column.to(tl.int64)[None, :] * given_strides[2]
        g = tl.load(given + at, mask=keep & (row < rows)[:, None], other=0.0).to(tl.float32)
        return g, tl.where(keep, g * z, 0.0)
    same = keep
    LABELS: tl.constexpr = KIND == SUP_CON or KIND == TWO_C or KIND == LABELLED
    if LABELS:
        same = row_labels[:, None] == tl.load(y_labels + first_y + y_offsets)[None, :]
    g = tl.zeros(z.shape, tl.float32)
    if y_statistics is not None:
        y_lse, y_weight, y_third, y_fourth = load_statistics(
            y_statistics, first_y, y_offsets, total_columns
        )
        g += row_gradient(
            z, y_lse[None, :], y_weight[None, :], y_third[None, :], y_fourth[None, :], same, KIND
        )
    of_rows = tl.zeros(z.shape, tl.float32)
    if x_statistics is not None:
        of_rows += row_gradient(
            z, x_lse[:, None], x_weight[:, None], x_third[:, None], x_fourth[:, None], same, KIND
        )
    g += of_rows
    # With labels, columns are rows as well, here or in another block, and say there what they have to about the temperature.
    moment = z * (of_rows if LABELS else g)
    return tl.where(keep, g, 0.0), tl.where(keep, moment, 0.0)


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "total_rows", "total_columns", "first_problem", "first_row_in_problem", "row_blocks", "size",
    ]
)  # fmt: skip
def _panel_kernel(
    x,
    x_scale,
    y,
    y_scale,
    x_labels,
    y_labels,
    temperature,
    x_statistics,
    y_statistics,
    given,
    given_strides,
    x_value_scale,
    y_value_scale,
    panel,
    part_term,
    first_problem,
    first_row_in_problem,
    row_blocks,
    size,
    panel_width,
    rows,
    columns,
    total_rows,
    total_columns,
    depth,
    KIND: tl.constexpr,
    TENSOR: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(size, BLOCK_M)
    row_block = tl.program_id(0) % row_blocks
    column_block = tl.program_id(0) // row_blocks
    number = (row_block // blocks).to(tl.int64)  # of the problem, in the panel
    problem = number + first_problem
    panel_start = row_block % blocks * BLOCK_M
    start = panel_start + first_row_in_problem
    there = panel_start + tl.arange(0, BLOCK_M) < size
    row = start + tl.arange(0, BLOCK_M)
    j = column_block * BLOCK_N
    column = j + tl.arange(0, BLOCK_N)
    x_offsets = inside(start, rows, BLOCK_M)
    y_offsets = inside(j, columns, BLOCK_N)
    first_row = problem * rows + start
    first_y = problem * columns + j
    if TENSOR:
        temperature = tl.load(temperature)
    x_unit = tl.load(x_scale + first_row + x_offsets)
    row_scale = to_base_2(x_unit, temperature)
    column_scale = tl.load(y_scale + first_y + y_offsets)
    row_labels = row
    if x_labels is not None:
        row_labels = tl.load(x_labels + first_row + x_offsets)
    x_lse, x_weight, x_third, x_fourth = row_scale, row_scale, row_scale, row_scale
    if x_statistics is not None:
        x_lse, x_weight, x_third, x_fourth = load_statistics(
            x_statistics, first_row, x_offsets, total_rows
        )
    if given is not None:
        given += problem * given_strides[0]

    s = products_of_chunks(
        x + first_row * depth, x_offsets, y + first_y * depth, y_offsets,
        depth, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    g, moment = tile_coefficients(
        s, row, column, first_y, y_offsets, row_scale, column_scale, row_labels, y_labels,
        x_statistics, y_statistics, x_lse, x_weight, x_third, x_fourth, given, given_strides,
        rows, columns, total_columns, KIND,
    )  # fmt: skip
    panel_row = panel_start + tl.arange(0, BLOCK_M)
    if part_term is not None:
        at = (column_block.to(tl.int64) * (row_blocks // blocks) + number) * size
        tl.store(part_term + at + panel_row, tl.sum(moment, 1) * LN_2, mask=there)
    if x_value_scale is not None:
        x_unit = tl.load(x_value_scale + first_row + x_offsets)
        column_scale = tl.load(y_value_scale + first_y + y_offsets)
    g *= (x_unit * SCALE)[:, None] * column_scale[None, :]
    out = panel + (number * size + panel_row)[:, None] * panel_width + column[None, :]
    mask = there[:, None] & (column < columns)[None, :]
    tl.store(out, g.to(panel.dtype.element_ty), mask=mask)
