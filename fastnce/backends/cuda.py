"""The CUDA backend: the kernels of ``csrc/cuda``, as torch.ops.fastnce_cuda.*.

They need a GPU, except for tests: ``FASTNCE_CUDA_EMULATED`` names a library of the same kernels for the host (see
``tests/cuda_kernels/emulated.py``), which then run on CPU tensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastnce.backends import build
from fastnce.backends.operators import Namespace

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_EMULATED = os.environ.get("FASTNCE_CUDA_EMULATED")
_DEVICE = "cpu" if _EMULATED else "cuda"


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine and what to do about it."""
    return _STATUS


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device``."""
    if _STATUS != "ok" or _operators is None:
        return _STATUS
    if not _operators.has(op):
        return f"{op} has no CUDA kernel"
    if torch.device(device).type != _DEVICE:
        return f"the CUDA kernels run on {_DEVICE} tensors{' where emulated' if _EMULATED else ''}"
    if dtype not in _DTYPES:
        return "the CUDA kernels take float32, bfloat16 and float16"
    return "ok"


def _load() -> tuple[Namespace | None, str]:
    """The operators of the loaded library, or why there are none."""
    reason = "ok" if _EMULATED else _gpu()
    if reason != "ok":
        return None, reason
    how = "python -m tests.cuda_kernels.emulated" if _EMULATED else "FASTNCE_CUDA=1 fastnce build"
    library = Path(_EMULATED) if _EMULATED else build.find_library(build.CUDA)
    if library is None or not library.is_file():
        return None, f"the CUDA library is not built. Run: {how}"
    if not build.is_current(library, build.CUDA):
        return None, f"{library} was built from other sources. Run: {how}"
    try:
        torch.ops.load_library(library)
        return Namespace("fastnce_cuda", _DEVICE.upper(), globals()), "ok"
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        return None, f"the CUDA library cannot be loaded: {reason}. Run: {how}"


def _gpu() -> str:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU, and this torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return f"the CUDA kernels need a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    return "ok"


_operators, _STATUS = _load()
