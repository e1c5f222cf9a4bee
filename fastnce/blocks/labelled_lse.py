"""Sums over all rows and over those of one's own label, in blocks: SupCon, 2C, and their parts over ranks.

A state has, of each row, two log-sum-exps, over all columns and over those of its label, and the weights of what is differentiated:

    G_ij = all_weight_i exp(z_ij - all_lse_i) + [same label] (same_weight_i exp(z_ij - same_lse_i) + linear_i)

The matrix of logits is that of the columns, too, transposed: with both states, one product gives the gradient of a row from both
its uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastnce.blocks.tiles import (
    HALF_SCALE,
    Buffer,
    Rows,
    Similarities,
    apart,
    blocks,
    long_sums,
    narrowed,
    number,
    power_above,
    product,
)


@dataclasses.dataclass(frozen=True)
class State:
    """Of rows, or of columns: (N,) each; no part for those that are None."""

    all_lse: Tensor
    all_weight: Tensor
    same_lse: Tensor | None = None
    same_weight: Tensor | None = None
    linear: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        found = (getattr(self, field.name) for field in dataclasses.fields(self))
        return State(*(None if x is None else function(x) for x in found))

    def weights(self) -> list[Tensor]:
        found = (self.all_weight, self.same_weight, self.linear)
        return [x for x in found if x is not None]

    def add_to(self, out: Tensor, z: Tensor, same: Tensor, part: Tensor) -> None:
        """Adds G to ``out`` (n, m), and overwrites ``part``; the state is one of (n, 1) or (1, m)."""
        # Of -inf, which is the sum of nothing, the difference to -inf would be NaN.
        least = torch.finfo(z.dtype).min
        torch.sub(z, self.all_lse.clamp(min=least), out=part).exp_()
        out += part.mul_(self.all_weight)
        if self.same_weight is not None:
            torch.sub(z, self.same_lse.clamp(min=least), out=part).exp_()
            out += part.mul_(self.same_weight).masked_fill_(~same, 0)
        if self.linear is not None:
            out += torch.mul(same, self.linear, out=part)


class Logits:
    """``z_ij = x_i . y_j / t`` in blocks of rows, with which columns have the label of the row.

    If one block has all rows, it is made once, for the sums and for the gradient.

    Args:
        own: row i leaves out column i.
    """

    def __init__(
        self,
        x: Rows,
        y: Rows,
        x_labels: Tensor,
        y_labels: Tensor,
        temperature: float | Tensor,
        own: bool,
    ) -> None:
        self.x, self.y, self.x_labels, self.y_labels = x, y, x_labels, y_labels
        self.tau, self.own = number(temperature), own
        self.similarities = Similarities(x, self.tau)
        self.moderate = self.similarities.moderate
        if not self.moderate:  # divided afterwards, as the reference rounds them
            self.similarities = Similarities(x, 1.0)
        self._buffers = [Buffer(x.units) for _ in range(4)]
        self._zero = x.units.new_zeros(())
        # The logit, or the exponential, of what is not in a sum.
        self._nothing = x.units.new_full((), 0 if self.moderate else -torch.inf)
        self._blocks = [rows for _, rows in blocks(1, len(x.units), len(y.units), x.units)]
        self._only: tuple[slice, Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, z and same; not to be changed. In z, a row's own column is like others."""
        if self._only is not None:
            yield self._only
            return
        for rows in self._blocks:
            at = slice(None), rows
            z = self.similarities(at, self.y, self._buffers[0])[0]
            if not self.moderate:
                z.div_(self.tau)
            same = self.x_labels[rows, None] == self.y_labels
            self._leave_own(same, rows)
            if len(self._blocks) == 1:
                self._only = rows, z, same
            yield rows, z, same

    def _leave_own(self, x: Tensor, rows: slice, value: float | Tensor = 0) -> None:
        if self.own:
            x.diagonal(rows.start).fill_(value)

    def sums(self, linear: bool = False) -> tuple[Tensor, Tensor]:
        """The lse (N,) of the rows, and that of the columns of their label, or the sum of these logits if ``linear``."""
        found = self.x.units.new_empty((2, len(self.x.units)))
        for rows, z, same in self:
            part = self._buffers[1](*z.shape)
            if self.moderate:
                torch.exp(z, out=part)
            else:
                part.copy_(z)
            self._leave_own(part, rows, self._nothing)
            found[0, rows] = self._lse(part)
            of_same = z if linear else part
            torch.where(same, of_same, self._zero if linear else self._nothing, out=part)
            found[1, rows] = part.sum(dim=1) if linear else self._lse(part)
        return found[0], found[1]

    def _lse(self, part: Tensor) -> Tensor:
        return part.sum(dim=1).log_() if self.moderate else part.logsumexp(dim=1)

    def gradient(
        self, x_state: State, y_state: State, need_moment: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``sum_j (G_ij + G_ji) y_j / t`` (N, D), and ``sum_ij G_ij z_ij`` of the rows' G."""
        units = self.x.units
        of_units = torch.empty_like(units)
        narrow, largest = self.y.inverse is not None, 1.0
        if narrow:
            largest = power_above(torch.cat([*x_state.weights(), *y_state.weights()]))
        scale, last = apart(1 / self.tau, largest, 1 / HALF_SCALE if narrow else 1.0)
        symmetric = x_state is y_state  # so is the matrix: the moment of G + G^T is twice that of G
        alone = need_moment and not symmetric  # the moment is that of the rows' G
        moments = alone or (need_moment and narrow)
        moment = units.new_zeros((), dtype=long_sums(units)) if moments else None
        columns = y_state.map(lambda x: x.unsqueeze(0))
        for rows, z, same in self:
            mine = x_state.map(lambda x, rows=rows: x[rows, None])
            both = self._coefficients(rows, z, same, mine, *(() if alone else (columns,)))
            if moments:
                moment += (z * both).sum(dtype=moment.dtype)
            if alone:
                both = both.clone().add_(self._coefficients(rows, z, same, columns))
            if narrow:
                both = narrowed(both, largest, self.y.like)
            product(both[None], self.y.factors, of_units[None, rows], scale=scale)
        if last is not None:
            of_units.mul_(last)
        if need_moment and not moments:
            moment = (units * of_units).sum()
        return of_units, 0.5 * moment if need_moment and symmetric else moment

    def _coefficients(self, rows: slice, z: Tensor, same: Tensor, *states: State) -> Tensor:
        """G (n, m) of states (n, 1) and (1, m), added up."""
        out, part, other = (buffer(*z.shape) for buffer in self._buffers[1:])
        if self.moderate:

            def add_of_same(values: list[Tensor]) -> None:
                out.add_(torch.where(same, _sum(values, other), self._zero, out=part))

            # exp z once, times the factors that it has.
            _sum([x.all_weight * (-x.all_lse).exp() for x in states], out)
            if states[0].same_weight is not None:
                add_of_same([x.same_weight * (-x.same_lse).exp() for x in states])
            out.mul_(torch.exp(z, out=part))
            if states[0].linear is not None:
                add_of_same([x.linear for x in states])
        else:
            out.zero_()
            for state in states:
                state.add_to(out, z, same, part)
        self._leave_own(out, rows)
        return out


def _sum(values: Sequence[Tensor], out: Tensor) -> Tensor:
    """That of one or two tensors, (n, 1) and (1, m) -> (n, m), in ``out``."""
    first, *rest = values
    return torch.add(first, *rest, out=out) if rest else out.copy_(first)


def labelled_lse_forward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    *,
    own: bool,
) -> Tensor:
    logits = Logits(Rows(x, True), Rows(y, True), x_labels, y_labels, temperature, own)
    return torch.stack(logits.sums(), dim=1).double()


def labelled_lse_backward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    x_state: Tensor,
    y_state: Tensor,
    *,
    own: bool,
) -> tuple[Tensor, Tensor]:
    rows = Rows(x, True)
    logits = Logits(rows, Rows(y, True), x_labels, y_labels, temperature, own)

    def state(columns: Tensor) -> State:
        all_lse, same_lse, all_weight, same_weight = columns.to(rows.units.dtype).unbind(dim=1)
        return State(all_lse, all_weight, same_lse, same_weight)

    of_units, moment = logits.gradient(state(x_state), state(y_state), True)
    return rows.wide_gradient(of_units), -moment / logits.tau
