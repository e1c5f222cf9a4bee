"""The pairs of rows of one label, against what is known of the others: several positives that are not one another's negatives.

The pairs are in PyTorch's own operators on every backend, ``fastnce.blocks``: of rows sorted by label they are a narrow part of
the matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import over_temperature
from fastnce.registry import Op, Operator, declare


def plain(
    query: Tensor,
    key: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    others: Tensor,
    temperature: float | Tensor,
    *,
    each: bool,
) -> tuple[Tensor, Tensor]:
    """``sum_{p in P_i} log(1 + exp(o_i - z_ip))`` or ``log(1 + exp(o_i - log sum_{p in P_i} exp z_ip))``, with z = dot product / t.

    Args:
        query: (N, D) in the dtype of the sums.
        key: (M, D).
        query_labels: (N,) int64.
        key_labels: (M,) int64; ``P_i`` are the keys that have the label of i, and another id.
        query_ids: (N,) int64, or None.
        key_ids: (M,) int64, or None.
        others: (N,), o: the log of the sum of the exponentials of the query's negatives.
        temperature: t, a float or a 0-d tensor.
        each: the former, one term for each positive.

    Returns:
        (N,), 0 where ``P_i`` is empty, and the number of positives, (N,) int64.
    """
    z = over_temperature(query @ key.T, temperature)
    positive = query_labels[:, None] == key_labels
    if query_ids is not None:
        positive = positive & (query_ids[:, None] != key_ids)
    counts = positive.sum(dim=1)
    if each:
        return -F.logsigmoid(z - others[:, None]).masked_fill(~positive, 0).sum(dim=1), counts
    none = counts == 0
    # Of no logits at all, autograd's gradient would be NaN.
    found = z.masked_fill(~positive & ~none[:, None], -torch.inf).logsumexp(dim=1)
    return -F.logsigmoid(found - others).masked_fill(none, 0), counts


def positive_pairs(
    query: Tensor,
    key: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    others: Tensor,
    temperature: float | Tensor,
    *,
    each: bool,
    matrix: bool,
) -> tuple[Tensor, Tensor]:
    """``plain``, or with no ``matrix`` the same in O((N + M) D) memory."""
    labels_and_ids = (query_labels, key_labels, query_ids, key_ids)
    if matrix:
        return plain(query, key, *labels_and_ids, others, temperature, each=each)
    _checks.expect_fusable("positive_pairs", query)
    tensors = _common.distinct((query, key, others, *labels_and_ids))
    return PositivePairs.apply(each, temperature, *tensors)


class PositivePairs(torch.autograd.Function):
    """Autograd of the blocks, which are made again in the backward."""

    @staticmethod
    def forward(
        ctx,
        each: bool,
        temperature: float | Tensor,
        query: Tensor,
        key: Tensor,
        others: Tensor,
        *labels_and_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        losses, counts, lse = backends.blocks.positive_pairs_forward(
            query, key, *labels_and_ids, others, temperature, each=each
        )
        ctx.mark_non_differentiable(counts)
        ctx.each, ctx.temperature = each, None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(query, key, others, lse, saved, *labels_and_ids)
        return losses, counts

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor, _: Tensor):
        query, key, others, lse, temperature, *labels_and_ids = saved
        temperature = ctx.temperature if temperature is None else temperature
        of_temperature, *needs = ctx.needs_input_grad[1:5]
        *of_rows, of_temperature = backends.blocks.positive_pairs_backward(
            grad,
            query,
            key,
            *labels_and_ids,
            others,
            temperature,
            lse,
            each=ctx.each,
            needs=(*needs, of_temperature),
        )
        return None, of_temperature, *of_rows, *(None,) * 4


def _results(query: Tensor, each: bool, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:1]
    lse = query.new_empty((0,) if each else rows)
    return query.new_empty(rows), query.new_empty(rows, dtype=torch.int64), lse


_INPUTS = (
    "Tensor query, Tensor key, Tensor query_labels, Tensor key_labels, Tensor? query_ids, Tensor? key_ids, Tensor others, "
    "Tensor? temperature_tensor, float temperature"
)

declare(
    # lse (N,): the log of the sum over the positives, -inf where there is none; (0,) with each.
    Op("positive_pairs", is_loss=False),
    Operator(
        f"positive_pairs_forward({_INPUTS}, bool each) -> (Tensor losses, Tensor counts, Tensor lse)",
        _results,
    ),
    Operator(
        f"positive_pairs_backward(Tensor grad_loss, {_INPUTS}, Tensor lse, bool each, bool need_query, bool need_key, "
        "bool need_others, bool need_temperature) -> "
        "(Tensor grad_query, Tensor grad_key, Tensor grad_others, Tensor grad_temperature)"
    ),
    positive_pairs=plain,
)
