"""The ``torch`` backend: every op in plain PyTorch, written to be read beside its equation.

It is the specification, the fallback on every device, the oracle of the tests and the baseline of the benchmarks. The functions
are differentiable; autograd derives their gradients. They take inputs that :mod:`fastnce.ops` has validated.
"""

import torch

from fastnce.reference.conditional_contrastive import conditional_contrastive
from fastnce.reference.info_nce import info_nce
from fastnce.reference.labelled_lse import labelled_lse_backward, labelled_lse_forward
from fastnce.reference.pairwise_cosine_similarity import pairwise_cosine_similarity
from fastnce.reference.sample_patches import draw_patch_ids, sample_patches
from fastnce.reference.sup_con import sup_con

__all__ = [
    "available",
    "conditional_contrastive",
    "draw_patch_ids",
    "info_nce",
    "labelled_lse_backward",
    "labelled_lse_forward",
    "pairwise_cosine_similarity",
    "sample_patches",
    "sup_con",
    "supports",
]


def available() -> str:
    """Plain PyTorch always runs."""
    return "ok"


def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Plain PyTorch runs every op on every device and floating-point dtype."""
    return "ok"
