"""The Triton backend: the kernels of ``triton_kernels``, registered for torch.compile.

They are loaded at the first question about a device that they could run on: ``import fastnce`` imports no Triton, and asks no GPU.
They have been written for NVIDIA GPUs. On AMD's they may run, by name, but nobody has tried them there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading

import torch

from fastnce.backends.operators import PythonNamespace

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_LEAST_CAPABILITY_FP8 = (8, 9)
# Interpreted, for tests, they run on the host.
_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

_operators: PythonNamespace | None = None
_answers: dict[int, str] = {}  # of each GPU
_lock = threading.RLock()


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine's current GPU."""
    return _runs_on(torch.device(_DEVICE))


@torch.compiler.assume_constant_result  # torch.compile cannot trace how kernels are loaded
def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device``."""
    device = torch.device(device)
    if device.type != _DEVICE:
        return "the Triton kernels run on cuda tensors"
    if dtype not in _DTYPES:
        return "the Triton kernels take float32, bfloat16 and float16"
    reason = _runs_on(device)
    if reason != "ok" or _operators is None:
        return reason
    if not _operators.has(op):
        return f"{op} has no Triton kernel"
    return _multiplies_fp8(device) if op == "info_nce_fp8" else "ok"


def _runs_on(device: torch.device) -> str:
    """``"ok"``, or why no kernel can run there. GPUs of one machine may differ, and each is asked once."""
    if device.type == "cpu":
        return _load()
    if device.index in _answers:
        return _answers[device.index]
    if not torch.cuda.is_available():
        return "the Triton kernels need a GPU, and this torch sees none"
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        if index not in _answers:
            reason = _load()
            if reason == "ok":
                reason = _capable(index, _LEAST_CAPABILITY, "the Triton kernels")
            if reason == "ok" and torch.cuda.is_current_stream_capturing():
                return reason  # nothing may be tried now
            _answers[index] = _starts(index) if reason == "ok" else reason
        return _answers[index]


def _load() -> str:
    global _operators
    with _lock:
        if _operators is not None:
            return "ok"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed. Run: pip install triton"
        try:
            kernels = importlib.import_module("fastnce.triton_kernels")
        except ImportError as error:
            return f"Triton cannot be imported: {error}. Run: pip install triton"
        _operators = PythonNamespace("fastnce_triton", kernels, globals())
        return "ok"


def _starts(index: int) -> str:
    """Triton compiles on the machine it runs on, and not every machine lets it."""
    launch = importlib.import_module("fastnce.triton_kernels.launch")
    try:
        launch.start_nothing(index)
    except Exception as error:  # of a compiler, the file system, the driver
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            f"Triton cannot compile and start a kernel: {reason}. It needs a C compiler, Python's headers (Python.h) and a "
            f"cache that can be written (TRITON_CACHE_DIR)"
        )
    return "ok"


def _multiplies_fp8(device: torch.device) -> str:
    if device.type == "cpu":
        return "ok"
    if torch.version.hip is not None:
        return "products in fp8 have been written for NVIDIA GPUs alone"
    return _capable(device.index, _LEAST_CAPABILITY_FP8, "products in fp8")


def _capable(index: int | None, least: tuple[int, int], what: str) -> str:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < least:
        needed, there = (".".join(map(str, x)) for x in (least, capability))
        return f"{what} need a GPU of compute capability {needed}, this one has {there}"
    return "ok"
