"""MoCo's queue of negatives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnce.distributed._exchange import Gather
from fastnce.distributed._losses import expect_rows
from fastnce.distributed._ranks import Fact, agree, ranks_of
from fastnce.ops import _checks
from fastnce.reference.normalize import normalize_rows

_OP = "NegativeQueue.enqueue"


class NegativeQueue(nn.Module):
    """A first-in-first-out queue of keys as negatives (He et al. 2020, https://arxiv.org/abs/1911.05722).

    Its state dict has the published names and shapes, ``queue`` (dim, size) and ``queue_ptr`` (1,); in memory each key is one run
    of numbers, so that the fused loss reads the queue where it lies. Ranks begin with the same random unit keys and take in the
    same keys, so that they stay alike.

    What :meth:`enqueue` is given is written when :attr:`keys` are next read: autograd may still need the present ones for the
    backward of the loss.

    Args:
        size: how many keys; need not be a multiple of the batch.
        dim: numbers per key.
        dtype: of the keys; the loss wants its query in the same.
        device: where.
        seed: of the keys before the first batch; the same on every rank.

    Raises:
        TypeError: ``size`` or ``dim`` is no int.
        ValueError: ``size`` or ``dim`` below 1.

    Example:
        >>> import torch, fastnce
        >>> queue = fastnce.NegativeQueue(size=4096, dim=128)
        >>> query, key = torch.randn(2, 32, 128)
        >>> loss = fastnce.info_nce(query.requires_grad_(), key, queue.keys, temperature=0.2)
        >>> queue.enqueue(key)
        >>> loss.backward()
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _checks.expect_int_at_least("NegativeQueue", "size", size, 1)
        _checks.expect_int_at_least("NegativeQueue", "dim", dim, 1)
        keys = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        keys = normalize_rows(keys).to(device=device, dtype=dtype)
        self.register_buffer("queue", keys.T)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64, device=device))
        self.queue: Tensor
        self.queue_ptr: Tensor
        self._waiting: list[Tensor] = []

    @property
    def keys(self) -> Tensor:
        """(size, dim), a view of the queue: ``negative_keys`` of the loss. Unit rows."""
        self._write()
        return self.queue.T

    def enqueue(
        self, keys: Tensor, *, group: dist.ProcessGroup | None = None, check: bool = True
    ) -> None:
        """Takes in this rank's keys (N, dim), of all ranks in the order of the ranks, in place of the oldest.

        Args:
            keys: (N, dim), any N, normalised here; no gradient. Of more than ``size`` keys the last stay.
            group: the ranks; None is the default group.
            check: whether the ranks compare dim, dtype and N first, see :mod:`fastnce.distributed`. On a GPU that makes the
                host wait; without it nothing does, and all ranks must have the same N.

        Raises:
            TypeError: ``keys`` has not the queue's dtype.
            ValueError: a wrong shape or device, or ranks that disagree.
        """
        ranks = ranks_of(group)
        if ranks is None:
            self._validate(keys)
            self._waiting.append(normalize_rows(keys.detach()))
            return
        rows = agree(ranks, _OP, self.queue.device, lambda: self._validate(keys), check=check)
        gathered = Gather(_OP, ranks, rows).all_rows(normalize_rows(keys.detach()))
        self._waiting.append(gathered)

    def extra_repr(self) -> str:
        dim, size = self.queue.shape
        return f"size={size}, dim={dim}"

    def _validate(self, keys: Tensor) -> dict[str, Fact]:
        expect_rows(_OP, "keys", keys)
        dim = self.queue.shape[0]
        _checks.expect_shape(_OP, "keys", keys, (keys.shape[0], dim), f"the queue has dim={dim}")
        _checks.expect_alike(_OP, "keys", keys, "the queue", self.queue)
        return {
            "rows": len(keys),
            "D": dim,
            "dtype": str(keys.dtype),
            "the queue's size": self.queue.shape[1],
        }

    @torch.no_grad()
    def _write(self) -> None:
        if not self._waiting:
            return
        size = self.queue.shape[1]
        keys = torch.cat(self._waiting)
        self._waiting.clear()
        # Positions stay on the device: no host has to know where the queue stands.
        places = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(1, places[-size:] % size, keys[-size:].T)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self._write()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._waiting.clear()
        super()._load_from_state_dict(*args, **kwargs)
