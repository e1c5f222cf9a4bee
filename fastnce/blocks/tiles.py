"""Unit rows, and the blocks of logits that take the place of the matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastnce.reference.normalize import rounded_unit_rows
from fastnce.registry import accumulation_dtype

# Bytes of a block of logits. On a CPU it stays in the cache between its product and its exponentials; on other devices a product
# has to fill the chip.
BYTES = {"cpu": 16 << 20}
BYTES_ELSEWHERE = 64 << 20
# Of a block, but for the last: below that, products starve.
LEAST_ROWS = 64


class Rows:
    """Rows ``x (..., D)`` in the dtype of the sums, of length 1 if ``normalize``.

    Args:
        x: the rows.
        normalize: divide by the L2 norm; zero rows stay zero, and get no gradient.
        rounded: similarities multiply the unit rows rounded to e4m3; gradients do not.
    """

    def __init__(self, x: Tensor, normalize: bool, rounded: bool = False) -> None:
        self.like, self.normalize = x, normalize
        dtype = accumulation_dtype(x.dtype)
        self.units = x.to(dtype, memory_format=torch.contiguous_format)
        if normalize:
            # By the largest magnitude first, so that no square overflows or vanishes.
            largest = torch.linalg.vector_norm(self.units, torch.inf, dim=-1, keepdim=True)
            self._is_zero = largest == 0
            self._largest = largest.masked_fill_(self._is_zero, 1)
            self.units = self.units / self._largest
            norm = self.units.square().sum(dim=-1, keepdim=True).sqrt_()
            self._norm = norm.masked_fill_(self._is_zero, 1)
            self.units /= self._norm
        self.similar = self.units
        if rounded:
            self.similar = rounded_unit_rows(x.to(self.units.dtype))

    def inverse_norm(self) -> Tensor:
        """(...), 0 for zero rows."""
        return (1 / self._norm / self._largest).masked_fill_(self._is_zero, 0).squeeze(-1)

    def gradient(self, of_units: Tensor) -> Tensor:
        """The gradient of ``x`` from that of the unit rows, which is overwritten."""
        return self.wide_gradient(of_units).to(self.like.dtype)

    def wide_gradient(self, of_units: Tensor) -> Tensor:
        """The same in the dtype of the sums."""
        if self.normalize:
            along = (self.units * of_units).sum(dim=-1, keepdim=True)
            of_units.addcmul_(self.units, along, value=-1).div_(self._norm).div_(self._largest)
            of_units.masked_fill_(self._is_zero, 0)
        return of_units


def blocks(batch: int, rows: int, columns: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batch elements and rows whose logits with ``columns`` columns fit the budget; all rows of several elements, or some of one."""
    budget = BYTES.get(like.device.type, BYTES_ELSEWHERE)
    height = max(LEAST_ROWS, budget // max(1, columns * like.element_size()))
    count = -(-rows // height)
    if count > 1:
        height = -(-rows // count)
        for element in range(batch):
            for first in range(0, rows, height):
                yield slice(element, element + 1), slice(first, min(first + height, rows))
        return
    group = max(1, height // rows)
    for element in range(0, batch, group):
        yield slice(element, min(element + group, batch)), slice(0, rows)


class Buffer:
    """Memory of one block, used again for every block."""

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)


def product(a: Tensor, b: Tensor, out: Tensor | None = None, keep: float = 0) -> Tensor:
    """``out = keep out + a @ b``, (B, n, k) and (B, k, m) or (k, m) -> (B, n, m)."""
    if out is None:
        out = a.new_empty((*a.shape[:2], b.shape[-1]))
    if b.dim() == 2 or len(a) == 1:
        into, a, b = (
            out.view(-1, out.shape[-1]),
            a.flatten(0, 1),
            b.squeeze(0) if b.dim() == 3 else b,
        )
        torch.addmm(into, a, b, beta=keep, out=into)
    else:
        torch.baddbmm(out, a, b, beta=keep, out=out)
    return out


def lse_in_place(parts: list[Tensor], constant: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Makes ``parts`` (..., m) their exponentials, relative to the largest of a row.

    Returns:
        That largest logit, the sum of the exponentials, and ``log sum exp``, all (..., 1). The ``constant`` is one more logit.
    """
    tops = [part.amax(dim=-1, keepdim=True) for part in parts]
    if constant is not None:
        tops.append(constant.expand_as(tops[0]))
    top = tops[0]
    for other in tops[1:]:
        top = torch.maximum(top, other)
    top = top.clamp(min=torch.finfo(top.dtype).min)  # of -inf alone, the sum is 0
    total = sum(part.sub_(top).exp_().sum(dim=-1, keepdim=True) for part in parts)
    if constant is not None:
        total = total + (constant - top).exp()
    # Of an infinite logit, the softmax is NaN at the logit itself, and 0 elsewhere: the sum must not carry it there.
    total = total.masked_fill(top == torch.inf, 1)
    return top, total, top + total.log()
