"""Keys without gradient: PyTorch's fused attention, whose values are the keys, gives the loss and the query's gradient at once."""

from __future__ import annotations

import torch
from torch import Tensor

# On a GPU there is none that keeps the contract. Those of 16 bits round unit rows and the mean key: the former moves the loss, and
# where the positive dominates, the gradient is the difference of that mean and the positive key. The one of float32 multiplies
# three times in tf32, whose sums lose bits, and that has not been measured.
_OF_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def has_attention(x: Tensor) -> bool:
    """Whether :func:`attention` takes rows like ``x``."""
    return x.device.type == "cpu" and _OF_CPU is not None and x.dtype.itemsize >= 4


def attention(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The mean key ``sum_j p_ij k_j`` (B, N, D), p the softmax of ``scale q_i . k_j``, and ``log sum exp`` (B, N, 1).

    Args:
        query: (B, N, D).
        key: (B, M, D).
        scale: of the products.
    """
    query, key = query.unsqueeze(1), key.unsqueeze(1)
    mean, lse = _OF_CPU(query, key, key, scale=scale)
    return mean.squeeze(1), lse.squeeze(1).unsqueeze(-1)
