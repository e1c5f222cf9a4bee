"""Batches of any size through encoders that could not hold them: gradient caching."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastnce.ops import _checks

_NOTHING = (
    "GradCache.backward: the loss depends on nothing that is trained: all encoders are frozen, or it detaches their "
    "representations. Unfreeze an encoder, or call encoders and loss without GradCache."
)


class GradCache:
    """The gradients of one large batch from two passes in chunks (Gao et al. 2021, https://arxiv.org/abs/2101.06983).

    The first pass encodes all chunks without keeping activations; the loss of all representations together gives their gradients;
    the second pass encodes each chunk again, with the random state of the first, and goes back through it. Memory is that of one
    chunk's activations and all representations; the price is one more forward.

    Equal to the one pass where a sample's representation depends on that sample alone. Batch normalisation does not (its
    statistics are a chunk's, and are updated twice): use group or layer normalisation, or put it in ``eval``.

    An encoder under DDP or ``fully_shard`` exchanges gradients once, with its last chunk. These also communicate in forwards: every
    rank needs the same number of chunks, if not of samples. Pass the wrapped module itself: a method of ``ddp.module`` goes
    past DDP, and nobody averages its gradients. With such an encoder, the gradients of the loss's own parameters (a learnable
    temperature) are averaged over the ranks too, whether these belong to it or to no wrapped module.

    Args:
        encoders: one per input: (chunk) -> (n, D). The same one may come twice; modules, methods and functions may be frozen.
        loss: (representations (N, D) of each encoder) -> scalar, such as ``fastnce.nt_xent``, or
            ``fastnce.distributed.nt_xent`` for the batches of all ranks.
        chunk_size: samples per chunk.
        scaler: for fp16 training; scales the loss.

    Raises:
        TypeError: ``chunk_size`` is no int.
        ValueError: no encoder, or ``chunk_size`` below 1.

    Examples:
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
            inputs: one per encoder: a tensor (N, ...), or tensors of the same N in tuples, lists, dicts or other mappings
                (``BatchEncoding``). Numbers, 0-d tensors and whatever is no tensor go with every chunk.
            loss_options: passed on to the loss.

        Returns:
            The loss, detached and unscaled.

        Raises:
            TypeError: an encoder or the loss returns no tensor.
            ValueError: another number of inputs than of encoders; tensors of different N in one input, or none; an encoder or
                the loss returns another shape; a loss that depends on nothing trained; or one that uses a parameter which
                ``fully_shard`` has sharded.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"GradCache.backward: expected {len(self.encoders)} inputs, one per encoder, got {len(inputs)}."
            )
        parts = [
            _Input(at, *pair, self.chunk_size)
            for at, pair in enumerate(zip(self.encoders, inputs, strict=True))
        ]
        representations = [part.encode() for part in parts]
        # Weights that autocast converted without gradients must not serve the second pass.
        torch.clear_autocast_cache()
        with torch.enable_grad():
            loss = self.loss(*representations, **loss_options)
            _expect_loss(loss)
            others = _leaves_of(loss, representations)
            _expect_whole(others)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        # An input that the loss does not use has no gradient to go back with.
        used = [
            (part, found.grad)
            for part, found in zip(parts, representations, strict=True)
            if found.grad is not None
        ]
        last = {id(part.encoder): part for part, _ in used}
        trained = [
            part.encoder
            for part, grad in used
            if part.backward(grad, sync=last[id(part.encoder)] is part)
        ]
        if not trained and not others:
            raise ValueError(_NOTHING)
        _average([x for x in others if isinstance(x, nn.Parameter)], self.encoders, trained)
        return loss.detach()


class _Input:
    """One encoder and its input in chunks."""

    def __init__(
        self, at: int, encoder: Callable[[Any], Tensor], value: Any, chunk_size: int
    ) -> None:
        self.at, self.encoder = at, encoder
        # Of a function or method nobody knows before it has run.
        self._may_train = not isinstance(encoder, nn.Module) or any(
            x.requires_grad for x in encoder.parameters()
        )
        length = _length(value)
        starts = range(0, max(length, 1), chunk_size)
        self._sizes = [min(chunk_size, length - start) for start in starts]
        self._chunks = [_rows(value, slice(start, start + chunk_size)) for start in starts]
        self._devices = _devices(encoder, value)
        self._states: list[_RandomState] = []

    @torch.no_grad()
    def encode(self) -> Tensor:
        """(N, D), a leaf that gets a gradient if the encoder may be trained."""
        found = []
        for chunk, size in zip(self._chunks, self._sizes, strict=True):
            self._states.append(_RandomState(self._devices))
            found.append(self.encoder(chunk))
            self._expect_rows(found[-1], size)
        return torch.cat(found).requires_grad_(self._may_train)

    def backward(self, grad: Tensor, sync: bool) -> bool:
        """The second pass; returns whether anything is trained.

        Args:
            grad: (N, D), of the representations.
            sync: this is the encoder's last input, so the last chunk is where ranks exchange gradients.
        """
        last = len(self._chunks) - 1
        for at, (chunk, part) in enumerate(zip(self._chunks, grad.split(self._sizes), strict=True)):
            now = sync and at == last
            with (
                self._states[at].restored(),
                torch.enable_grad(),
                _gradient_sync(self.encoder, now),
            ):
                found = self.encoder(chunk)
                if not found.requires_grad:  # a function of frozen parts
                    return False
                if now and _is_ddp(self.encoder):
                    _backward_of_all(self.encoder, found, part)
                else:
                    found.backward(part)
        return True

    def _expect_rows(self, found: object, size: int) -> None:
        expected = f"encoder {self.at} must return a tensor (n, D), here ({size}, D)"
        if not isinstance(found, Tensor):
            raise TypeError(
                f"GradCache.backward: {expected}, got {type(found).__name__}. "
                "Wrap it in a module or function that returns the representations alone."
            )
        if found.dim() == 0 or len(found) != size:
            raise ValueError(
                f"GradCache.backward: {expected}, got {_checks.shape_of(found)}. Return one row per sample."
            )


def _modules_of(encoder: object) -> list[nn.Module]:
    """The modules that an encoder runs, as far as it can be seen: itself, whose method it is, and what a function names."""
    if isinstance(encoder, functools.partial):
        parts = [encoder.func, *encoder.args, *encoder.keywords.values()]
        return [module for part in parts for module in _modules_of(part)]
    seen = [encoder, getattr(encoder, "__self__", None)]
    if inspect.isfunction(encoder):
        with contextlib.suppress(ValueError):  # a name that has no value yet
            names = inspect.getclosurevars(encoder)
            seen += [*names.nonlocals.values(), *names.globals.values()]
    return [x for x in seen if isinstance(x, nn.Module)]


class _RandomState:
    """torch's random state on the CPU and some ``devices``."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = {
            device: torch.get_device_module(device).get_rng_state(device) for device in devices
        }

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Goes back to this state, and afterwards to the present one."""
        present = _RandomState(self._others)
        self._set()
        try:
            yield
        finally:
            present._set()

    def _set(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)


def _devices(encoder: object, value: Any) -> set[torch.device]:
    """Where an encoder may draw random numbers, beside the CPU: where its input and its weights are.

    Some weights nobody sees from here; a function that moves its input to them most likely uses the current device.
    """
    tensors = _tensors(value)
    for module in _modules_of(encoder):
        tensors += [*module.parameters(), *module.buffers()]
    found = {x.device for x in tensors}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        # Asking a device that nobody has used yet would take memory on it.
        in_use = getattr(torch.get_device_module(accelerator), "is_initialized", lambda: True)
        if in_use():
            index = torch.accelerator.current_device_index()
            found.add(torch.device(accelerator.type, index))
    return {device for device in found if device.type not in ("cpu", "meta")}


@contextlib.contextmanager
def _gradient_sync(encoder: object, wanted: bool) -> Iterator[None]:
    """Whether DDP or ``fully_shard`` exchanges gradients in the backward inside the block."""
    if _is_sharded(encoder):
        encoder.set_requires_gradient_sync(wanted)
        try:
            yield
        finally:
            encoder.set_requires_gradient_sync(True)
    elif hasattr(encoder, "no_sync") and not wanted:
        if getattr(encoder, "static_graph", False):
            raise ValueError(
                "GradCache.backward: an encoder is DistributedDataParallel(static_graph=True), which cannot add up the gradients "
                "of several chunks. Drop static_graph."
            )
        with encoder.no_sync():
            yield
    else:
        yield


def _is_sharded(encoder: object) -> bool:
    return hasattr(encoder, "set_requires_gradient_sync")


def _is_ddp(encoder: object) -> bool:
    return hasattr(encoder, "require_backward_grad_sync")


def _backward_of_all(ddp: nn.Module, found: Tensor, grad: Tensor) -> None:
    """``found.backward(grad)``, after which DDP has exchanged all gradients of this step.

    It waits for every parameter. Those that had their gradient before, from the loss (a temperature) or from the encoder's other
    inputs (another tower), and now get none, get one of zeros: what was added up before then travels too.
    """
    trained = [x for x in ddp.parameters() if x.requires_grad]
    done: set[int] = set()
    hooks = [x.register_post_accumulate_grad_hook(lambda x: done.add(id(x))) for x in trained]
    try:
        found.backward(grad)
    finally:
        for hook in hooks:
            hook.remove()
    waiting = [x for x in trained if x.grad is not None and id(x) not in done]
    if waiting:
        zeros = [x.new_zeros(()).expand_as(x) for x in waiting]
        torch.autograd.backward([x.view_as(x) for x in waiting], zeros)


def _leaves_of(loss: Tensor, representations: list[Tensor]) -> list[Tensor]:
    """The further tensors that ``loss`` gives gradients to, in the same order on every rank."""
    found: dict[int, Tensor] = {}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            found[id(node.variable)] = node.variable
        waiting += [following for following, _ in node.next_functions]
    for x in representations:
        found.pop(id(x), None)
    return list(found.values())


def _average(
    parameters: list[nn.Parameter], encoders: Iterable[object], synced: Iterable[object]
) -> None:
    """The gradients of the loss's own ``parameters`` over the ranks, of which DDP and ``fully_shard`` know nothing.

    Where somebody has averaged them already, they are equal, and stay as they are.

    Args:
        parameters: of the loss.
        encoders: all; where none is wrapped, whoever averages their gradients has to average these too.
        synced: the encoders whose gradients have been exchanged.
    """
    modules = [x for encoder in encoders for top in _modules_of(encoder) for x in top.modules()]
    wrapped = next((x for x in modules if _is_ddp(x) or _is_sharded(x)), None)
    # The user's own no_sync(): gradients are being added up, and exchanged by a later call.
    if wrapped is None or not getattr(wrapped, "require_backward_grad_sync", True):
        return
    known = {id(x) for encoder in synced if _is_ddp(encoder) for x in encoder.parameters()}
    group = _group_of(wrapped)
    for x in parameters:
        if id(x) not in known and x.grad is not None:
            dist.all_reduce(x.grad, group=group)
            x.grad /= dist.get_world_size(group)


def _group_of(encoder: nn.Module) -> dist.ProcessGroup | None:
    """Over which a wrapped encoder averages."""
    if _is_ddp(encoder):
        return encoder.process_group
    meshes = [x.device_mesh for x in encoder.parameters() if hasattr(x, "device_mesh")]
    return meshes[0].get_group() if meshes and meshes[0].ndim == 1 else None


def _expect_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"GradCache.backward: loss must return a scalar tensor, got {type(loss).__name__}."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"GradCache.backward: loss must return a scalar, got a tensor of shape {_checks.shape_of(loss)}. "
            "Reduce it, e.g. reduction='mean'."
        )
    if not loss.requires_grad:
        raise ValueError(_NOTHING)


def _expect_whole(leaves: list[Tensor]) -> None:
    for x in leaves:
        if any(placement.is_shard() for placement in getattr(x, "placements", ())):
            raise ValueError(
                f"GradCache.backward: the loss uses a parameter of shape {_checks.shape_of(x)} that fully_shard has sharded; it "
                "would get this rank's part of its gradient alone. Leave it out, fully_shard(model, ignored_params={...}): "
                "GradCache averages it over the ranks."
            )


def _length(value: Any) -> int:
    """The number of samples, N of the tensors (N, ...) in ``value``."""
    lengths = {len(x) for x in _tensors(value) if x.dim() > 0}
    if not lengths:
        raise ValueError(
            f"GradCache.backward: an input must hold tensors (N, ...), got {type(value).__name__} without any. "
            "Pass a tensor, or a tuple, list, dict or other mapping of tensors."
        )
    if len(lengths) != 1:
        raise ValueError(
            f"GradCache.backward: an input must hold tensors of one length, got lengths {sorted(lengths)}."
        )
    return lengths.pop()


def _tensors(value: Any) -> list[Tensor]:
    """All of ``value``; pytree does not look into mappings that it does not know, such as transformers' BatchEncoding."""
    found = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += _tensors(list(leaf.values()))
    return found


def _rows(value: Any, rows: slice) -> Any:
    """``value`` with these rows of every tensor in it; whatever has no rows stays as it is."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[rows] if leaf.dim() > 0 else leaf
        if isinstance(leaf, Mapping):
            parts = {name: _rows(x, rows) for name, x in leaf.items()}
            if not isinstance(leaf, MutableMapping):
                return parts
            part = copy.copy(leaf)
            for name, x in parts.items():
                part[name] = x
            return part
        return leaf

    return pytree.tree_map(cut, value)
