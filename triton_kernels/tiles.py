"""Parts that the passes over the matrix of similarities share: where a program works, a tile of logits, and what counts in it.

Logits are in units of log 2, so that exponentials are ``exp2``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastnce.registry import LEFT_OUT

from .launch import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(INTERPRETED)
_LEFT_OUT = tl.constexpr(LEFT_OUT)

# Which columns count for a row, and how:
QUEUE = tl.constexpr(0)  # all
IN_BATCH = tl.constexpr(1)  # all but the row's own, which is its positive and kept apart
SUP_CON = tl.constexpr(2)  # all but the row's own; those with its label are positives
TWO_C = tl.constexpr(3)  # the same, positives by their own log-sum-exp
GIVEN = tl.constexpr(4)  # coefficients from memory
LABELLED = tl.constexpr(5)  # all; those with its label by their own log-sum-exp as well
# Rows and columns are a problem's queries and then its keys: all but the row's own and its partner, which is its positive
BOTH_SIDES = tl.constexpr(6)
# The same, where a column's loss has a gradient for rows of its own side alone
DETACHED = tl.constexpr(7)
# As QUEUE and IN_BATCH, without the pairs that ids or the guide's rows leave out
MASKED = tl.constexpr(8)
MASKED_IN_BATCH = tl.constexpr(9)
# All but those that ids leave out, each by itself; positives are those with its label, or if paired the row's own
SIGMOID = tl.constexpr(10)
SIGMOID_PAIRED = tl.constexpr(11)


@triton.jit
def span(block, rows, columns, BLOCK: tl.constexpr):
    """The first row of a block, in its problem of ``rows`` and ``columns``, and the problem's first row and column.

    The latter are int64, and in the packed rows: an address is theirs, plus a small offset in a tile.
    """
    blocks = tl.cdiv(rows, BLOCK)
    problem = (block // blocks).to(tl.int64)
    return block % blocks * BLOCK, problem * rows, problem * columns


@triton.jit
def to_base_2(x, temperature):
    """``x / temperature`` in units of log 2, rounded once."""
    return (x.to(tl.float64) * (LOG2_E / tl.cast(temperature, tl.float64))).to(tl.float32)


@triton.jit
def load_pair_logits(products, x_scale, y_scale, at, there, temperature):
    """Logits of single pairs, rounded as those of a tile are: of equal rows, they are equal."""
    row_scale = to_base_2(tl.load(x_scale + at, mask=there, other=0.0), temperature)
    logits = tl.load(products + at, mask=there, other=0.0) * row_scale
    return logits * tl.load(y_scale + at, mask=there, other=0.0)


@triton.jit
def inside(start, count, BLOCK: tl.constexpr):
    """Offsets from ``start`` for a block of rows; beyond the end the last row again, so that no load needs a mask."""
    return tl.minimum(tl.arange(0, BLOCK), count - 1 - start)


@triton.jit
def load_rows(x, offsets, depth, d):
    """Elements ``d`` of packed rows at small offsets from ``x``."""
    return tl.load(x + offsets[:, None] * depth + d[None, :])


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b`` in fp32; the interpreter knows no product of bf16 or fp8.

    Hopper's matrix instruction for fp8 keeps about 14 bits of a sum; after four of them, a depth of 128, it goes to fp32.
    """
    if a.dtype.is_fp8() and not _INTERPRETED:
        DEPTH: tl.constexpr = a.shape[1]
        EXACT: tl.constexpr = 128 if DEPTH > 128 else DEPTH
        return tl.dot(a, b, accumulator, max_num_imprecise_acc=EXACT)
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def products_of_chunks(
    x,
    x_offsets,
    y,
    y_offsets,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x_i . y_j``, by chunks of the depth."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, depth, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        x_chunk = load_rows(x, x_offsets, depth, d)
        y_chunk = load_rows(y, y_offsets, depth, d)
        s = multiply(x_chunk, tl.trans(y_chunk), s, PRECISION)
    return s


@triton.jit
def counts(row, column, columns, KIND: tl.constexpr):
    """Which pairs of a row and a column of one problem take part; rows beyond the end are the caller's to leave out."""
    keep = (column < columns)[None, :]
    OTHERS: tl.constexpr = KIND == IN_BATCH or KIND == MASKED_IN_BATCH
    if OTHERS or KIND == SUP_CON or KIND == TWO_C:
        keep = keep & (row[:, None] != column[None, :])
    if KIND == BOTH_SIDES or KIND == DETACHED:
        pairs = columns // 2
        keep = keep & ((row % pairs)[:, None] != (column % pairs)[None, :])
    return keep


@triton.jit
def left_out_by_ids(row_ids, column_ids, positive):
    """Pairs of the same id that are no positives, if there are any; and all of the id LEFT_OUT."""
    of_rows, of_columns = row_ids[:, None], column_ids[None, :]
    out = of_rows == of_columns
    if positive is not None:
        out = out & ~positive
    return out | (of_rows == _LEFT_OUT) | (of_columns == _LEFT_OUT)


@triton.jit
def left_in(
    keep, positive, x_ids, y_ids, x_guide, y_guide, x_offsets, y_offsets, guide_depth, total_rows, total_columns,
    KIND: tl.constexpr,
):  # fmt: skip
    """``keep`` without the pairs that ids and the guide leave out; the pointers are those of the tile, None where there is nothing.

    The guide's rows are columns of (G, total): a pair's product is added up in one order, whichever of the two is the row, so that
    all passes leave out the same. ``tl.dot`` in fp32 would take more registers than the products leave.
    """
    if KIND >= MASKED:
        if y_ids is not None:
            row_ids, column_ids = tl.load(x_ids + x_offsets), tl.load(y_ids + y_offsets)
            keep = keep & ~left_out_by_ids(row_ids, column_ids, positive)
        if y_guide is not None:
            found = tl.zeros((x_offsets.shape[0], y_offsets.shape[0]), tl.float32)
            for _ in range(guide_depth):
                found += (
                    tl.load(x_guide + x_offsets)[:, None] * tl.load(y_guide + y_offsets)[None, :]
                )
                x_guide += total_rows
                y_guide += total_columns
            keep = keep & ~(found > 0)
    return keep


@triton.jit
def log_1p(x):
    """log(1 + x), exact for small x."""
    one_more = 1.0 + x
    rounded = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    return tl.where(one_more == 1.0, x, tl.log(one_more) * (x / rounded))


@triton.jit
def positives(row, column, row_labels, y_labels, y_offsets, KIND: tl.constexpr):
    """Of the sigmoid loss; None if there are none."""
    if KIND == SIGMOID_PAIRED:
        return row[:, None] == column[None, :]
    elif y_labels is not None:
        return row_labels[:, None] == tl.load(y_labels + y_offsets)[None, :]
    else:
        return None


@triton.jit
def sigmoid_pairs(z, bias, positive):
    """``log(1 + e^x)``, x the logit of a negative, or minus that of a positive; and its derivative by the logit."""
    x = z * LN_2 + bias
    if positive is not None:
        x = tl.where(positive, -x, x)
    e = tl.exp(-tl.abs(x))
    loss = tl.maximum(x, 0.0) + log_1p(e)
    sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    if positive is not None:
        sigmoid = tl.where(positive, -sigmoid, sigmoid)
    return loss, sigmoid


@triton.jit
def load_statistics(statistics, first, offsets, total, KIND: tl.constexpr):
    """Of each row log-sum-exp (to base 2), weight, and two more numbers where its loss needs them (see ``row_gradient``)."""
    statistics += first
    total = tl.cast(total, tl.int64)
    lse = tl.load(statistics + offsets) * LOG2_E
    weight = tl.load(statistics + total + offsets)
    third = weight
    fourth = weight
    BY_LSE: tl.constexpr = KIND == TWO_C or KIND == LABELLED
    if KIND == SUP_CON or BY_LSE:
        third = tl.load(statistics + 2 * total + offsets)
    if BY_LSE:
        fourth = tl.load(statistics + 3 * total + offsets)
    return lse, weight, third, fourth


@triton.jit
def row_gradient(z, statistics, AXIS: tl.constexpr, same, KIND: tl.constexpr):
    """d L / d z of a tile by the losses of its rows (AXIS 1), or of its columns (0), from ``load_statistics``.

    ``weight softmax`` over all; over those of the same label, SupCon's ``-third`` each; or ``fourth softmax``, of which
    ``third`` is the log-sum-exp.
    """
    third = tl.expand_dims(statistics[2], AXIS)
    g = tl.expand_dims(statistics[1], AXIS) * tl.exp2(z - tl.expand_dims(statistics[0], AXIS))
    if KIND == SUP_CON:
        g -= tl.where(same, third, 0.0)
    if KIND == TWO_C or KIND == LABELLED:
        fourth = tl.expand_dims(statistics[3], AXIS)
        g += tl.where(same, fourth * tl.exp2(z - third * LOG2_E), 0.0)
    return g
