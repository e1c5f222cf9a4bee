"""PatchNCE in blocks: layers of the same shape are one batch.

One direction against the keys alone is InfoNCE's. The other forms have *pairs* of sides: queries with keys; with query negatives
also queries with queries; and keys with keys, if these are queries in their turn. With E = exp z and r_a = 1 / (the sum of row a),
a similarity has one E for all its uses. Up to the positives', its coefficients are ``E_ab (r_a + r_b)``; of queries with keys,
r of the keys is 0 unless symmetric, and where keys are detached, each side has its own r alone.

Products of N x N x D, in plain PyTorch, one direction after the other, and here:

    one direction, query negatives     6    5, or 4 where keys need no gradient
    symmetric                          6    3
    the same, detached                 4    3
    symmetric, query negatives        12    7: 3 for the logits of both sides, 4 for their gradients
    the same, detached                10    7

Where an image's logits are in several blocks they are made twice, by one product more for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce.blocks.info_nce import At, Gradients, Problem
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
    product,
)

# Elements up to which layers of the same shape are one batch on a CPU: larger ones, one at a time, stay in its cache.
_JOINED_ON_CPU = 1 << 14


class _Pair:
    """Blocks of the logits of the rows of one side, 0 or 1, with those of another; of their ``own`` side, none with itself."""

    def __init__(self, left: int, right: int, similarities: Similarities, columns: Rows) -> None:
        self.left, self.right, self.own = left, right, left == right
        self._similarities, self._columns = similarities, columns
        self._buffer = Buffer(columns.units)

    def logits(self, at: At) -> Tensor:
        """Of a block of rows with all columns, (b, n, N)."""
        z = self._similarities(at, self._columns[at[0]], self._buffer)
        if self.own:
            diagonal(z, at).fill_(-torch.inf)
        return z


def diagonal(x: Tensor, at: At) -> Tensor:
    """(b, n), a view."""
    return x.diagonal(at[1].start, dim1=-2, dim2=-1)


class Sides:
    """Queries and keys, (B, N, D) each, whose losses have one weight. The options are those of the operator.

    Args:
        both: the rows (2 B, N, D), queries first.
        weight: the gradients are those of ``weight * losses.sum()``; None for no gradients.
        needs: of queries, keys and temperature.
    """

    def __init__(
        self,
        both: Rows,
        temperature: float | Tensor,
        weight: float | None,
        needs: tuple[bool, bool, bool],
        *,
        self_logit: float,
        symmetric: bool,
        query_negatives: bool,
        detach_keys: bool,
    ) -> None:
        half, units = len(both.units) // 2, both.units
        self.both, self.rows, self.needs = both, (both[:half], both[half:]), needs
        self.tau, self.symmetric, self.detached = number(temperature), symmetric, detach_keys
        similarities = [Similarities(rows, self.tau) for rows in self.rows]
        self.moderate, self.narrow = similarities[0].moderate, both.inverse is not None
        pairs = [(0, 1), (0, 0), (1, 1)] if query_negatives else [(0, 1)]
        self.pairs = [
            _Pair(left, right, similarities[left], self.rows[right])
            for left, right in pairs
            if symmetric or left == 0
        ]
        self._buffer = Buffer(units)
        self.constant = units.new_full((), self_logit) / self.tau
        self.constants = self.constant + (math.log(2) if query_negatives else 0)
        # Of both sides (2, B, N); at first of the constants alone, and, if moderate, the sums without the logarithm.
        self.lse = units.new_empty((2, half, units.shape[1]), dtype=long_sums(units))
        self.lse.copy_(self.constants.exp() if self.moderate else self.constants)
        self.losses = torch.empty_like(units[:half, :, 0])
        self.grads = None
        if weight is not None and any(needs):
            self.weight = weight / 2 if symmetric else weight
            narrow = 1 / HALF_SCALE if self.narrow else 1.0
            self.scale, self.last = apart(self.weight, 1 / self.tau, narrow)
            # The temperature's is found from those of all rows; detached, from those of own pairs apart.
            parts = 2 if needs[2] and query_negatives and detach_keys else 1
            self.grads = units.new_zeros((parts, 2, half, *units.shape[1:]))

    def run(self) -> tuple[Tensor, Gradients]:
        """The losses (B, N), and the gradients of queries, keys and temperature, None where not needed."""
        batch, rows = self.losses.shape
        groups: dict[int, list[At]] = {}
        for at in blocks(batch, rows, rows * len(self.pairs), self.both.units):
            groups.setdefault(at[0].start, []).append(at)
        for group in groups.values():
            self._run_group(group)
        return self.losses, self._gradients()

    def _run_group(self, group: list[At]) -> None:
        """Several images, each in one block; or one, in one or several."""
        images, kept = group[0][0], {}
        for pair in self.pairs:
            for at in group:
                part = kept[pair] = pair.logits(at)
                if not pair.own:
                    self.losses[at] = diagonal(part, at)
                if self.moderate:
                    part.exp_()
                self._add_to_lse(self.lse[pair.left][at], part, -1)
                if self.symmetric and not pair.own:
                    self._add_to_lse(self.lse[pair.right][images], part, -2)
        lse = self.lse[:, images]
        states = lse.reciprocal() if self.moderate else lse
        lse = lse.log_() if self.moderate else lse
        lse = lse.mean(dim=0) if self.symmetric else lse[0]
        torch.sub(lse, self.losses[images], out=self.losses[images])
        if self.grads is None:
            return
        states = states.to(self.both.units.dtype)
        for pair in self.pairs:
            for at in group:
                part = kept[pair]
                if len(group) > 1:
                    part = pair.logits(at)
                    part = part.exp_() if self.moderate else part
                self._add_gradients(pair, part, at, states[pair.left][:, at[1]], states[pair.right])

    def _add_to_lse(self, out: Tensor, part: Tensor, dim: int) -> None:
        if self.moderate:
            out += part.sum(dim=dim)
        else:
            torch.logaddexp(out, part.logsumexp(dim=dim).to(out.dtype), out=out)

    def _add_gradients(
        self, pair: _Pair, part: Tensor, at: At, of_rows: Tensor, of_columns: Tensor
    ) -> None:
        """Of a block whose rows and columns have the states (b, n) and (b, N): their lse, or 1 over their sums if moderate."""
        left, right = (self.needs[2] or self.needs[side] for side in (pair.left, pair.right))
        if pair.own:
            if left:
                self._multiply(pair, self._coefficients(part, of_rows, of_columns), at, True, False)
            return
        if self.detached:
            if right:
                found = self._coefficients(part, None, of_columns, self._buffer(*part.shape))
                diagonal(found, at).sub_(1)
                self._multiply(pair, found, at, False, True)
            of_columns, right = None, False
        elif not self.symmetric:
            of_columns = None
        found = self._coefficients(part, of_rows, of_columns)
        diagonal(found, at).sub_(1 if of_columns is None else 2)
        self._multiply(pair, found, at, left, right)

    def _coefficients(
        self,
        part: Tensor,
        of_rows: Tensor | None,
        of_columns: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum of the softmaxes of a block, of rows, of columns or of both, in ``out`` or else in its place."""
        out = part if out is None else out
        states = [] if of_rows is None else [of_rows.unsqueeze(-1)]
        states += [] if of_columns is None else [of_columns.unsqueeze(-2)]
        if self.moderate:
            both = len(states) > 1
            factor = torch.add(*states, out=self._buffer(*part.shape)) if both else states[0]
            return torch.mul(part, factor, out=out)
        first, *rest = states
        other = [torch.sub(part, x, out=self._buffer(*part.shape)).exp_() for x in rest]
        found = torch.sub(part, first, out=out).exp_()
        return found.add_(other[0]) if other else found

    def _multiply(self, pair: _Pair, part: Tensor, at: At, to_left: bool, to_right: bool) -> None:
        """Adds the products of a block's coefficients with the rows of each side to the gradients of the other."""
        part = narrowed(part, None, self.both.like) if self.narrow else part
        left, right = (self.rows[side].factors for side in (pair.left, pair.right))
        grads = self.grads[-1 if pair.own else 0]
        if to_left:
            product(part, right[at[0]], grads[pair.left][at], keep=1, scale=self.scale)
        if to_right:
            product(part.mT, left[at], grads[pair.right][at[0]], keep=1, scale=self.scale)

    def _gradients(self) -> Gradients:
        if self.grads is None:
            return None, None, None
        grads = self.grads if self.last is None else self.grads.mul_(self.last)
        of_units = (grads.sum(dim=0) if len(grads) > 1 else grads[0]).flatten(0, 1)
        of_temperature = None
        if self.needs[2]:
            # What a logit adds is in the moments of both of its rows; detached, only own logits are in two.
            moments = (grads * self.both.units.view_as(grads[0])).flatten(1).sum(dim=1)
            moment = 0.5 * (moments.sum() + moments[0]) if self.detached else 0.5 * moments.sum()
            lse = self.lse if self.symmetric else self.lse[0]
            shares = (self.constants - lse).exp_().sum().to(moment.dtype) * self.weight
            of_temperature = -(moment + shares * self.constant) / self.tau
        if self.needs[0] and self.needs[1]:
            found = self.both.gradient(of_units).chunk(2)
        else:
            each = zip(self.rows, of_units.chunk(2), self.needs, strict=False)
            found = [rows.gradient(part) if need else None for rows, part, need in each]
        return *found, of_temperature


def patch_nce_forward(
    queries: list[Tensor],
    keys: list[Tensor],
    temperature: float | Tensor,
    *,
    self_logit: float,
    symmetric: bool = False,
    query_negatives: bool = False,
    detach_keys: bool = False,
    loss_scales: Sequence[float],
    grad_scales: Sequence[float],
    loss_layers: int = 0,
    grad_layers: int = 0,
    needs: tuple[Sequence[bool], Sequence[bool], bool],
) -> tuple[Tensor, tuple[list[Tensor | None], list[Tensor | None], Tensor | None]]:
    need_queries, need_keys, need_temperature = needs
    alike: dict[tuple, list[int]] = {}
    for layer, query in enumerate(queries):
        count = query.shape[:2].numel()
        loss_scale = loss_scales[layer] / (loss_layers * count if loss_layers else 1)
        grad_scale = None
        if len(grad_scales) > 0:
            grad_scale = grad_scales[layer] / (grad_layers * count if grad_layers else 1)
        needed = need_queries[layer], need_keys[layer]
        alone = layer if query.device.type == "cpu" and query.numel() > _JOINED_ON_CPU else None
        kind = query.shape, loss_scale, grad_scale, needed, alone
        alike.setdefault(kind, []).append(layer)

    loss, of_temperature = None, None
    grads: tuple[list, list] = ([None] * len(queries), [None] * len(queries))
    for (shape, loss_scale, grad_scale, needed, _), layers in alike.items():
        both = Rows(torch.cat([x[layer] for x in (queries, keys) for layer in layers]), True)
        if symmetric or query_negatives:
            sides = Sides(
                both,
                temperature,
                grad_scale,
                (*needed, need_temperature),
                self_logit=self_logit,
                symmetric=symmetric,
                query_negatives=query_negatives,
                detach_keys=detach_keys,
            )
            losses, (*found, dt) = sides.run()
        else:
            half = len(both.units) // 2
            problem = Problem(
                both[:half], both[half:], None, temperature, in_batch=True, self_logit=self_logit
            )
            losses, _, (*found, _, dt) = problem.run(grad_scale, (*needed, False, need_temperature))
        part, scale = losses.mean(), loss_scale * losses.numel()
        part = part if scale == 1 else part * scale
        loss = part if loss is None else loss + part
        for side, grad in zip(grads, found, strict=True):
            if grad is not None:
                for layer, part in zip(layers, grad.split(shape[0]), strict=True):
                    side[layer] = part
        if dt is not None:  # the temperature's is that of the loss
            part = dt * (loss_scale / grad_scale)
            of_temperature = part if of_temperature is None else of_temperature + part
    return loss, (*grads, of_temperature)
