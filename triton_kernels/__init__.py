"""The GPU backend's kernels: every op in Triton, from Ampere to Blackwell.

The functions are those of every backend (see ``fastnce.backends``): ``<op>_forward`` and ``<op>_backward`` over validated tensors.
With ``TRITON_INTERPRET=1``, set before the package is imported, they run on CPU tensors as well, for tests.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch

try:
    import triton  # noqa: F401
except ImportError as error:
    _MISSING = f"Triton cannot be imported: {error}. Run: pip install triton"
else:
    _MISSING = ""
    from .launch import INTERPRETED

    # The functions of the backend, whichever file they are in.
    for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
        _module = importlib.import_module(_file.name)
        for _name, _function in vars(_module).items():
            if _name.endswith(("_forward", "_backward", "_add_")) and not _name.startswith("_"):
                globals()[_name] = _function

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_LEAST_CAPABILITY_FP8 = (8, 9)


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine."""
    if _MISSING:
        return _MISSING
    if INTERPRETED:
        return "ok"
    if not torch.cuda.is_available():
        return "the Triton kernels need a GPU, and this torch sees none"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        return f"the Triton kernels need a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    return "ok"


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device``."""
    reason = available()
    if reason != "ok":
        return reason
    kind = torch.device(device).type
    if kind != "cuda" and not (INTERPRETED and kind == "cpu"):
        return "the Triton kernels run on cuda tensors"
    if dtype not in _DTYPES:
        return "the Triton kernels take float32, bfloat16 and float16"
    if op == "info_nce_fp8" and not INTERPRETED:
        return _multiplies_fp8()
    return "ok"


def _multiplies_fp8() -> str:
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is not None:
        return "products in fp8 have been written for NVIDIA GPUs alone"
    if capability < _LEAST_CAPABILITY_FP8:
        return f"products in fp8 need a GPU of compute capability 8.9, this one has {capability[0]}.{capability[1]}"
    return "ok"
