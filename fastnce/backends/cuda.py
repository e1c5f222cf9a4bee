"""The CUDA backend: the kernels of ``csrc/cuda``, as torch.ops.fastnce_cuda.*.

They need a GPU, except for tests: ``FASTNCE_CUDA_EMULATED`` names a library of the same kernels for the host (see
``tests/cuda_kernels/emulated.py``), which then run on CPU tensors.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastnce.backends import build, fakes
from fastnce.backends.operators import Operators

# The operators that each op runs. Those without a kernel in the library are not claimed.
_OPERATORS = {
    "info_nce": ("info_nce_forward", "info_nce_backward"),
    "patch_nce": ("patch_nce_forward",),
    "conditional_contrastive": (
        "conditional_contrastive_forward",
        "conditional_contrastive_backward",
    ),
    "sample_patches": ("sample_patches_forward", "sample_patches_backward"),
    "tap_patches": ("sample_patches_forward", "sample_patches_backward", "sample_patches_add_"),
    "nt_xent": ("sup_con_forward", "sup_con_backward"),
    "sup_con": ("sup_con_forward", "sup_con_backward"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_EMULATED = os.environ.get("FASTNCE_CUDA_EMULATED")
_DEVICE = "cpu" if _EMULATED else "cuda"


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine and what to do about it."""
    return _STATUS


def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device_type``."""
    if _STATUS != "ok":
        return _STATUS
    if op not in _OPS:
        return f"{op} has no CUDA kernel"
    if device_type != _DEVICE:
        return f"the CUDA kernels run on {_DEVICE} tensors{' where emulated' if _EMULATED else ''}"
    if dtype not in _DTYPES:
        return "the CUDA kernels take float32, bfloat16 and float16"
    return "ok"


def _load() -> tuple[frozenset[str], str]:
    """The ops that the loaded library has kernels for, and ``"ok"``, or why nothing is loaded."""
    reason = "ok" if _EMULATED else _gpu()
    if reason != "ok":
        return frozenset(), reason
    how = "python -m tests.cuda_kernels.emulated" if _EMULATED else "FASTNCE_CUDA=1 fastnce build"
    library = Path(_EMULATED) if _EMULATED else build.find_library(build.CUDA)
    if library is None or not library.is_file():
        return frozenset(), f"the CUDA library is not built. Run: {how}"
    if not build.is_current(library, build.CUDA):
        return frozenset(), f"{library} was built from other sources. Run: {how}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        return frozenset(), f"the CUDA library cannot be loaded: {reason}. Run: {how}"
    fakes.register("fastnce_cuda")
    return frozenset(op for op, names in _OPERATORS.items() if all(map(_has_kernel, names))), "ok"


def _gpu() -> str:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU, and this torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return f"the CUDA kernels need a GPU of compute capability 8.0, this one has {capability[0]}.{capability[1]}"
    return "ok"


def _has_kernel(operator: str) -> bool:
    name = f"fastnce_cuda::{operator}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, _DEVICE.upper())


_OPS, _STATUS = _load()
_operators = Operators("fastnce_cuda")
info_nce_forward = _operators.info_nce_forward
info_nce_backward = _operators.info_nce_backward
patch_nce_forward = _operators.patch_nce_forward
conditional_contrastive_forward = _operators.conditional_contrastive_forward
conditional_contrastive_backward = _operators.conditional_contrastive_backward
sup_con_forward = _operators.sup_con_forward
sup_con_backward = _operators.sup_con_backward
sample_patches_forward = _operators.sample_patches_forward
sample_patches_backward = _operators.sample_patches_backward
sample_patches_add_ = _operators.sample_patches_add_
