"""The sigmoid loss of pairs: every pair by itself, so that loss and gradients wait for no sum of a row.

One pass over the tiles makes the rows' losses, the sums that the gradients of scale and bias need, and, where rows are resident, the
product of the queries' gradient: 2 products of N M D. The keys' gradient makes the similarities anew: 2 more, 4 of 3 mandatory ones.
Nothing of size N M reaches memory. Deeper rows go through panels of coefficients, as in ``gradients``: 4 products as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .gradients import (
    PRODUCT_SCALE,
    Coefficients,
    Products,
    RowGradients,
    both_products,
    relative_weights,
    statistics,
)
from .launch import launch, temperature_arguments
from .masked_info_nce import ids_of
from .rows import Rows, input_precision, pack
from .tiles import (
    LN_2,
    SIGMOID,
    SIGMOID_PAIRED,
    counts,
    inside,
    left_in,
    load_rows,
    multiply,
    positives,
    products_of_chunks,
    sigmoid_pairs,
    span,
    to_base_2,
)

Gradients = tuple[Tensor | None, ...]


def sigmoid_contrastive_forward(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    paired: bool,
    normalize: bool,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    """Arguments and results: those of the operator, see ``fastnce/ops/sigmoid_contrastive.py``."""
    rows, columns = _problem(query, key, labels, (query_ids, key_ids), paired, normalize)
    if grad_scale is None or not any(needs):
        return _sums(rows, columns, temperature, bias, (False, False))[0], (None,) * 4
    scale = grad_scale / len(query) if mean else grad_scale
    return _run(rows, columns, temperature, bias, None, scale, needs, query.dtype)


def sigmoid_contrastive_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    paired: bool,
    normalize: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Arguments and results: those of the operator; ``grad_loss`` (N,), any strides."""
    rows, columns = _problem(query, key, labels, (query_ids, key_ids), paired, normalize)
    weight, upstream = relative_weights(grad_loss)
    return _run(rows, columns, temperature, bias, weight, upstream, needs, query.dtype)[1]


def _problem(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    paired: bool,
    normalize: bool,
) -> tuple[Rows, Columns]:
    kind = SIGMOID_PAIRED if paired else SIGMOID
    columns = Columns(pack(key, normalize), kind.value)
    if len(labels) > 0:
        of_query, of_key = labels.split([len(query), len(key)])
        columns.labels, columns.x_labels = of_key.contiguous(), of_query.contiguous()
    if ids[1] is not None:
        columns.ids = ids_of(query, ids[0]), ids[1].contiguous()
    return pack(query, normalize), columns


def _run(
    query: Rows,
    columns: Columns,
    temperature: float | Tensor,
    bias: Tensor,
    weight: Tensor | None,
    upstream: float | Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Gradients]:
    """Losses, and the gradients of ``upstream * (weight * losses).sum()``; no weight is 1."""
    need_query, need_key, need_bias, need_temperature = needs
    resident = query.split != (0, 0)
    wanted = need_query and resident, need_bias or need_temperature
    losses, raw, of_bias, of_logit = _sums(query, columns, temperature, bias, wanted)
    each = torch.ones_like(losses) if weight is None else weight
    of_query, of_key = (
        RowGradients(x, temperature, upstream, dtype) if needed else None
        for x, needed in ((query, need_query), (columns.y, need_key))
    )
    if raw is not None:
        of_query.finish(Products(raw, each.expand(len(raw), -1).contiguous()))
    want_x = need_query and not resident
    if want_x or need_key:
        coefficients = Coefficients(query, columns, temperature, statistics(each, each), bias=bias)
        _, found, _ = both_products(coefficients, want_x=want_x, want_y=need_key, of_x=of_query)
        if need_key:
            of_key.finish(found)
    return losses, (
        None if of_query is None else of_query.out,
        None if of_key is None else of_key.out,
        (each * of_bias).sum().mul(upstream).to(bias.dtype) if need_bias else None,
        -(each * of_logit).sum() * (upstream / temperature) if need_temperature else None,
    )


def _sums(
    query: Rows,
    columns: Columns,
    temperature: float | Tensor,
    bias: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses (R,); if wanted parts of ``sum_j g_ij y^_j`` (P, R, padded depth); and ``sum_j g_ij``, ``sum_j g_ij z_ij``, each (R,)."""
    product, sums = wanted
    tile = columns.tile(query, "products" if product else "sums", rich=True)
    if product:  # there are three sums besides
        tile = dataclasses.replace(tile, n=max(16, tile.n // 2))
    parts = columns.splits(query, tile)
    losses = query.scale.new_empty((parts, len(query)))
    raw = query.x.new_empty((parts, *query.x.shape), dtype=torch.float32) if product else None
    of_bias, of_logit = (torch.empty_like(losses) if sums else None for _ in range(2))
    head, tail = query.split
    launch(
        _sigmoid_kernel,
        (columns.row_blocks(query, tile.m), parts),
        tile.options,
        x=query.x,
        x_scale=query.scale,
        y=columns.y.x,
        y_scale=columns.y.scale,
        x_labels=columns.row_labels,
        y_labels=columns.labels,
        bias=bias,
        losses=losses,
        of_bias=of_bias,
        of_logit=of_logit,
        raw=raw,
        depth=query.padded,
        KIND=columns.kind,
        SCALE=PRODUCT_SCALE.get(query.x.dtype, 1.0),
        HEAD=head,
        TAIL=tail,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=query.chunk(tile.d),
        PRECISION=input_precision(query.x),
        **columns.span_arguments(query),
        **columns.mask_arguments(),
        **temperature_arguments(temperature),
    )
    sums_of = (None if x is None else x.sum(0) for x in (of_bias, of_logit))
    return losses.sum(0), raw, *sums_of


@triton.jit(do_not_specialize=["rows", "columns", "total_rows"])
def _sigmoid_kernel(
    x,
    x_scale,
    y,
    y_scale,
    x_labels,
    y_labels,
    temperature,
    bias,
    losses,
    of_bias,
    of_logit,
    raw,
    x_ids,
    y_ids,
    x_guide,
    y_guide,
    guide_depth,
    rows,
    columns,
    total_rows,
    depth,
    KIND: tl.constexpr,
    TENSOR: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(1)
    start, first_row, first_column = span(tl.program_id(0), rows, columns, BLOCK_M)
    row = start + tl.arange(0, BLOCK_M)
    there = row < rows
    x_offsets = inside(start, rows, BLOCK_M)
    first_row += start
    x += first_row * depth
    if TENSOR:
        temperature = tl.load(temperature)
    row_scale = to_base_2(tl.load(x_scale + first_row + x_offsets), temperature)
    shift = tl.load(bias).to(tl.float32)
    row_labels = row
    if x_labels is not None:
        row_labels = tl.load(x_labels + first_row + x_offsets)
    if x_ids is not None:
        x_ids += first_row
    PRODUCT: tl.constexpr = raw is not None

    steps = tl.cdiv(tl.cdiv(columns, BLOCK_N), tl.num_programs(1))
    begin = part * steps * BLOCK_N
    end = tl.minimum(begin + steps * BLOCK_N, columns)
    loss = tl.zeros((BLOCK_M,), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    logit_sum = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M, HEAD if PRODUCT else 1), tl.float32)
    product_tail = tl.zeros((BLOCK_M, TAIL if PRODUCT and TAIL else 1), tl.float32)
    if HEAD:
        x_head = load_rows(x, x_offsets, depth, tl.arange(0, HEAD))
        if TAIL:
            x_tail = load_rows(x, x_offsets, depth, HEAD + tl.arange(0, TAIL))
    for j in tl.range(begin, end, BLOCK_N):
        column = j + tl.arange(0, BLOCK_N)
        first_y = first_column + j
        y_offsets = inside(j, columns, BLOCK_N)
        y_block = y + first_y * depth
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
        column_scale = tl.load(y_scale + first_y + y_offsets)
        z = z * row_scale[:, None] * column_scale[None, :]
        of_columns = None if y_labels is None else y_labels + first_y
        positive = positives(row, column, row_labels, of_columns, y_offsets, KIND)
        ids = None if y_ids is None else y_ids + first_y
        keep = left_in(
            counts(row, column, columns, KIND),
            positive, x_ids, ids, x_guide, y_guide, x_offsets, y_offsets, guide_depth, total_rows, total_rows, KIND,
        )  # fmt: skip
        each, g = sigmoid_pairs(z, shift, positive)
        loss += tl.sum(tl.where(keep, each, 0.0), 1)
        g = tl.where(keep, g, 0.0)
        if of_bias is not None:
            bias_sum += tl.sum(g, 1)
            logit_sum += tl.sum(tl.where(keep, g * z, 0.0), 1)
        if PRODUCT:
            g = (g * (column_scale * SCALE)[None, :]).to(y_head.dtype)
            product = multiply(g, y_head, product, PRECISION)
            if TAIL:
                product_tail = multiply(g, y_tail, product_tail, PRECISION)

    at = tl.cast(part, tl.int64) * total_rows + first_row
    tl.store(losses + at + x_offsets, loss, mask=there)
    if of_bias is not None:
        tl.store(of_bias + at + x_offsets, bias_sum, mask=there)
        tl.store(of_logit + at + x_offsets, logit_sum * LN_2, mask=there)
    if PRODUCT:
        out = raw + at * depth + (x_offsets * depth)[:, None]
        tl.store(out + tl.arange(0, HEAD)[None, :], product * (1 / SCALE), mask=there[:, None])
        if TAIL:
            d = HEAD + tl.arange(0, TAIL)
            tl.store(out + d[None, :], product_tail * (1 / SCALE), mask=there[:, None])
