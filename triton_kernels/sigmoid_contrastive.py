"""The sigmoid loss of pairs: every pair by itself, so that loss and gradients wait for no sum of a row.

One pass over the tiles makes the rows' losses, the sums that the gradients of scale and bias need, and, where rows are resident, the
product of the queries' gradient: 2 products of N M D. The keys' gradient makes the similarities anew: 2 more, 4 of 3 mandatory ones.
Nothing of size N M reaches memory. Deeper rows go through panels, as in ``gradients``: 4 products as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import Columns
from .gradients import (
    Coefficients,
    Products,
    RowGradients,
    both_products,
    relative_weights,
    row_sums,
    statistics,
)
from .masked_info_nce import ids_of
from .rows import Rows, pack
from .tiles import SIGMOID, SIGMOID_PAIRED

Gradients = tuple[Tensor | None, ...]


def sigmoid_contrastive_forward(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    paired: bool,
    normalize: bool,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
) -> tuple[Tensor, Gradients]:
    """Arguments and results: those of the operator, see ``fastnce/ops/sigmoid_contrastive.py``."""
    rows, columns = _problem(query, key, labels, (query_ids, key_ids), paired, normalize)
    if grad_scale is None or not any(needs):
        pairs = Coefficients(rows, columns, temperature, bias=bias)
        return row_sums(pairs, product=False, term=False, losses=True).losses, (None,) * 4
    scale = grad_scale / len(query) if mean else grad_scale
    return _run(rows, columns, temperature, bias, None, scale, needs, query.dtype)


def sigmoid_contrastive_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    paired: bool,
    normalize: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Arguments and results: those of the operator; ``grad_loss`` (N,), any strides."""
    rows, columns = _problem(query, key, labels, (query_ids, key_ids), paired, normalize)
    weight, upstream = relative_weights(grad_loss)
    return _run(rows, columns, temperature, bias, weight, upstream, needs, query.dtype)[1]


def _problem(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    paired: bool,
    normalize: bool,
) -> tuple[Rows, Columns]:
    kind = SIGMOID_PAIRED if paired else SIGMOID
    columns = Columns(pack(key, normalize), kind.value)
    if len(labels) > 0:
        of_query, of_key = labels.split([len(query), len(key)])
        columns.labels, columns.x_labels = of_key.contiguous(), of_query.contiguous()
    if ids[1] is not None:
        columns.ids = ids_of(query, ids[0]), ids[1].contiguous()
    return pack(query, normalize), columns


def _run(
    query: Rows,
    columns: Columns,
    temperature: float | Tensor,
    bias: Tensor,
    weight: Tensor | None,
    upstream: float | Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Gradients]:
    """Losses, and the gradients of ``upstream * (weight * losses).sum()``; no weight is 1."""
    need_query, need_key, need_bias, need_temperature = needs
    resident = query.split != (0, 0)
    pairs = Coefficients(query, columns, temperature, bias=bias)
    products, of_logit, losses, of_bias = row_sums(
        pairs, product=need_query and resident, term=need_bias or need_temperature, losses=True
    )
    each = torch.ones_like(losses) if weight is None else weight
    of_query, of_key = (
        RowGradients(x, temperature, upstream, dtype) if needed else None
        for x, needed in ((query, need_query), (columns.y, need_key))
    )
    if products is not None:
        raw = products.raw
        of_query.finish(Products(raw, each.expand(len(raw), -1).contiguous()))
    want_x = need_query and not resident
    if want_x or need_key:
        pairs.x_statistics = statistics(each, each)
        _, found, _ = both_products(pairs, want_x=want_x, want_y=need_key, of_x=of_query)
        if need_key:
            of_key.finish(found)
    return losses, (
        None if of_query is None else of_query.out,
        None if of_key is None else of_key.out,
        (each * of_bias).sum().mul(upstream).to(bias.dtype) if need_bias else None,
        -(each * of_logit).sum() * (upstream / temperature) if need_temperature else None,
    )
