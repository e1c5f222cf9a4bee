"""InfoNCE in blocks.

With row weights w and the softmax p, ``G_ij = w_i (p_ij - [j is the positive])``, and ``dq_i = sum_j G_ij k_j / t``,
``dk_j = sum_i G_ij q_i / t``, ``dt = -sum_ij G_ij z_ij / t``. A block of rows is complete, so that its sums are known before
it leaves: three products for both gradients, two without that of the keys. Symmetric, the sums of the columns are known
only after a first pass: four, unless one block has all logits.

Logits that are known to be moderate go without the maximum of their row, and are then relative to 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce.blocks.attention import attention, has_attention
from fastnce.blocks.tiles import (
    BYTES,
    HALF_SCALE,
    LEAST_ROWS,
    Buffer,
    Rows,
    Similarities,
    blocks,
    exponentials,
    narrowed,
    number,
    power_above,
    product,
)

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
    **options: object,
) -> tuple[Tensor, Tensor, Gradients]:
    problem = _problem(query, key, negatives, temperature, **options)
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
    **options: object,
) -> Gradients:
    problem = _problem(query, key, negatives, temperature, **options)
    return problem.run(grad_loss.to(lse.dtype), needs, lse)[2]


info_nce_fp8_forward = functools.partial(info_nce_forward, rounded=True)
info_nce_fp8_backward = functools.partial(info_nce_backward, rounded=True)


def _problem(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool,
    rounded: bool = False,
    **options: object,
) -> Problem:
    rows = (Rows(x, normalize, rounded) for x in (query, key))
    return Problem(*rows, negatives, temperature, **options)


class Problem:
    """Queries and keys (B, N, D), and what else is in their sums; as the operators have it."""

    def __init__(
        self,
        query: Rows,
        key: Rows,
        negatives: Tensor | None,
        temperature: float | Tensor,
        *,
        in_batch: bool,
        self_logit: float | None,
    ) -> None:
        self.query, self.key, self.negatives = query, key, negatives
        self.own = negatives is not None and negatives.dim() == 4
        self.in_batch, self.tau = in_batch, number(temperature)
        self.similarities = Similarities(query, self.tau)
        self.moderate = self.similarities.moderate
        units = query.units
        # The sum has a logit of at least -1 / t. What changes no bit of it is left out.
        least = math.log(torch.finfo(units.dtype).eps / 4)
        self.constant = None
        if self_logit is not None and not (self.moderate and (self_logit + 1) / self.tau < least):
            self.constant = units.new_full((), self_logit) / self.tau
        # Coefficients in 16 bits, where the products take those.
        self.narrow = query.inverse is not None and not self.own
        self._buffers = [Buffer(units) for _ in range(3)]
        # Of symmetric losses, if one block has them all.
        self._kept: list[Tensor] | None = None

    @functools.cached_property
    def shared(self) -> Rows | None:
        """Negatives (M, D)."""
        return None if self.negatives is None or self.own else self._rows(self.negatives)

    def _rows(self, x: Tensor) -> Rows:
        return Rows(x, self.key.normalize, self.key.rounded)

    def blocks(self):
        batch, rows, depth = self.query.units.shape
        columns = rows if self.in_batch else 1
        columns += 0 if self.negatives is None else self.negatives.shape[-2]
        if self.own:
            columns *= 1 + depth  # these rows are copied, too
        return blocks(batch, rows, columns, self.query.units)

    def logits(self, at: tuple[slice, slice]) -> tuple[list[Tensor], Rows | None]:
        """Those of a block's queries with keys and with negatives, and the queries' own negatives."""
        if self._kept is not None:
            return self._kept, None
        if self.in_batch:
            key = self.key[at[0]]
            found = [self.similarities(at, key.similar, key.inverse, self._buffers[0])]
        else:
            positive = (self.query.wide[at] * self.key.wide[at]).sum(dim=-1, keepdim=True)
            found = [positive / self.tau]
        if self.shared is not None:
            found.append(
                self.similarities(at, self.shared.similar, self.shared.inverse, self._buffers[1])
            )
        own = None
        if self.own:
            own = self._rows(self.negatives[at].to(self.query.units.dtype))
            found.append((own.units @ self.query.units[at].unsqueeze(-1)).squeeze(-1) / self.tau)
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
        top = units.new_full(shape, 0 if self.moderate else torch.finfo(units.dtype).min)
        total = units.new_zeros(shape)
        found = list(self.blocks())
        for at in found:
            (part,), _ = self.logits(at)
            if len(found) == 1:
                self._kept = [part]
            positive[at] = self.positive([part], at)
            relative, of_element = self._buffers[2](*part.shape), at[0]
            if self.moderate:
                torch.exp(part, out=relative)
                torch.log(relative.sum(dim=-1), out=lse[0][at])
                total[of_element] += relative.sum(dim=-2)
                continue
            row_top, row_total = exponentials([relative.copy_(part)], None, moderate=False)
            lse[0][at] = (row_top + row_total.log()).squeeze(-1)
            before, now = top[of_element], torch.maximum(top[of_element], part.amax(dim=-2))
            torch.sub(part, now.unsqueeze(-2), out=relative)
            total[of_element] *= (before - now).exp()
            total[of_element] += relative.exp_().sum(dim=-2)
            top[of_element] = now
        lse[1] = top + total.masked_fill_(top == torch.inf, 1).log()  # as in exponentials
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
        symmetric = lse is not None and lse.dim() == 3
        if weights is not None and not symmetric and self._has_attention(needs):
            return self._attend(weights, needs, lse)
        losses = None
        if lse is None:
            losses, lse = (self.query.units.new_empty(self.query.units.shape[:2]) for _ in range(2))
        sums = None if weights is None else _Sums(self, weights, needs, symmetric)
        for at in self.blocks():
            parts, own = self.logits(at)
            positive, divisor, logits = self.positive(parts, at), None, []
            if sums is not None and needs[3] and self.key.rounded:
                logits = [part.clone() for part in parts]
            if symmetric:
                self._coefficients_of_both(parts[0], positive, at, lse, sums.weights)
            else:
                divisor = self._exponentials(parts, positive, at, losses, lse)
                if sums is None:
                    continue
                positive -= 1 if divisor is None else divisor.squeeze(-1)
            sums.add(parts, own, at, divisor, logits)
        if sums is None:
            return losses, lse, (None,) * 4
        *grads, of_temperature = sums.gradients()
        if of_temperature is not None:
            of_temperature = self._with_constant(of_temperature, weights, lse)
        return losses, lse, (*grads, of_temperature)

    def _has_attention(self, needs: Sequence[bool]) -> bool:
        need_query, need_key, need_negatives, need_temperature = needs
        if need_key or need_negatives or not (need_query or need_temperature):
            return False
        plain = not self.own and not self.key.rounded and self.query.inverse is None
        return plain and has_attention(self.query.units)

    def _attend(
        self, weights: float | Tensor, needs: Sequence[bool], lse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Gradients]:
        """As ``run``, for keys without gradient.

        With m the mean key and p the softmax's share of the positive, where it is not among these keys, the gradient of a query is
        ``w / t (m - k)`` or, with m that of the other keys, ``w / t ((1 - p) m - (1 - p) k)``.
        """
        left, scale, key = self.similarities.left, self.similarities.scale, self.key.units
        positive = (left * key).sum(dim=-1, keepdim=True).mul_(scale)
        found = attention(left, key, scale) if self.in_batch else None
        flat = left.flatten(0, 1).unsqueeze(0)
        rows = max(LEAST_ROWS, BYTES["cpu"] // 4 // (key.shape[-1] * key.element_size()))
        for negatives in () if self.negatives is None else self.negatives.split(rows):
            units = self._rows(negatives).units.unsqueeze(0)
            more = (x.view(*left.shape[:2], -1) for x in attention(flat, units, scale))
            found = more if found is None else _both_means(*found, *more)
        mean, of_others = found
        total = of_others if self.in_batch else torch.logaddexp(of_others, positive)
        if self.constant is not None:
            total = torch.logaddexp(total, self.constant)
        losses = None
        if lse is None:
            losses, lse = (total - positive).squeeze(-1), total.squeeze(-1)
        if total is not of_others:
            mean.mul_((of_others - total).exp_())
        if self.in_batch:
            mean.sub_(key)
        else:
            mean.addcmul_(key, torch.expm1(positive - total))
        factor = weights.unsqueeze(-1) if isinstance(weights, Tensor) else weights
        of_query = mean.mul_(factor / self.tau)
        of_temperature = None
        if needs[3]:
            of_temperature = -(self.query.units * of_query).sum() / self.tau
            of_temperature = self._with_constant(of_temperature, weights, lse)
        grads = self.query.gradient(of_query) if needs[0] else None, None, None, of_temperature
        return losses, lse, grads

    def _with_constant(self, of_temperature: Tensor, weights: float | Tensor, lse: Tensor):
        """The gradient of the temperature with that from the constant logit."""
        if self.constant is None:
            return of_temperature
        shares = (self.constant - lse).exp_().mul_(weights)
        return of_temperature - shares.sum() * self.constant / self.tau

    def _exponentials(
        self,
        parts: list[Tensor],
        positive: Tensor,
        at: tuple[slice, slice],
        losses: Tensor | None,
        lse: Tensor,
    ) -> Tensor | None:
        """Makes the logits exponentials; their sum (..., 1), None for 1. Writes losses and lse, if there are any losses."""
        if losses is not None:
            value = None if self.moderate else positive.clone()
            top, total = exponentials(parts, self.constant, self.moderate)
            torch.log(total.squeeze(-1), out=lse[at])
            if self.moderate:  # no quotient of two of these overflows
                torch.div(total.squeeze(-1), positive, out=losses[at]).log_()
            else:
                lse[at] += top.squeeze(-1)
                torch.sub(lse[at], value, out=losses[at])
            return total
        for part in parts:
            if not self.moderate:
                part.sub_(lse[at].unsqueeze(-1))
            part.exp_()
        return lse[at].unsqueeze(-1).exp() if self.moderate else None

    def _coefficients_of_both(
        self,
        part: Tensor,
        positive: Tensor,
        at: tuple[slice, slice],
        lse: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Makes a block of logits twice the coefficients of the symmetric losses, whose weights are (B, N, 1), 1 if None."""
        of_rows, of_columns = lse[0][at].unsqueeze(-1), lse[1][at[0]].unsqueeze(-2)
        buffer = self._buffers[2](*part.shape)
        row_weights = 1.0 if weights is None else weights[at]
        column_weights = 1.0 if weights is None else weights[at[0]].mT
        if self.moderate:
            shares = row_weights * (-of_rows).exp_(), column_weights * (-of_columns).exp_()
            part.exp_().mul_(torch.add(*shares, out=buffer))
        else:
            by_row = torch.sub(part, of_rows, out=buffer).exp_()
            part.sub_(of_columns).exp_()
            if weights is not None:
                by_row.mul_(row_weights)
                part.mul_(column_weights)
            part.add_(by_row)
        positive -= 2 if weights is None else 2 * weights[at].squeeze(-1)


class _Sums:
    """The gradients of the rows, added up block by block. The coefficients are ``parts * weights / divisor``.

    What is a number in that goes into the products, and tensors that all rows have in common multiply at the end. Symmetric
    coefficients come twice as large, with their weights.
    """

    def __init__(
        self,
        problem: Problem,
        weights: float | Tensor,
        needs: Sequence[bool],
        symmetric: bool,
    ) -> None:
        self.problem, self.needs, self.symmetric = problem, needs, symmetric
        self.query, self.key = problem.query, problem.key
        self.scale, self.weights, last = 1.0, None, 1.0
        if isinstance(weights, Tensor):
            self.weights = weights.unsqueeze(-1)
            if problem.narrow:
                last = power_above(weights)
                self.weights = self.weights / last
        else:
            self.scale = weights
        if isinstance(problem.tau, Tensor):
            last = last / problem.tau
        else:
            self.scale /= problem.tau
        self.last = last if isinstance(last, Tensor) else None
        if problem.narrow:
            self.scale /= HALF_SCALE
        if symmetric:
            self.scale /= 2
        need_query, need_key, need_negatives, need_temperature = needs
        units = self.query.units
        self.of_query = torch.empty_like(units) if need_query or need_temperature else None
        self.of_key = torch.zeros_like(units) if need_key else None
        self.of_negatives, self.moment = None, None
        if need_negatives:
            like = problem.negatives if problem.own else problem.shared.units
            self.of_negatives = torch.zeros_like(like)

    def add(
        self,
        parts: list[Tensor],
        own: Rows | None,
        at: tuple[slice, slice],
        divisor: Tensor | None,
        logits: list[Tensor],
    ) -> None:
        """Adds a block's; the logits, if there are any, for the temperature."""
        if self.problem.narrow:
            parts, divisor = [narrowed(part, divisor, self.key.like) for part in parts], None
        if self.weights is not None and not self.symmetric:
            divisor = (1 if divisor is None else divisor) / self.weights[at]
        for part, z in zip(parts, logits, strict=False):
            terms = part * z if divisor is None else part * z / divisor
            self.moment = terms.sum() if self.moment is None else self.moment + terms.sum()
        if self.of_query is not None:
            sums = self._times_columns(parts, own, self.of_query[at], at)
            if divisor is not None:
                sums.div_(divisor)
        if self.of_key is None and self.of_negatives is None:
            return
        query = self.query.units[at] if divisor is None else self.query.units[at] / divisor
        rows = query.to(parts[0].dtype)
        if self.of_key is not None and self.problem.in_batch:
            product(parts[0].mT, rows, self.of_key[at[0]], keep=1, scale=self.scale)
        elif self.of_key is not None:
            self.of_key[at] = parts[0] * query * self.scale
        if self.of_negatives is None:
            return
        if own is None:
            flat, rows = parts[-1].flatten(0, 1).T, rows.flatten(0, 1)
            product(flat[None], rows, self.of_negatives[None], keep=1, scale=self.scale)
        else:
            of_units = parts[-1].unsqueeze(-1) * query.unsqueeze(-2)
            of_units.mul_(self.scale if self.last is None else self.last * self.scale)
            self.of_negatives[at] = own.gradient(of_units)

    def _times_columns(
        self, parts: list[Tensor], own: Rows | None, out: Tensor, at: tuple[slice, slice]
    ) -> Tensor:
        """``scale sum_j part_ij k_j`` over all columns, (B, n, D)."""
        problem, scale = self.problem, self.scale
        if problem.in_batch:
            key = self.key.factors if problem.narrow else self.key.units
            product(parts[0], key[at[0]], out, scale=scale)
        else:
            torch.mul(parts[0], self.key.units[at], out=out).mul_(scale)
        if problem.shared is not None:
            product(parts[1], problem.shared.factors, out, keep=1, scale=scale)
        if own is not None:
            out.add_((parts[-1].unsqueeze(-2) @ own.units).squeeze(-2), alpha=scale)
        return out

    def gradients(self) -> Gradients:
        """Of queries, keys, negatives and temperature; None of those that are not needed."""
        need_query, need_key, need_negatives, need_temperature = self.needs
        own, last = self.problem.own, self.last
        if last is not None:
            for grad in (self.of_query, self.of_key, None if own else self.of_negatives):
                if grad is not None:
                    grad.mul_(last)
        of_temperature = None
        if need_temperature and self.moment is None:
            of_temperature = -(self.query.units * self.of_query).sum() / self.problem.tau
        elif need_temperature:  # of rounded similarities
            of_temperature = self.moment * (-self.scale if last is None else last * -self.scale)
        of_negatives = self.of_negatives
        if need_negatives and not own:
            of_negatives = self.problem.shared.gradient(of_negatives)
        return (
            self.query.gradient(self.of_query) if need_query else None,
            self.key.gradient(self.of_key) if need_key else None,
            of_negatives,
            of_temperature,
        )


def _both_means(mean: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The mean key of two sets of keys, and the log-sum-exp."""
    total = torch.logaddexp(lse, more_lse)
    mean = mean.mul_((lse - total).exp_()).addcmul_(more, (more_lse - total).exp_())
    return mean, total
