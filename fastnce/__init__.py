"""Exact contrastive losses with fused kernels, and training of the systems that live on them.

Example:
    >>> import torch, fastnce
    >>> query = torch.randn(256, 128, requires_grad=True)
    >>> loss = fastnce.info_nce(query, torch.randn(256, 128), temperature=0.07)
    >>> loss.backward()
"""

import importlib
from pathlib import Path

from fastnce import waiting

waiting.set_for_commands()  # before torch is imported

# In a checkout the kernels lie beside the package, as its sources do; an installation has them inside.
_here = Path(__file__).resolve().parent
if not (_here / "triton_kernels").is_dir() and (_here.parent / "triton_kernels").is_dir():
    __path__.append(str(_here.parent))

from fastnce import backends, losses  # noqa: E402
from fastnce.backends import use_backend  # noqa: E402
from fastnce.ops import (  # noqa: E402
    conditional_contrastive,
    info_nce,
    nt_xent,
    pairwise_cosine_similarity,
    patch_nce,
    sample_patches,
    sup_con,
    tap_patches,
)

# Loaded when first asked for: most programs have one process.
_LAZY = {"distributed": "", "GradCache": "GradCache", "NegativeQueue": "NegativeQueue"}

__version__ = "0.1.0"

__all__ = [
    "GradCache",
    "NegativeQueue",
    "backends",
    "conditional_contrastive",
    "distributed",
    "info_nce",
    "losses",
    "nt_xent",
    "pairwise_cosine_similarity",
    "patch_nce",
    "sample_patches",
    "sup_con",
    "tap_patches",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastnce' has no attribute {name!r}")
    module = importlib.import_module("fastnce.distributed")
    return getattr(module, _LAZY[name]) if _LAZY[name] else module
