"""InfoNCE in blocks.

With row weights w and the softmax p, the gradient of a logit is ``G_ij = w_i (p_ij - [j is the positive])``; then
``dq_i = sum_j G_ij k_j / t``, ``dk_j = sum_i G_ij q_i / t`` and ``dt = -sum_ij G_ij z_ij / t = -sum_i q_i . dq_i / t``. A block of
rows is complete, so that its sums are known before it leaves: three products for both gradients, two without that of the keys.
Symmetric, ``G_ij = (w_i p_ij + w_j c_ij) / 2 - w_i [j is the positive]`` with the softmax c of the columns, whose sums are known
only after a first pass: four, unless one block has all logits.

If logits are *moderate*, known to lie within ``tiles.MODERATE``, exponentials are relative to 0, without the maximum of a row.
What a block then has in memory is G up to factors, which are applied where they cost least. Numbers, such as 1 / t and one w
for all, are the *scale* of the products. A row's sum over w_i, the *divisor*, divides rows (b, n, D). A tensor that all have in
common, such as 1 / t of a temperature that nobody reads, comes *last*, and multiplies the gradients.

Where products take rows of 16 bits as they are, coefficients are *narrow*: divided, times ``HALF_SCALE``, and rounded to 16 bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType

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
    accumulate,
    apart,
    blocks,
    exponentials,
    long_sums,
    narrowed,
    number,
    power_above,
    product,
)

Gradients = tuple[Tensor | None, ...]
At = tuple[slice, slice]


def info_nce_forward(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool = False,
    needs: Sequence[bool],
    **options: object,
) -> tuple[Tensor, Tensor, Gradients]:
    if mean and grad_scale is not None:
        grad_scale /= query.shape[:2].numel()
    return _problem(query, key, negatives, temperature, **options).run(grad_scale, needs)


def info_nce_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
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


class _Shared:
    """Columns of all rows of a batch element: its keys (B, M, D), or negatives (1, M, D) of all elements."""

    sums: Tensor | None = None  # of the gradient, if it is needed

    def __init__(self, similarities: Similarities, rows: Rows) -> None:
        self.similarities, self.rows, self.buffer = similarities, rows, Buffer(rows.units)
        self.factors = rows

    def start(self) -> None:
        self.sums = torch.zeros_like(self.rows.units)

    def _element(self, at: At) -> slice:
        return at[0] if len(self.rows.units) > 1 else slice(None)

    def logits(self, at: At) -> Tensor:
        """Of the queries of a block, (b, n, M)."""
        return self.similarities(at, self.rows[self._element(at)], self.buffer)

    def times(self, part: Tensor, at: At, out: Tensor, keep: bool, scale: float) -> None:
        """``keep out + scale sum_j part_ij k_j`` in ``out``."""
        rows = self.factors.factors if part.dtype.itemsize == 2 else self.factors.units
        product(part, rows[self._element(at)], out, keep=keep, scale=scale)

    def add(self, part: Tensor, query: Tensor, at: At, scale: float, last: Tensor | None) -> None:
        """Adds ``scale sum_i part_ij q_i`` to the gradient."""
        query = query.to(part.dtype)
        if len(self.sums) == 1:
            part, query = (x.flatten(0, 1).unsqueeze(0) for x in (part, query))
        product(part.mT, query, self.sums[self._element(at)], keep=1, scale=scale)

    def gradient(self, last: Tensor | None) -> Tensor:
        return self.rows.gradient(self.sums if last is None else self.sums.mul_(last))


class _Own:
    """Columns of one row each: its positive (B, N, D) alone, or its negatives (B, N, M, D). Of a block's the gradient is whole."""

    sums: Tensor | None = None

    def __init__(
        self, similarities: Similarities, like: Tensor, rows: Callable[[At], Rows]
    ) -> None:
        self.similarities, self.like, self._rows_at = similarities, like, rows

    def start(self) -> None:
        self.sums = torch.empty_like(self.like)

    def logits(self, at: At) -> Tensor:
        self._rows = self._rows_at(at)  # (b, n, m, D)
        rows, query = self._rows.wide, self.similarities.rows.wide[at].unsqueeze(-2)
        one = rows.shape[-2] == 1
        found = (rows * query).sum(dim=-1) if one else (rows @ query.mT).squeeze(-1)
        return found / self.similarities.tau

    def times(self, part: Tensor, at: At, out: Tensor, keep: bool, scale: float) -> None:
        units, part = self._rows.units, part.to(out.dtype).unsqueeze(-2)
        found = part * units if units.shape[-2] == 1 else part @ units
        accumulate(found.squeeze(-2), out, keep, scale)

    def add(self, part: Tensor, query: Tensor, at: At, scale: float, last: Tensor | None) -> None:
        of_units = part.unsqueeze(-1) * query.unsqueeze(-2)
        of_units.mul_(scale if last is None else last * scale)
        self.sums[at] = self._rows.gradient(of_units).view_as(self.sums[at])

    def gradient(self, last: Tensor | None) -> Tensor:
        return self.sums


class Problem:
    """Queries and keys (B, N, D), and what else is in their sums; as the operators have it."""

    decoupled = False  # the positive is not in the sum

    def __init__(
        self,
        query: Rows,
        key: Rows,
        negatives: Tensor | None,
        temperature: float | Tensor,
        *,
        in_batch: bool,
        self_logit: float | None,
        symmetric: bool = False,
    ) -> None:
        self.query, self.key, self.negatives, self.symmetric = query, key, negatives, symmetric
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
        self.narrow = query.inverse is not None and not self.own
        self._buffer = Buffer(units)
        # Of symmetric losses, if one block has them all.
        self._kept: list[Tensor] | None = None

    @functools.cached_property
    def columns(self) -> list[_Shared | _Own]:
        """The positives' first."""
        key, negatives, similarities = self.key, self.negatives, self.similarities
        found: list[_Shared | _Own] = [_Shared(similarities, key)]
        if not self.in_batch:
            found = [_Own(similarities, key.like, lambda at: key[(*at, None)])]
        if self.own:
            rows = lambda at: key.alike(self.negatives_at(at).to(key.units.dtype))  # noqa: E731
            found.append(_Own(similarities, negatives, rows))
        elif negatives is not None:
            found.append(_Shared(similarities, key.alike(self.negatives_at(...).unsqueeze(0))))
        return found

    def negatives_at(self, at: At | EllipsisType) -> Tensor:
        """Of a block those of its queries, or all."""
        return self.negatives[at]

    def blocks(self) -> Iterator[At]:
        batch, rows, depth = self.query.units.shape
        columns = rows if self.in_batch else 1
        columns += 0 if self.negatives is None else self.negatives.shape[-2]
        if self.own:
            columns *= 1 + depth  # these rows are copied, too
        return blocks(batch, rows, columns, self.query.units)

    def logits(self, at: At) -> list[Tensor]:
        """Of a block with all columns, -inf where a pair is left out. The memory is that of the next block, too."""
        return [column.logits(at) for column in self.columns]

    def count(self, parts: list[Tensor], positive: Tensor, at: At) -> None:
        """Takes notice of the positives' ranks in a block."""

    def positive(self, part: Tensor, at: At) -> Tensor:
        """(b, n), a view of what the first columns have."""
        if not self.in_batch:
            return part.squeeze(-1)
        return part.diagonal(at[1].start, dim1=-2, dim2=-1)

    def sums_of_both(self) -> tuple[Tensor, Tensor]:
        """The symmetric losses (B, N), and the lse (2, B, N) of rows and columns."""
        units = self.query.units
        shape = units.shape[:2]
        lse, positive = units.new_empty((2, *shape)), units.new_empty(shape)
        # Added up over the blocks, of which there may be hundreds.
        of_columns = units.new_full(shape, -torch.inf, dtype=long_sums(units))
        found = list(self.blocks())
        for at in found:
            (part,) = parts = self.logits(at)
            own = self.positive(part, at)
            positive[at] = own
            self.count(parts, own, at)
            if self.decoupled:
                own.fill_(-torch.inf)
            if self.moderate:
                relative = torch.exp(part, out=self._buffer(*part.shape))
                by_row, by_column = (relative.sum(dim=dim).log_() for dim in (-1, -2))
            else:
                by_row, by_column = (part.logsumexp(dim=dim) for dim in (-1, -2))
            lse[0][at], sums = by_row, of_columns[at[0]]
            torch.logaddexp(sums, by_column.to(sums.dtype), out=sums)
            if len(found) == 1:
                self._kept = parts
        lse[1] = of_columns
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
        losses = None
        sums = None if weights is None else _Sums(self, weights, needs)
        if self.symmetric:
            if lse is None:
                losses, lse = self.sums_of_both()
            if sums is not None:
                self._add_blocks(sums, lse)
        elif sums is not None and self._has_attention(needs):
            losses, lse = self._attend(sums, lse)
        else:
            losses, lse = self._add_blocks(sums, lse)
        return losses, lse, (None,) * 4 if sums is None else sums.gradients(lse)

    def _add_blocks(self, sums: _Sums | None, lse: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Adds all blocks to the sums, if there are any; losses and lse, as of ``run``."""
        losses = None
        if lse is None:
            losses, lse = (self.query.units.new_empty(self.query.units.shape[:2]) for _ in range(2))
        if sums is not None:
            sums.start()
        for at in self.blocks():
            parts = self._kept or self.logits(at)
            positive, divisor, logits = self.positive(parts[0], at), None, []
            if losses is not None:
                self.count(parts, positive, at)
            if sums is not None and sums.moment is not None:
                logits = [part.clone() for part in parts]
            if self.symmetric:
                self._coefficients_of_both(parts[0], positive, at, lse, sums.weights)
            else:
                divisor = self._exponentials(parts, positive, at, losses, lse)
            if sums is not None:
                sums.add(parts, at, divisor, logits)
        return losses, lse

    def _has_attention(self, needs: Sequence[bool]) -> bool:
        need_query, need_key, need_negatives, need_temperature = needs
        if need_key or need_negatives or not (need_query or need_temperature):
            return False
        plain = not self.own and not self.key.rounded and self.query.inverse is None
        return plain and has_attention(self.query.units)

    def _attend(self, sums: _Sums, lse: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """As ``_add_blocks``, for keys without gradient.

        With m the mean key and p the softmax's share of the positive, where it is not among these keys, the gradient of a query is
        ``w / t (m - k)`` or, with m that of the other keys, ``w / t ((1 - p) m - (1 - p) k)``.
        """
        left, scale, key = self.similarities.left, self.similarities.scale, self.key.units
        positive = (left * key).sum(dim=-1, keepdim=True).mul_(scale)
        found = attention(left, key, scale) if self.in_batch else None
        flat = left.flatten(0, 1).unsqueeze(0)
        rows = max(LEAST_ROWS, BYTES["cpu"] // 4 // (key.shape[-1] * key.element_size()))
        for negatives in () if self.negatives is None else self.negatives.split(rows):
            units = self.key.alike(negatives).units.unsqueeze(0)
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
        sums.of_query = mean.mul_(sums.scale if sums.weights is None else sums.weights * sums.scale)
        return losses, lse

    def _exponentials(
        self, parts: list[Tensor], positive: Tensor, at: At, losses: Tensor | None, lse: Tensor
    ) -> Tensor | None:
        """Makes the logits coefficients times a divisor (b, n, 1), None for 1. Writes losses and lse, if there are any losses."""
        divisor = logit = None
        if losses is not None and (self.decoupled or not self.moderate):
            logit = positive.clone()
        if self.decoupled:
            positive.fill_(-torch.inf)
        if losses is not None:
            top, divisor = exponentials(parts, self.constant, self.moderate)
            torch.log(divisor.squeeze(-1), out=lse[at])
            if not self.moderate:
                lse[at] += top.squeeze(-1)
            if logit is None:  # no quotient of two moderate exponentials overflows
                torch.div(divisor.squeeze(-1), positive, out=losses[at]).log_()
            else:
                torch.sub(lse[at], logit, out=losses[at])
        else:
            for part in parts:
                if not self.moderate:
                    part.sub_(lse[at].unsqueeze(-1))
                part.exp_()
            if self.moderate:
                divisor = lse[at].unsqueeze(-1).exp()
        positive -= 1 if divisor is None else divisor.squeeze(-1)
        if self.decoupled and losses is not None:
            divisor.masked_fill_(divisor == 0, 1)  # of rows of zeros, whose sums are empty
        return divisor

    def _coefficients_of_both(
        self, part: Tensor, positive: Tensor, at: At, lse: Tensor, weights: Tensor | None
    ) -> None:
        """Makes a block of logits twice the coefficients of the symmetric losses, whose weights are (B, N, 1), 1 if None."""
        of_rows, of_columns = lse[0][at].unsqueeze(-1), lse[1][at[0]].unsqueeze(-2)
        mine, theirs = (1.0, 1.0) if weights is None else (weights[at], weights[at[0]].mT)
        buffer = self._buffer(*part.shape)
        if self.decoupled:
            positive.fill_(-torch.inf)
        if self.moderate:
            torch.add(mine * (-of_rows).exp_(), theirs * (-of_columns).exp_(), out=buffer)
            part.exp_().mul_(buffer)
        else:
            by_row = torch.sub(part, of_rows, out=buffer).exp_()
            part.sub_(of_columns).exp_()
            if weights is not None:
                by_row.mul_(mine)
                part.mul_(theirs)
            part.add_(by_row)
        positive.unsqueeze(-1).sub_(2 * mine)


class _Sums:
    """The gradients, added up block by block.

    The coefficients are ``scale last parts / divisor`` times the weights (B, N, 1), if these differ. Symmetric parts have them.
    """

    def __init__(self, problem: Problem, weights: float | Tensor, needs: Sequence[bool]) -> None:
        self.problem, self.given, self.needs = problem, weights, needs
        self.weights, common = None, weights
        if isinstance(weights, Tensor):
            common = power_above(weights) if problem.narrow else 1.0
            self.weights = (weights / common).unsqueeze(-1)
        # Of parts that are larger.
        factor = (HALF_SCALE if problem.narrow else 1) * (2 if problem.symmetric else 1)
        self.scale, self.last = apart(common, 1 / problem.tau, 1 / factor)
        self.of_query: Tensor | None = None
        # Rounded similarities are not the product of what is multiplied for the gradient.
        rounded = problem.key.rounded and needs[3]
        self.moment = problem.query.units.new_zeros(()) if rounded else None

    def start(self) -> None:
        if self.needs[0] or self.needs[3]:
            self.of_query = torch.empty_like(self.problem.query.units)
        for column, need in zip(self.problem.columns, self.needs[1:], strict=False):
            if need:
                column.start()

    def add(
        self, parts: list[Tensor], at: At, divisor: Tensor | None, logits: list[Tensor]
    ) -> None:
        """Adds a block's; the logits, if there are any, for the temperature."""
        if self.problem.narrow:
            parts, divisor = [narrowed(x, divisor, self.problem.key.like) for x in parts], None
        if self.weights is not None and not self.problem.symmetric:
            divisor = (1 if divisor is None else divisor) / self.weights[at]
        for part, z in zip(parts, logits, strict=False):
            self.moment += (part * z if divisor is None else part * z / divisor).sum()
        both = list(zip(self.problem.columns, parts, strict=True))
        if self.of_query is not None:
            out = self.of_query[at]
            for i, (column, part) in enumerate(both):
                column.times(part, at, out, i > 0, self.scale)
            if divisor is not None:
                out.div_(divisor)
        query = None
        for column, part in both:
            if column.sums is not None:
                if query is None:
                    query = self.problem.query.units[at]
                    query = query if divisor is None else query / divisor
                column.add(part, query, at, self.scale, self.last)

    def gradients(self, lse: Tensor) -> Gradients:
        """Of queries, keys, negatives and temperature; None of those that are not needed."""
        problem, last, of_query = self.problem, self.last, self.of_query
        if last is not None and of_query is not None:
            of_query.mul_(last)
        of_temperature = None
        if self.moment is not None:
            of_temperature = self.moment * (-self.scale if last is None else last * -self.scale)
        elif self.needs[3]:
            of_temperature = -(problem.query.units * of_query).sum() / problem.tau
        if self.needs[3] and problem.constant is not None:
            shares = (problem.constant - lse).exp_().mul_(self.given)
            of_temperature = of_temperature - shares.sum() * problem.constant / problem.tau
        of_columns: list[Tensor | None] = [None, None]
        likes = problem.key.like, problem.negatives
        for i, need in enumerate(self.needs[1:3]):
            if need:
                of_columns[i] = problem.columns[i].gradient(last).view_as(likes[i])
        of_query = problem.query.gradient(of_query) if self.needs[0] else None
        return of_query, *of_columns, of_temperature


def _both_means(mean: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The mean key of two sets of keys, and the log-sum-exp."""
    total = torch.logaddexp(lse, more_lse)
    mean = mean.mul_((lse - total).exp_()).addcmul_(more, (more_lse - total).exp_())
    return mean, total
