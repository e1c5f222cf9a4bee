"""The ``blocks`` backend: the kernels of ``fastnce.blocks``, in PyTorch's own operators, registered for torch.compile."""

import torch

from fastnce import blocks
from fastnce.backends.operators import PythonNamespace
from fastnce.registry import Form


def available() -> str:
    """PyTorch's own operators always run."""
    return "ok"


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` is left to others."""
    return "ok" if _operators.has(op) else f"{op} keeps no matrix in plain PyTorch either"


def lacks(op: str, dtype: torch.dtype, form: Form) -> str:
    """``""``, or why such calls are left to others."""
    if op == "patch_nce" and form.name not in ("keys fixed", "both gradients"):
        return "in blocks, patch_nce has one direction, without query_negatives"
    return ""


_operators = PythonNamespace("fastnce_blocks", blocks, globals())
