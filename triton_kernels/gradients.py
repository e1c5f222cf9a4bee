"""From the coefficients ``G = d L / d z`` to the products that the gradients need, ``G y^`` for rows and ``G^T x^`` for columns.

Where rows stay on the chip (``config.RESIDENT_DEPTH``), the similarities are made anew for each of the two products, which follows
at once. No coefficient reaches memory, and no sum is shared between programs. Deeper rows would be multiplied too often that way:
there the coefficients of a panel of rows go through memory in the inputs' precision, and the products are the library's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .columns import Columns
from .launch import cdiv, launch, temperature_arguments
from .rows import Rows, input_precision
from .tiles import (
    BOTH_SIDES,
    DETACHED,
    GIVEN,
    LABELLED,
    LN_2,
    SIGMOID,
    SUP_CON,
    TWO_C,
    counts,
    inside,
    left_in,
    load_rows,
    load_statistics,
    multiply,
    positives,
    products_of_chunks,
    row_gradient,
    sigmoid_pairs,
    span,
    to_base_2,
)

# So many parts of a row are added where its gradient is made; of more, many at a time, by programs of their own.
_FEW_PARTS = 8
_TOGETHER, _TOGETHER_D = 32, 64
# fp16 has too few small numbers for the weights of many columns; statistics' weights are at most 1.
_SCALE = {torch.float16: 1024.0}


def relative_weights(grad_loss: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that arrive, as weights of at most 1 and a factor: fp16 holds the former times a softmax."""
    flat = grad_loss.reshape(-1).float()
    top = largest_weight(flat)
    return flat / top, top


def largest_weight(weights: Tensor) -> Tensor:
    """The largest magnitude, 1 where that is no number to divide by."""
    top = torch.linalg.vector_norm(weights, torch.inf).float()
    return torch.where((top > 0) & top.isfinite(), top, 1.0)


def statistics(
    lse: Tensor, weight: Tensor, third: Tensor | None = None, fourth: Tensor | None = None
) -> Tensor:
    """(2 to 4, R) for ``tiles.load_statistics``."""
    return torch.stack([x for x in (lse, weight, third, fourth) if x is not None])


@dataclasses.dataclass
class Products:
    """``sum_p factor_p raw_p`` is what the rows' gradients need; without a factor, the sum of the parts."""

    raw: Tensor  # (P, R, padded depth)
    factor: Tensor | None = None  # (P, R)


@dataclasses.dataclass
class RowGradients:
    """The gradient of the inputs behind ``rows`` from their products, of any of them as soon as they are complete.

    The products are in fp32, and need not all be there at once.
    """

    rows: Rows
    temperature: float | Tensor
    upstream: float | Tensor
    dtype: torch.dtype
    pair: Rows | None = None
    pair_weight: Tensor | None = None

    def __post_init__(self) -> None:
        self.out = self.rows.x.new_empty((len(self.rows), self.rows.depth), dtype=self.dtype)

    def finish(self, *products: Products, part: slice = slice(None)) -> Tensor:
        """Fills the rows ``part`` of ``out``, and returns all of it.

        With respect to the unit row it is ``g = (sum_p factor_p raw_p + pair_weight pair^) upstream / t``; through the
        normalisation ``(g - x^ (x^ . g)) / ||x||``.
        """
        rows, out = self.rows[part], self.out[part]
        raw, factor = _joined(products)
        pair = None if self.pair is None else self.pair[part]
        block_d = min(128, triton.next_power_of_2(rows.padded))
        block = max(1, 1024 // block_d)
        launch(
            _row_gradients_kernel,
            (cdiv(len(rows), block),),
            x=rows.x,
            x_scale=rows.scale,
            inverse=rows.inverse,
            raw=raw,
            factor=factor,
            pair=None if pair is None else pair.x,
            pair_scale=None if pair is None else pair.scale,
            pair_weight=None if self.pair_weight is None else self.pair_weight[part],
            upstream=self.upstream,
            out=out,
            parts=0 if raw is None else raw.shape[0],
            total=len(rows),
            depth=rows.depth,
            padded=rows.padded,
            NORMALIZE=rows.normalize,
            UPSTREAM_TENSOR=isinstance(self.upstream, Tensor),
            BLOCK=block,
            BLOCK_D=block_d,
            **temperature_arguments(self.temperature),
        )
        return self.out


def _joined(products: Sequence[Products]) -> tuple[Tensor | None, Tensor | None]:
    """Raw parts and their factors, few enough for one program to go through them."""
    if not products:
        return None, None
    if len(products) == 1 and len(products[0].raw) <= _FEW_PARTS:
        return products[0].raw, products[0].factor
    total = products[0].raw.new_empty((1, *products[0].raw.shape[1:]))
    _, count, padded = total.shape
    for index, each in enumerate(products):
        parts = len(each.raw)
        together = min(_TOGETHER, triton.next_power_of_2(parts))
        rows = _TOGETHER // together
        launch(
            _add_parts_kernel,
            (cdiv(count, rows), cdiv(padded, _TOGETHER_D)),
            raw=each.raw,
            factor=each.factor,
            out=total,
            parts=parts,
            total=count,
            padded=padded,
            MORE=index > 0,
            PARTS=together,
            ROWS=rows,
            BLOCK_D=_TOGETHER_D,
        )
    return total, None


@dataclasses.dataclass
class Coefficients:
    """``G = d L / d z`` of the rows ``x`` against ``columns``, by what their losses have found, or given.

    Args:
        x: the rows.
        columns: the columns.
        temperature: a float or a 0-d tensor.
        x_statistics: (2 to 4, R) of the rows' losses (see ``tiles.load_statistics``), None if they have none.
        y_statistics: (2 to 4, C) of the columns' losses, likewise.
        given: the coefficients (problems, rows, columns) themselves, any strides, for columns of the kind GIVEN.
        given_unit: a 0-d tensor, by which those are divided.
        bias: a 0-d tensor, of the sigmoid loss, whose coefficients take the weights from the statistics alone.
    """

    x: Rows
    columns: Columns
    temperature: float | Tensor
    x_statistics: Tensor | None = None
    y_statistics: Tensor | None = None
    given: Tensor | None = None
    given_unit: Tensor | None = None
    bias: Tensor | None = None

    def transposed(self) -> Coefficients:
        """The columns as rows, and the rows as columns."""
        given = None if self.given is None else self.given.mT
        columns = self.columns.swapped(self.x)
        statistics = self.y_statistics, self.x_statistics
        numbers = given, self.given_unit, self.bias
        return Coefficients(self.columns.y, columns, self.temperature, *statistics, *numbers)

    def arguments(self) -> dict[str, object]:
        """Those of a kernel."""
        x, y = self.x.for_similarity, self.columns.y.for_similarity
        return {
            "x": x.x,
            "x_scale": x.scale,
            "y": y.x,
            "y_scale": y.scale,
            "x_labels": self.columns.row_labels,
            "y_labels": self.columns.labels,
            "x_statistics": self.x_statistics,
            "y_statistics": self.y_statistics,
            "given": self.given,
            "given_strides": (0, 0, 0) if self.given is None else self.given.stride(),
            "given_unit": self.given_unit,
            "bias": self.bias,
            "total_columns": len(y),
            "depth": self.x.padded,
            "KIND": self.columns.kind,
            "SCALE": _SCALE.get(self.x.x.dtype, 1.0),
            "PRECISION": input_precision(self.x.x),
            **self.columns.mask_arguments(),
            **temperature_arguments(self.temperature),
        }


def both_products(
    g: Coefficients,
    *,
    want_x: bool,
    want_y: bool,
    want_term: bool = False,
    of_x: RowGradients | None = None,
) -> tuple[Products | None, Products | None, Tensor | None]:
    """``G y^`` for the rows and ``G^T x^`` for the columns, and ``sum_j G_ij z_ij`` (R,), all or None.

    The third is, with labels, from the rows' losses alone. ``of_x`` finishes the first, if these are all of the rows' products, so
    that it need not be returned.
    """
    if g.x.split == (0, 0):
        return _through_panels(g, want_x, want_y, want_term, of_x)
    found_x = found_y = term = None
    if want_x or want_term:
        found_x, term, *_ = row_sums(g, product=True, term=want_term)
    if want_x and of_x is not None:
        of_x.finish(found_x)
        found_x = None
    if want_y:
        found_y = row_sums(g.transposed(), product=True, term=False).products
    return found_x, found_y, term


def _through_panels(
    g: Coefficients, want_x: bool, want_y: bool, want_term: bool, of_x: RowGradients | None
) -> tuple[Products | None, Products | None, Tensor | None]:
    """As ``both_products``, through panels of coefficients ``G_ij scale_i scale_j``; problems are not ragged.

    A panel's rows are finished as soon as it is multiplied. What it adds to the columns' products is added to them.
    """
    x, columns = g.x, g.columns
    problems = columns.problems
    count, width = len(x) // problems, len(columns.y) // problems
    raw_x = None
    if want_x and of_x is None:
        raw_x = x.x.new_empty((1, *x.x.shape), dtype=torch.float32)
    raw_y = columns.y.x.new_zeros((1, *columns.y.x.shape), dtype=torch.float32) if want_y else None
    term = x.scale.new_empty((len(x),)) if want_term else None

    def products(raw: Tensor | None, rows: Rows) -> Products | None:
        if raw is None:
            return None
        # The panel's coefficients hold the scale of rows and columns; where that is 0, so is the product.
        without = rows.scale.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
        return Products(raw, without.unsqueeze(0))

    tile = columns.tile(x, "panel", rich=want_term)
    x_rows, y_rows = x.x.view(problems, count, -1), columns.y.x.view(problems, width, -1)
    column_blocks = cdiv(width, tile.n)
    elements = config.panel_elements(len(x), len(columns.y), x.padded)
    height = max(tile.m, min(count, elements // width) // tile.m * tile.m)
    together = max(1, elements // (width * count)) if height >= count else 1
    for problem in range(0, problems, together):
        chosen = slice(problem, min(problem + together, problems))
        number = chosen.stop - chosen.start
        for start in range(0, count, height):
            size = min(height, count - start)
            # Whole vectors in each row, for quick stores.
            panel = x.x.new_empty((number, size, cdiv(width, 16) * 16))[..., :width]
            terms = term.new_empty((column_blocks, number * size)) if want_term else None
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
                **g.arguments(),
            )
            # Whole problems, or rows of one.
            first = problem * count + start
            rows = slice(first, first + number * size)
            if want_term:
                term[rows] = terms.sum(0)
            if want_x:
                product = _bmm(panel, y_rows[chosen]).flatten(0, 1)
                if of_x is None:
                    raw_x[0, rows] = product
                else:
                    of_x.finish(products(product.unsqueeze(0), x[rows]), part=rows)
                del product
            if want_y:
                into = raw_y.view(problems, width, -1)[chosen]
                _add_bmm(into, panel.mT, x_rows[chosen, start : start + size])
            del panel  # before the next one
    return products(raw_x, x), products(raw_y, columns.y), term


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


class RowSums(NamedTuple):
    """Of rows, what ``row_sums`` was asked for."""

    products: Products | None  # parts of ``sum_j G_ij y^_j``
    term: Tensor | None  # (R,): ``sum_j G_ij z_ij``
    losses: Tensor | None  # (R,), of the sigmoid loss, as the following
    of_bias: Tensor | None  # (R,): ``sum_j G_ij``


def row_sums(g: Coefficients, *, product: bool, term: bool, losses: bool = False) -> RowSums:
    """One pass over the tiles; ``losses`` of the sigmoid loss, and with the term what its bias needs."""
    x, columns = g.x, g.columns
    tile = columns.tile(x, "products" if product else "sums", rich=term)
    if product and losses:  # there are three sums besides
        tile = dataclasses.replace(tile, n=max(16, tile.n // 2))
    parts = columns.splits(x, tile)
    raw = x.x.new_empty((parts, *x.x.shape), dtype=torch.float32) if product else None
    of_term, of_losses, of_bias = (
        x.scale.new_empty((parts, len(x))) if wanted else None
        for wanted in (term, losses, losses and term)
    )
    head, tail = x.split
    apart = product and columns.y.rounded is not None
    launch(
        _row_products_kernel,
        (columns.row_blocks(x, tile.m), parts),
        tile.options,
        values=columns.y.x if apart else None,
        value_scale=columns.y.scale if apart else None,
        raw=raw,
        part_term=of_term,
        part_loss=of_losses,
        part_bias=of_bias,
        HEAD=head,
        TAIL=tail,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_D=x.chunk(tile.d),
        **columns.span_arguments(x),
        **g.arguments(),
    )
    sums = (None if y is None else y.sum(0) for y in (of_term, of_losses, of_bias))
    return RowSums(Products(raw) if product else None, *sums)


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
    of_rows,
    given,
    given_strides,
    given_unit,
    bias,
    x_ids,
    y_ids,
    x_guide,
    y_guide,
    x_offsets,
    guide_depth,
    rows,
    columns,
    total_rows,
    total_columns,
    KIND: tl.constexpr,
):
    """Coefficients of a tile, from its products ``s``, their products with the logits, and the losses, if each pair has one."""
    z = s * row_scale[:, None] * column_scale[None, :]
    keep = counts(row, column, columns, KIND)
    ids = None if y_ids is None else y_ids + first_y
    guide = None if y_guide is None else y_guide + first_y
    positive = None
    if KIND >= SIGMOID:
        of_columns = None if y_labels is None else y_labels + first_y
        positive = positives(row, column, row_labels, of_columns, y_offsets, KIND)
    keep = left_in(
        keep, positive, x_ids, ids, x_guide, guide, x_offsets, y_offsets, guide_depth, total_rows, total_columns, KIND
    )  # fmt: skip
    if KIND >= SIGMOID:
        loss, g = sigmoid_pairs(z, tl.load(bias).to(tl.float32), positive)
        if x_statistics is not None:
            g *= of_rows[1][:, None]
        if y_statistics is not None:
            weights = load_statistics(y_statistics, first_y, y_offsets, total_columns, KIND)
            g *= weights[1][None, :]
        g = tl.where(keep, g, 0.0)
        return g, tl.where(keep, g * z, 0.0), tl.where(keep, loss, 0.0)
    if KIND == GIVEN:
        at = row.to(tl.int64)[:, None] * given_strides[1]
        at += column.to(tl.int64)[None, :] * given_strides[2]
        g = tl.load(given + at, mask=keep & (row < rows)[:, None], other=0.0).to(tl.float32)
        if given_unit is not None:
            g /= tl.load(given_unit)
        return g, tl.where(keep, g * z, 0.0), g
    same = keep
    LABELS: tl.constexpr = KIND == SUP_CON or KIND == TWO_C or KIND == LABELLED
    if LABELS:
        same = row_labels[:, None] == tl.load(y_labels + first_y + y_offsets)[None, :]
    g = tl.zeros(z.shape, tl.float32)
    if y_statistics is not None:
        of_columns = load_statistics(y_statistics, first_y, y_offsets, total_columns, KIND)
        g += row_gradient(z, of_columns, 0, same, KIND)
    if KIND == DETACHED:
        of_queries = (row < columns // 2)[:, None] == (column < columns // 2)[None, :]
        g = tl.where(of_queries, g, 0.0)
    by_rows = tl.zeros(z.shape, tl.float32)
    if x_statistics is not None:
        by_rows += row_gradient(z, of_rows, 1, same, KIND)
    g += by_rows
    # Columns that are rows as well, here or in another block, say there what they have to about the temperature.
    moment = z * (by_rows if LABELS or KIND == BOTH_SIDES or KIND == DETACHED else g)
    return tl.where(keep, g, 0.0), tl.where(keep, moment, 0.0), g


@triton.jit(do_not_specialize=["rows", "columns", "total_rows", "total_columns"])
def _row_products_kernel(
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
    given_unit,
    bias,
    x_ids,
    y_ids,
    x_guide,
    y_guide,
    guide_depth,
    values,
    value_scale,
    raw,
    part_term,
    part_loss,
    part_bias,
    rows,
    columns,
    total_rows,
    total_columns,
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
    if x_labels is not None:
        row_labels = tl.load(x_labels + first_row + x_offsets)
    if x_ids is not None:
        x_ids += first_row
    if x_guide is not None:
        x_guide += first_row
    of_rows = (row_scale, row_scale, row_scale, row_scale)
    if x_statistics is not None:
        of_rows = load_statistics(x_statistics, first_row, x_offsets, total_rows, KIND)

    steps = tl.cdiv(tl.cdiv(columns, BLOCK_N), tl.num_programs(1))
    begin = part * steps * BLOCK_N
    end = tl.minimum(begin + steps * BLOCK_N, columns)
    PRODUCT: tl.constexpr = raw is not None
    product = tl.zeros((BLOCK_M, HEAD if PRODUCT else 1), tl.float32)
    product_tail = tl.zeros((BLOCK_M, TAIL if PRODUCT and TAIL else 1), tl.float32)
    term = tl.zeros((BLOCK_M,), tl.float32)
    losses = tl.zeros((BLOCK_M,), tl.float32)
    of_bias = tl.zeros((BLOCK_M,), tl.float32)
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
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            s = multiply(x_head, tl.trans(y_head), s, PRECISION)
            if TAIL:
                y_tail = load_rows(y_block, y_offsets, depth, HEAD + tl.arange(0, TAIL))
                s = multiply(x_tail, tl.trans(y_tail), s, PRECISION)
        else:
            s = products_of_chunks(
                x, x_offsets, y_block, y_offsets, depth, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
            )
        column_scale = tl.load(y_scale + first_y + y_offsets)
        g, moment, loss = tile_coefficients(
            s, row, column, first_y, y_offsets, row_scale, column_scale, row_labels, y_labels,
            x_statistics, y_statistics, of_rows, given, given_strides, given_unit,
            bias, x_ids, y_ids, x_guide, y_guide, x_offsets, guide_depth, rows, columns, total_rows, total_columns, KIND,
        )  # fmt: skip
        if part_term is not None:
            term += tl.sum(moment, 1)
        if part_loss is not None:
            losses += tl.sum(loss, 1)
        if part_bias is not None:
            of_bias += tl.sum(g, 1)
        if values is not None:
            block = values + first_y * depth
            y_head = load_rows(block, y_offsets, depth, tl.arange(0, HEAD))
            if TAIL:
                y_tail = load_rows(block, y_offsets, depth, HEAD + tl.arange(0, TAIL))
            column_scale = tl.load(value_scale + first_y + y_offsets)
        if PRODUCT:
            g = (g * (column_scale * SCALE)[None, :]).to(y_head.dtype)
            product = multiply(g, y_head, product, PRECISION)
            if TAIL:
                product_tail = multiply(g, y_tail, product_tail, PRECISION)

    at = tl.cast(part, tl.int64) * total_rows + first_row
    if part_term is not None:
        tl.store(part_term + at + x_offsets, term * LN_2, mask=there)
    if part_loss is not None:
        tl.store(part_loss + at + x_offsets, losses, mask=there)
    if part_bias is not None:
        tl.store(part_bias + at + x_offsets, of_bias, mask=there)
    if PRODUCT:
        out = raw + at * depth + (x_offsets * depth)[:, None]
        d = tl.arange(0, HEAD)
        tl.store(out + d[None, :], product * (1 / SCALE), mask=there[:, None])
        if TAIL:
            d = HEAD + tl.arange(0, TAIL)
            tl.store(out + d[None, :], product_tail * (1 / SCALE), mask=there[:, None])


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
    given_unit,
    bias,
    x_ids,
    y_ids,
    x_guide,
    y_guide,
    guide_depth,
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
    if x_ids is not None:
        x_ids += first_row
    if x_guide is not None:
        x_guide += first_row
    of_rows = (row_scale, row_scale, row_scale, row_scale)
    if x_statistics is not None:
        of_rows = load_statistics(x_statistics, first_row, x_offsets, total_rows, KIND)
    if given is not None:
        given += problem * given_strides[0]

    s = products_of_chunks(
        x + first_row * depth, x_offsets, y + first_y * depth, y_offsets,
        depth, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    g, moment, _ = tile_coefficients(
        s, row, column, first_y, y_offsets, row_scale, column_scale, row_labels, y_labels,
        x_statistics, y_statistics, of_rows, given, given_strides, given_unit,
        bias, x_ids, y_ids, x_guide, y_guide, x_offsets, guide_depth, rows, columns, total_rows, total_columns, KIND,
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


@triton.jit(do_not_specialize=["parts", "total"])
def _add_parts_kernel(
    raw,
    factor,
    out,
    parts,
    total,
    padded,
    MORE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out`` is, or if MORE gets, the sum of the parts times their factors."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < total)[:, None] & (d < padded)[None, :]
    at = row[:, None] * padded + d[None, :]
    sum_ = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if MORE:
        sum_ = tl.load(out + at, mask=inside, other=0.0)
    for begin in range(0, parts, PARTS):
        part = (begin + tl.arange(0, PARTS)).to(tl.int64)
        first = part[:, None] * total
        mask = (part < parts)[:, None, None] & inside[None, :, :]
        term = tl.load(raw + (first * padded)[:, :, None] + at[None, :, :], mask=mask, other=0.0)
        if factor is not None:
            there = (part < parts)[:, None] & (row < total)[None, :]
            term *= tl.load(factor + first + row[None, :], mask=there, other=0.0)[:, :, None]
        sum_ += tl.sum(term, 0)
    tl.store(out + at, sum_, mask=inside)


@triton.jit
def _unit_gradient(raw, factor, pair, pair_factor, rows, d, mask, parts, total, padded, to_input):
    g = tl.zeros(mask.shape, tl.float32)
    at = rows[:, None] * padded + d
    if raw is not None:
        for part in range(parts):
            first = tl.cast(part, tl.int64) * total
            term = tl.load(raw + first * padded + at, mask=mask, other=0.0)
            if factor is not None:
                inside = rows < total
                term *= tl.load(factor + first + rows, mask=inside, other=0.0)[:, None]
            g += term
    if pair is not None:
        g += pair_factor[:, None] * tl.load(pair + at, mask=mask, other=0.0).to(tl.float32)
    return g * to_input


@triton.jit(do_not_specialize=["parts", "total"])
def _row_gradients_kernel(
    x,
    x_scale,
    inverse,
    raw,
    factor,
    pair,
    pair_scale,
    pair_weight,
    upstream,
    temperature,
    out,
    parts,
    total,
    depth,
    padded,
    NORMALIZE: tl.constexpr,
    TENSOR: tl.constexpr,
    UPSTREAM_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = rows < total
    if TENSOR:
        temperature = tl.load(temperature)
    if UPSTREAM_TENSOR:
        upstream = tl.load(upstream)
    to_input = upstream / temperature
    pair_factor = tl.zeros((BLOCK,), tl.float32)
    if pair is not None:
        pair_factor = tl.load(pair_weight + rows, mask=there, other=0.0)
        pair_factor *= tl.load(pair_scale + rows, mask=there, other=0.0)
    unit = tl.load(x_scale + rows, mask=there, other=0.0)[:, None]

    along = tl.zeros((BLOCK,), tl.float32)  # x^ . g
    if NORMALIZE:
        for begin in range(0, depth, BLOCK_D):
            d = (begin + tl.arange(0, BLOCK_D))[None, :]
            mask = there[:, None] & (d < depth)
            g = _unit_gradient(
                raw, factor, pair, pair_factor, rows, d, mask, parts, total, padded, to_input
            )
            row = tl.load(x + rows[:, None] * padded + d, mask=mask, other=0.0).to(tl.float32)
            along += tl.sum(row * unit * g, 1)
    for begin in range(0, depth, BLOCK_D):
        d = (begin + tl.arange(0, BLOCK_D))[None, :]
        mask = there[:, None] & (d < depth)
        g = _unit_gradient(
            raw, factor, pair, pair_factor, rows, d, mask, parts, total, padded, to_input
        )
        if NORMALIZE:
            row = tl.load(x + rows[:, None] * padded + d, mask=mask, other=0.0).to(tl.float32)
            g = (g - row * unit * along[:, None]) * tl.load(inverse + rows, mask=there, other=0.0)[
                :, None
            ]
        tl.store(out + rows[:, None] * depth + d, g.to(out.dtype.element_ty), mask=mask)
