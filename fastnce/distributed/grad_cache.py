"""Batches of any size through encoders that could not hold them: gradient caching."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from fastnce.ops import _checks


class GradCache:
    """The gradients of one large batch from two passes in chunks (Gao et al. 2021, https://arxiv.org/abs/2101.06983).

    The first pass encodes all chunks without keeping activations; the loss of all representations together gives their gradients;
    the second pass encodes each chunk again, with the random state of the first, and goes back through it. Memory is that of one
    chunk's activations and all representations; the price is one more forward.

    Equal to the one pass where a sample's representation depends on that sample alone. Batch normalisation does not (its
    statistics are a chunk's, and are updated twice): use group or layer normalisation, or put it in ``eval``.

    An encoder under DDP or ``fully_shard`` exchanges gradients once, with its last chunk. These also communicate in forwards: every
    rank needs the same number of chunks, if not of samples.

    Args:
        encoders: one per input: (chunk) -> (n, D). The same one may come twice.
        loss: (representations (N, D) of each encoder) -> scalar, such as :func:`fastnce.nt_xent`, or
            :func:`fastnce.distributed.nt_xent` for the batches of all ranks.
        chunk_size: samples per chunk.
        scaler: for fp16 training; scales the loss.

    Raises:
        TypeError: ``chunk_size`` is no int.
        ValueError: no encoder, or ``chunk_size`` below 1.

    Example:
        >>> import torch, fastnce
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> cache = fastnce.GradCache(encoder, encoder, loss=fastnce.nt_xent, chunk_size=32)
        >>> loss = cache.backward(torch.randn(256, 16), torch.randn(256, 16))  # the parameters have their .grad
    """

    def __init__(
        self,
        *encoders: Callable[[Any], Tensor],
        loss: Callable[..., Tensor],
        chunk_size: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not encoders:
            raise ValueError("GradCache: encoders are missing. Pass one per input of the loss.")
        _checks.expect_int_at_least("GradCache", "chunk_size", chunk_size, 1)
        self.encoders, self.loss, self.chunk_size = encoders, loss, chunk_size
        self.scaler = scaler

    def backward(self, *inputs: Any, **loss_options: Any) -> Tensor:
        """Adds the gradients of ``loss(encoder(input) ..., **loss_options)`` to all parameters, those of the loss among them.

        Args:
            inputs: one per encoder: a tensor (N, ...), or tensors of the same N in tuples, lists or dicts.
            loss_options: passed on to the loss.

        Returns:
            The loss, detached and unscaled.

        Raises:
            ValueError: another number of inputs than of encoders, or tensors of different N in one input.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"GradCache.backward: expected {len(self.encoders)} inputs, one per encoder, got {len(inputs)}."
            )
        parts = [_Input(*pair, self.chunk_size) for pair in zip(self.encoders, inputs, strict=True)]
        representations = [part.encode() for part in parts]
        # Weights that autocast converted without gradients must not serve the second pass.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            loss = self.loss(*representations, **loss_options)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        last = {id(part.encoder): part for part in parts if part.is_trained}
        for part, found in zip(parts, representations, strict=True):
            if part.is_trained:
                part.backward(found.grad, sync=last[id(part.encoder)] is part)
        return loss.detach()


class _Input:
    """One encoder and its input in chunks."""

    def __init__(self, encoder: Callable[[Any], Tensor], value: Any, chunk_size: int) -> None:
        self.encoder = encoder
        self.is_trained = not isinstance(encoder, nn.Module) or any(
            parameter.requires_grad for parameter in encoder.parameters()
        )
        self._chunks = _split(value, chunk_size)
        self._states: list[_RandomState] = []

    @torch.no_grad()
    def encode(self) -> Tensor:
        """(N, D), a leaf that gets a gradient if the encoder is trained."""
        found = []
        for chunk in self._chunks:
            self._states.append(_RandomState(chunk))
            found.append(self.encoder(chunk))
        return torch.cat(found).requires_grad_(self.is_trained)

    def backward(self, grad: Tensor, sync: bool) -> None:
        """The second pass; ``sync``: this is the encoder's last input, so the last chunk is where ranks exchange gradients."""
        last = len(self._chunks) - 1
        grads = grad.split([_length(chunk) for chunk in self._chunks])
        for at, (chunk, part) in enumerate(zip(self._chunks, grads, strict=True)):
            with (
                self._states[at].restored(),
                torch.enable_grad(),
                _gradient_sync(self.encoder, sync and at == last),
            ):
                self.encoder(chunk).backward(part)


class _RandomState:
    """torch's random state, of the CPU and of the devices of some tensors."""

    def __init__(self, tensors: Any) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*pytree.tree_leaves(tensors))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Goes back to this state, and afterwards to the present one."""
        device_type = "cuda" if self._devices else "cpu"
        with torch.random.fork_rng(self._devices, device_type="cuda", enabled=True):
            torch.set_rng_state(self._cpu)
            if self._devices:
                set_device_states(self._devices, self._states, device_type=device_type)
            yield


@contextlib.contextmanager
def _gradient_sync(encoder: object, wanted: bool) -> Iterator[None]:
    """Whether DDP or ``fully_shard`` exchanges gradients in the backward inside the block."""
    if hasattr(encoder, "set_requires_gradient_sync"):
        encoder.set_requires_gradient_sync(wanted)
        try:
            yield
        finally:
            encoder.set_requires_gradient_sync(True)
    elif hasattr(encoder, "no_sync") and not wanted:
        with encoder.no_sync():
            yield
    else:
        yield


def _split(value: Any, chunk_size: int) -> list[Any]:
    """``value`` with every tensor in it cut into chunks; whatever is no tensor goes with every chunk."""
    leaves, structure = pytree.tree_flatten(value)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    lengths = {len(x) for x in tensors}
    if len(lengths) != 1:
        raise ValueError(
            f"GradCache.backward: an input must hold tensors of one length, got lengths {sorted(lengths)}."
        )
    pieces = [x.split(chunk_size) if isinstance(x, Tensor) else None for x in leaves]
    count = len(tensors[0].split(chunk_size))
    return [
        pytree.tree_unflatten(
            [x if cut is None else cut[at] for x, cut in zip(leaves, pieces, strict=True)],
            structure,
        )
        for at in range(count)
    ]


def _length(chunk: Any) -> int:
    return next(len(x) for x in pytree.tree_leaves(chunk) if isinstance(x, Tensor))
