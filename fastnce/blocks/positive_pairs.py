"""Pairs of rows of one label: blocks of queries in the order of their labels, each against the span of the keys that have these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.blocks.tiles import long_sums, number

# Of a block of logits. Where labels have few rows, a larger one is mostly pairs of others.
QUERIES, KEYS = 128, 2048


class _Pairs:
    """Rows in the order of their labels, and the blocks in which all pairs of one label are."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        query_labels: Tensor,
        key_labels: Tensor,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        temperature: float | Tensor,
    ) -> None:
        self.query_labels, self.query_order = query_labels.sort()
        self.key_labels, self.key_order = key_labels.sort()
        self.query, self.key = query[self.query_order], key[self.key_order]
        self.query_ids = None if query_ids is None else query_ids[self.query_order]
        self.key_ids = None if key_ids is None else key_ids[self.key_order]
        self.tau = number(temperature)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Queries, keys, logits and whether they are a pair."""
        rows = len(self.query)
        starts = list(range(0, rows, QUERIES))
        ends = [min(start + QUERIES, rows) for start in starts]
        first = torch.searchsorted(self.key_labels, self.query_labels[::QUERIES].contiguous())
        of_last = self.query_labels[torch.tensor(ends, device=self.query.device) - 1]
        last = torch.searchsorted(self.key_labels, of_last, right=True)
        # On a GPU the host waits for these numbers.
        spans = torch.stack([first, last], dim=1).tolist()
        for start, end, (begin, stop) in zip(starts, ends, spans, strict=True):
            for left in range(begin, stop, KEYS):
                at = slice(start, end), slice(left, min(left + KEYS, stop))
                yield *at, *self._block(*at)

    def _block(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        z = (self.query[rows] @ self.key[columns].T).div_(self.tau)
        positive = self.query_labels[rows, None] == self.key_labels[columns]
        if self.query_ids is not None:
            positive &= self.query_ids[rows, None] != self.key_ids[columns]
        return z, positive


def positive_pairs_forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = _Pairs(query, key, query_labels, key_labels, query_ids, key_ids, temperature)
    others = others[pairs.query_order]
    losses, counts = torch.zeros_like(others), torch.zeros_like(query_labels)
    lse = torch.full_like(others, -torch.inf)
    for rows, _, z, positive in pairs:
        counts[rows] += positive.sum(dim=1)
        if each:
            of_pairs = F.logsigmoid(z.sub_(others[rows, None])).masked_fill_(~positive, 0)
            losses[rows] -= of_pairs.sum(dim=1)
        else:
            found = z.masked_fill_(~positive, -torch.inf).logsumexp(dim=1)
            lse[rows] = torch.logaddexp(lse[rows], found)
    if not each:
        losses = -F.logsigmoid(lse - others).masked_fill(counts == 0, 0)
    found = [torch.empty_like(x) for x in (losses, counts, lse)]
    for x, in_order in zip(found, (losses, counts, lse), strict=True):
        x[pairs.query_order] = in_order
    losses, counts, lse = found
    return losses, counts, lse.new_empty(0) if each else lse


def positive_pairs_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    query_labels: Tensor,
    key_labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    others: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    each: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    pairs = _Pairs(query, key, query_labels, key_labels, query_ids, key_ids, temperature)
    order = pairs.query_order
    grad, others = grad_loss[order], others[order]
    if not each:
        # Of -inf, which is the sum of nothing, the difference to -inf would be NaN.
        lse = lse[order].clamp(min=torch.finfo(lse.dtype).min)
        grad = grad * torch.sigmoid(others - lse)
    of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
    of_others = torch.zeros_like(others)
    moment = query.new_zeros((), dtype=long_sums(query))
    for rows, columns, z, positive in pairs:
        if each:
            part = torch.sigmoid(others[rows, None] - z)
        else:
            part = torch.exp(z - lse[rows, None])
        part.masked_fill_(~positive, 0).mul_(grad[rows, None])
        of_others[rows] += part.sum(dim=1)
        of_query[rows].addmm_(part, pairs.key[columns], alpha=-1)
        of_key[columns].addmm_(part.T, pairs.query[rows], alpha=-1)
        moment += (part * z).sum(dtype=moment.dtype)
    found = [torch.empty_like(x) for x in (query, key, others)]
    orders, sums = (order, pairs.key_order, order), (of_query, of_key, of_others)
    for x, places, in_order in zip(found, orders, sums, strict=True):
        x[places] = in_order
    for x in found[:2]:
        x.div_(pairs.tau)
    found.append((moment / pairs.tau).to(query.dtype))
    return tuple(x if need else None for x, need in zip(found, needs, strict=True))
