"""PyTorch's operators that a call starts."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    """Inside the block keeps the names of those that start something: neither views nor room for results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = any(isinstance(x, torch.Tensor) for x in tree_leaves(found))
        if tensors and not function.is_view and "empty" not in name:
            self.names.append(name)
        return found
