"""The ``blocks`` backend: the kernels of ``fastnce.blocks``, in PyTorch's own operators, registered for torch.compile."""

import torch

from fastnce import blocks
from fastnce.backends.operators import PythonNamespace


def available() -> str:
    """PyTorch's own operators always run."""
    return "ok"


def supports(op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` is left to others."""
    return "ok" if _operators.has(op) else f"{op} keeps no matrix in plain PyTorch either"


_operators = PythonNamespace("fastnce_blocks", blocks, globals())
