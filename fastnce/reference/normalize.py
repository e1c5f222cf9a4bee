"""L2 normalisation of rows, safe for zero, tiny and huge rows."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize_rows(x: Tensor) -> Tensor:
    """``x / ||x||`` over the last dimension; an all-zero row stays zero and gets a zero gradient.

    Each row is divided by its largest magnitude first (which leaves the result as it is), so that the sum of squares neither
    overflows nor underflows.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    is_zero = largest == 0
    x = x / largest.masked_fill(is_zero, 1)
    norm = x.square().sum(dim=-1, keepdim=True).masked_fill(is_zero, 1).sqrt()
    return (x / norm).masked_fill(is_zero, 0)
