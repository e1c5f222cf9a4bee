"""InfoNCE with pairs left out, weights, the decoupled form and ranks: the kernels of ``info_nce`` with masked columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnce.ops.masked_info_nce import Masks, left_in
from fastnce.registry import LEFT_OUT

from .gradients import relative_weights
from .info_nce import Gradients, Problem, Solution, gradients, own_again, problem_of, shaped, solve
from .launch import cdiv, launch, temperature_arguments
from .tiles import IN_BATCH, LN_2, MASKED, MASKED_IN_BATCH, load_pair_logits

_BLOCK = 128
_GUIDED_DEPTH = 32


def masked_info_nce_forward(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    negative_ids: Tensor | None,
    guide_query: Tensor | None,
    guide_key: Tensor | None,
    guide_negatives: Tensor | None,
    weights: Tensor | None,
    temperature: float | Tensor,
    *,
    rank: bool,
    needs: Sequence[bool],
    **options: bool,
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Arguments and results: those of the operator, see ``fastnce/ops/masked_info_nce.py``."""
    masks = Masks(query_ids, key_ids, negative_ids, guide_query, guide_key, guide_negatives)
    problem = _problem(query, key, negatives, masks, temperature, **options)
    if rank:
        problem.positive_logit = _positive_logits(problem)
    now = weights is not None and any(needs)
    solution = solve(
        problem, with_product=now and (needs[0] or needs[3]), with_term=now and needs[3]
    )
    shape = query.shape[:2]
    ranks = query.new_empty((0,), dtype=torch.int64)
    if rank:
        ranks = solution.rank.long().view(*solution.rank.shape[:-1], *shape)
    # Before the gradients, which may change it.
    loss, lse = solution.loss.view(shape), solution.lse.view(*solution.lse.shape[:-1], *shape)
    grads: Gradients = (None,) * 4
    if now:
        grads = _gradients(problem, solution, weights, needs, query, key, negatives)
    return loss, lse, ranks, grads


def masked_info_nce_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    negative_ids: Tensor | None,
    guide_query: Tensor | None,
    guide_key: Tensor | None,
    guide_negatives: Tensor | None,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
    **options: bool,
) -> Gradients:
    """Arguments and results: those of the operator; ``grad_loss`` (B, N), any strides."""
    masks = Masks(query_ids, key_ids, negative_ids, guide_query, guide_key, guide_negatives)
    problem = _problem(query, key, negatives, masks, temperature, **options)
    lse = lse.reshape(2, -1) if problem.symmetric else lse.reshape(-1)
    # Rounded as in the forward: of a positive alone, the gradient is exactly 0.
    logit = _positive_logits(problem) * LN_2.value
    if problem.decoupled:
        at_positive = (lse != -torch.inf).to(lse.dtype).neg()
    else:
        at_positive = torch.expm1(logit - lse)
    at_positive = at_positive.mean(0) if problem.symmetric else at_positive
    solution = Solution(logit, lse, logit, at_positive, own=own_again(problem))
    return _gradients(problem, solution, grad_loss, needs, query, key, negatives)


def _problem(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    masks: Masks,
    temperature: float | Tensor,
    *,
    decoupled: bool,
    **options: bool,
) -> Problem:
    negatives = left_in(negatives, masks.negative_ids)
    problem = problem_of(query, key, negatives, temperature, self_logit=None, **options)
    problem.decoupled = decoupled
    if masks.guide_query is not None and query.shape[2] > _GUIDED_DEPTH:
        # The guide's products leave too few registers for those of whole rows.
        problem.query, problem.key = (
            dataclasses.replace(x, deep=True) for x in (problem.query, problem.key)
        )
        for columns in problem.sets:
            in_batch = columns.kind == IN_BATCH.value
            columns.y = problem.key if in_batch else dataclasses.replace(columns.y, deep=True)
    of_query = ids_of(query, masks.query_ids)
    for columns in problem.sets:
        in_batch = columns.y is problem.key
        ids = masks.key_ids if in_batch else masks.negative_ids
        guide = masks.guide_key if in_batch else masks.guide_negatives
        if ids is not None:
            columns.ids = of_query, ids_of(query, ids)
        if guide is not None:
            columns.guide = _transposed(masks.guide_query), _transposed(guide)
        if ids is not None or guide is not None:
            columns.kind = (MASKED_IN_BATCH if in_batch else MASKED).value
    if problem.negatives is not None and masks.negative_ids is not None:
        problem.own_ids = of_query, masks.negative_ids.contiguous()
    return problem


def ids_of(query: Tensor, ids: Tensor | None) -> Tensor:
    """(R,) of rows (..., D), one that no key has where there are none."""
    if ids is None:
        return query.new_full((query.shape[:-1].numel(),), LEFT_OUT + 2, dtype=torch.int64)
    return ids.reshape(-1).contiguous()


def _transposed(guide: Tensor) -> Tensor:
    """(G, R) of rows (..., G)."""
    return guide.reshape(-1, guide.shape[-1]).float().T.contiguous()


def _gradients(
    problem: Problem,
    solution: Solution,
    weights: Tensor,
    needs: Sequence[bool],
    *inputs: Tensor | None,
) -> Gradients:
    """Of ``(weights * losses).sum()``."""
    weight, upstream = relative_weights(weights)
    if problem.decoupled:
        # Losses of empty sums have no gradient, and next to 0 the exponentials of these sums are 0.
        empty = solution.lse == -torch.inf
        weight = weight.masked_fill(empty.view(-1, len(weight)).any(0), 0)
        solution.lse = solution.lse.masked_fill(empty, 0)
    found = gradients(problem, solution, weight, upstream, needs, inputs[0].dtype)
    return shaped(found, *inputs)


def _positive_logits(problem: Problem) -> Tensor:
    """(R,) to base 2, rounded as those of tiles are."""
    out = torch.empty_like(problem.positive)
    launch(
        _positive_logits_kernel,
        (cdiv(len(out), _BLOCK),),
        products=problem.positive,
        x_scale=problem.query.scale,
        y_scale=problem.key.scale,
        out=out,
        total=len(out),
        BLOCK=_BLOCK,
        **temperature_arguments(problem.temperature),
    )
    return out


@triton.jit(do_not_specialize=["total"])
def _positive_logits_kernel(
    products, x_scale, y_scale, temperature, out, total, TENSOR: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    if TENSOR:
        temperature = tl.load(temperature)
    logits = load_pair_logits(products, x_scale, y_scale, at, there, temperature)
    tl.store(out + at, logits, mask=there)
