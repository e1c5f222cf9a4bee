"""The compiled backend: the kernels of ``csrc/``, as torch.ops.fastnce.*.

The library is loaded once, when this module is imported, if it is there. Where it is not, ``available`` says why and
everything else of the package works without it.
"""

from __future__ import annotations

import torch

from fastnce.backends import build
from fastnce.backends.operators import Namespace
from fastnce.registry import Form

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu",)


def available() -> str:
    """``"ok"``, or why the compiled library is not loaded and what to do about it."""
    return _STATUS


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device``."""
    if _STATUS != "ok" or _operators is None:
        return _STATUS
    if not _operators.has(op):
        return f"{op} has no compiled kernel yet"
    if torch.device(device).type not in _DEVICES:
        return f"the compiled kernels run on {', '.join(_DEVICES)} tensors"
    if dtype not in _DTYPES:
        return "the compiled kernels take float64, float32, bfloat16 and float16"
    return "ok"


def lacks(op: str, dtype: torch.dtype, form: Form) -> str:
    """Why calls of this form are left to others, "" where they are not."""
    del dtype
    return "no ids or masks yet" if (op, form.name) == ("sigmoid_contrastive", "masked") else ""


def instruction_set() -> str:
    """``portable``, ``avx2``, ``avx512`` or ``avx512bf16``: the processor's widest, or what ``FASTNCE_CPU_ISA`` asks for.

    Raises:
        RuntimeError: ``FASTNCE_CPU_ISA`` is unknown, or not of this processor.
    """
    return torch.ops.fastnce.instruction_set()


def fma_peak(seconds: float = 0.05, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of multiply-adds in registers on all threads: what no product of this processor exceeds.

    Of the instruction set that the kernels use, and measured now: other processes lower it.

    Args:
        seconds: how long; half of it again goes before, for the clock frequency.
        dtype: of the factors: float64, float32, or bfloat16 where the processor multiplies it; otherwise float32.
    """
    known = (torch.float64, torch.bfloat16)
    name = str(dtype if dtype in known else torch.float32).removeprefix("torch.")
    return torch.ops.fastnce.fma_peak(seconds, name)


def _load() -> tuple[Namespace | None, str]:
    """The operators of the loaded library, or why there are none."""
    try:
        library = build.find_library()
        if library is None:
            return None, "the native library is not built. Run: fastnce build"
        if not build.is_current(library):
            return None, f"{library} was built from other sources. Run: fastnce build"
        torch.ops.load_library(library)
        operators = Namespace("fastnce", "CPU", globals())
        operators.define("instruction_set() -> str")
        operators.define("fma_peak(float seconds, str dtype) -> float")
        return operators, "ok"
    except (OSError, RuntimeError) as error:
        # A library for another processor or an older torch; reported, for the rest works without it.
        reason = str(error).strip().splitlines()[0]
        return None, f"the native library cannot be loaded: {reason}. Run: fastnce build"


_operators, _STATUS = _load()
