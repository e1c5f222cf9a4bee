"""From the products to the gradients of single rows, through their normalisation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, temperature_arguments
from .rows import Rows

_OPTIONS = {"num_warps": 4, "num_stages": 2}


def row_gradients(
    rows: Rows,
    raw: Tensor | None,
    factor: Tensor | None,
    pair: Rows | None,
    pair_weight: Tensor | None,
    temperature: float | Tensor,
    upstream: float | Tensor,
    out: Tensor,
) -> None:
    """Fills ``out`` (R, depth) with the gradient of the inputs behind ``rows``.

    With respect to the unit row it is ``g = (sum_p factor_p raw_p + pair_weight pair^) upstream / t``; through the normalisation
    ``(g - x^ (x^ . g)) / ||x||``.

    Args:
        rows: the rows themselves.
        raw: (P, R, padded depth) fp32, products by parts of the columns; None for no such part.
        factor: (P, R) fp32, or None for ones.
        pair: rows of which each takes part alone, or None.
        pair_weight: (R,) fp32.
        temperature: t.
        upstream: a factor of everything, a float or a 0-d tensor.
        out: the result.
    """
    total, depth = len(rows), rows.depth
    block_d = min(128, triton.next_power_of_2(rows.padded))
    block = max(1, 1024 // block_d)
    launch(
        _row_gradients_kernel,
        (cdiv(total, block),),
        _OPTIONS,
        x=rows.x,
        x_scale=rows.scale,
        inverse=rows.inverse,
        raw=raw,
        factor=factor,
        pair=None if pair is None else pair.x,
        pair_scale=None if pair is None else pair.scale,
        pair_weight=pair_weight,
        upstream=upstream,
        out=out,
        parts=0 if raw is None else raw.shape[0],
        total=total,
        depth=depth,
        padded=rows.padded,
        NORMALIZE=rows.normalize,
        UPSTREAM_TENSOR=isinstance(upstream, Tensor),
        BLOCK=block,
        BLOCK_D=block_d,
        **temperature_arguments(temperature),
    )


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
