"""Batches of any size through encoders that could not hold them: gradient caching."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
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

    A module under DDP or ``fully_shard`` exchanges gradients once, with its last chunk, whether it is an encoder or a function calls
    it. ``fully_shard`` also communicates in forwards: there every rank needs the same number of chunks, if not of samples. A method
    of ``ddp.module`` goes past DDP, and nobody averages its gradients, unless ``wrapper`` is given. With such an encoder, the
    gradients of the loss's own parameters (a learnable temperature) are averaged over the ranks too, in or outside of it.

    Args:
        encoders: one per input: (chunk) -> (n, D). The same one may come twice; modules, methods and functions may be frozen.
        loss: (representations (N, D) of each encoder) -> scalar, such as ``fastnce.nt_xent``, or
            ``fastnce.distributed.nt_xent`` for the batches of all ranks.
        chunk_size: samples per chunk at most; a list has one for each encoder. None needs ``tokens``.
        tokens: of a chunk at most: its samples times the longest of them; None, or one for each encoder. The input is a mapping with
            ``attention_mask`` (N, L), or ``length`` (N,). Chunks are of similar lengths, and cut behind the longest of them: of
            every tensor (N, L, ...), like the mask. A longer sample has a chunk of its own.
        keywords: a mapping goes to its encoder by keywords, ``encoder(**chunk)``.
        output: what the encoder returns -> (n, D), such as ``lambda found: found.pooler_output``; or one for each encoder.
        loss_parameters: are averaged over the ranks of the default group even where no encoder is seen to be wrapped.
        wrapper: DDP, where encoders are methods of the module in it (``wrapper.module.encode_text``): they run through it.
        python_random: the second pass also repeats Python's and numpy's global random numbers, beside torch's.
        scaler: for fp16 training; scales the loss.

    Raises:
        TypeError: ``chunk_size`` or ``tokens`` is no int; ``wrapper`` is no DistributedDataParallel.
        ValueError: no encoder; ``chunk_size`` or ``tokens`` below 1, neither of them, or another number of them than of encoders;
            or no encoder is a method of ``wrapper.module``.

    Examples:
        >>> import torch, fastnce
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> cache = fastnce.GradCache(encoder, encoder, loss=fastnce.nt_xent, chunk_size=32)
        >>> loss = cache.backward(torch.randn(256, 16), torch.randn(256, 16))  # the parameters have their .grad
    """

    def __init__(
        self,
        *encoders: Callable[..., Any],
        loss: Callable[..., Tensor],
        chunk_size: int | Sequence[int | None] | None = None,
        tokens: int | Sequence[int | None] | None = None,
        keywords: bool = False,
        output: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor] | None] | None = None,
        loss_parameters: Iterable[nn.Parameter] = (),
        wrapper: nn.Module | None = None,
        python_random: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not encoders:
            raise ValueError("GradCache: encoders are missing. Pass one per input of the loss.")
        count = len(encoders)
        limits = list(
            zip(
                _one_each("chunk_size", chunk_size, count),
                _one_each("tokens", tokens, count),
                strict=True,
            )
        )
        for limit in limits:
            if limit == (None, None):
                raise ValueError(
                    "GradCache: an encoder has neither chunk_size nor tokens. Pass at least one of them."
                )
            for name, value in zip(("chunk_size", "tokens"), limit, strict=True):
                if value is not None:
                    _checks.expect_int_at_least("GradCache", name, value, 1)
        self.encoders = encoders if wrapper is None else _through(wrapper, encoders)
        self.loss, self.loss_parameters, self.scaler = loss, tuple(loss_parameters), scaler
        self._limits, self._outputs = limits, _one_each("output", output, count)
        self._keywords, self._python_random = keywords, python_random

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
                ``fully_shard`` has sharded; with ``tokens``, an input without lengths, or an encoder under ``fully_shard``.
        """
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"GradCache.backward: expected {len(self.encoders)} inputs, one per encoder, got {len(inputs)}."
            )
        parts = [
            _Input(at, *of_encoder, self._keywords, self._python_random)
            for at, of_encoder in enumerate(
                zip(self.encoders, inputs, self._limits, self._outputs, strict=True)
            )
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
        last = {id(module): part for part, _ in used for module in part.wrapped}
        trained = []
        for part, grad in used:
            due = [module for module in part.wrapped if last[id(module)] is part]
            if part.backward(grad, due):
                trained.append(part)
        if not trained and not others:
            raise ValueError(_NOTHING)
        _average(
            [x for x in others if isinstance(x, nn.Parameter)],
            self.loss_parameters,
            wrapped=[module for part in parts for module in part.may_run],
            synced=[module for part in trained for module in part.wrapped],
        )
        return loss.detach()


class _Input:
    """One encoder and its input in chunks.

    Attributes:
        may_run: the modules under DDP or ``fully_shard`` that are seen in the encoder.
        wrapped: those that its first chunk has run.
    """

    def __init__(
        self,
        at: int,
        encoder: Callable[..., Any],
        value: Any,
        limits: tuple[int | None, int | None],
        output: Callable[[Any], Tensor] | None,
        keywords: bool,
        python_random: bool,
    ) -> None:
        self.at, self.encoder, self._output = at, encoder, output
        self._by_keywords = keywords and isinstance(value, Mapping)
        self.may_run, self.wrapped = _wrapped_in(encoder), []
        length, (chunk_size, tokens) = _length(value), limits
        if tokens is None:
            self._order = None
            starts = range(0, max(length, 1), chunk_size)
            self._sizes = [min(chunk_size, length - start) for start in starts]
            self._chunks = [_rows(value, slice(start, start + chunk_size)) for start in starts]
        else:
            if any(map(_is_sharded, self.may_run)):
                raise ValueError(
                    f"GradCache.backward: encoder {at} is under fully_shard, which needs as many chunks on every rank, and tokens "
                    "makes as many as there are long samples. Pass chunk_size alone."
                )
            lengths = _lengths_in_tokens(value, at)
            self._order, self._sizes = _by_length(lengths, tokens, chunk_size or max(length, 1))
            self._chunks = [
                _without_padding(_rows(value, rows), lengths[rows])
                for rows in self._order.split(self._sizes)
            ]
        self._devices, self._python_random = _devices(encoder, value), python_random
        self._states: list[_RandomState] = []

    def encode(self) -> Tensor:
        """(N, D), a leaf that gets a gradient if the encoder is trained."""
        found = []
        for chunk, size in zip(self._chunks, self._sizes, strict=True):
            self._states.append(_RandomState(self._devices, self._python_random))
            first = not found
            with self._first_chunk() if first else torch.no_grad():
                part = self._run(chunk)
            self._expect_rows(part, size)
            if first:
                trained = part.requires_grad or _is_trained(self.encoder) is True
            found.append(part.detach())
            del part
        rows = torch.cat(found)
        if self._order is not None:
            rows = rows[self._order.argsort()]
        return rows.requires_grad_(trained)

    def backward(self, grad: Tensor, due: list[nn.Module]) -> bool:
        """The second pass; returns whether anything is trained.

        Args:
            grad: (N, D), of the representations.
            due: the wrapped modules that run in no later input: with the last chunk their ranks exchange gradients.
        """
        last = len(self._chunks) - 1
        grad = grad if self._order is None else grad[self._order]
        for at, (chunk, part) in enumerate(zip(self._chunks, grad.split(self._sizes), strict=True)):
            now = due if at == last else []
            with (
                self._states[at].restored(),
                torch.enable_grad(),
                _gradient_sync(self.wrapped, now),
            ):
                found = self._run(chunk)
                if not found.requires_grad:  # a module that detaches what it returns
                    return False
                _backward_of_all(list(filter(_is_ddp, now)), found, part)
        return True

    def _run(self, chunk: Any) -> Any:
        found = self.encoder(**chunk) if self._by_keywords else self.encoder(chunk)
        return found if self._output is None else self._output(found)

    @contextlib.contextmanager
    def _first_chunk(self) -> Iterator[None]:
        """Learns which wrapped modules run; and with gradients, where nobody knows before, whether the encoder is trained."""
        ran: set[int] = set()
        hooks = [x.register_forward_pre_hook(lambda x, _: ran.add(id(x))) for x in self.may_run]
        unknown = _is_trained(self.encoder) is None
        try:
            with (
                torch.set_grad_enabled(unknown),
                _gradient_sync(self.may_run if unknown else [], []),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        # A method of a sharded module does not call the module's hooks.
        ran.update((id(self.encoder), id(getattr(self.encoder, "__self__", None))))
        self.wrapped = [x for x in self.may_run if id(x) in ran]

    def _expect_rows(self, found: object, size: int) -> None:
        expected = f"encoder {self.at} must return a tensor (n, D), here ({size}, D)"
        if not isinstance(found, Tensor):
            raise TypeError(
                f"GradCache.backward: {expected}, got {type(found).__name__}. "
                "Pass output=, a function that takes the representations out of it."
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


def _wrapped_in(encoder: object) -> list[nn.Module]:
    """The modules under DDP or ``fully_shard`` that an encoder may run; of one inside another the outer."""
    found: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for top in _modules_of(encoder):
        for x in top.modules():
            if id(x) not in inside and (_is_ddp(x) or _is_sharded(x)):
                found[id(x)] = x
                inside.update(map(id, x.modules()))
    return list(found.values())


def _is_trained(encoder: object) -> bool | None:
    """None where one has to run it to know: of a function or method, and of a module with a frozen part."""
    if not isinstance(encoder, nn.Module):
        return None
    wanted = {x.requires_grad for x in encoder.parameters()}
    return None if len(wanted) == 2 else True in wanted


def _through(wrapper: nn.Module, encoders: tuple[Callable, ...]) -> tuple[Callable, ...]:
    """``encoders``, the methods of the module in ``wrapper`` as its forwards."""
    if not _is_ddp(wrapper):
        raise TypeError(
            f"GradCache: wrapper must be DistributedDataParallel, got {type(wrapper).__name__}. Leave it out; methods of a module under "
            "fully_shard need torch's register_fsdp_forward_method(module, name)."
        )
    inner = wrapper.module
    found = tuple(
        _Method(wrapper, x) if getattr(x, "__self__", None) is inner else x for x in encoders
    )
    if not any(isinstance(x, _Method) for x in found):
        raise ValueError(
            "GradCache: no encoder is a method of wrapper.module. Pass e.g. wrapper.module.encode_text, or leave wrapper out."
        )
    return found


class _Method:
    """A method of the module in DDP that runs as DDP's forward, which then exchanges its gradients."""

    def __init__(self, ddp: nn.Module, method: Callable[..., Any]) -> None:
        self.__self__, self._method = ddp, method

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        attributes = vars(self.__self__.module)
        before = {"forward": attributes["forward"]} if "forward" in attributes else {}

        def restore() -> None:
            attributes.pop("forward", None)
            attributes.update(before)

        def forward(*args: Any, **keywords: Any) -> Any:
            restore()  # the method may call the module
            return self._method(*args, **keywords)

        attributes["forward"] = forward
        try:
            return self.__self__(*args, **keywords)
        finally:
            restore()


class _RandomState:
    """torch's random state on the CPU and some ``devices``; and ``python``'s and numpy's."""

    def __init__(self, devices: Iterable[torch.device], python: bool = False) -> None:
        self._python = random.getstate() if python else None
        # Who has not imported it draws none of its numbers.
        self._numpy = (
            sys.modules["numpy"].random.get_state() if python and "numpy" in sys.modules else None
        )
        self._cpu = torch.get_rng_state()
        self._others = {
            device: torch.get_device_module(device).get_rng_state(device) for device in devices
        }

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Goes back to this state, and afterwards to the present one."""
        present = _RandomState(self._others, self._python is not None)
        self._set()
        try:
            yield
        finally:
            present._set()

    def _set(self) -> None:
        if self._python is not None:
            random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
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
def _gradient_sync(modules: list[nn.Module], now: list[nn.Module]) -> Iterator[None]:
    """In a backward inside the block, of these wrapped ``modules`` only those of ``now`` exchange gradients."""
    with contextlib.ExitStack() as stack:
        for x in modules:
            wanted = any(x is y for y in now)
            if _is_sharded(x):
                x.set_requires_gradient_sync(wanted)
                stack.callback(x.set_requires_gradient_sync, True)
            elif not wanted:
                if getattr(x, "static_graph", False):
                    raise ValueError(
                        "GradCache.backward: an encoder is DistributedDataParallel(static_graph=True), which cannot add up the "
                        "gradients of several chunks. Drop static_graph."
                    )
                stack.enter_context(x.no_sync())
        yield


def _is_sharded(encoder: object) -> bool:
    return hasattr(encoder, "set_requires_gradient_sync")


def _is_ddp(encoder: object) -> bool:
    return hasattr(encoder, "require_backward_grad_sync")


def _backward_of_all(ddps: list[nn.Module], found: Tensor, grad: Tensor) -> None:
    """``found.backward(grad)``, after which these have exchanged all gradients of this step.

    DDP waits for every parameter. Those that had their gradient before, from the loss (a temperature) or from the encoder's other
    inputs (another tower), and now get none, get one of zeros: what was added up before then travels too.
    """
    trained = [x for ddp in ddps for x in ddp.parameters() if x.requires_grad]
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
    parameters: list[nn.Parameter],
    named: tuple[nn.Parameter, ...],
    wrapped: list[nn.Module],
    synced: list[nn.Module],
) -> None:
    """The gradients of the loss's own parameters over the ranks, of which DDP and ``fully_shard`` know nothing.

    Where somebody has averaged them already, they are equal, and stay as they are.

    Args:
        parameters: that the loss has used; where nothing is ``wrapped``, whoever averages the encoders has to average these too.
        named: ``loss_parameters``, used on this rank or not.
        wrapped: all modules under DDP or ``fully_shard``.
        synced: those whose gradients have been exchanged.
    """
    # The user's own no_sync(): gradients are being added up, and exchanged by a later call.
    if wrapped and not getattr(wrapped[0], "require_backward_grad_sync", True):
        return
    if not wrapped and not (dist.is_available() and dist.is_initialized()):
        return
    for x in named:
        if x.grad is None:
            x.grad = torch.zeros_like(x)
    known = {id(x) for ddp in filter(_is_ddp, synced) for x in ddp.parameters()}
    group = _group_of(wrapped[0]) if wrapped else None
    chosen = {id(x): x for x in (*named, *(parameters if wrapped else ()))}
    for key, x in chosen.items():
        if key not in known and x.grad is not None:
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


def _rows(value: Any, rows: slice | Tensor) -> Any:
    """``value`` with these rows of every tensor in it; whatever has no rows stays as it is."""
    return _changed(value, lambda x: x[rows] if x.dim() > 0 else x)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, Mapping):
            parts = {name: _changed(x, change) for name, x in leaf.items()}
            if not isinstance(leaf, MutableMapping):
                return parts
            part = copy.copy(leaf)
            for name, x in parts.items():
                part[name] = x
            return part
        return leaf

    return pytree.tree_map(of, value)


def _lengths_in_tokens(value: Any, at: int) -> Tensor:
    """(N,), on the CPU: up to the last token that ``attention_mask`` (N, L) has, or ``length``."""
    found = value if isinstance(value, Mapping) else {}
    mask, lengths = found.get("attention_mask"), found.get("length")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return ((mask != 0) * places).amax(1).cpu()
    if isinstance(lengths, Tensor) and lengths.dim() == 1:
        return lengths.cpu()
    raise ValueError(
        f"GradCache.backward: with tokens, input {at} must be a mapping with attention_mask (N, L) or length (N,), "
        f"got {type(value).__name__} without. Add one of them, or pass chunk_size."
    )


def _by_length(lengths: Tensor, tokens: int, chunk_size: int) -> tuple[Tensor, list[int]]:
    """The rows (N,), shorter before longer, and how many of them each chunk has."""
    order, sizes = lengths.argsort(stable=True), [0]
    for longest in lengths[order].tolist():
        full = sizes[-1] == chunk_size or (sizes[-1] + 1) * longest > tokens
        if full and sizes[-1] > 0:
            sizes.append(0)
        sizes[-1] += 1
    return order, sizes


def _without_padding(chunk: Any, lengths: Tensor) -> Any:
    """Cut behind the last token of ``attention_mask`` (n, L), where there is one."""
    mask = chunk.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(lengths) == 0:
        return chunk
    shape, longest = mask.shape, max(int(lengths.max()), 1)
    return _changed(chunk, lambda x: x[:, :longest] if x.shape[:2] == shape else x)


def _one_each(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value for each encoder: what a list or tuple has, or the same."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"GradCache: {name} must be one value or one for each of {count} encoders, got {len(value)}."
        )
    return value
