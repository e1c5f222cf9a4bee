"""From the coefficients ``G = d L / d z`` to the products that the gradients need, ``G y^`` for rows and ``G^T x^`` for columns.

Where rows stay on the chip (``config.RESIDENT_DEPTH``), the similarities are made anew for each of the two products, which follows
at once: no coefficient reaches memory, and no sum is shared between programs. Deeper rows would be multiplied too often that way:
there the coefficients of a panel of rows go through memory in the inputs' precision, and the products are the library's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .launch import launch
from .panels import panel_products, pass_arguments, tile_coefficients
from .rows import Rows
from .tiles import (
    LN_2,
    inside,
    load_rows,
    load_statistics,
    multiply,
    span,
    to_base_2,
)


@dataclasses.dataclass
class Products:
    """``sum_p factor_p raw_p`` is what the rows' gradients need; without a factor, the sum of the parts."""

    raw: Tensor  # (P, R, padded depth)
    factor: Tensor | None = None  # (P, R)


def joined(products: Sequence[Products]) -> tuple[Tensor | None, Tensor | None]:
    """All parts together, and their factors."""
    if len(products) < 2:
        return (products[0].raw, products[0].factor) if products else (None, None)
    ones = [x.raw.new_ones(x.raw.shape[:2]) if x.factor is None else x.factor for x in products]
    return torch.cat([x.raw for x in products]), torch.cat(ones)


def both_products(
    x: Rows,
    columns: Columns,
    temperature: float | Tensor,
    x_statistics: Tensor | None,
    y_statistics: Tensor | None,
    *,
    want_x: bool,
    want_y: bool,
    want_term: bool = False,
    given: Tensor | None = None,
) -> tuple[Products | None, Products | None, Tensor | None]:
    """``G y^`` for the rows and ``G^T x^`` for the columns, and ``sum_j G_ij z_ij`` (R,).

    Args:
        x: the rows.
        columns: the columns.
        temperature: a float or a 0-d tensor.
        x_statistics: (3, R) of the rows' losses (see ``tiles.load_statistics``), None if they have none.
        y_statistics: (3, C) of the columns' losses, likewise.
        want_x: the first.
        want_y: the second.
        want_term: the third.
        given: the coefficients (problems, rows, columns) themselves, any strides, for columns of the kind GIVEN.
    """
    common = (x, columns, temperature, x_statistics, y_statistics)
    if x.split == (0, 0):
        return _through_panels(*common, want_x, want_y, want_term, given)
    of_x = of_y = term = None
    if want_x or want_term:
        of_x, term = _row_products(*common, want_term, given)
    if want_y:
        back = dataclasses.replace(columns, y=x)
        swapped = None if given is None else given.mT
        of_y, _ = _row_products(
            columns.y, back, temperature, y_statistics, x_statistics, False, swapped
        )
    return of_x, of_y, term


def _through_panels(
    x, columns, temperature, x_statistics, y_statistics, want_x, want_y, want_term, given
):
    raw_x = x.x.new_empty((1, *x.x.shape), dtype=torch.float32) if want_x else None
    raw_y = columns.y.x.new_zeros((1, *columns.y.x.shape), dtype=torch.float32) if want_y else None
    term = x.scale.new_empty((len(x),)) if want_term else None
    panel_products(
        x,
        columns,
        temperature,
        x_statistics,
        y_statistics,
        None if raw_x is None else raw_x[0],
        None if raw_y is None else raw_y[0],
        term,
        given,
    )

    def products(raw: Tensor | None, rows: Rows) -> Products | None:
        # The panel's coefficients hold the scale of rows and columns.
        without = torch.where(rows.scale == 0, 0.0, 1 / rows.scale)
        return None if raw is None else Products(raw, without.unsqueeze(0))

    return products(raw_x, x), products(raw_y, columns.y), term


def _row_products(x, columns, temperature, x_statistics, y_statistics, want_term, given):
    parts = columns.splits(x, columns.tile(x, "products", rich=want_term))
    raw = x.x.new_empty((parts, *x.x.shape), dtype=torch.float32)
    term = x.scale.new_empty((parts, len(x))) if want_term else None
    row_products(x, columns, temperature, x_statistics, y_statistics, raw, term, given)
    return Products(raw), None if term is None else term.sum(0)


def row_products(
    x: Rows,
    columns: Columns,
    temperature: float | Tensor,
    x_statistics: Tensor | None,
    y_statistics: Tensor | None,
    raw: Tensor,
    term: Tensor | None = None,
    given: Tensor | None = None,
) -> None:
    """Fills ``raw`` (P, R, padded depth) with parts of ``sum_j G_ij y^_j``, and ``term`` (P, R) with ``sum_j G_ij z_ij``."""
    tile = columns.tile(x, "products", rich=term is not None)
    head, tail = x.split
    apart = columns.y.rounded is not None
    launch(
        _row_products_kernel,
        (columns.row_blocks(x, tile.m), raw.shape[0]),
        tile.options,
        values=columns.y.x if apart else None,
        value_scale=columns.y.scale if apart else None,
        raw=raw,
        part_term=term,
        HEAD=head,
        TAIL=tail,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        **columns.span_arguments(x, tile.m),
        **pass_arguments(x, columns, temperature, x_statistics, y_statistics, given),
    )


@triton.jit(do_not_specialize=["rows", "columns", "total_rows", "total_columns"])
def _row_products_kernel(
    x,
    x_scale,
    y,
    y_scale,
    labels,
    temperature,
    table,
    x_statistics,
    y_statistics,
    given,
    given_strides,
    values,
    value_scale,
    raw,
    part_term,
    rows,
    columns,
    total_rows,
    total_columns,
    depth,
    KIND: tl.constexpr,
    TENSOR: tl.constexpr,
    RAGGED: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(1)
    first_row, first_column, rows, columns, start = span(
        tl.program_id(0), rows, columns, table, RAGGED, BLOCK_M
    )
    if given is not None:
        given += first_row // rows * given_strides[0]
    row = start + tl.arange(0, BLOCK_M)
    there = row < rows
    x_offsets = inside(start, rows, BLOCK_M)
    first_row += start
    x += first_row * depth
    if TENSOR:
        temperature = tl.load(temperature)
    row_scale = to_base_2(tl.load(x_scale + first_row + x_offsets), temperature)
    row_labels = row
    if labels is not None:
        row_labels = tl.load(labels + first_row + x_offsets)
    x_lse, x_weight, x_third = row_scale, row_scale, row_scale
    if x_statistics is not None:
        x_lse, x_weight, x_third = load_statistics(x_statistics, first_row, x_offsets, total_rows)

    steps = tl.cdiv(tl.cdiv(columns, BLOCK_N), tl.num_programs(1))
    begin = part * steps * BLOCK_N
    end = tl.minimum(begin + steps * BLOCK_N, columns)
    x_head = load_rows(x, x_offsets, depth, tl.arange(0, HEAD))
    product = tl.zeros((BLOCK_M, HEAD), tl.float32)
    product_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 1), tl.float32)
    term = tl.zeros((BLOCK_M,), tl.float32)
    if TAIL:
        x_tail = load_rows(x, x_offsets, depth, HEAD + tl.arange(0, TAIL))
    for j in tl.range(begin, end, BLOCK_N):
        column = j + tl.arange(0, BLOCK_N)
        first_y = first_column + j
        y_offsets = inside(j, columns, BLOCK_N)
        y_block = y + first_y * depth
        y_head = load_rows(y_block, y_offsets, depth, tl.arange(0, HEAD))
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = multiply(x_head, tl.trans(y_head), s, PRECISION)
        if TAIL:
            y_tail = load_rows(y_block, y_offsets, depth, HEAD + tl.arange(0, TAIL))
            s = multiply(x_tail, tl.trans(y_tail), s, PRECISION)
        column_scale = tl.load(y_scale + first_y + y_offsets)
        g, z, keep = tile_coefficients(
            s, row, column, first_y, y_offsets, row_scale, column_scale, row_labels, labels,
            x_statistics, y_statistics, x_lse, x_weight, x_third, given, given_strides,
            rows, columns, total_columns, KIND,
        )  # fmt: skip
        if part_term is not None:
            term += tl.sum(tl.where(keep, g * z, 0.0), 1)
        if values is not None:
            block = values + first_y * depth
            y_head = load_rows(block, y_offsets, depth, tl.arange(0, HEAD))
            if TAIL:
                y_tail = load_rows(block, y_offsets, depth, HEAD + tl.arange(0, TAIL))
            column_scale = tl.load(value_scale + first_y + y_offsets)
        g = (g * (column_scale * SCALE)[None, :]).to(y_head.dtype)
        product = multiply(g, y_head, product, PRECISION)
        if TAIL:
            product_tail = multiply(g, y_tail, product_tail, PRECISION)

    at = tl.cast(part, tl.int64) * total_rows + first_row
    if part_term is not None:
        tl.store(part_term + at + x_offsets, term * LN_2, mask=there)
    out = raw + at * depth + (x_offsets * depth)[:, None]
    d = tl.arange(0, HEAD)
    tl.store(out + d[None, :], product * (1 / SCALE), mask=there[:, None])
    if TAIL:
        d = HEAD + tl.arange(0, TAIL)
        tl.store(out + d[None, :], product_tail * (1 / SCALE), mask=there[:, None])
