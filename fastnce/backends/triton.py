"""The Triton backend: the kernels of ``triton_kernels``, loaded where they can run, and registered for torch.compile.

Called eagerly, an op goes straight to the kernels. While torch.compile traces, it becomes one of ``torch.ops.fastnce_triton``,
which the compiler does not look into.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch

from fastnce.backends import operators
from fastnce.registry import Operator


def _load() -> tuple[ModuleType | None, str]:
    """The kernels, or why they are not there. Triton is not imported where nothing could run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed. Run: pip install triton"
    if not interpreted and not torch.cuda.is_available():
        return None, "the Triton kernels need a GPU, and this torch sees none"
    kernels = importlib.import_module("fastnce.triton_kernels")
    reason = kernels.available()
    return (kernels, "ok") if reason == "ok" else (None, reason)


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine."""
    return _STATUS


def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device_type``."""
    if _KERNELS is None:
        return _STATUS
    if not _operators.has(op):
        return f"{op} has no Triton kernel"
    return _KERNELS.supports(op, device_type, dtype)


class _Namespace(operators.Namespace):
    """Its operators run the functions ``<operator>`` of ``triton_kernels``."""

    def _function(self, operator: Operator) -> Callable | None:
        eager = getattr(_KERNELS, operator.name, None)
        if eager is None:
            return None
        run = operators.implementation(operator, eager)
        self._library.impl(operator.name, run, "CompositeExplicitAutograd")
        compiled = operators.function(self.name, operator)

        def function(*arguments: object, **options: object) -> object:
            call = compiled if torch.compiler.is_compiling() else eager
            return call(*arguments, **options)

        return function

    def _has_kernel(self, operator: str) -> bool:
        return self._functions.get(operator) is not None


_KERNELS, _STATUS = _load()
if _KERNELS is not None:
    _operators = _Namespace("fastnce_triton", "CUDA", globals())
