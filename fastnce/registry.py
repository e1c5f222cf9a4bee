"""Declared once for every op: its operators, which backends implement, its reference, its samples for tests.

``fastnce/ops/<op>.py`` calls ``declare``. Everything else (the backends, ``fastnce.reference``, ``fastnce.testing``,
tests and benchmarks) reads :data:`OPS`, and keeps no list of ops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Operator:
    """One function that the kernels of a backend implement, by its schema.

    Common to all: floating inputs are float64, float32, bfloat16 or float16, of one dtype per call and with any strides. Sums,
    losses and the gradient of the temperature are in ``acc``, float64 for float64 and float32 otherwise; other gradients are
    contiguous and of the input's dtype. A gradient that was not asked for is undefined in C++, None in Python.

    These names of arguments have a meaning:
        temperature_tensor, temperature: the temperature is the 0-d tensor of float32 or float64, or, without one, the float.
        bfloat16_products: the large products may multiply numbers rounded to bfloat16, where the processor has instructions
            for it and acc is float32.
        grad_scale, grad_scales: if given, or not empty, also the gradients of this times the sum of the losses.
        mean: the gradients of the mean instead. No number of losses is an argument, for a compiler would take it for a constant.
        weights: if given, also the gradients of the sum of these times the losses.
        need_x: the gradient of ``x`` is asked for. The gradients are the last results, in this order. Where x is a list, a list
            of those that are needed.

    Args:
        schema: as ``torch.library`` takes it.
        results: (arguments by name) -> the results before the gradients, as tensors of the right shape, dtype and device.
    """

    def __init__(self, schema: str, results: Callable[..., Sequence[Tensor]] | None = None) -> None:
        parsed = torch._C.parse_schema(schema)
        self.schema, self.name, self._results = schema, parsed.name, results
        self.arguments = tuple(x.name for x in parsed.arguments)
        self.needs = tuple(x for x in self.arguments if x.startswith("need_"))
        self.lists = "bool[] need_" in schema
        self.options = tuple(
            x.name
            for x in parsed.arguments
            if "Tensor" not in str(x.type) and not x.name.startswith(("need_", "temperature"))
        )
        self.results_before_gradients = len(parsed.returns) - len(self.needs)

    def fake(self, *arguments: object) -> object:
        """The results in shapes and dtypes alone: for torch.compile and meta tensors."""
        values: dict[str, Any] = dict(zip(self.arguments, arguments, strict=True))
        found = () if self._results is None else self._results(**values)
        if not self.needs:
            return found
        now = (
            values.get("grad_scale", 1.0) is not None
            and values.get("weights", 1.0) is not None
            and len(values.get("grad_scales", (1.0,))) > 0
        )
        gradients = [self._gradient(name, values, now) for name in self.needs]
        return (*found, *gradients)

    def _gradient(self, name: str, values: dict, now: bool) -> object:
        needed, of = values[name], values.get(name.removeprefix("need_"))
        if name == "need_temperature":
            first = next(iter(values.values()))
            first = first if isinstance(first, Tensor) else first[0]
            of = first.new_empty((), dtype=accumulation_dtype(first.dtype))
        if isinstance(of, Sequence):
            return [
                x.new_empty(x.shape) for x, need in zip(of, needed, strict=True) if now and need
            ]
        return _like(of, now and needed)


def _like(x: Tensor | None, needed: bool) -> Tensor | None:
    return x.new_empty(x.shape) if needed and x is not None else None


class Form(NamedTuple):
    """What the verdict on a GPU's kernels is about (``fastnce verify``): the path that a call takes in them, and its size.

    Args:
        name: such as "both gradients"; one of the forms of ``fastnce.verification.cases``.
        work: multiply-adds of one product of the rows, or elements of the feature maps.
        depth: D of the rows; 0 for maps.
    """

    name: str
    work: int
    depth: int


def _only_form(rows: Sequence[Tensor]) -> Form:
    """Of rows (N, D) among themselves, whichever gradients are needed."""
    return Form("any", rows[0].numel() * rows[0].shape[-2], rows[0].shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """A public op, or what public ops are computed with.

    Args:
        name: by which ``fastnce.backends`` knows it, and, if public, the function's.
        runs: the names of the operators that it runs on a fused backend, if not those that are declared with it.
        function: the public function.
        over_ranks: the function of ``fastnce.distributed``.
        samples: (``fastnce.testing.Make``) -> samples for tests, in every form that the op has.
        is_loss: it is reduced, and its result is in the dtype of the sums; else in the inputs'.
        form: of a call, from what its function gives to ``backends.select``.
    """

    name: str
    runs: tuple[str, ...] = ()
    function: Callable | None = None
    over_ranks: Callable | None = None
    samples: Callable | None = None
    is_loss: bool = True
    form: Callable[..., Form] = _only_form

    @property
    def rounds_products(self) -> bool:
        """Whether float32 inputs may have products of bfloat16, at torch's precision "medium"."""
        return any("bfloat16_products" in OPERATORS[name].arguments for name in self.runs)


class Make:
    """Makes the tensors of samples.

    Args:
        dtype: of the rows.
        device: of the rows.
        generator: the source of all numbers.
    """

    def __init__(self, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
        self.dtype, self.device, self.generator = dtype, device, generator

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        """Gaussian rows; the same numbers for every dtype, up to rounding."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.device, self.dtype).requires_grad_(grad)

    def similar(self, x: Tensor) -> Tensor:
        """Rows whose cosine with those of ``x`` is about 0.8, as positives have during training."""
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x.device)
        return (0.8 * x.detach() + 0.6 * noise).to(x.dtype).requires_grad_()


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op: its arguments by name.

    The gradients of the tensors that have ``requires_grad`` are part of the result.
    """

    name: str
    arguments: dict[str, object]

    def __repr__(self) -> str:
        return self.name


# The id of a key that is nobody's negative, such as padding.
LEFT_OUT = torch.iinfo(torch.int64).min

OPS: dict[str, Op] = {}
OPERATORS: dict[str, Operator] = {}
# Plain PyTorch, by the name in ``fastnce.reference``.
REFERENCES: dict[str, Callable] = {}
_declared: list[tuple[Op, Sequence[Operator]]] = []
_watchers: list[Callable[[Op, Sequence[Operator]], None]] = []


def declare(op: Op, *operators: Operator, **references: Callable) -> None:
    """Makes an op known, with the operators that no other op has declared, and the functions of its reference."""
    names = op.runs or tuple(x.name for x in operators)
    op = OPS[op.name] = dataclasses.replace(op, runs=names)
    OPERATORS.update({x.name: x for x in operators})
    REFERENCES.update(references)
    _declared.append((op, operators))
    for watcher in _watchers:
        watcher(op, operators)


def watch(watcher: Callable[[Op, Sequence[Operator]], None]) -> None:
    """Calls ``watcher(op, its operators)`` for every op that is declared, before and from now on."""
    _watchers.append(watcher)
    for op, operators in _declared:
        watcher(op, operators)
