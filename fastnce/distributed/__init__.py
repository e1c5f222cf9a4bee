"""Losses against the samples of all ranks of a process group."""

from fastnce.distributed.conditional_contrastive import conditional_contrastive

__all__ = ["conditional_contrastive"]
