"""InfoNCE's negatives that belong to a single query each: matrices times vectors, as fast as memory gives the negatives."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, temperature_arguments
from .rows import Rows, inverse_root, largest_magnitude, power_of_two
from .tiles import LN_2, LOG2_E, left_out_by_ids, to_base_2

_BLOCK_M = 32


@dataclasses.dataclass
class OwnNegatives:
    """Negatives (B, N, M, D), any strides, with what ``own_sums`` finds."""

    values: Tensor
    logits: Tensor  # (R, M) to base 2
    inverse: Tensor  # (R, M): 1 / ||n||
    ids: tuple[Tensor, Tensor] | None = (
        None  # (R,) of the queries and (R, M), see ``left_out_by_ids``
    )


def _arguments(
    query: Rows,
    negatives: Tensor,
    temperature: float | Tensor,
    ids: tuple[Tensor, Tensor] | None,
) -> dict[str, object]:
    """The arguments of both kernels."""
    query_ids, negative_ids = ids or (None, None)
    return {
        "query": query.x,
        "scale": query.scale,
        "negatives": negatives,
        "query_ids": query_ids,
        "negative_ids": negative_ids,
        "queries": negatives.shape[1],
        "count": negatives.shape[2],
        "depth": query.depth,
        "padded": query.padded,
        "strides": negatives.stride(),
        "NORMALIZE": query.normalize,
        "BLOCK_M": _BLOCK_M,
        "BLOCK_D": min(128, max(16, triton.next_power_of_2(query.depth))),
        **temperature_arguments(temperature),
    }


def own_sums(
    query: Rows,
    negatives: Tensor,
    temperature: float | Tensor,
    largest: Tensor,
    total: Tensor,
    ids: tuple[Tensor, Tensor] | None = None,
    positive: Tensor | None = None,
    rank: Tensor | None = None,
) -> OwnNegatives:
    """Fills ``largest`` and ``total`` (R,): ``total 2^largest`` is the sum of the exponentials of each query's negatives.

    And ``rank`` (R,), with how many logits are larger than ``positive`` (R,), to base 2.
    """
    size = (2, len(query), negatives.shape[2])
    logits, inverse = query.x.new_empty(size, dtype=torch.float32)
    launch(
        _own_sums_kernel,
        (len(query),),
        logits=logits,
        inverse=inverse,
        largest=largest,
        total=total,
        positive=positive,
        rank=rank,
        **_arguments(query, negatives, temperature, ids),
    )
    return OwnNegatives(negatives, logits, inverse, ids)


def own_gradients(
    query: Rows,
    own: OwnNegatives,
    temperature: float | Tensor,
    lse: Tensor,
    weight: Tensor | None,
    upstream: float | Tensor,
    need_negatives: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """By (R,) ``lse`` and weights, none for 1: the queries' part (1, R, padded depth), the negatives' gradient, and ``sum_m G_im z_im`` (R,)."""
    raw = query.x.new_empty((1, *query.x.shape), dtype=torch.float32)
    out = own.values.new_empty(own.values.shape) if need_negatives else None
    terms = query.scale.new_empty((len(query),))
    arguments = _arguments(query, own.values, temperature, own.ids)
    launch(
        _own_gradients_kernel,
        (len(query), triton.cdiv(query.padded, arguments["BLOCK_D"])),
        logits=own.logits,
        inverse=own.inverse,
        lse=lse,
        weight=weight,
        upstream=upstream,
        raw=raw,
        out=out,
        terms=terms,
        UPSTREAM_TENSOR=isinstance(upstream, Tensor),
        **arguments,
    )
    return raw, out, terms


@triton.jit
def _left_in(m, i, count, query_ids, negative_ids):
    """Which of a query's negatives count."""
    there = m < count
    if negative_ids is not None:
        ids = tl.load(negative_ids + i * count + m, mask=there, other=0)
        own = tl.load(query_ids + i + tl.arange(0, 1))
        there = there & ~tl.reshape(left_out_by_ids(own, ids, None), there.shape)
    return there


@triton.jit(do_not_specialize=["queries", "count"])
def _own_sums_kernel(
    query,
    scale,
    negatives,
    temperature,
    logits,
    inverse,
    largest,
    total,
    positive,
    rank,
    query_ids,
    negative_ids,
    queries,
    count,
    depth,
    padded,
    strides,
    NORMALIZE: tl.constexpr,
    TENSOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    if TENSOR:
        temperature = tl.load(temperature)
    unit = to_base_2(tl.load(scale + i), temperature)
    negatives += i // queries * strides[0] + i % queries * strides[1]
    top = tl.full((1,), float("-inf"), tl.float32)
    sums = tl.zeros((1,), tl.float32)
    larger = tl.zeros((1,), tl.int32)
    for begin in range(0, count, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        there = _left_in(m, i, count, query_ids, negative_ids)
        rows = negatives + m.to(tl.int64)[:, None] * strides[2]
        power = tl.full((BLOCK_M,), 1.0, tl.float32)
        if NORMALIZE:
            largest_of = largest_magnitude(rows, strides[3], there, depth, BLOCK_M, BLOCK_D)
            power = power_of_two(largest_of)
        dot = tl.zeros((BLOCK_M,), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float64)
        for start in range(0, depth, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = there[:, None] & (d < depth)[None, :]
            at = rows + d.to(tl.int64)[None, :] * strides[3]
            chunk = tl.load(at, mask=mask, other=0.0).to(tl.float32) * power[:, None]
            q = tl.load(query + i * padded + d, mask=d < depth, other=0.0).to(tl.float32)
            dot += tl.sum(chunk * q[None, :], 1)
            wide = chunk.to(tl.float64)
            squares += tl.sum(wide * wide, 1)
        length = tl.full((BLOCK_M,), 1.0, tl.float32)
        if NORMALIZE:
            length = inverse_root(squares)
        z = dot * length * unit
        tl.store(logits + i * count + m, z, mask=there)
        tl.store(inverse + i * count + m, length * power, mask=there)
        new = tl.maximum(top, tl.max(tl.where(there, z, float("-inf")), 0))
        finite = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp2(top - finite) + tl.sum(tl.where(there, tl.exp2(z - finite), 0.0), 0)
        top = new
        if rank is not None:
            larger += tl.sum((there & (z > tl.load(positive + i))).to(tl.int32), 0)
    one = tl.arange(0, 1)
    if rank is not None:
        tl.store(rank + i + one, larger)
    tl.store(largest + i + one, top)
    tl.store(total + i + one, sums)


@triton.jit(do_not_specialize=["queries", "count"])
def _own_gradients_kernel(
    query,
    scale,
    negatives,
    temperature,
    logits,
    inverse,
    lse,
    weight,
    upstream,
    raw,
    out,
    terms,
    query_ids,
    negative_ids,
    queries,
    count,
    depth,
    padded,
    strides,
    NORMALIZE: tl.constexpr,
    TENSOR: tl.constexpr,
    UPSTREAM_TENSOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < depth
    if TENSOR:
        temperature = tl.load(temperature)
    if UPSTREAM_TENSOR:
        upstream = tl.load(upstream)
    q = tl.load(query + i * padded + d, mask=inside, other=0.0).to(tl.float32) * tl.load(scale + i)
    own_lse = tl.load(lse + i) * LOG2_E
    own_weight = 1.0
    if weight is not None:
        own_weight = tl.load(weight + i)
    negatives += i // queries * strides[0] + i % queries * strides[1]
    product = tl.zeros((BLOCK_D,), tl.float32)
    term = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, count, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        there = _left_in(m, i, count, query_ids, negative_ids)
        mask = there[:, None] & inside[None, :]
        at = m.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64)[None, :] * strides[3]
        length = tl.load(inverse + i * count + m, mask=there, other=0.0)
        rows = tl.load(negatives + at, mask=mask, other=0.0).to(tl.float32) * length[:, None]
        z = tl.load(logits + i * count + m, mask=there, other=0.0)
        g = tl.where(there, tl.exp2(z - own_lse), 0.0) * own_weight
        term += tl.where(there, g * z, 0.0)
        product += tl.sum(tl.where(mask, g[:, None] * rows, 0.0), 0)
        if out is not None:
            gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32) + q[None, :]
            if NORMALIZE:
                cosine = z * (LN_2 * temperature)
                gradient = (gradient - rows * cosine[:, None]) * length[:, None]
            gradient *= g[:, None] * (upstream / temperature)
            where = (i * count + m)[:, None] * depth + d[None, :]
            mask = (m < count)[:, None] & inside[None, :]
            tl.store(out + where, gradient.to(out.dtype.element_ty), mask=mask)
    tl.store(raw + i * padded + d, product, mask=d < padded)
    if tl.program_id(1) == 0:
        tl.store(terms + i, tl.sum(term) * LN_2)
