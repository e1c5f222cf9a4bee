"""InfoNCE with pairs left out, in blocks: of a block of logits, those of such pairs become -inf, whose exponentials are 0."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from fastnce.blocks.info_nce import At, Gradients, Problem, _Own, _Shared, _Sums
from fastnce.blocks.tiles import Buffer, Rows, Similarities, product
from fastnce.registry import LEFT_OUT


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
    ids = (query_ids, key_ids, negative_ids)
    guide = (guide_query, guide_key, guide_negatives)
    problem = _Masked(query, key, negatives, ids, guide, temperature, rank=rank, **options)
    losses, lse, grads = problem.run(weights, needs)
    return losses, lse, problem.ranks, grads


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
    ids = (query_ids, key_ids, negative_ids)
    guide = (guide_query, guide_key, guide_negatives)
    problem = _Masked(query, key, negatives, ids, guide, temperature, rank=False, **options)
    return problem.run(grad_loss.to(lse.dtype), needs, lse)[2]


Side = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Keys(_Shared):
    """The keys in batch. What is in those that are ``out`` (B, N, 1), such as NaN, reaches the gradient of their own query alone."""

    def __init__(self, similarities: Similarities, rows: Rows, out: Tensor) -> None:
        super().__init__(similarities, rows)
        self.factors = copy.copy(rows)
        self.factors.units = rows.units.masked_fill(out, 0)
        self.factors.factors = rows.factors.masked_fill(out, 0)
        self._out = rows.units.masked_fill(~out, 0)

    def times(self, part: Tensor, at: At, out: Tensor, keep: bool, scale: float) -> None:
        super().times(part, at, out, keep, scale)
        own = torch.diagonal(part, at[1].start, -2, -1).unsqueeze(-1).to(out.dtype)
        out.addcmul_(own, self._out[at], value=scale)


class _Masked(Problem):
    """The operators' arguments.

    Attributes:
        ranks: the third result.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        ids: Side,
        guide: Side,
        temperature: float | Tensor,
        *,
        normalize: bool,
        symmetric: bool,
        in_batch: bool,
        decoupled: bool,
        rank: bool,
    ) -> None:
        rows = (Rows(x, normalize) for x in (query, key))
        super().__init__(
            *rows, negatives, temperature, in_batch=in_batch, self_logit=None, symmetric=symmetric
        )
        self.decoupled, self._rank = decoupled, rank
        self._of_query = ids[0], guide[0]
        # Of each of the columns: ids (1 or B, 1 or N, M) and the guide's rows (1 or B, M, G).
        self._of_columns = [(_ids(ids[1]), guide[1]) if in_batch else (None, None)]
        if negatives is not None:
            shared = None if guide[2] is None else guide[2].unsqueeze(0)
            self._of_columns.append((_ids(ids[2]), shared))
        self._masks = any(x is not None for both in self._of_columns for x in both)
        shape = (2, *query.shape[:2]) if symmetric else tuple(query.shape[:2])
        self.ranks = query.new_zeros(shape if rank else (0,), dtype=torch.int64)
        self._guide_buffer = Buffer(query if guide[0] is None else guide[0])
        self._positives: Tensor | None = None
        if rank and symmetric:  # of later blocks, too
            own = _Own(self.similarities, key, lambda at: self.key[(*at, None)])
            self._positives = own.logits((slice(None), slice(None))).squeeze(-1)

    @functools.cached_property
    def columns(self) -> list[_Shared | _Own]:
        found, ids = super().columns, self._of_columns[0][0]
        if ids is not None:
            found[0] = _Keys(self.similarities, self.key, (ids == LEFT_OUT).mT)
        return found

    def negatives_at(self, at: At | EllipsisType) -> Tensor:
        found, ids = super().negatives_at(at), self._of_columns[-1][0]
        if ids is None:
            return found
        ids = _of(ids, at) if self.own else ids.view(-1)
        return found.masked_fill((ids == LEFT_OUT).unsqueeze(-1), 0)

    def logits(self, at: At) -> list[Tensor]:
        parts = super().logits(at)
        if self._masks:
            kept = self.positive(parts[0], at).clone()
            for part, (ids, guide) in zip(parts, self._of_columns, strict=True):
                self._leave_out(part, at, ids, guide)
            self.positive(parts[0], at).copy_(kept)
        return parts

    def _leave_out(self, part: Tensor, at: At, ids: Tensor | None, guide: Tensor | None) -> None:
        query_ids, of_query = self._of_query
        if ids is not None:
            ids = _of(ids, at)
            part.masked_fill_(ids == LEFT_OUT, -torch.inf)
            if query_ids is not None:
                part.masked_fill_(ids == query_ids[at].unsqueeze(-1), -torch.inf)
        if guide is not None:
            guide = guide if len(guide) == 1 else guide[at[0]]
            found = product(of_query[at], guide.mT, self._guide_buffer(*part.shape))
            part.masked_fill_(found > 0, -torch.inf)

    def count(self, parts: list[Tensor], positive: Tensor, at: At) -> None:
        if not self._rank:
            return
        of_rows = self.ranks[0] if self.symmetric else self.ranks
        for part in parts:
            of_rows[at] += (part > positive.unsqueeze(-1)).sum(dim=-1)
        if self._positives is not None:
            larger = parts[0] > self._positives[at[0]].unsqueeze(-2)
            self.positive(larger, at).fill_(False)  # it is itself, but for rounding
            self.ranks[1][at[0]] += larger.sum(dim=-2)

    def _add_blocks(self, sums: _Sums | None, lse: Tensor | None) -> tuple[Tensor | None, Tensor]:
        if self.decoupled and lse is not None:
            # Losses of empty sums have no gradient, and next to 0 the exponentials of these sums are 0.
            empty = lse == -torch.inf
            without = (empty.any(dim=0) if self.symmetric else empty).unsqueeze(-1)
            sums.weights, lse = sums.weights.masked_fill(without, 0), lse.masked_fill(empty, 0)
        return super()._add_blocks(sums, lse)

    def _has_attention(self, needs: Sequence[bool]) -> bool:
        masked = self._masks or self.decoupled or self._rank
        return not masked and super()._has_attention(needs)


def _ids(ids: Tensor | None) -> Tensor | None:
    """(M,), (B, M) or (B, N, M), with all three dimensions."""
    return ids if ids is None or ids.dim() == 3 else ids.view(-1, 1, ids.shape[-1])


def _of(ids: Tensor, at: At) -> Tensor:
    """Those of a block."""
    return ids[at[0] if len(ids) > 1 else slice(None), at[1] if ids.shape[1] > 1 else slice(None)]
