"""Losses of rows with labels: SupCon, ContraGAN's 2C loss, and the log-sum-exp of one block of a larger matrix.

In the first two, rows are against one another, each but itself. The gradient of a unit row gathers its own loss and those in which it
is a column: ``sum_j (G_ij + G_ji) x^_j / t``. The matrix of similarities is symmetric, so one pass finds both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, tuning
from .columns import Columns
from .gradients import Coefficients, RowGradients, both_products, relative_weights, statistics
from .launch import cdiv, launch, temperature_arguments
from .parts import Parts, fold, merged, new_parts
from .rows import Rows, pack, pack_pairs, pair_logits
from .sums import offset_kind, sum_exponentials, sums_tile
from .tiles import LABELLED, LN_2, SUP_CON, TWO_C, load_pair_logits

Gradients = tuple[Tensor | None, ...]
_BLOCK = 128


# SupCon; NT-Xent is the one with two rows of each label.


def sup_con_forward(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Losses, has_positive and lse, all (N,), and, if ``grad_scale`` is given, the gradients, as in InfoNCE.

    Arguments and results: those of the operator, see ``fastnce/ops/sup_con.py``.
    """
    columns = Columns(pack(features, True), SUP_CON.value, labels=labels.contiguous())
    parts = _self_sums(columns, temperature, features.dtype)
    loss, lse, positives = (parts.sum.new_empty((len(labels),)) for _ in range(3))
    launch(
        _sup_con_kernel,
        (cdiv(len(labels), _BLOCK),),
        largest=parts.largest,
        sums=parts.sum,
        same=parts.a,
        counts=parts.b,
        loss=loss,
        lse=lse,
        positives=positives,
        parts=parts.sum.shape[0],
        total=len(labels),
        BLOCK=_BLOCK,
    )
    has_positive = positives > 0
    grads: Gradients = (None,) * 2
    if grad_scale is not None:
        upstream = grad_scale / has_positive.sum().clamp(min=1) if mean else grad_scale
        weight = torch.ones_like(loss)
        grads = _sup_con_gradients(
            columns, temperature, lse, positives, weight, upstream, needs, features.dtype
        )
    return loss, has_positive, lse, grads


def sup_con_backward(
    grad_loss: Tensor,
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward."""
    columns = Columns(pack(features, True), SUP_CON.value, labels=labels.contiguous())
    weight, upstream = relative_weights(grad_loss)
    ordered = labels.sort().values
    last, first = (
        torch.searchsorted(ordered, columns.labels, right=right) for right in (True, False)
    )
    positives = (last - first - 1).float()
    return _sup_con_gradients(
        columns, temperature, lse, positives, weight, upstream, needs, features.dtype
    )


def _sup_con_gradients(
    columns, temperature, lse, positives, weight, upstream, needs, dtype
) -> Gradients:
    weight = weight * (positives > 0)
    of_losses = statistics(lse, weight, weight / positives.clamp(min=1))
    of_rows = RowGradients(columns.y, temperature, upstream, dtype) if needs[0] else None
    term = _self_products(columns, temperature, of_losses, of_rows, needs[1])
    return (
        None if of_rows is None else of_rows.out,
        -term * (upstream / temperature) if needs[1] else None,
    )


# 2C: the other samples, and a sample's own proxy beside them.


def conditional_contrastive_forward(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """Losses (N,), lse (2, N) = [log den, log num] and, if ``grad_scale`` is given, the gradients, as in InfoNCE.

    Arguments and results: those of the operator, see ``fastnce/ops/conditional_contrastive.py``.
    """
    pairs = pack_pairs(embeddings, proxies, True)
    rows, packed_proxies, to_proxy = pairs
    columns = Columns(rows, TWO_C.value, labels=labels.contiguous())
    parts = _self_sums(columns, temperature, embeddings.dtype)
    loss, lse = to_proxy.new_empty((len(labels),)), to_proxy.new_empty((2, len(labels)))
    launch(
        _two_c_kernel,
        (cdiv(len(labels), _BLOCK),),
        to_proxy=to_proxy,
        row_scale=rows.scale,
        proxy_scale=packed_proxies.scale,
        largest=parts.largest,
        sums=parts.sum,
        same_largest=parts.a,
        same_sums=parts.b,
        loss=loss,
        lse=lse,
        parts=parts.sum.shape[0],
        total=len(labels),
        BLOCK=_BLOCK,
        **temperature_arguments(temperature),
    )
    grads: Gradients = (None,) * 3
    if grad_scale is not None:
        scale = grad_scale / len(embeddings) if mean else grad_scale
        weight = torch.ones_like(loss)
        grads = _two_c_gradients(
            pairs, columns, temperature, lse, weight, scale, needs, embeddings.dtype
        )
    return loss, lse, grads


def conditional_contrastive_backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward."""
    pairs = pack_pairs(embeddings, proxies, True)
    columns = Columns(pairs[0], TWO_C.value, labels=labels.contiguous())
    weight, upstream = relative_weights(grad_loss)
    return _two_c_gradients(
        pairs, columns, temperature, lse, weight, upstream, needs, embeddings.dtype
    )


def _two_c_gradients(pairs, columns, temperature, lse, weight, upstream, needs, dtype) -> Gradients:
    rows, proxies, to_proxy = pairs
    need_rows, need_proxies, need_temperature = needs
    logit = pair_logits(rows, proxies, to_proxy, temperature)
    at_proxy = weight * (torch.exp(logit - lse[0]) - torch.exp(logit - lse[1]))
    finish = (temperature, upstream, dtype)
    of_losses = statistics(lse[0], weight, lse[1], -weight)
    of_rows = RowGradients(rows, *finish, proxies, at_proxy) if need_rows else None
    term = _self_products(columns, temperature, of_losses, of_rows, need_temperature)
    grad_proxies = grad_temperature = None
    if need_proxies:
        grad_proxies = RowGradients(proxies, *finish, rows, at_proxy).finish()
    if need_temperature:
        grad_temperature = -(term + (at_proxy * logit).sum()) * (upstream / temperature)
    return None if of_rows is None else of_rows.out, grad_proxies, grad_temperature


# Rows against themselves.


@tuning.tuned
def _self_sums(columns: Columns, temperature: float | Tensor, dtype: torch.dtype) -> Parts:
    """Sums over all other rows and over those with the same label; ``dtype`` of the inputs."""
    if not config.half_tiles(len(columns.y), columns.y.depth):
        return labelled_sums(columns.y, columns, temperature, dtype)
    return _half_of_the_tiles(columns, temperature, dtype)


@tuning.tuned
def labelled_sums(
    x: Rows, columns: Columns, temperature: float | Tensor, dtype: torch.dtype
) -> Parts:
    """Sums over all columns that count for a row, and over those with its label; ``dtype`` of the inputs."""
    offset = offset_kind(temperature, x.normalize, dtype)
    splits = columns.splits(x, sums_tile(x, columns, offset, False, False))
    parts = new_parts(x, splits, labelled=True)
    sum_exponentials(x, columns, temperature, offset, parts)
    return parts


def _half_of_the_tiles(columns: Columns, temperature, dtype) -> Parts:
    """The sums from the tiles on and above the diagonal: what a tile above it adds to its rows, its mirror image would to its columns.

    N^2 D / 2 multiply-adds and N^2 / 2 exponentials less. For it each block of m rows leaves four numbers in fp32 for every column
    after its own, N^2 / 2m columns in all, which are written and read again: at m = 64 one byte for 2 D multiply-adds saved. On
    a GPU of 650 TFLOP/s and 4.8 TB/s that takes half the time of the products saved at D = 64, a sixteenth at D = 512. No
    number is shared between programs, so that nothing is atomic, and the order of all sums is fixed.
    """
    rows = columns.y
    offset = offset_kind(temperature, rows.normalize, dtype)
    tile = sums_tile(rows, columns, offset, False, False)
    blocks = columns.row_blocks(rows, tile.m)
    height = max(1, min(blocks, config.COLUMN_PARTS // (4 * len(rows))))
    # A block of rows has half the columns on average.
    splits = columns.splits(rows, tile, cdiv(height, 2))
    parts = new_parts(rows, splits + 1, labelled=True)
    by_block = new_parts(rows, height, labelled=True)
    for first in range(0, blocks, height):
        chosen = by_block[: min(height, blocks - first)]
        sum_exponentials(
            rows,
            columns,
            temperature,
            offset,
            parts[:splits],
            column_parts=chosen,
            block_range=(first, len(chosen.sum)),
            half=True,
        )
        fold(chosen, parts[splits:], columns.kind, first, half_block=tile.m)
    return parts


def _self_products(
    columns: Columns,
    temperature: float | Tensor,
    of_losses: Tensor,
    of_rows: RowGradients | None,
    want_term: bool,
) -> Tensor | None:
    """Finishes the rows' gradients with ``sum_j (G_ij + G_ji) x^_j``, and returns the sum of ``G_ij z_ij`` over all pairs.

    All tiles, not half of them. Half would do with 1.5 products of N^2 D instead of 2: the similarities of half the tiles, and of
    each tile one for its rows and one for its columns. But where a block of m rows has been, the sums of all columns after its
    own, N D / 2 numbers in fp32 on average, have been read and written. That is 8 / m bytes for each multiply-add saved, at
    m = 64 eight times what the memory does in that time. Panels of coefficients have a thousand rows, and would gain an eighth at best.
    """
    if of_rows is None and not want_term:
        return None
    _, _, term = both_products(
        Coefficients(columns.y, columns, temperature, of_losses, of_losses),
        want_x=of_rows is not None,
        want_y=False,
        want_term=want_term,
        of_x=of_rows,
    )
    return None if term is None else term.sum()


# One block of a larger matrix, and its part in the gradients.


def labelled_lse_forward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    *,
    own: bool,
) -> Tensor:
    """``[log sum_j exp(s_ij / t), log sum_{j of the label of i} exp(s_ij / t)]``, -inf for an empty sum: (N, 2) float64.

    Arguments and results: ``fastnce.reference.labelled_lse_forward``.
    """
    rows, columns = _block(x, y, x_labels, y_labels, own)
    parts = labelled_sums(rows, columns, temperature, x.dtype)
    # In fp64: the lse of other blocks joins it.
    lses = [
        torch.logsumexp(largest.double() * math.log(2) + sums.double().log(), 0)
        for largest, sums in ((parts.largest, parts.sum), (parts.a, parts.b))
    ]
    return torch.stack(lses, dim=1)


def labelled_lse_backward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    x_state: Tensor,
    y_state: Tensor,
    *,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """This block's part in the gradient of ``x``, as rows and as columns, and of the temperature, as rows alone.

    Arguments and results: ``fastnce.reference.labelled_lse_backward``.
    """
    rows, columns = _block(x, y, x_labels, y_labels, own)
    weights = torch.cat([x_state[:, 2:], y_state[:, 2:]])
    top = weights.abs().amax().float()
    top = torch.where((top > 0) & top.isfinite(), top, 1.0)  # fp16 holds weights of at most 1
    of_x = RowGradients(rows, temperature, top, torch.float32)

    def of_losses(state: Tensor) -> Tensor:
        all_lse, same_lse, all_weight, same_weight = state.unbind(1)
        return statistics(all_lse, all_weight / top, same_lse, same_weight / top).float()

    by_losses = Coefficients(rows, columns, temperature, of_losses(x_state), of_losses(y_state))
    _, _, term = both_products(by_losses, want_x=True, want_y=False, want_term=True, of_x=of_x)
    return of_x.out, -term.sum(dtype=torch.float64) * top / temperature


def _block(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, own: bool
) -> tuple[Rows, Columns]:
    kind = TWO_C if own else LABELLED
    labels = y_labels.contiguous()
    columns = Columns(pack(y, True), kind.value, labels=labels, x_labels=x_labels.contiguous())
    return pack(x, True), columns


@triton.jit(do_not_specialize=["parts", "total"])
def _sup_con_kernel(
    largest,
    sums,
    same,
    counts,
    loss,
    lse,
    positives,
    parts,
    total,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    none = tl.full((BLOCK,), float("-inf"), tl.float32)
    top, sum_ = merged(largest, sums, at, there, parts, total, none)
    number = tl.zeros((BLOCK,), tl.float32)
    logits = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        first = tl.cast(part, tl.int64) * total
        logits += tl.load(same + first + at, mask=there, other=0.0)
        number += tl.load(counts + first + at, mask=there, other=0.0)
    log_sum = tl.where(sum_ == 0, 0.0, (top + tl.log2(sum_)) * LN_2)  # 0 for a single row
    own = log_sum - logits / tl.maximum(number, 1.0)
    tl.store(loss + at, tl.where(number > 0, own, 0.0), mask=there)
    tl.store(lse + at, log_sum, mask=there)
    tl.store(positives + at, number, mask=there)


@triton.jit(do_not_specialize=["parts", "total"])
def _two_c_kernel(
    to_proxy,
    row_scale,
    proxy_scale,
    largest,
    sums,
    same_largest,
    same_sums,
    temperature,
    loss,
    lse,
    parts,
    total,
    TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    if TENSOR:
        temperature = tl.load(temperature)
    proxy = load_pair_logits(to_proxy, row_scale, proxy_scale, at, there, temperature)
    top, sum_ = merged(largest, sums, at, there, parts, total, proxy)
    same_top, same_sum = merged(same_largest, same_sums, at, there, parts, total, proxy)
    log_den = (top + tl.log2(sum_)) * LN_2
    log_num = (same_top + tl.log2(same_sum)) * LN_2
    tl.store(loss + at, log_den - log_num, mask=there)
    tl.store(lse + at, log_den, mask=there)
    tl.store(lse + total + at, log_num, mask=there)
