"""The public ops: argument checks, the choice of a backend, and autograd. No maths."""

from fastnce.ops.conditional_contrastive import conditional_contrastive
from fastnce.ops.info_nce import info_nce
from fastnce.ops.nt_xent import nt_xent
from fastnce.ops.pairwise_cosine_similarity import pairwise_cosine_similarity
from fastnce.ops.patch_nce import patch_nce
from fastnce.ops.sample_patches import sample_patches, tap_patches
from fastnce.ops.sup_con import sup_con

__all__ = [
    "conditional_contrastive",
    "info_nce",
    "nt_xent",
    "pairwise_cosine_similarity",
    "patch_nce",
    "sample_patches",
    "sup_con",
    "tap_patches",
]
