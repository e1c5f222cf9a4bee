"""The CUDA backend: the kernels of ``csrc/cuda``, as torch.ops.fastnce_cuda.*.

Their library is loaded at the first question about a device that they could run on: ``import fastnce`` asks no GPU.

They need a GPU, except for tests: ``FASTNCE_CUDA_EMULATED`` names a library of the same kernels for the host (see
``tests/cuda_kernels/emulated.py``), which then run on CPU tensors.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from fastnce.backends import build
from fastnce.backends.operators import Namespace
from fastnce.registry import Form

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALF)
# These multiply float32 without losing accuracy; for the others that is PyTorch's own products' part.
_OF_FLOAT32 = ("patch_nce", "sample_patches")
_MOST_CHANNELS = (
    256  # of patch_nce's own kernel, which alone has float32, both directions and query negatives
)
_LEAST_CAPABILITY = (8, 0)
_EMULATED = os.environ.get("FASTNCE_CUDA_EMULATED")
_DEVICE = "cpu" if _EMULATED else "cuda"

_operators: Namespace | None = None
_answers: dict[int, str] = {}  # of each GPU
_lock = threading.RLock()


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine's current GPU, and what to do about it."""
    return _runs_on(torch.device(_DEVICE))


@torch.compiler.assume_constant_result  # torch.compile cannot trace how a library is loaded
def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device``."""
    device = torch.device(device)
    if device.type != _DEVICE:
        return f"the CUDA kernels run on {_DEVICE} tensors{' where emulated' if _EMULATED else ''}"
    if dtype not in _DTYPES:
        return "the CUDA kernels take float32, bfloat16 and float16"
    reason = _runs_on(device)
    if reason != "ok" or _operators is None:
        return reason
    if not _operators.has(op):
        return f"{op} has no CUDA kernel"
    if dtype not in _HALF and op not in _OF_FLOAT32:
        return f"the CUDA kernels of {op} take bfloat16 and float16"
    return "ok"


def lacks(op: str, dtype: torch.dtype, form: Form) -> str:
    """``""``, or why no kernel takes calls of this form, though the op has kernels for ``dtype``."""
    if form.name == "own negatives":
        return "the CUDA kernels take negatives that all queries share, none of each query's own"
    if form.depth <= _MOST_CHANNELS:
        return ""
    of = "float32 rows" if dtype == torch.float32 else ""
    if op == "patch_nce" and form.name not in ("keys fixed", "both gradients"):
        of = "rows of a symmetric patch_nce, or one with query_negatives,"
    return of and f"the CUDA kernels take {of} of up to {_MOST_CHANNELS} elements, got {form.depth}"


def _runs_on(device: torch.device) -> str:
    """``"ok"``, or why no kernel can run there. GPUs of one machine may differ."""
    if device.type == "cpu":
        return _load()
    if device.index in _answers:
        return _answers[device.index]
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU, and this torch sees none"
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        if index not in _answers:
            reason = _capable(index)
            if reason == "ok":
                reason = _load()
            if reason == "ok":
                if torch.cuda.is_current_stream_capturing():
                    return "ok"  # nothing may be tried now
                reason = _starts(index)
            _answers[index] = reason
        return _answers[index]


def _capable(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        return f"the CUDA kernels need a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    return "ok"


def _load() -> str:
    """``"ok"`` once the library's operators are there, or why they are not."""
    global _operators
    with _lock:
        if _operators is not None:
            return "ok"
        how = (
            "python -m tests.cuda_kernels.emulated" if _EMULATED else "FASTNCE_CUDA=1 fastnce build"
        )
        library = Path(_EMULATED) if _EMULATED else build.find_library(build.CUDA)
        if library is None or not library.is_file():
            return f"the CUDA library is not built. Run: {how}"
        if not build.is_current(library, build.CUDA):
            return f"{library} was built from other sources. Run: {how}"
        try:
            torch.ops.load_library(library)
            operators = Namespace("fastnce_cuda", _DEVICE.upper(), globals())
            operators.define("probe(int device) -> str")
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            return f"the CUDA library cannot be loaded: {reason}. Run: {how}"
        _operators = operators
        return "ok"


def _starts(index: int) -> str:
    """A library may have no code for this GPU, or be newer than its driver."""
    reason = torch.ops.fastnce_cuda.probe(index)
    if reason == "ok":
        return "ok"
    target = build.target_of(".".join(map(str, torch.cuda.get_device_capability(index))))
    return (
        f"the CUDA library starts no kernel on this GPU: {reason}. Run: "
        f"FASTNCE_CUDA=1 FASTNCE_CUDA_ARCHS={target} fastnce build, with a toolkit that is no newer than the driver"
    )
