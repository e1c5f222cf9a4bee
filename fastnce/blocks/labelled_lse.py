"""Sums over all rows and over those of one's own label, in blocks: SupCon, 2C, and their parts over ranks.

A state has, of each row, two log-sum-exps, over all columns and over those of its label, and the weights of what is differentiated:

    G_ij = all_weight_i exp(z_ij - all_lse_i) + [same label] (same_weight_i exp(z_ij - same_lse_i) + linear_i)

The matrix of logits is that of the columns, too, transposed: with both states, one product gives the gradient of a row from both
its uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastnce.blocks.tiles import Buffer, Rows, blocks, exponentials, product


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

    def add_to(self, out: Tensor, z: Tensor, same: Tensor, buffer: Buffer) -> None:
        """Adds G to ``out`` (n, m); the state is one of (n, 1) or (1, m)."""
        # Of -inf, which is the sum of nothing, the difference to -inf would be NaN.
        least = torch.finfo(z.dtype).min
        part = torch.sub(z, self.all_lse.clamp(min=least), out=buffer(*z.shape)).exp_()
        out += part.mul_(self.all_weight)
        if self.same_weight is not None:
            part = torch.sub(z, self.same_lse.clamp(min=least), out=part).exp_()
            out += part.mul_(self.same_weight).masked_fill_(~same, 0)
        if self.linear is not None:
            out += torch.mul(same, self.linear, out=part)


class Logits:
    """``z_ij = x_i . y_j / t`` in blocks of rows, with which columns have the label of the row.

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
        self.tau, self.own = temperature, own
        self.buffers = [Buffer(x.units) for _ in range(3)]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, z and same, which may be changed."""
        count, columns = len(self.x.units), len(self.y.units)
        for _, rows in blocks(1, count, columns, self.x.units):
            units = self.x.units[rows]
            z = self.buffers[0](len(units), columns)
            product(units[None], self.y.units.T, z[None]).div_(self.tau)
            same = self.x_labels[rows, None] == self.y_labels
            if self.own:
                z.diagonal(rows.start).fill_(-torch.inf)
                same.diagonal(rows.start).fill_(False)
            yield rows, z, same

    def sums(self, of_same: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The lse (N,) of the rows, and ``of_same`` of the logits with columns of their label, -inf for the others."""
        sums, same_sums = (self.x.units.new_empty(len(self.x.units)) for _ in range(2))
        for rows, z, same in self:
            part = self.buffers[1](*z.shape).copy_(z).masked_fill_(~same, -torch.inf)
            same_sums[rows] = of_same(part)
            sums[rows] = lse_of(z)
        return sums, same_sums

    def gradient(self, x_state: State, y_state: State, moment: Tensor | None) -> Tensor:
        """``sum_j (G_ij + G_ji) y_j / t`` (N, D); adds ``sum_ij G_ij z_ij``, of the rows' G, to ``moment``."""
        of_units = torch.empty_like(self.x.units)
        columns = y_state.map(lambda x: x.unsqueeze(0))
        for rows, z, same in self:
            both = self.buffers[1](*z.shape).zero_()
            x_state.map(lambda x, rows=rows: x[rows, None]).add_to(both, z, same, self.buffers[2])
            if moment is not None:
                finite = torch.clamp(z, min=torch.finfo(z.dtype).min, out=self.buffers[2](*z.shape))
                moment += finite.mul_(both).sum(dtype=moment.dtype)
            columns.add_to(both, z, same, self.buffers[2])
            product(both[None], self.y.units, of_units[None, rows])
        return of_units.div_(self.tau)


def lse_of(z: Tensor) -> Tensor:
    """``log sum exp`` of each row, which is overwritten."""
    return exponentials([z], None, False)[2].squeeze(-1)


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
    return torch.stack(logits.sums(lse_of), dim=1).double()


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

    moment = rows.units.new_zeros((), dtype=torch.float64)
    of_units = logits.gradient(state(x_state), state(y_state), moment)
    return rows.wide_gradient(of_units), -moment / logits.tau
