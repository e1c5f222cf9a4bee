"""Unit rows, and the blocks of logits that take the place of the matrix."""

from __future__ import annotations

import copy
import functools
import math
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
# Logits that lie within this have exponentials, and sums and quotients of these, that float32 holds: they need no maximum.
MODERATE = 36.0
# Of coefficients in 16 bits, which are at most 6 times the largest weight: a power of two, so that float16 keeps small ones.
HALF_SCALE = 2.0**13


def multiplies_in_16_bits(x: Tensor) -> bool:
    """Whether PyTorch multiplies rows like ``x`` as they are, with results in float32; elsewhere they are converted first."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.device.type == "cuda" and torch.version.hip is None


def long_sums(x: Tensor) -> torch.dtype:
    """That of sums over hundreds of blocks: float64, but for Apple's GPUs, which have none."""
    return x.dtype if x.device.type == "mps" else torch.float64


class Rows:
    """Rows ``x (..., D)`` in the dtype of the sums, of length 1 if ``normalize``, and what products take in their place.

    The products for logits take ``similar``, those for gradients ``factors``: both are ``units``, unless the inputs have 16 bits
    and so have the products. Then ``factors`` are the units rounded, and ``similar`` the rows as they came, times a power of two,
    so that logits are as exact as float32's: products are to be multiplied by ``inverse (..., 1)`` of both sides.

    Args:
        x: the rows.
        normalize: divide by the L2 norm; zero rows stay zero, and get no gradient.
        rounded: similarities multiply the unit rows rounded to e4m3; gradients do not.
    """

    def __init__(self, x: Tensor, normalize: bool, rounded: bool = False) -> None:
        self.like, self.normalize, self.rounded = x, normalize, rounded
        units = x.to(accumulation_dtype(x.dtype), memory_format=torch.contiguous_format)
        self.inverse = None
        if normalize:
            # By the largest magnitude first, so that no square overflows or vanishes.
            least = torch.finfo(units.dtype).tiny * 2.0**26
            self._largest = _largest(units).clamp_(min=least)
            units = units / self._largest
            # What is divided by that of a zero row is 0.
            self._norm = torch.threshold_(_norm(units), 0, math.inf)
            units.div_(self._norm)
        self.units = self.similar = self.factors = units
        if rounded:
            self.similar = rounded_unit_rows(x.to(units.dtype))
        elif multiplies_in_16_bits(x):
            self._narrow()

    def _narrow(self) -> None:
        x = self.like
        if not self.normalize:
            self.similar = self.factors = x.contiguous()
            self.inverse = torch.ones_like(self.units[..., :1])
            return
        self.factors = self.units.to(x.dtype)
        # Largest elements between a half and 1: no product of two rows leaves float32's range.
        mantissa = torch.frexp(self._largest).mantissa
        self.similar = torch.mul(x, mantissa / self._largest, out=torch.empty_like(self.factors))
        self.inverse = (mantissa * self._norm).reciprocal_()

    @property
    def wide(self) -> Tensor:
        """The similar rows in the dtype of the sums."""
        return self.similar if self.inverse is None else self.units

    def alike(self, x: Tensor) -> Rows:
        """Others with the same options."""
        return Rows(x, self.normalize, self.rounded)

    def __getitem__(self, at: object) -> Rows:
        part = copy.copy(self)
        for name, x in vars(self).items():
            if isinstance(x, Tensor):
                setattr(part, name, x[at])
        return part

    def inverse_norm(self) -> Tensor:
        """(...), 0 for zero rows."""
        return (1 / self._norm / self._largest).squeeze(-1)

    def gradient(self, of_units: Tensor) -> Tensor:
        """The gradient of ``x`` from that of the unit rows, which is overwritten."""
        return self.wide_gradient(of_units).to(self.like.dtype)

    def wide_gradient(self, of_units: Tensor) -> Tensor:
        """The same in the dtype of the sums."""
        if self.normalize:
            along = (self.units * of_units).sum(dim=-1, keepdim=True)
            of_units.addcmul_(self.units, along, value=-1).div_(self._norm).div_(self._largest)
        return of_units


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude (..., 1) of each row."""
    if x.device.type == "cpu":  # whose operator for it is slow
        return torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
    return torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    """The norm (..., 1) of each row."""
    if x.device.type == "cpu":  # rounded as the reference rounds it
        return x.square().sum(dim=-1, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def number(temperature: float | Tensor) -> float | Tensor:
    """The temperature's number, unless a device would be waited for."""
    on_host = isinstance(temperature, Tensor) and temperature.device.type == "cpu"
    return temperature.item() if on_host else temperature


class Similarities:
    """``z = x . y / t`` of blocks of the rows x, (N, D) or (B, N, D).

    Attributes:
        moderate: every z is known to lie within ``MODERATE``. Nobody reads a temperature that is a tensor.
    """

    def __init__(self, rows: Rows, temperature: float | Tensor) -> None:
        rows = rows[None] if rows.units.dim() == 2 else rows
        self.rows, self.tau = rows, temperature
        self.left, self.scale, self._inverse = rows.similar, 1.0, None
        self.moderate = False
        if not isinstance(temperature, Tensor):
            self.scale = 1 / temperature
            # Eight bits make cosines larger than 1.
            largest = self.scale * (1.2 if rows.rounded else 1)
            self.moderate = rows.normalize and largest <= MODERATE
        if rows.inverse is not None:
            self._inverse = rows.inverse / temperature
        elif isinstance(temperature, Tensor):
            self.left = self.left / temperature

    def __call__(self, at: object, y: Rows, buffer: Buffer) -> Tensor:
        """(b, n, m), of the rows ``at`` and of y, (b, m, D), (1, m, D) or (m, D)."""
        left, right = self.left[at], y.similar.mT
        if y.inverse is not None:
            return product(left, right).mul_(y.inverse.mT).mul_(self._inverse[at])
        return product(left, right, buffer(*left.shape[:2], right.shape[-1]), scale=self.scale)


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


def product(
    a: Tensor, b: Tensor, out: Tensor | None = None, keep: int = 0, scale: float = 1
) -> Tensor:
    """``keep out + scale a @ b`` in ``out``, (B, n, k) and (B, k, m), (1, k, m) or (k, m) -> (B, n, m).

    Of factors of 16 bits the result is in float32; without ``out`` it is ``a @ b``.
    """
    shape = (*a.shape[:2], b.shape[-1])
    flat = b.dim() == 2 or len(b) == 1
    if flat:
        a, b = a.flatten(0, 1), b.view(b.shape[-2:])
    if a.dtype.itemsize == 2:
        found = _wide_product(a, b).view(shape)
        return found if out is None else accumulate(found, out, keep, scale)
    out = a.new_empty(shape) if out is None else out
    into = out.view(-1, shape[-1]) if flat else out
    multiply = torch.addmm if flat else torch.baddbmm
    multiply(into, a, b, beta=keep, alpha=scale, out=into)
    return out


def accumulate(x: Tensor, out: Tensor, keep: int, scale: float) -> Tensor:
    """``keep out + scale x`` in ``out``."""
    return out.add_(x, alpha=scale) if keep else torch.mul(x, scale, out=out)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cpu":  # the same numbers, for tests
        return a.float() @ b.float()
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


def exponentials(
    parts: list[Tensor], constant: Tensor | None, moderate: bool
) -> tuple[float | Tensor, Tensor]:
    """Makes ``parts`` (..., m) their exponentials, relative to 0 if ``moderate``, or to the largest of a row.

    Returns:
        What they are relative to, and the sum of the exponentials, both (..., 1). The ``constant`` is one more logit.
    """
    top: float | Tensor = 0.0
    if not moderate:
        top = functools.reduce(torch.maximum, [part.amax(dim=-1, keepdim=True) for part in parts])
        if constant is not None:
            top = torch.maximum(top, constant)
        top = top.clamp(min=torch.finfo(top.dtype).min)  # of -inf alone, the sum is 0
        for part in parts:
            part.sub_(top)
    sums = [part.exp_().sum(dim=-1, keepdim=True) for part in parts]
    if constant is not None:
        sums.append((constant - top).exp())
    total = functools.reduce(torch.add, sums)
    # Of an infinite logit, the softmax is NaN at the logit itself, and 0 elsewhere: the sum must not carry it there.
    if not moderate:
        total = total.masked_fill(top == torch.inf, 1)
    return top, total


def narrowed(part: Tensor, divisor: Tensor | None, like: Tensor) -> Tensor:
    """Coefficients ``part / divisor`` times ``HALF_SCALE``, in the dtype of ``like``."""
    out = torch.empty_like(part, dtype=like.dtype)
    if divisor is None:
        return torch.mul(part, HALF_SCALE, out=out)
    return torch.div(part, divisor / HALF_SCALE, out=out)


def power_above(x: Tensor) -> Tensor:
    """The least power of two above the largest finite magnitude."""
    largest = x.abs().nan_to_num(0, 0, 0).amax()
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def apart(*factors: float | Tensor) -> tuple[float, Tensor | None]:
    """Their product in two: of the numbers, which matrix products take, and of the tensors, which multiply in the end."""
    numbers = [x for x in factors if not isinstance(x, Tensor)]
    tensors = [x for x in factors if isinstance(x, Tensor)]
    return math.prod(numbers), functools.reduce(torch.mul, tensors) if tensors else None
