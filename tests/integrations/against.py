"""A loss of ours against theirs: the value, and the gradients of all its tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

ASKED_FOR = os.environ.get("FASTNCE_DROPINS", "0") != "0"
# What stands for a library in the tests.
THEIRS = ("equation", "library") if ASKED_FOR else ("equation",)


def draw(*shape: int, seed: int = 0, unit: bool = False) -> Tensor:
    """Rows in float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1) if unit else x


def similar(x: Tensor, seed: int = 1) -> Tensor:
    """Rows near those of ``x``."""
    return x + 0.7 * draw(*x.shape, seed=seed)


def value_and_gradients(
    loss: Callable[..., Tensor], tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """Of ``loss(*tensors)`` in this dtype; losses of many rows are weighed unequally."""
    leaves = [x if x is None else x.to(dtype).clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    given = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad((value * weights).sum(), given, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for x, g in zip(given, gradients, strict=True)
    ]
    return [value.detach(), *gradients]


def assert_same(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *tensors: Tensor | None,
) -> None:
    """In float64 to 1e-12; in float32 both are off by rounding."""
    got, expected = (value_and_gradients(f, tensors, torch.float64) for f in (ours, theirs))
    for index, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert index > 0 or y.abs().max() > 0
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    rounded = [value_and_gradients(f, tensors, torch.float32) for f in (ours, theirs)]
    for x, y, truth in zip(*rounded, expected, strict=True):
        error, of_theirs = ((z.double() - truth).abs().max() for z in (x, y))
        assert error <= 4 * of_theirs + 2e-6 * truth.abs().max().clamp(min=1)


def assert_same_signature(ours: Callable, theirs: Callable) -> None:
    """Names, order and defaults."""
    found = [inspect.signature(f).parameters.values() for f in (ours, theirs)]
    got, expected = ([(p.name, p.kind, p.default) for p in of] for of in found)
    assert got == expected


def assert_same_class(ours: type, theirs: type) -> None:
    """Their constructors and ``forward``."""
    assert ours.__name__ == theirs.__name__
    assert_same_signature(ours, theirs)
    assert_same_signature(ours.forward, theirs.forward)


def imported(name: str) -> ModuleType:
    """A module of one of the libraries."""
    _import_torchvision()
    return importlib.import_module(name)


@functools.cache
def _import_torchvision() -> torch.library.Library | None:
    """One for GPUs beside a torch without: its operators do not load, and it ends where it names them, unless they are there.

    What is declared lives as long as the library that is returned.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        importlib.import_module("torchvision")
        return declared
    return None
