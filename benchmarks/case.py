"""The things that are measured: a case (an op, sizes, inputs) and the providers that compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Shape = dict[str, int]
Call = Callable[[Inputs], Any]

# The truth in fp64 keeps several N x M arrays: about this many bytes per pair.
_TRUTH_BYTES_PER_PAIR = 64


class Draw:
    """Seeded random inputs of one device and dtype; drawn on the CPU, so the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Independent standard normal numbers."""
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def near(self, x: Tensor, noise: float = 3.0) -> Tensor:
        """``x`` with noise; the default makes positives of cosine 0.3, closer than negatives but no trivial task."""
        return x + noise * self.normal(*x.shape)

    def labels(self, count: int, classes: int) -> Tensor:
        """(count,) int64 class labels."""
        return torch.randint(classes, (count,), generator=self._generator).to(self.device)

    def positions(self, limit: int, count: int) -> Tensor:
        """(count,) distinct int64 positions below ``limit``."""
        return torch.randperm(limit, generator=self._generator)[:count].to(self.device)

    def scalar(self, value: float) -> Tensor:
        """A 0-d parameter, in the dtype in which the ops keep it."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.tensor(value, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One problem: an op, its sizes, and how to make its inputs.

    Args:
        op: the public op, ``fastnce.<op>``.
        name: unique within the op.
        shape: the sizes, by the letters used in the docstrings.
        make: ``(shape, draw) -> arguments of the op``.
        wrt: the arguments whose gradients are computed; none times the forward alone.
        products: how many N x M x D matrix products loss and gradients cannot do without; 0 if there is no product.
        pairs: ``shape -> N * M``, summed over whatever is batched.
        options: further arguments of the op, the same for every provider.
        sets: the sets (``quick``, ``full``, ``demo``, ``table``, ``target``) that it belongs to.
        devices: the device types that it is meant for.
        gate_only: arguments given for the gate but left out (None) when timed, such as positions to be drawn.
        gate_limits: sizes that the gate does not exceed, where a rival needs too much at the timed ones.
        once: so long, and so large for a rival, that only our own backends take part, with one call that gives time and
            memory (on a CPU only).
        form: ``(inputs, **options, backend) -> outputs`` of ours, where that is not ``op(**inputs, **options, backend)``.
        alone: what the case does besides the op, such as the network that a map goes on into. It is timed with the
            providers, and what they take above it is reported too.
    """

    op: str
    name: str
    shape: Shape
    make: Callable[[Shape, Draw], Inputs]
    wrt: tuple[str, ...]
    products: int = 0
    pairs: Callable[[Shape], int] = lambda shape: 0
    options: dict[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = ("full",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    gate_only: tuple[str, ...] = ()
    gate_limits: Shape = field(default_factory=dict)
    once: bool = False
    form: Callable[..., Any] | None = None
    alone: Call | None = None

    @property
    def flop(self) -> int:
        """Floating-point operations of the mandatory products."""
        return 2 * self.products * self.pairs(self.shape) * self.shape.get("D", 0)

    def gate_shape(self, truth_bytes: float) -> Shape:
        """The sizes at which the result is checked against fp64: the timed ones, or less where the truth needs more memory."""
        shape = self.cut(self.gate_limits)
        while (
            _TRUTH_BYTES_PER_PAIR * self.pairs(shape) > truth_bytes
            and max(shape.get("N", 1), shape.get("M", 1)) > 1
        ):
            larger = "M" if shape.get("M", 0) > shape.get("N", 0) else "N"
            shape |= {larger: (shape[larger] + 1) // 2}
        return shape

    def cut(self, limits: Shape) -> Shape:
        """The sizes, none above its limit."""
        return {key: min(size, limits.get(key, size)) for key, size in self.shape.items()}

    def inputs(
        self, device: torch.device, dtype: torch.dtype, shape: Shape | None = None
    ) -> Inputs:
        """The op's arguments at the timed sizes, those in ``wrt`` requiring a gradient.

        With a ``shape`` they are at those sizes, and complete: what ``gate_only`` leaves out of the timing is given.
        """
        inputs = self.make(shape or self.shape, Draw(device, dtype))
        for leaf in leaves(inputs, self.wrt):
            leaf.requires_grad_()
        if shape is None:
            inputs |= dict.fromkeys(self.gate_only)
        return inputs


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        name: shown in tables.
        call: arguments -> loss, or output tensors.
        ours: a fused backend of this package, held to the package's numerical contract.
        reason: why it cannot run here, or ``"ok"``.
        extra_bytes: what it is known to allocate at least, at the timed sizes; it is skipped where that is not free.
        compiled: the first call compiles.
        rounds_products: the factors of its products are rounded to fewer bits than the inputs have.
        truth: plain PyTorch of what it computes, where that is another function than the case's: of rounded similarities.
    """

    name: str
    call: Call
    ours: bool = False
    reason: str = "ok"
    extra_bytes: int = 0
    compiled: bool = False
    rounds_products: bool = False
    truth: Call | None = None


def leaves(inputs: Inputs, names: Iterable[str]) -> list[Tensor]:
    """The tensors of the named arguments, lists flattened."""
    values = [inputs[name] for name in names]
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
