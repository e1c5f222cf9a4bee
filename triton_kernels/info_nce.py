"""InfoNCE: in-batch, batched, a queue, each query's own negatives, symmetric.

The positive of a row is kept out of the sums: with s the sum of the other exponentials relative to the positive's, the loss is
``log(1 + s)`` and the gradient at the positive ``-s / (1 + s)``. Nothing cancels where the positive dominates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .columns import Columns
from .gradients import (
    Coefficients,
    Products,
    RowGradients,
    both_products,
    relative_weights,
    statistics,
)
from .launch import cdiv, launch, temperature_arguments
from .own_negatives import OwnNegatives, own_gradients, own_sums
from .parts import PARTS, Parts, fold, merged, new_parts, some_parts
from .rows import Rows, pack, pack_pairs, pair_logits
from .sums import offset_kind, sum_exponentials, sums_tile
from .tiles import IN_BATCH, LN_2, LOG2_E, QUEUE, load_pair_logits, log_1p

Gradients = tuple[Tensor | None, ...]
_BLOCK = 128


@dataclasses.dataclass
class Problem:
    """Packed rows and columns of one call."""

    query: Rows
    key: Rows
    positive: Tensor  # (R,) product of each packed query with its key
    sets: list[Columns]
    temperature: float | Tensor
    offset: int
    symmetric: bool = False
    self_logit: float | None = None
    negatives: Tensor | None = None  # each query's own
    self_count: int = 1  # how often the self logit is there, once or twice
    decoupled: bool = False  # the positive is not in the sum
    positive_logit: Tensor | None = None  # (R,), to base 2: ranks are asked for
    own_ids: tuple[Tensor, Tensor] | None = None  # of the queries, and of each query's own


@dataclasses.dataclass
class Solution:
    """The rows' losses, and what their gradients need."""

    loss: Tensor  # (R,)
    lse: Tensor  # (R,) or, symmetric, (2, R)
    logit: Tensor  # (R,), of the positive
    at_positive: (
        Tensor  # (R,): d loss / d logit of the positive; minus the softmax's weight on all others
    )
    factor: Tensor | None = None  # (P, R): from exponentials of a part to the softmax
    # (R,): sum of softmax times logit over what is in the parts, and the constant logit
    term: Tensor | None = None
    parts: Parts | None = None
    own: OwnNegatives | None = None
    rank: Tensor | None = None  # (R,) or, symmetric, (2, R)


def problem_of(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    self_logit: float | None,
    similarity_dtype: torch.dtype | None = None,
) -> Problem:
    """Packs the inputs; the options are those of ``fastnce.info_nce``, ``in_batch`` its ``in_batch_negatives``."""
    fp8 = similarity_dtype is not None
    q, k, positive = pack_pairs(query, key, normalize, fp8)
    sets = [Columns(k, IN_BATCH.value, query.shape[0])] if in_batch else []
    if negatives is not None and negatives.dim() == 2:
        sets.append(Columns(pack(negatives, normalize, fp8), QUEUE.value))
        negatives = None
    offset = offset_kind(temperature, normalize, query.dtype)
    return Problem(q, k, positive, sets, temperature, offset, symmetric, self_logit, negatives)


def info_nce_forward(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
    **options: Any,
) -> tuple[Tensor, Tensor, Gradients]:
    """Losses, log-sum-exp and, if ``grad_scale`` is given, the gradients of ``grad_scale * losses.sum()``, or of the mean.

    Arguments and results: those of the operator, see ``fastnce/ops/info_nce.py``; ``options``: ``problem_of``.
    """
    problem = problem_of(query, key, negatives, temperature, **options)
    now = grad_scale is not None and any(needs)
    solution = solve(
        problem, with_product=now and (needs[0] or needs[3]), with_term=now and needs[3]
    )
    lse = solution.lse.view(*solution.lse.shape[:-1], *query.shape[:2])
    grads: Gradients = (None,) * 4
    if now:
        scale = grad_scale / query.shape[:2].numel() if mean else grad_scale
        found = gradients(problem, solution, None, scale, needs, query.dtype)
        grads = shaped(found, query, key, negatives)
    return solution.loss.view(query.shape[:2]), lse, grads


def info_nce_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
    **options: Any,
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward; ``grad_loss`` (B, N), any strides."""
    problem = problem_of(query, key, negatives, temperature, **options)
    weight, upstream = relative_weights(grad_loss)
    lse = lse.reshape(2, -1) if problem.symmetric else lse.reshape(-1)
    positive = pair_logits(problem.query, problem.key, problem.positive, temperature)
    at_positive = torch.expm1(positive - lse)
    at_positive = at_positive.mean(0) if problem.symmetric else at_positive
    solution = Solution(positive, lse, positive, at_positive, own=own_again(problem))
    found = gradients(problem, solution, weight, upstream, needs, query.dtype)
    return shaped(found, query, key, negatives)


def own_again(problem: Problem) -> OwnNegatives | None:
    """The logits of each query's own negatives."""
    if problem.negatives is None:
        return None
    unused = torch.empty_like(problem.positive), torch.empty_like(problem.positive)
    return own_sums(problem.query, problem.negatives, problem.temperature, *unused, problem.own_ids)


# The operators of the op "info_nce_fp8".
info_nce_fp8_forward = functools.partial(info_nce_forward, similarity_dtype=torch.float8_e4m3fn)
info_nce_fp8_backward = functools.partial(info_nce_backward, similarity_dtype=torch.float8_e4m3fn)


def shaped(found: Gradients, *inputs: Tensor | None) -> Gradients:
    pairs = zip(found, (*inputs, None), strict=True)
    return tuple(g if g is None or x is None else g.view(x.shape) for g, x in pairs)


def solve(problem: Problem, *, with_product: bool, with_term: bool) -> Solution:
    """The losses; with the sums that the queries' gradient needs, where one pass can make both."""
    query = problem.query
    fused = with_product and bool(problem.sets) and not problem.symmetric and query.split != (0, 0)
    splits = [_splits(problem, c, fused, fused and with_term) for c in problem.sets]
    own_parts = int(problem.negatives is not None)
    parts = new_parts(query, sum(splits) + own_parts, labelled=False, term=fused and with_term)
    parts.rank = _ranks_of(problem, parts)
    if fused:
        parts.raw = query.x.new_empty((sum(splits), *query.x.shape), dtype=torch.float32)
    column_parts = None
    begin = 0
    for columns, count in zip(problem.sets, splits, strict=True):
        chosen = parts[begin : begin + count]
        begin += count
        if problem.symmetric:
            column_parts = _both_sums(problem, columns, chosen)
        else:
            positive = problem.positive_logit
            sum_exponentials(
                query, columns, problem.temperature, problem.offset, chosen, positive=positive
            )
    own = None
    if own_parts:
        own = own_sums(
            query,
            problem.negatives,
            problem.temperature,
            parts.largest[-1],
            parts.sum[-1],
            problem.own_ids,
            problem.positive_logit,
            None if parts.rank is None else parts.rank[-1],
        )
        if parts.term is not None:
            parts.term[-1].zero_()
    solution = _solved(problem, parts, column_parts, fused, own)
    if parts.rank is not None:
        solution.rank = parts.rank.sum(0)
        if column_parts is not None:
            solution.rank = torch.stack([solution.rank, column_parts.rank.sum(0)])
    return solution


def _ranks_of(problem: Problem, parts: Parts) -> Tensor | None:
    if problem.positive_logit is None:
        return None
    return torch.zeros_like(parts.sum, dtype=torch.int32)


def _splits(problem: Problem, columns: Columns, product: bool, term: bool) -> int:
    """Into how many parts the columns go."""
    query = problem.query
    tile = sums_tile(query, columns, problem.offset, product, term)
    return columns.splits(query, tile, _height(problem, columns, tile))


def _height(problem: Problem, columns: Columns, tile: config.Tile) -> int:
    """How many blocks of rows go together: all, but where they leave sums of columns, no more than those may take."""
    blocks = columns.row_blocks(problem.query, tile.m)
    if not problem.symmetric or columns.problems > 1:
        return blocks
    return max(1, min(blocks, config.COLUMN_PARTS // (2 * len(columns.y))))


def _both_sums(problem: Problem, columns: Columns, parts: Parts) -> Parts:
    """Sums of rows into ``parts``, and those of columns, by blocks of rows or, where these are many, in one part."""
    query = problem.query
    tile = sums_tile(query, columns, problem.offset, False, False)
    common = (query, columns, problem.temperature, problem.offset, parts)
    blocks = columns.row_blocks(query, tile.m)
    height = _height(problem, columns, tile)
    positive = problem.positive_logit
    by_block = new_parts(columns.y, height // columns.problems, labelled=False)
    by_block.rank = _ranks_of(problem, by_block)
    if height == blocks:
        sum_exponentials(*common, column_parts=by_block, positive=positive)
        return by_block
    together = new_parts(columns.y, 1, labelled=False)
    together.rank = _ranks_of(problem, together)
    for first in range(0, blocks, height):
        chosen = by_block[: min(height, blocks - first)]
        block_range = (first, len(chosen.sum))
        sum_exponentials(*common, column_parts=chosen, block_range=block_range, positive=positive)
        fold(chosen, together, columns.kind, first)
        if chosen.rank is not None:
            together.rank += chosen.rank.sum(0)
    return together


def _solved(problem, parts, column_parts, fused, own) -> Solution:
    total = len(problem.query)
    new = problem.positive.new_empty
    lse = new((2, total) if problem.symmetric else (total,))
    factor = new((parts.raw.shape[0], total)) if fused else None
    term = new((total,)) if parts.term is not None else None
    loss, logit, at_positive = (new((total,)) for _ in range(3))
    kept = parts if fused else None
    solution = Solution(loss, lse, logit, at_positive, factor, term, kept, own)
    of_columns = column_parts or Parts()
    launch(
        _losses_kernel,
        (cdiv(total, _BLOCK),),
        positive=problem.positive,
        query_scale=problem.query.for_similarity.scale,
        key_scale=problem.key.for_similarity.scale,
        largest=parts.largest,
        sums=parts.sum,
        terms=parts.term,
        column_largest=of_columns.largest,
        column_sums=of_columns.sum,
        loss=solution.loss,
        lse=lse,
        logit=solution.logit,
        at_positive=solution.at_positive,
        factor=factor,
        term=term,
        self_logit=float(problem.self_logit or 0.0),
        parts=parts.sum.shape[0],
        factor_parts=factor.shape[0] if fused else 0,
        column_parts=0 if of_columns.sum is None else len(of_columns.sum),
        total=total,
        SELF=0 if problem.self_logit is None else problem.self_count,
        DECOUPLED=problem.decoupled,
        BLOCK=_BLOCK,
        **temperature_arguments(problem.temperature),
    )
    return solution


def gradients(
    problem: Problem,
    solution: Solution,
    weight: Tensor | None,
    upstream: float | Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> Gradients:
    """The four gradients of ``upstream * (weight * losses).sum()``, those of rows as (R, D); no weight is 1.

    The temperature's is ``-upstream / t * sum_i weight_i (sum_j softmax_ij z_ij - z_ip)``.
    """
    need_query, need_key, need_negatives, need_temperature = needs
    query, temperature = problem.query, problem.temperature
    half = 0.5 if problem.symmetric else 1.0
    lses = solution.lse.view(-1, len(query))

    def weighted(x: Tensor) -> Tensor:
        return x if weight is None else x * weight

    @functools.cache  # only where a pass needs them
    def of_losses() -> tuple[Tensor, Tensor | None]:
        each = torch.full_like(lses[0], half) if weight is None else weight * half
        return statistics(lses[0], each), statistics(lses[1], each) if problem.symmetric else None

    at_positive = weighted(solution.at_positive)
    want_row = need_query or need_temperature
    fused = solution.parts is not None

    def gradient_of(rows: Rows, pair: Rows | None) -> RowGradients:
        pair_weight = None if pair is None else at_positive
        return RowGradients(rows, temperature, upstream, dtype, pair, pair_weight)

    of_query = gradient_of(query, problem.key) if need_query else None
    products: list[Products] = []  # of the queries
    grad_key = grad_negatives = term = None
    if fused:
        products.append(Products(solution.parts.raw, weighted(solution.factor)))
        term = None if solution.term is None else weighted(solution.term)
        solution.parts = None
    if solution.own is not None and (want_row or need_negatives):
        raw, grad_negatives, own_term = own_gradients(
            query, solution.own, temperature, lses[0], weight, upstream, need_negatives
        )
        products.append(Products(raw))
        term = _sum(term, own_term)
    # Products in fp32 take twice the memory of the inputs in bf16, so those of queries and keys do not wait for each other.
    alone = not products and len(problem.sets) == 1
    if fused or not problem.sets:
        if of_query is not None:
            of_query.finish(*products)
        products.clear()
    for columns in problem.sets:
        is_key = columns.y is problem.key
        want_x = want_row and not fused
        want_y = need_key if is_key else need_negatives
        if not (want_x or want_y):
            continue
        row, column = of_losses()
        found_x, found_y, found_term = both_products(
            Coefficients(query, columns, temperature, row, column if is_key else None),
            want_x=want_x,
            want_y=want_y,
            want_term=want_x and need_temperature,
            of_x=of_query if alone else None,
        )
        term = _sum(term, found_term)
        products += [] if found_x is None else [found_x]
        if want_y and is_key:
            grad_key = gradient_of(problem.key, query).finish(found_y)
        elif want_y:
            grad_negatives = gradient_of(columns.y, None).finish(found_y)
    if of_query is not None and products:
        of_query.finish(*products)
    if need_key and grad_key is None:  # a positive alone
        grad_key = gradient_of(problem.key, query).finish()
    grad_query = None if of_query is None else of_query.out
    grad_temperature = None
    if need_temperature:
        by_row = at_positive * solution.logit
        by_row = by_row if term is None else by_row + term
        if problem.self_logit is not None and not fused:
            constant = problem.self_logit / temperature
            by_row = by_row + weighted(torch.exp(constant - lses).mean(0)) * constant
        grad_temperature = -by_row.sum() * (upstream / temperature)
    return grad_query, grad_key, grad_negatives, grad_temperature


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@triton.jit
def _one_direction(
    largest, sums, positive, at, there, parts, total, constant, DECOUPLED: tl.constexpr
):
    """Loss, log-sum-exp (natural) and missing weight of a row or a column; the positive's logit is to base 2."""
    top, sum_ = merged(largest, sums, at, there, parts, total, constant)
    # Large numbers meet before anything is rounded. An infinite positive makes the loss inf - inf.
    d = ((top - positive) + tl.log2(sum_)) * LN_2 + 0 * tl.maximum(positive, 0.0)
    if DECOUPLED:
        return d, (top + tl.log2(sum_)) * LN_2, tl.where(sum_ == 0, 0.0, 1.0)
    loss = tl.maximum(d, 0.0) + log_1p(tl.exp(-tl.abs(d)))
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
    at_positive,
    factor,
    term,
    self_logit,
    parts,
    factor_parts,
    column_parts,
    total,
    SELF: tl.constexpr,
    DECOUPLED: tl.constexpr,
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
    self_logit *= LOG2_E / temperature
    if SELF:
        constant = tl.zeros((BLOCK,), tl.float32) + self_logit + (SELF - 1)  # log2 of 1 or 2
    row_loss, row_lse, row_missing = _one_direction(
        largest, sums, p, at, there, parts, total, constant, DECOUPLED
    )
    tl.store(lse + at, row_lse, mask=there)
    if column_sums is not None:
        column_loss, column_lse, column_missing = _one_direction(
            column_largest, column_sums, p, at, there, column_parts, total, constant, DECOUPLED
        )
        tl.store(lse + total + at, column_lse, mask=there)
        row_loss = 0.5 * (row_loss + column_loss)
        row_missing = 0.5 * (row_missing + column_missing)
    tl.store(loss + at, row_loss, mask=there)
    tl.store(at_positive + at, -row_missing, mask=there)
    if factor is not None:
        sum_ = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, factor_parts, PARTS):
            where, mask = some_parts(begin, factor_parts, at, there, total)
            each = tl.load(largest + where, mask=mask, other=float("-inf"))
            to_softmax = tl.exp2(each - (row_lse * LOG2_E)[None, :])
            if DECOUPLED:  # of no negative at all, the sums are 0
                to_softmax = tl.where((row_lse == float("-inf"))[None, :], 0.0, to_softmax)
            tl.store(factor + where, to_softmax, mask=mask)
            if term is not None:
                sum_ += tl.sum(to_softmax * tl.load(terms + where, mask=mask, other=0.0), 0)
        if term is not None:
            if SELF:
                sum_ += tl.exp2(constant - row_lse * LOG2_E) * self_logit * LN_2
            tl.store(term + at, sum_, mask=there)
