"""MoCo's queue of negatives, and with labels a cross-batch memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ops.masked_info_nce import LEFT_OUT
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

    With ``labelled=True`` it is a cross-batch memory (Wang et al. 2020, https://arxiv.org/abs/1912.06798) for ``fastnce.sup_con``:
    beside each key it has a label and an id, in the state dict as ``queue_labels`` and ``queue_ids``, (size,) int64. Places that
    no key has taken count for nothing where ``reference_ids=queue.ids`` or ``reference_mask=queue.filled`` says so.

    Args:
        size: how many keys; need not be a multiple of the batch.
        dim: numbers per key.
        dtype: of the keys; the loss wants its query in the same.
        device: where.
        seed: of the keys before the first batch; the same on every rank.
        labelled: whether keys have labels and ids.

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

        The batch against the memory, in which it already is: each row's own copy is left out.

        >>> memory = fastnce.NegativeQueue(size=4096, dim=128, labelled=True)
        >>> labels = torch.arange(32) // 4
        >>> ids = memory.enqueue(query, labels)
        >>> past = {"ids": ids, "reference_ids": memory.ids}
        >>> fastnce.sup_con(query, labels, memory.keys, memory.labels, **past).backward()
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int = 0,
        labelled: bool = False,
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
        if labelled:
            nothing = torch.full((size,), LEFT_OUT, dtype=torch.int64, device=device)
            self.register_buffer("queue_labels", torch.zeros_like(nothing))
            self.register_buffer("queue_ids", nothing)
        # Of each batch the unit keys, and of a labelled queue the labels and ids.
        self._waiting: list[tuple[Tensor, ...]] = []

    @property
    def labelled(self) -> bool:
        """Whether keys have labels and ids."""
        return "queue_labels" in self._buffers

    @property
    def keys(self) -> Tensor:
        """(size, dim), a view of the queue: ``negative_keys`` of the loss. Unit rows."""
        self._write_waiting()
        if not self.queue.T.is_contiguous():  # a file's tensor, put in place of the buffer
            self.queue = self.queue.T.contiguous().T
        return self.queue.T

    @property
    def labels(self) -> Tensor:
        """(size,) int64, of the keys: ``reference_labels`` of ``fastnce.sup_con``."""
        return self._of_labelled("labels", "queue_labels")

    @property
    def ids(self) -> Tensor:
        """(size,) int64, of the keys: ``reference_ids`` of ``fastnce.sup_con``, for which places not yet taken are nothing."""
        return self._of_labelled("ids", "queue_ids")

    @property
    def filled(self) -> Tensor:
        """(size,) bool, which places keys have taken: ``reference_mask`` of ``fastnce.sup_con`` where samples have no ids."""
        return self.ids != LEFT_OUT

    def enqueue(
        self,
        keys: Tensor,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        check: bool = True,
    ) -> Tensor | None:
        """Takes in this rank's keys (N, dim), of all ranks in the order of the ranks, in place of the oldest.

        Args:
            keys: (N, dim), any N, normalised here; no gradient. Of more than ``size`` keys the last stay. In the queue's dtype, or
                under autocast in any.
            labels: (N,) integers, of a labelled queue.
            ids: (N,) integers of the samples, such as their numbers in the dataset, by which no sample meets its own older keys; None
                gives every key a new one, and so leaves out its copy alone.
            group: the ranks; None is the default group.
            check: whether the ranks compare dim, dtype and N first, see ``fastnce.distributed``. On a GPU that makes the
                host wait; without it nothing does, and all ranks must have the same N.

        Returns:
            Of a labelled queue the ids (N,) of these keys.

        Raises:
            TypeError: ``keys`` has not the queue's dtype, outside autocast.
            ValueError: a wrong shape or device, labels missing or of a queue without, or ranks that disagree.
        """
        ranks = ranks_of(group)
        # The wider of both dtypes: of it the unit rows are made, and only these are rounded to the queue's.
        keys, _ = _checks.same_dtype_under_autocast(keys, self._none())
        validate = functools.partial(self._validate, keys, labels, ids)
        if ranks is None:
            validate()
            gather = None
        else:
            gather = Gather(_OP, ranks, agree(ranks, _OP, self.queue.device, validate, check=check))

        def of_all(x: Tensor) -> Tensor:
            return x if gather is None else gather.all_rows(x)

        batch = [of_all(normalize_rows(keys.detach()).to(self.queue.dtype))]
        if self.labelled:
            batch.append(of_all(labels.to(torch.int64, copy=True)))
            if ids is None:
                batch.append(self._new_ids(len(batch[0])))
                before = 0 if gather is None else sum(gather.rows[: ranks.rank])
                ids = batch[2][before : before + len(keys)]
            else:
                ids = ids.to(torch.int64, copy=True)
                batch.append(of_all(ids))
        self._waiting.append(tuple(batch))
        return ids

    def extra_repr(self) -> str:
        dim, size = self.queue.shape
        return f"size={size}, dim={dim}" + (", labelled=True" if self.labelled else "")

    def _of_labelled(self, what: str, buffer: str) -> Tensor:
        if not self.labelled:
            # nn.Module would put its own text in the place of an AttributeError's.
            raise ValueError(
                f"NegativeQueue: no {what} in a queue of keys alone. Make it NegativeQueue(size, dim, labelled=True)."
            )
        self._write_waiting()
        return getattr(self, buffer)

    def _new_ids(self, count: int) -> Tensor:
        """(count,), none of which is in the queue, or waits to be."""
        present = torch.cat([self.queue_ids, *(batch[2] for batch in self._waiting)])
        return present.amax().clamp(min=-1) + torch.arange(1, count + 1, device=present.device)

    def _write_waiting(self) -> None:
        _write(self._waiting, *(getattr(self, name) for name in self._names()))
        self._waiting.clear()

    def _validate(self, keys: Tensor, labels: Tensor | None, ids: Tensor | None) -> dict[str, Fact]:
        _checks.expect_rows(_OP, "keys", keys, may_be_empty=True)
        dim = self.queue.shape[0]
        _checks.expect_shape(_OP, "keys", keys, (keys.shape[0], dim), f"the queue has dim={dim}")
        like, _ = _checks.same_dtype_under_autocast(self._none(), keys)
        _checks.expect_alike(_OP, "keys", keys, "the queue", like)
        for name, x in (("labels", labels), ("ids", ids)):
            if x is not None and not self.labelled:
                raise ValueError(
                    f"{_OP}: {name} are of a labelled queue. Make it NegativeQueue(size, dim, labelled=True), or drop {name}."
                )
            if x is not None:
                _checks.expect_labels(_OP, x, keys, "keys", name)
        if self.labelled and labels is None:
            raise ValueError(f"{_OP}: labels is None. Pass the labels of the keys, (N,) integers.")
        return {
            "rows": len(keys),
            "D": dim,
            "dtype": str(self.queue.dtype),
            "the queue's size": self.queue.shape[1],
            "whether keys have labels": self.labelled,
            "whether keys have ids": ids is not None,
        }

    def _names(self) -> tuple[str, ...]:
        """Of the buffers, as ``_write`` takes them."""
        return ("queue", "queue_ptr", *(("queue_labels", "queue_ids") if self.labelled else ()))

    def _none(self) -> Tensor:
        """No key, in the queue's dtype and on its device."""
        return self.queue[:, :0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NegativeQueue:
        super()._apply(fn, recurse)
        self._waiting = [tuple(map(fn, batch)) for batch in self._waiting]
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Copies, with what waits written into them: autograd may still need the queue as it is."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        names = [f"{prefix}{name}" for name in self._names()]
        copies = [destination[name].clone(memory_format=torch.contiguous_format) for name in names]
        _write(self._waiting, *copies)
        destination.update(zip(names, copies, strict=True))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}queue" in state_dict:
            self._waiting.clear()
            if self.labelled and f"{prefix}queue_ids" not in state_dict:
                self.queue_ids.fill_(LEFT_OUT)  # keys of which no label is known


@torch.no_grad()
def _write(
    waiting: list[tuple[Tensor, ...]], queue: Tensor, queue_ptr: Tensor, *others: Tensor
) -> None:
    """Writes keys (N, dim) and what else waits (N,) into ``queue`` (dim, size) and ``others`` (size,).

    From ``queue_ptr`` (1,) on, which goes on with them.
    """
    if not waiting:
        return
    size = queue.shape[1]
    keys, *more = (torch.cat(x) for x in zip(*waiting, strict=True))
    # Positions stay on the device: no host has to know where the queue stands.
    places = queue_ptr + torch.arange(len(keys), device=keys.device)
    queue.index_copy_(1, places[-size:] % size, keys[-size:].T)
    for buffer, x in zip(others, more, strict=True):
        buffer.index_copy_(0, places[-size:] % size, x[-size:])
    queue_ptr.copy_((queue_ptr + len(keys)) % size)
