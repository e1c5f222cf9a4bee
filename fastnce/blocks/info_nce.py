"""InfoNCE in blocks.

With row weights w and the softmax p, ``G_ij = w_i (p_ij - [j is the positive])``, and ``dq_i = sum_j G_ij k_j / t``,
``dk_j = sum_i G_ij q_i / t``, ``dt = -sum_ij G_ij z_ij / t``. A block of rows is complete, so that its sums are known before
it leaves: three products for both gradients, two without that of the keys. Symmetric, the sums of the columns are known
only after a first pass: four.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce.blocks.tiles import Buffer, Rows, blocks, lse_in_place, product

Gradients = tuple[Tensor | None, ...]


def info_nce_forward(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
    symmetric: bool,
    rounded: bool = False,
    **options: object,
) -> tuple[Tensor, Tensor, Gradients]:
    problem = Problem(query, key, negatives, temperature, rounded=rounded, **options)
    weights = grad_scale
    if mean and weights is not None:
        weights /= query.shape[:2].numel()
    if symmetric:
        loss, lse = problem.sums_of_both()
        grads = problem.run(weights, needs, lse)[2] if weights is not None else (None,) * 4
        return loss, lse, grads
    return problem.run(weights, needs)


def info_nce_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
    symmetric: bool,
    rounded: bool = False,
    **options: object,
) -> Gradients:
    problem = Problem(query, key, negatives, temperature, rounded=rounded, **options)
    return problem.run(grad_loss.to(lse.dtype), needs, lse)[2]


info_nce_fp8_forward = functools.partial(info_nce_forward, rounded=True)
info_nce_fp8_backward = functools.partial(info_nce_backward, rounded=True)


class Problem:
    """Queries and keys (B, N, D), and what else is in their sums; as the operators have it."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        *,
        normalize: bool,
        in_batch: bool,
        self_logit: float | None,
        rounded: bool = False,
    ) -> None:
        self.make = functools.partial(Rows, normalize=normalize, rounded=rounded)
        self.query, self.key = self.make(query), self.make(key)
        self.negatives = negatives
        self.own = negatives is not None and negatives.dim() == 4
        self.shared = self.make(negatives) if negatives is not None and not self.own else None
        self.in_batch, self.rounded = in_batch, rounded
        units = self.query.units
        self.tau = temperature
        self.constant = None
        if self_logit is not None:
            self.constant = units.new_full((), self_logit) / self.tau
        self._buffers = [Buffer(units) for _ in range(3)]

    def blocks(self):
        batch, rows, _ = self.query.units.shape
        columns = rows if self.in_batch else 1
        columns += 0 if self.negatives is None else self.negatives.shape[-2]
        if self.own:
            columns *= 1 + self.query.units.shape[-1]  # these rows are copied, too
        return blocks(batch, rows, columns, self.query.units)

    def logits(self, at: tuple[slice, slice]) -> tuple[list[Tensor], Rows | None]:
        """Those of a block's queries with keys and with negatives, and the queries' own negatives."""
        query = self.query.similar[at]
        count, height = query.shape[:2]
        if self.in_batch:
            key = self.key.similar[at[0]]
            out = self._buffers[0](count, height, key.shape[1])
            found = [product(query, key.mT, out).div_(self.tau)]
        else:
            found = [(query * self.key.similar[at]).sum(dim=-1, keepdim=True) / self.tau]
        if self.shared is not None:
            columns = self.shared.similar
            out = self._buffers[1](count, height, len(columns))
            found.append(product(query, columns.T, out).div_(self.tau))
        own = self.make(self.negatives[at]) if self.own else None
        if own is not None:
            found.append((own.similar @ query.unsqueeze(-1)).squeeze(-1) / self.tau)
        return found, own

    def positive(self, parts: list[Tensor], at: tuple[slice, slice]) -> Tensor:
        """(B, n), a view."""
        if not self.in_batch:
            return parts[0].squeeze(-1)
        return parts[0].diagonal(at[1].start, dim1=-2, dim2=-1)

    def sums_of_both(self) -> tuple[Tensor, Tensor]:
        """The symmetric losses (B, N), and the lse (2, B, N) of rows and columns."""
        units = self.query.units
        shape = units.shape[:2]
        lse, positive = units.new_empty((2, *shape)), units.new_empty(shape)
        top = units.new_full(shape, torch.finfo(units.dtype).min)
        total = units.new_zeros(shape)
        for at in self.blocks():
            (part,), _ = self.logits(at)
            positive[at] = self.positive([part], at)
            of_element, before = at[0], top[at[0]]
            now = torch.maximum(before, part.amax(dim=-2))
            relative = torch.sub(part, now.unsqueeze(-2), out=self._buffers[2](*part.shape)).exp_()
            total[of_element] = total[of_element] * (before - now).exp() + relative.sum(dim=-2)
            top[of_element] = now
            lse[0][at] = lse_in_place([part], None)[2].squeeze(-1)
        lse[1] = top + total.masked_fill_(top == torch.inf, 1).log()  # as in lse_in_place
        return lse.mean(dim=0) - positive, lse

    def run(
        self, weights: float | Tensor | None, needs: Sequence[bool], lse: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Gradients]:
        """Losses and lse (B, N), unless the lse is given; and the gradients of ``sum(weights * losses)``, unless these are None.

        Args:
            weights: one for all, or (B, N).
            needs: of query, key, negatives and temperature.
            lse: (B, N), or (2, B, N) where the losses are symmetric.
        """
        need_query, need_key, need_negatives, need_temperature = needs
        units = self.query.units
        found = None
        if lse is None:
            found = [units.new_empty(units.shape[:2]) for _ in range(2)]
        wanted = weights is not None
        of_query = torch.empty_like(units) if wanted and need_query else None
        of_key = torch.zeros_like(units) if wanted and need_key else None
        of_negatives = None
        if wanted and need_negatives:
            of_negatives = torch.zeros_like(self.negatives if self.own else self.shared.units)
        moment = units.new_zeros(()) if wanted and need_temperature else None

        for at in self.blocks():
            parts, own = self.logits(at)
            positive, constant = self.positive(parts, at), None
            kept = None
            if moment is not None and self.rounded:
                kept = [part.clone() for part in parts]
            if lse is None:
                value = positive.clone()
                top, total, of_rows = lse_in_place(parts, self.constant)
                found[0][at], found[1][at] = of_rows.squeeze(-1) - value, of_rows.squeeze(-1)
                if not wanted:
                    continue
                if self.constant is not None:
                    constant = (self.constant - top).exp()
                factor = _at(weights, at) / total
                positive -= total.squeeze(-1)
            elif lse.dim() == 2:
                for part in parts:
                    part.sub_(lse[at].unsqueeze(-1)).exp_()
                if self.constant is not None:
                    constant = (self.constant - lse[at].unsqueeze(-1)).exp()
                factor = _at(weights, at)
                positive -= 1
            else:
                factor = self._coefficients_of_both(parts[0], positive, at, lse, weights)
            # From here ``factor * parts`` is G.
            to_keys = self.query.units[at] * (factor / self.tau)
            if of_query is not None or (moment is not None and kept is None):
                sums = self._times_columns(parts, own, at) * (factor / self.tau)
                if of_query is not None:
                    of_query[at] = sums
                if moment is not None and kept is None:
                    moment += (self.query.units[at] * sums).sum()
            if kept is not None:
                for part, logits in zip(parts, kept, strict=True):
                    moment += (part * logits * factor).sum()
            if moment is not None and constant is not None:
                moment += (constant * self.constant * factor).sum()
            if of_key is not None and self.in_batch:
                product(parts[0].mT, to_keys, of_key[at[0]], keep=1)
            elif of_key is not None:
                of_key[at] = parts[0] * to_keys
            if of_negatives is not None and own is not None:
                of_units = parts[-1].unsqueeze(-1) * to_keys.unsqueeze(-2)
                of_negatives[at] = own.gradient(of_units)
            elif of_negatives is not None:
                flat = parts[-1].flatten(0, 1)
                of_negatives.addmm_(flat.T, to_keys.flatten(0, 1))

        grads = (
            None if of_query is None else self.query.gradient(of_query),
            None if of_key is None else self.key.gradient(of_key),
            self.shared.gradient(of_negatives)
            if of_negatives is not None and not self.own
            else of_negatives,
            None if moment is None else -moment / self.tau,
        )
        return (*(found if found is not None else (None, None)), grads)

    def _times_columns(
        self, parts: list[Tensor], own: Rows | None, at: tuple[slice, slice]
    ) -> Tensor:
        """``sum_j part_ij k_j`` over all columns, (B, n, D)."""
        if self.in_batch:
            sums = product(parts[0], self.key.units[at[0]])
        else:
            sums = parts[0] * self.key.units[at]
        if self.shared is not None:
            product(parts[1], self.shared.units, sums, keep=1)
        if own is not None:
            sums += (parts[-1].unsqueeze(-2) @ own.units).squeeze(-2)
        return sums

    def _coefficients_of_both(
        self,
        part: Tensor,
        positive: Tensor,
        at: tuple[slice, slice],
        lse: Tensor,
        weights: float | Tensor,
    ) -> float:
        """Makes a block of logits G of the symmetric losses, but for the factor that is returned."""
        by_row = torch.sub(part, lse[0][at].unsqueeze(-1), out=self._buffers[2](*part.shape)).exp_()
        part.sub_(lse[1][at[0]].unsqueeze(-2)).exp_()
        if isinstance(weights, Tensor):
            by_row *= weights[at].unsqueeze(-1)
            part *= weights[at[0]].unsqueeze(-2)
            part += by_row
            positive -= 2 * weights[at]
            return 0.5
        part += by_row
        positive -= 2
        return 0.5 * weights


def _at(weights: float | Tensor, at: tuple[slice, slice]) -> float | Tensor:
    return weights[at].unsqueeze(-1) if isinstance(weights, Tensor) else weights
