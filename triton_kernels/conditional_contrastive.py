"""ContraGAN's 2C loss: the other samples, and a sample's own proxy beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .gradients import RowGradients
from .info_nce import relative_weights, statistics
from .launch import cdiv, launch, temperature_arguments
from .row_losses import merged
from .rows import pack_pairs, pair_logits
from .self_similarity import self_products, self_sums
from .tiles import LN_2, TWO_C, load_pair_logits

Gradients = tuple[Tensor | None, ...]
_BLOCK = 128


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
    packed = pack_pairs(embeddings, proxies, True)
    columns = Columns(packed[0], TWO_C.value, labels=labels.contiguous())
    parts = self_sums(packed[0], columns, temperature, embeddings.dtype)
    total = len(labels)
    loss = packed[2].new_empty((total,))
    lse = packed[2].new_empty((2, total))
    launch(
        _losses_kernel,
        (cdiv(total, _BLOCK),),
        {"num_warps": 4, "num_stages": 2},
        to_proxy=packed[2],
        row_scale=packed[0].scale,
        proxy_scale=packed[1].scale,
        largest=parts.largest,
        sums=parts.sum,
        same_largest=parts.a,
        same_sums=parts.b,
        loss=loss,
        lse=lse,
        parts=parts.sum.shape[0],
        total=total,
        BLOCK=_BLOCK,
        **temperature_arguments(temperature),
    )
    grads: Gradients = (None,) * 3
    if grad_scale is not None:
        weight = torch.ones_like(loss)
        scale = grad_scale / len(embeddings) if mean else grad_scale
        grads = _gradients(
            packed, columns, temperature, lse, weight, scale, needs, embeddings.dtype
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
    packed = pack_pairs(embeddings, proxies, True)
    columns = Columns(packed[0], TWO_C.value, labels=labels.contiguous())
    weight, upstream = relative_weights(grad_loss)
    return _gradients(packed, columns, temperature, lse, weight, upstream, needs, embeddings.dtype)


def _gradients(packed, columns, temperature, lse, weight, upstream, needs, dtype) -> Gradients:
    rows, proxies, to_proxy = packed
    need_rows, need_proxies, need_temperature = needs
    logit = pair_logits(rows, proxies, to_proxy, temperature)
    at_proxy = weight * (torch.exp(logit - lse[0]) - torch.exp(logit - lse[1]))
    finish = (temperature, upstream, dtype)
    grad_rows = grad_proxies = grad_temperature = None
    if need_rows or need_temperature:
        of_losses = statistics(lse[0], weight, lse[1], -weight)
        of_rows = RowGradients(rows, *finish, proxies, at_proxy) if need_rows else None
        term = self_products(rows, columns, temperature, of_losses, of_rows, need_temperature)
        grad_rows = None if of_rows is None else of_rows.out
    if need_proxies:
        grad_proxies = RowGradients(proxies, *finish, rows, at_proxy).finish()
    if need_temperature:
        grad_temperature = -(term + (at_proxy * logit).sum()) * (upstream / temperature)
    return grad_rows, grad_proxies, grad_temperature


@triton.jit(do_not_specialize=["parts", "total"])
def _losses_kernel(
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
