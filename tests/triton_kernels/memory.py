"""How much memory a call holds at its peak, without a GPU: of tensors without memory whose storages are counted while they live."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block counts the bytes of all storages that were made in it and are still referred to.

    Not counted is what an operation of the library takes for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is_tensor(x)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if _is_tensor(x) and x.untyped_storage()._cdata not in given:
                self._count(x.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.live += size

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)
