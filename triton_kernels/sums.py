"""The pass that sums exponentials: of rows, of columns as well, and with the product that a gradient needs if it can."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .columns import Columns
from .launch import launch, temperature_arguments
from .parts import Parts, store_column_sums
from .rows import Rows, input_precision
from .tiles import (
    LABELLED,
    LN_2,
    LOG2_E,
    SUP_CON,
    TWO_C,
    counts,
    inside,
    left_in,
    load_rows,
    multiply,
    products_of_chunks,
    span,
    to_base_2,
)

# What the exponentials are relative to.
FIXED = tl.constexpr(0)  # one offset, from the bound of a cosine
RUNNING = tl.constexpr(1)  # the running maximum
BY_TEMPERATURE = tl.constexpr(2)  # the temperature, known on the device alone, decides


def offset_kind(temperature: float | Tensor, normalize: bool, dtype: torch.dtype) -> int:
    """How to keep exponentials in range. fp16 products need those of at most 1 that the running maximum gives."""
    if not normalize or dtype == torch.float16:
        return RUNNING.value
    if isinstance(temperature, Tensor):
        return BY_TEMPERATURE.value
    return FIXED.value if 1 / temperature <= config.LARGEST_FIXED_LOGIT else RUNNING.value


def sums_tile(x: Rows, columns: Columns, offset: int, product: bool, term: bool) -> config.Tile:
    """The tile of ``sum_exponentials``."""
    rich = term or offset != FIXED.value
    return columns.tile(x, "products", rich) if product else columns.tile(x, "sums")


def sum_exponentials(
    x: Rows,
    columns: Columns,
    temperature: float | Tensor,
    offset: int,
    parts: Parts,
    *,
    column_parts: Parts | None = None,
    block_range: tuple[int, int] | None = None,
    half: bool = False,
    positive: Tensor | None = None,
) -> None:
    """Fills ``parts``, as many as it has, for the rows ``x``.

    Args:
        x: the rows.
        columns: the columns.
        temperature: a float or a 0-d tensor.
        offset: from ``offset_kind``.
        parts: what to fill; ``raw`` and ``term`` if they are there.
        column_parts: what to fill for the columns, one part for each block of rows of a problem; or None.
        block_range: first block of rows and number of blocks, of a single problem; all by default.
        half: rows are their own columns: a block leaves out the columns before it, and counts for the columns after it.
        positive: (R,) logits, to base 2, of the rows' positives and so of those columns', which ``rank`` needs.
    """
    tile = sums_tile(x, columns, offset, parts.raw is not None, parts.term is not None)
    head, tail = x.split
    rows, y = x.for_similarity, columns.y.for_similarity
    apart = columns.y.rounded is not None and parts.raw is not None
    first, blocks = block_range or (0, columns.row_blocks(x, tile.m))
    of_columns = column_parts or Parts()
    launch(
        _sums_kernel,
        (blocks, parts.sum.shape[0]),
        tile.options,
        x=rows.x,
        x_scale=rows.scale,
        y=y.x,
        y_scale=y.scale,
        values=columns.y.x if apart else None,
        value_scale=columns.y.scale if apart else None,
        x_labels=columns.row_labels,
        y_labels=columns.labels,
        part_largest=parts.largest,
        part_sum=parts.sum,
        part_a=parts.a,
        part_b=parts.b,
        part_term=parts.term,
        raw=parts.raw,
        positive=positive,
        part_rank=parts.rank,
        column_rank=of_columns.rank,
        column_largest=of_columns.largest,
        column_sum=of_columns.sum,
        column_a=of_columns.a,
        column_b=of_columns.b,
        total_columns=len(columns.y),
        first_block=first,
        depth=x.padded,
        KIND=columns.kind,
        OFFSET=offset,
        HALF=half,
        LIMIT=config.LARGEST_FIXED_LOGIT,
        TOP=config.EXPONENT_TOP,
        HEAD=head,
        TAIL=tail,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=x.chunk(tile.d),
        PRECISION=input_precision(x.x),
        **columns.span_arguments(x),
        **columns.mask_arguments(),
        **temperature_arguments(temperature),
    )


@triton.jit
def _relative_to(z, keep, largest, ONLINE: tl.constexpr):
    """The new maximum of each row, a finite stand-in for it, and what turns earlier sums into its units."""
    if ONLINE:
        new = tl.maximum(largest, tl.max(tl.where(keep, z, float("-inf")), 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        return new, finite, tl.exp2(largest - finite)
    return largest, largest, largest


@triton.jit
def _sweep(
    x,
    y,
    y_scale,
    values,
    value_scale,
    y_labels,
    row_labels,
    column_largest,
    column_sum,
    column_a,
    column_b,
    column_rank,
    column_positive,
    row_positive,
    x_ids,
    y_ids,
    x_guide,
    y_guide,
    guide_depth,
    total_rows,
    total_columns,
    row,
    x_offsets,
    row_scale,
    offset,
    rows,
    columns,
    begin,
    end,
    depth,
    first_of_columns,
    KIND: tl.constexpr,
    ONLINE: tl.constexpr,
    PRODUCT: tl.constexpr,
    TERM: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if not ONLINE:
        largest = tl.zeros((BLOCK_M,), tl.float32) + offset
    total = tl.zeros((BLOCK_M,), tl.float32)
    BY_LSE: tl.constexpr = KIND == TWO_C or KIND == LABELLED
    a = largest if BY_LSE else tl.zeros((BLOCK_M,), tl.float32)
    b = tl.zeros((BLOCK_M,), tl.float32)
    term = tl.zeros((BLOCK_M,), tl.float32)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    raw = tl.zeros((BLOCK_M, HEAD if PRODUCT else 1), tl.float32)
    raw_tail = tl.zeros((BLOCK_M, TAIL if PRODUCT and TAIL else 1), tl.float32)
    if HEAD:
        x_head = load_rows(x, x_offsets, depth, tl.arange(0, HEAD))
        if TAIL:
            x_tail = load_rows(x, x_offsets, depth, HEAD + tl.arange(0, TAIL))
    for j in tl.range(begin, end, BLOCK_N):
        column = j + tl.arange(0, BLOCK_N)
        y_offsets = inside(j, columns, BLOCK_N)
        y_block = y + tl.cast(j, tl.int64) * depth
        if HEAD:
            y_head = load_rows(y_block, y_offsets, depth, tl.arange(0, HEAD))
            z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            z = multiply(x_head, tl.trans(y_head), z, PRECISION)
            if TAIL:
                y_tail = load_rows(y_block, y_offsets, depth, HEAD + tl.arange(0, TAIL))
                z = multiply(x_tail, tl.trans(y_tail), z, PRECISION)
        else:
            z = products_of_chunks(
                x, x_offsets, y_block, y_offsets, depth, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
            )
        column_scale = tl.load(y_scale + j + y_offsets)
        z = z * row_scale[:, None] * column_scale[None, :]
        keep = counts(row, column, columns, KIND)
        ids = None if y_ids is None else y_ids + j
        guide = None if y_guide is None else y_guide + j
        keep = left_in(
            keep, None, x_ids, ids, x_guide, guide, x_offsets, y_offsets, guide_depth, total_rows, total_columns, KIND
        )  # fmt: skip
        if COLUMNS:
            keep = keep & (row < rows)[:, None]
        largest, finite, shrink = _relative_to(z, keep, largest, ONLINE)
        e = tl.where(keep, tl.exp2(z - finite[:, None]), 0.0)
        if ONLINE:
            total *= shrink
        total += tl.sum(e, 1)
        if TERM:
            if ONLINE:
                term *= shrink
            term += tl.sum(tl.where(keep, e * z, 0.0), 1)
        there = (column < columns) & (column >= first_of_columns)
        if RANK:
            rank += tl.sum((keep & (z > row_positive[:, None])).to(tl.int32), 1)
            if COLUMNS:
                of_column = tl.load(column_positive + j + y_offsets)
                larger = (keep & (z > of_column[None, :])).to(tl.int32)
                tl.store(column_rank + column, tl.sum(larger, 0), mask=there)
        if COLUMNS:
            store_column_sums(column_largest, column_sum, column, there, z, keep, e, offset, ONLINE)
        if KIND == SUP_CON or BY_LSE:
            same = keep & (row_labels[:, None] == tl.load(y_labels + j + y_offsets)[None, :])
        if KIND == SUP_CON:
            logits = tl.where(same, z, 0.0)
            a += tl.sum(logits, 1)
            b += tl.sum(same.to(tl.int32), 1).to(tl.float32)
            if COLUMNS:
                tl.store(column_a + column, tl.sum(logits, 0) * LN_2, mask=there)
                number = tl.sum(same.to(tl.int32), 0).to(tl.float32)
                tl.store(column_b + column, number, mask=there)
        if BY_LSE:
            a, finite_a, shrink_a = _relative_to(z, same, a, ONLINE)
            e_same = e
            if ONLINE:
                b *= shrink_a
                e_same = tl.exp2(z - finite_a[:, None])
            e_same = tl.where(same, e_same, 0.0)
            b += tl.sum(e_same, 1)
            if COLUMNS:
                store_column_sums(
                    column_a, column_b, column, there, z, same, e_same, offset, ONLINE
                )
        if PRODUCT:
            if values is not None:
                block = values + tl.cast(j, tl.int64) * depth
                y_head = load_rows(block, y_offsets, depth, tl.arange(0, HEAD))
                if TAIL:
                    y_tail = load_rows(block, y_offsets, depth, HEAD + tl.arange(0, TAIL))
                column_scale = tl.load(value_scale + j + y_offsets)
            weight = (e * column_scale[None, :]).to(y_head.dtype)
            if ONLINE:
                raw *= shrink[:, None]
            raw = multiply(weight, y_head, raw, PRECISION)
            if TAIL:
                if ONLINE:
                    raw_tail *= shrink[:, None]
                raw_tail = multiply(weight, y_tail, raw_tail, PRECISION)
    return largest, total, a, b, term, rank, raw, raw_tail


@triton.jit(do_not_specialize=["rows", "columns", "total_rows", "total_columns", "first_block"])
def _sums_kernel(
    x,
    x_scale,
    y,
    y_scale,
    values,
    value_scale,
    x_labels,
    y_labels,
    temperature,
    part_largest,
    part_sum,
    part_a,
    part_b,
    part_term,
    raw,
    positive,
    part_rank,
    column_rank,
    column_largest,
    column_sum,
    column_a,
    column_b,
    x_ids,
    y_ids,
    x_guide,
    y_guide,
    guide_depth,
    rows,
    columns,
    total_rows,
    total_columns,
    first_block,
    depth,
    KIND: tl.constexpr,
    OFFSET: tl.constexpr,
    HALF: tl.constexpr,
    TENSOR: tl.constexpr,
    LIMIT: tl.constexpr,
    TOP: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0) + first_block
    part = tl.program_id(1)
    start, first_row, first_column = span(block, rows, columns, BLOCK_M)
    row = start + tl.arange(0, BLOCK_M)
    there = row < rows
    x_offsets = inside(start, rows, BLOCK_M)
    first_row += start
    x += first_row * depth
    y += first_column * depth
    y_scale += first_column
    if values is not None:
        values += first_column * depth
        value_scale += first_column
    if TENSOR:
        temperature = tl.load(temperature)
    row_scale = to_base_2(tl.load(x_scale + first_row + x_offsets), temperature)
    row_labels = row
    if y_labels is not None:
        row_labels = tl.load(x_labels + first_row + x_offsets)
        y_labels += first_column

    if y_ids is not None:
        x_ids += first_row
        y_ids += first_column
    if y_guide is not None:
        x_guide += first_row
        y_guide += first_column
    RANK: tl.constexpr = part_rank is not None
    row_positive = row_scale
    column_positive = positive
    if RANK:
        row_positive = tl.load(positive + first_row + x_offsets)
        column_positive += first_column

    # With half the tiles, first the square on the diagonal, which has both halves, then columns whose own rows will leave
    # these out. The first blocks have the most to do, and start first.
    first_of_all = start if HALF else 0
    first_of_columns = start + BLOCK_M if HALF else 0
    steps = tl.cdiv(tl.cdiv(columns - first_of_all, BLOCK_N), tl.num_programs(1))
    begin = first_of_all + part * steps * BLOCK_N
    end = tl.minimum(begin + steps * BLOCK_N, columns)
    offset = tl.maximum(1 / temperature - TOP, 0.0) * LOG2_E
    if column_sum is not None:
        column_part = (start // BLOCK_M - first_block).to(tl.int64) * total_columns + first_column
        column_largest += column_part
        column_sum += column_part
    if column_a is not None:
        column_a += column_part
        column_b += column_part
    if column_rank is not None:
        column_rank += column_part

    PRODUCT: tl.constexpr = raw is not None
    TERM: tl.constexpr = part_term is not None
    COLUMNS: tl.constexpr = column_sum is not None
    running = OFFSET == RUNNING
    if OFFSET == BY_TEMPERATURE:
        running = 1 / temperature > LIMIT
    if running:
        largest, total, a, b, term, rank, product, product_tail = _sweep(
            x, y, y_scale, values, value_scale, y_labels, row_labels, column_largest, column_sum, column_a, column_b,
            column_rank, column_positive, row_positive, x_ids, y_ids, x_guide, y_guide, guide_depth, total_rows, total_columns,
            row, x_offsets, row_scale, offset, rows, columns, begin, end, depth, first_of_columns, KIND, True, PRODUCT, TERM,
            COLUMNS, RANK, HEAD, TAIL, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    else:
        largest, total, a, b, term, rank, product, product_tail = _sweep(
            x, y, y_scale, values, value_scale, y_labels, row_labels, column_largest, column_sum, column_a, column_b,
            column_rank, column_positive, row_positive, x_ids, y_ids, x_guide, y_guide, guide_depth, total_rows, total_columns,
            row, x_offsets, row_scale, offset, rows, columns, begin, end, depth, first_of_columns, KIND, False, PRODUCT, TERM,
            COLUMNS, RANK, HEAD, TAIL, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip

    at = tl.cast(part, tl.int64) * total_rows + first_row
    tl.store(part_largest + at + x_offsets, largest, mask=there)
    tl.store(part_sum + at + x_offsets, total, mask=there)
    if KIND == SUP_CON:
        a *= LN_2
    if part_a is not None:
        tl.store(part_a + at + x_offsets, a, mask=there)
        tl.store(part_b + at + x_offsets, b, mask=there)
    if TERM:
        tl.store(part_term + at + x_offsets, term * LN_2, mask=there)
    if RANK:
        tl.store(part_rank + at + x_offsets, rank, mask=there)
    if PRODUCT:
        out = raw + at * depth + (x_offsets * depth)[:, None]
        tl.store(out + tl.arange(0, HEAD)[None, :], product, mask=there[:, None])
        if TAIL:
            d = HEAD + tl.arange(0, TAIL)
            tl.store(out + d[None, :], product_tail, mask=there[:, None])
