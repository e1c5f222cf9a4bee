"""The Triton backend: the kernels of ``triton_kernels``, loaded where they can run, and registered for torch.compile."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from fastnce.backends.operators import PythonNamespace


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


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device``."""
    if _KERNELS is None:
        return _STATUS
    if not _operators.has(op):
        return f"{op} has no Triton kernel"
    return _KERNELS.supports(op, device, dtype)


_KERNELS, _STATUS = _load()
if _KERNELS is not None:
    _operators = PythonNamespace("fastnce_triton", _KERNELS, globals())
