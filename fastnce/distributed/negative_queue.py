"""MoCo's queue of negatives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ranks import Fact, Gather, agree, ranks_of
from fastnce.reference.normalize import normalize_rows

_OP = "NegativeQueue.enqueue"


class NegativeQueue(nn.Module):
    """A first-in-first-out queue of keys as negatives (He et al. 2020, https://arxiv.org/abs/1911.05722).

    Its state dict has the published names and shapes, ``queue`` (dim, size) and ``queue_ptr`` (1,), contiguous as safetensors wants
    them; in memory each key is one run of numbers, so that the fused loss reads the queue where it lies. Ranks begin with the
    same random unit keys and take in the same keys, so that they stay alike.

    What ``enqueue`` is given is written when ``keys`` are next read: autograd may still need the present ones for the
    backward of the loss. Until then it waits: it moves and converts with the module, and is in its copies and state dicts.

    Args:
        size: how many keys; need not be a multiple of the batch.
        dim: numbers per key.
        dtype: of the keys; the loss wants its query in the same.
        device: where.
        seed: of the keys before the first batch; the same on every rank.

    Raises:
        TypeError: ``size`` or ``dim`` is no int.
        ValueError: ``size`` or ``dim`` below 1.

    Examples:
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
        _write(self._waiting, self.queue, self.queue_ptr)
        self._waiting.clear()
        if not self.queue.T.is_contiguous():  # a file's tensor, put in place of the buffer
            self.queue = self.queue.T.contiguous().T
        return self.queue.T

    def enqueue(
        self, keys: Tensor, *, group: dist.ProcessGroup | None = None, check: bool = True
    ) -> None:
        """Takes in this rank's keys (N, dim), of all ranks in the order of the ranks, in place of the oldest.

        Args:
            keys: (N, dim), any N, normalised here; no gradient. Of more than ``size`` keys the last stay. In the queue's dtype, or
                under autocast in any.
            group: the ranks; None is the default group.
            check: whether the ranks compare dim, dtype and N first, see ``fastnce.distributed``. On a GPU that makes the
                host wait; without it nothing does, and all ranks must have the same N.

        Raises:
            TypeError: ``keys`` has not the queue's dtype, outside autocast.
            ValueError: a wrong shape or device, or ranks that disagree.
        """
        ranks = ranks_of(group)
        # The wider of both dtypes: of it the unit rows are made, and only these are rounded to the queue's.
        keys, _ = _checks.same_dtype_under_autocast(keys, self._none())
        if ranks is None:
            self._validate(keys)
            rows = None
        else:
            validate = functools.partial(self._validate, keys)
            rows = agree(ranks, _OP, self.queue.device, validate, check=check)
        unit = normalize_rows(keys.detach()).to(self.queue.dtype)
        self._waiting.append(unit if ranks is None else Gather(_OP, ranks, rows).all_rows(unit))

    def extra_repr(self) -> str:
        dim, size = self.queue.shape
        return f"size={size}, dim={dim}"

    def _validate(self, keys: Tensor) -> dict[str, Fact]:
        _checks.expect_rows(_OP, "keys", keys, may_be_empty=True)
        dim = self.queue.shape[0]
        _checks.expect_shape(_OP, "keys", keys, (keys.shape[0], dim), f"the queue has dim={dim}")
        like, _ = _checks.same_dtype_under_autocast(self._none(), keys)
        _checks.expect_alike(_OP, "keys", keys, "the queue", like)
        return {
            "rows": len(keys),
            "D": dim,
            "dtype": str(self.queue.dtype),
            "the queue's size": self.queue.shape[1],
        }

    def _none(self) -> Tensor:
        """No key, in the queue's dtype and on its device."""
        return self.queue[:, :0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NegativeQueue:
        super()._apply(fn, recurse)
        self._waiting = [fn(keys) for keys in self._waiting]
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Copies, with what waits written into them: autograd may still need the queue as it is."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        names = [f"{prefix}{name}" for name in ("queue", "queue_ptr")]
        copies = [destination[name].clone(memory_format=torch.contiguous_format) for name in names]
        _write(self._waiting, *copies)
        destination.update(zip(names, copies, strict=True))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}queue" in state_dict:
            self._waiting.clear()


@torch.no_grad()
def _write(waiting: list[Tensor], queue: Tensor, queue_ptr: Tensor) -> None:
    """Writes keys (N, dim) each into ``queue`` (dim, size) from ``queue_ptr`` (1,) on, which goes on with them."""
    if not waiting:
        return
    size = queue.shape[1]
    keys = torch.cat(waiting)
    # Positions stay on the device: no host has to know where the queue stands.
    places = queue_ptr + torch.arange(len(keys), device=keys.device)
    queue.index_copy_(1, places[-size:] % size, keys[-size:].T)
    queue_ptr.copy_((queue_ptr + len(keys)) % size)
