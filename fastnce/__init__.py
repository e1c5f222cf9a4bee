"""Exact contrastive losses with fused kernels, and training of the systems that live on them.

Examples:
    >>> import torch, fastnce
    >>> query = torch.randn(256, 128, requires_grad=True)
    >>> loss = fastnce.info_nce(query, torch.randn(256, 128), temperature=0.07)
    >>> loss.backward()
"""

import importlib
import importlib.util
import sys
from pathlib import Path

from fastnce import waiting

waiting.set_for_commands()  # before torch is imported


class _KernelsBeside:
    """Finds fastnce.triton_kernels in a checkout, where they lie beside the package as csrc does; an installation has them inside."""

    package = Path(__file__).resolve().parent
    kernels = package.parent / "triton_kernels" / "__init__.py"

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
        if name != "fastnce.triton_kernels":
            return None
        return importlib.util.spec_from_file_location(name, cls.kernels)


if not (_KernelsBeside.package / "triton_kernels").is_dir() and _KernelsBeside.kernels.is_file():
    sys.meta_path.insert(0, _KernelsBeside)

from fastnce import backends, losses  # noqa: E402
from fastnce.backends import use_backend  # noqa: E402
from fastnce.ops.conditional_contrastive import conditional_contrastive  # noqa: E402
from fastnce.ops.contrastive_distillation import contrastive_distillation  # noqa: E402
from fastnce.ops.info_nce import info_nce  # noqa: E402
from fastnce.ops.nt_xent import nt_xent  # noqa: E402
from fastnce.ops.pairwise_cosine_similarity import pairwise_cosine_similarity  # noqa: E402
from fastnce.ops.patch_nce import patch_nce  # noqa: E402
from fastnce.ops.sample_patches import sample_patches, tap_patches  # noqa: E402
from fastnce.ops.sigmoid_contrastive import sigmoid_contrastive  # noqa: E402
from fastnce.ops.softmax_shapes import contrastive_cross_entropy  # noqa: E402
from fastnce.ops.sup_con import sup_con  # noqa: E402
from fastnce.registry import OPS  # noqa: E402

# Loaded when first asked for: most programs have one process, and verify once.
_LAZY = {
    "distributed": ("fastnce.distributed", ""),
    "GradCache": ("fastnce.distributed", "GradCache"),
    "NegativeQueue": ("fastnce.distributed", "NegativeQueue"),
    "integrations": ("fastnce.integrations", ""),
    "verify": ("fastnce.verification", "verify"),
}

__version__ = "0.2.0"

__all__ = [
    "GradCache",
    "NegativeQueue",
    "backends",
    "conditional_contrastive",
    "contrastive_cross_entropy",
    "contrastive_distillation",
    "distributed",
    "info_nce",
    "integrations",
    "losses",
    "nt_xent",
    "pairwise_cosine_similarity",
    "patch_nce",
    "sample_patches",
    "sigmoid_contrastive",
    "sup_con",
    "tap_patches",
    "use_backend",
    "verify",
]


def __getattr__(name: str) -> object:
    # Those above are named for whoever reads the source; an op that is declared is here anyway.
    if name in OPS and OPS[name].function is not None:
        return OPS[name].function
    if name not in _LAZY:
        raise AttributeError(f"module 'fastnce' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module
