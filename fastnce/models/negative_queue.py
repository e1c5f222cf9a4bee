"""MoCo's queue of keys (stands in until the package has its own)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NegativeQueue(nn.Module):
    """First in, first out: `keys` (size, dim), at first random unit vectors."""

    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Puts `keys` (N, dim) in the place of the oldest ones."""
        size = len(self.keys)
        keys = keys[-size:]
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.keys[places] = F.normalize(keys.to(self.keys.dtype))
        self.pointer.add_(len(keys)).remainder_(size)
