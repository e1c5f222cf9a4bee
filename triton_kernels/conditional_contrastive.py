"""ContraGAN's 2C loss: the other samples, and a sample's own proxy beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import Columns
from .gradients import RowGradients, relative_weights, statistics
from .labelled import self_products, self_sums
from .launch import cdiv, launch, temperature_arguments
from .parts import merged
from .rows import pack_pairs, pair_logits
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
    pairs = pack_pairs(embeddings, proxies, True)
    rows, packed_proxies, to_proxy = pairs
    columns = Columns(rows, TWO_C.value, labels=labels.contiguous())
    parts = self_sums(columns, temperature, embeddings.dtype)
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
    term = self_products(columns, temperature, of_losses, of_rows, need_temperature)
    grad_proxies = grad_temperature = None
    if need_proxies:
        grad_proxies = RowGradients(proxies, *finish, rows, at_proxy).finish()
    if need_temperature:
        grad_temperature = -(term + (at_proxy * logit).sum()) * (upstream / temperature)
    return None if of_rows is None else of_rows.out, grad_proxies, grad_temperature


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
