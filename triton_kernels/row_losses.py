"""From sums of exponentials by parts to the losses of rows, and what their gradients need."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LN_2, LOG2_E, load_pair_logits


@triton.jit
def merged(largest, sums, at, there, parts, total, constant):
    """Maximum and sum over the parts, and a constant logit, to base 2."""
    top = constant
    for part in range(parts):
        each = tl.load(largest + tl.cast(part, tl.int64) * total + at, mask=there, other=0.0)
        top = tl.maximum(top, each)
    finite = tl.where(top == float("-inf"), 0.0, top)
    sum_ = tl.exp2(constant - finite)
    for part in range(parts):
        first = tl.cast(part, tl.int64) * total
        each = tl.load(largest + first + at, mask=there, other=0.0)
        sum_ += tl.load(sums + first + at, mask=there, other=0.0) * tl.exp2(each - finite)
    return top, sum_


@triton.jit
def _log_1p(x):
    """log(1 + x), exact for small x."""
    one_more = 1.0 + x
    rounded = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    return tl.where(one_more == 1.0, x, tl.log(one_more) * (x / rounded))


@triton.jit
def _one_direction(largest, sums, positive, at, there, parts, total, constant):
    """Loss, log-sum-exp (natural) and missing weight of a row or a column; the positive's logit is to base 2."""
    top, sum_ = merged(largest, sums, at, there, parts, total, constant)
    # Large numbers meet before anything is rounded. An infinite positive makes the loss inf - inf.
    d = ((top - positive) + tl.log2(sum_)) * LN_2 + 0 * tl.maximum(positive, 0.0)
    loss = tl.maximum(d, 0.0) + _log_1p(tl.exp(-tl.abs(d)))
    return loss, positive * LN_2 + loss, 1 / (1 + tl.exp(-d))


@triton.jit(do_not_specialize=["parts", "factor_parts", "column_parts", "total"])
def _losses_kernel(
    positive,
    query_scale,
    key_scale,
    largest,
    sums,
    terms,
    column_largest,
    column_sums,
    temperature,
    loss,
    lse,
    logit,
    missing,
    factor,
    term,
    self_logit,
    parts,
    factor_parts,
    column_parts,
    total,
    SELF: tl.constexpr,
    TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    if TENSOR:
        temperature = tl.load(temperature)
    p = load_pair_logits(positive, query_scale, key_scale, at, there, temperature)
    tl.store(logit + at, p * LN_2, mask=there)
    constant = tl.full((BLOCK,), float("-inf"), tl.float32)
    if SELF:
        constant = tl.zeros((BLOCK,), tl.float32) + self_logit * (LOG2_E / temperature)
    row_loss, row_lse, row_missing = _one_direction(
        largest, sums, p, at, there, parts, total, constant
    )
    tl.store(lse + at, row_lse, mask=there)
    if column_sums is not None:
        none = tl.full((BLOCK,), float("-inf"), tl.float32)
        column_loss, column_lse, column_missing = _one_direction(
            column_largest, column_sums, p, at, there, column_parts, total, none
        )
        tl.store(lse + total + at, column_lse, mask=there)
        row_loss = 0.5 * (row_loss + column_loss)
        row_missing = 0.5 * (row_missing + column_missing)
    tl.store(loss + at, row_loss, mask=there)
    tl.store(missing + at, row_missing, mask=there)
    if factor is not None:
        sum_ = tl.zeros((BLOCK,), tl.float32)
        for part in range(factor_parts):
            first = tl.cast(part, tl.int64) * total
            each = tl.load(largest + first + at, mask=there, other=0.0)
            to_softmax = tl.exp2(each - row_lse * LOG2_E)
            tl.store(factor + first + at, to_softmax, mask=there)
            if term is not None:
                sum_ += to_softmax * tl.load(terms + first + at, mask=there, other=0.0)
        if term is not None:
            if SELF:
                sum_ += tl.exp2(constant - row_lse * LOG2_E) * constant * LN_2
            tl.store(term + at, sum_, mask=there)
