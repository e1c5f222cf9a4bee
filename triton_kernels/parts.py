"""Sums of exponentials by parts, to base 2, and how many parts become one."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch
from .rows import Rows
from .tiles import SUP_CON

_BLOCK = 128  # columns
PARTS = tl.constexpr(16)  # of them at a time


@dataclasses.dataclass
class Parts:
    """Sums of exponentials ``sum 2^largest``: of R rows by P parts of the columns, or of R columns by P blocks of rows."""

    largest: Tensor | None = None  # (P, R)
    sum: Tensor | None = None  # (P, R)
    # SupCon: sum of the positives' logits, and their number; 2C: like `largest` and `sum`, of the positives
    a: Tensor | None = None
    b: Tensor | None = None
    term: Tensor | None = None  # sum of exp times logit (natural)
    raw: Tensor | None = None  # (P, R, padded depth), sum of exp times y^
    rank: Tensor | None = None  # int32, how many are larger than the positive

    def __getitem__(self, which: slice) -> Parts:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Parts(*(None if x is None else x[which] for x in values))


def new_parts(rows: Rows, count: int, *, labelled: bool, term: bool = False) -> Parts:
    """Room for ``count`` parts of the sums of ``rows``."""

    def numbers(wanted: bool) -> Tensor | None:
        return rows.x.new_empty((count, len(rows)), dtype=torch.float32) if wanted else None

    return Parts(*map(numbers, (True, True, labelled, labelled, term)))


@triton.jit
def store_column_sums(largest, total, column, there, z, keep, e, offset, ONLINE: tl.constexpr):
    """A tile's part of the sums of its columns: of ``e``, but that is of no use where it is relative to the rows' maxima."""
    if ONLINE:
        top = tl.max(tl.where(keep, z, float("-inf")), 0)
        finite = tl.where(top == float("-inf"), 0.0, top)
        e = tl.where(keep, tl.exp2(z - finite[None, :]), 0.0)
    else:
        top = tl.zeros(column.shape, tl.float32) + offset
    tl.store(largest + column, top, mask=there)
    tl.store(total + column, tl.sum(e, 0), mask=there)


def fold(
    parts: Parts, into: Parts, kind: int, first_block: int, half_block: int | None = None
) -> None:
    """Adds parts of columns by blocks of rows, of which the first is ``first_block``, to the single part ``into``.

    The first of all blocks finds nothing there yet. With ``half_block`` rows in a block, a column has parts of the blocks before
    its own alone.
    """
    count, total = parts.sum.shape
    launch(
        _fold_kernel,
        (cdiv(total, _BLOCK),),
        largest=parts.largest,
        sums=parts.sum,
        a=parts.a,
        b=parts.b,
        into_largest=into.largest,
        into_sums=into.sum,
        into_a=into.a,
        into_b=into.b,
        count=count,
        first_block=first_block,
        total=total,
        KIND=kind,
        HALF_BLOCK=half_block or 0,
        BLOCK=_BLOCK,
    )


@triton.jit
def _more(top, sum_, largest, sums, at, mask):
    """Maximum and sum with further parts."""
    each = tl.load(largest + at, mask=mask, other=float("-inf"))
    new = tl.maximum(top, tl.max(each, 0))
    finite = tl.where(new == float("-inf"), 0.0, new)
    terms = tl.load(sums + at, mask=mask, other=0.0) * tl.exp2(each - finite[None, :])
    return new, sum_ * tl.exp2(top - finite) + tl.sum(terms, 0)


@triton.jit(do_not_specialize=["count", "first_block", "total"])
def _fold_kernel(
    largest,
    sums,
    a,
    b,
    into_largest,
    into_sums,
    into_a,
    into_b,
    count,
    first_block,
    total,
    KIND: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < total
    before = column < tl.where(first_block > 0, total, 0)
    BY_SUM: tl.constexpr = KIND == SUP_CON
    top = tl.load(into_largest + column, mask=before, other=float("-inf"))
    sum_ = tl.load(into_sums + column, mask=before, other=0.0)
    top_a, sum_b = top, sum_
    if a is not None:
        top_a = tl.load(into_a + column, mask=before, other=0.0 if BY_SUM else float("-inf"))
        sum_b = tl.load(into_b + column, mask=before, other=0.0)
    for begin in range(0, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        mask = (part < count)[:, None] & there[None, :]
        if HALF_BLOCK:
            mask = mask & ((part + first_block)[:, None] < (column // HALF_BLOCK)[None, :])
        at = part.to(tl.int64)[:, None] * total + column[None, :]
        top, sum_ = _more(top, sum_, largest, sums, at, mask)
        if a is not None:
            if BY_SUM:
                top_a += tl.sum(tl.load(a + at, mask=mask, other=0.0), 0)
                sum_b += tl.sum(tl.load(b + at, mask=mask, other=0.0), 0)
            else:
                top_a, sum_b = _more(top_a, sum_b, a, b, at, mask)
    tl.store(into_largest + column, top, mask=there)
    tl.store(into_sums + column, sum_, mask=there)
    if a is not None:
        tl.store(into_a + column, top_a, mask=there)
        tl.store(into_b + column, sum_b, mask=there)


@triton.jit
def some_parts(begin, parts, at, there, total):
    """Where PARTS numbers of each row ``at`` lie, from part ``begin`` on, and which of them are there."""
    part = begin + tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & there[None, :]
    return part.to(tl.int64)[:, None] * total + at[None, :], mask


@triton.jit
def merged(largest, sums, at, there, parts, total, constant):
    """Maximum and sum over the parts, and a constant logit, to base 2."""
    top = constant
    sum_ = tl.where(constant == float("-inf"), 0.0, 1.0)
    for begin in range(0, parts, PARTS):
        where, mask = some_parts(begin, parts, at, there, total)
        top, sum_ = _more(top, sum_, largest, sums, where, mask)
    return top, sum_
