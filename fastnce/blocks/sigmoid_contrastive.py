"""The sigmoid loss in blocks: a row's loss is a sum over pairs that wait for nothing, so that loss and gradients are three products.

With x the logit of a negative, or minus that of a positive, a pair's loss is softplus(x), and the gradient of x is sigmoid(x).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.blocks.tiles import (
    HALF_SCALE,
    Buffer,
    Rows,
    Similarities,
    blocks,
    narrowed,
    number,
    power_above,
    product,
)
from fastnce.registry import LEFT_OUT

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
    ids = query_ids, key_ids
    problem = _Problem(query, key, bias, labels, ids, temperature, paired, normalize)
    if mean and grad_scale is not None:
        grad_scale /= len(query)
    return problem.run(grad_scale, needs)


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
    ids = query_ids, key_ids
    problem = _Problem(query, key, bias, labels, ids, temperature, paired, normalize)
    return problem.run(grad_loss.to(bias.dtype).unsqueeze(1), needs)[1]


class _Problem:
    """The operators' arguments."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor,
        labels: Tensor,
        ids: tuple[Tensor | None, Tensor | None],
        temperature: float | Tensor,
        paired: bool,
        normalize: bool,
    ) -> None:
        self.query, self.key, self.bias = Rows(query, normalize), Rows(key, normalize), bias
        self.labels, self.ids, self.paired = labels, ids, paired
        self.tau = number(temperature)

    def run(
        self, weights: float | Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor, Gradients]:
        """Losses (N,), and the gradients of ``sum(weights * losses)``, unless the weights are None.

        Args:
            weights: one for all, or (N, 1).
            needs: of query, key, bias and temperature.
        """
        query, key = self.query.units, self.key.units
        similarities, buffer = Similarities(self.query, self.tau), Buffer(query)
        losses, gradients = query.new_empty(len(query)), weights is not None
        of_query = torch.empty_like(query) if gradients and (needs[0] or needs[3]) else None
        of_key = torch.zeros_like(key) if gradients and needs[1] else None
        of_bias = torch.zeros_like(self.bias) if gradients and needs[2] else None
        narrow, common = self.query.inverse is not None, weights
        if isinstance(weights, Tensor):
            common = power_above(weights) if narrow else 1.0
            weights = weights / common
        for _, at in blocks(1, len(query), len(key), query):
            part = similarities((slice(None), at), self.key, buffer)[0].add_(self.bias)  # (n, M)
            signs = self._turn(part, at)
            if self.ids[1] is not None:
                self._leave_out(part, at, signs)
            losses[at] = F.logsigmoid(part.neg()).sum(dim=1).neg_()
            if weights is None:
                continue
            self._turn(part.sigmoid_(), at, signs)
            if isinstance(weights, Tensor):
                part.mul_(weights[at])
            if of_bias is not None:
                of_bias += part.sum()
            if narrow:
                part = narrowed(part, None, self.key.like)
            if of_query is not None:
                product(part[None], self.key.factors, of_query[None, at])
            if of_key is not None:
                product(part.mT[None], self.query.factors[at], of_key[None], keep=1)
        if not gradients:
            return losses, (None,) * 4
        if of_bias is not None:
            of_bias *= common
        factor = common / self.tau / (HALF_SCALE if narrow else 1)
        of_query, of_key = (None if x is None else x.mul_(factor) for x in (of_query, of_key))
        of_temperature = -(query * of_query).sum() / self.tau if needs[3] else None
        of_query = self.query.gradient(of_query) if needs[0] else None
        of_key = self.key.gradient(of_key) if needs[1] else None
        return losses, (of_query, of_key, of_bias, of_temperature)

    def _turn(self, part: Tensor, at: slice, signs: Tensor | None = None) -> Tensor | None:
        """Changes the sign of the positives in rows ``at``; with labels, returns the signs, which may be given the next time."""
        rows = len(self.query.units)
        if len(self.labels) > 0:
            if signs is None:
                same = self.labels[:rows][at, None] == self.labels[rows:]
                signs = same.to(part.dtype).mul_(-2).add_(1)
            part.mul_(signs)
        elif self.paired:
            part.diagonal(at.start).neg_()
        return signs

    def _leave_out(self, part: Tensor, at: slice, signs: Tensor | None) -> None:
        """Makes -inf, of which loss and gradient are 0, what has been turned."""
        query_ids, key_ids = self.ids
        part.masked_fill_(key_ids == LEFT_OUT, -torch.inf)
        if query_ids is None:
            return
        same = query_ids[at, None] == key_ids
        if signs is not None:
            same &= signs > 0
        elif self.paired:
            same.diagonal(at.start).fill_(False)
        part.masked_fill_(same, -torch.inf)
