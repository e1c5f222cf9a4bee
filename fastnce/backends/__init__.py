"""The table of backends, and the only place that chooses one.

A backend is a module with plain functions ``<op>_forward`` and ``<op>_backward`` over validated tensors, and two
predicates: ``available() -> str`` and ``supports(op, device, dtype) -> str``, which answer ``"ok"`` or the reason why not.
One that has not all forms of an op says which with ``lacks(op, dtype, form) -> str``, ``""`` where it has this one.
The ``torch`` backend is ``fastnce.reference``: differentiable PyTorch that every other backend is tested against.

Asked for by name (``backend=``, ``use_backend``, ``FASTNCE_BACKEND``), a backend runs or raises with its reason.
Chosen automatically, the first of the table that can run the op does; but kernels of a GPU only where ``fastnce verify`` has found
them right and faster on that GPU, for such calls (``fastnce.backends.verdicts``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from fastnce import reference
from fastnce.backends import blocks, cuda, native, verdicts
from fastnce.backends import triton as triton_ops
from fastnce.registry import OPS

_log = logging.getLogger("fastnce")

# In order of preference.
_TABLE: dict[str, ModuleType] = {
    "triton": triton_ops,
    "cuda": cuda,
    "native": native,
    "blocks": blocks,
    "torch": reference,
}
# Devices on which a backend has to earn its place.
_VERIFIED = ("cuda",)
# Elsewhere they run by name alone; on a CPU, because
_ON_CPU = {
    "triton": "Triton's interpreter is for tests, ask for it by name",
    "cuda": "its emulation is for tests, ask for it by name",
}

_requested: str | None = os.environ.get("FASTNCE_BACKEND") or None
_logged: set[tuple[str, str, torch.dtype, str]] = set()


def names() -> tuple[str, ...]:
    """The backends' names, in order of preference."""
    return tuple(_TABLE)


def available() -> dict[str, str]:
    """Every backend with ``"ok"``, or with the reason why it cannot run on this machine.

    Examples:
        >>> import fastnce
        >>> fastnce.backends.available()["torch"]
        'ok'
    """
    return {name: module.available() for name, module in _TABLE.items()}


def supports(name: str, op: str, device: str | torch.device, dtype: torch.dtype) -> str:
    """``"ok"``, or why the backend ``name`` cannot run ``op`` on tensors of ``dtype`` on ``device`` ("cpu", "cuda:1").

    Examples:
        >>> import fastnce, torch
        >>> fastnce.backends.supports("torch", "info_nce", "cpu", torch.float32)
        'ok'
    """
    return _module(name).supports(op, device, dtype)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the ``with`` block on the backend ``name`` (``None``: chosen automatically).

    The setting holds for the whole process, all threads, until the block ends. It overrides ``FASTNCE_BACKEND``; an op's own
    ``backend=`` overrides both.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend cannot run on this machine.

    Examples:
        >>> import fastnce, torch
        >>> with fastnce.use_backend("torch"):
        ...     loss = fastnce.info_nce(torch.eye(4), torch.eye(4))
    """
    global _requested
    if name is not None:
        reason = _module(name).available()
        if reason != "ok":
            raise RuntimeError(f"use_backend: backend {name!r} cannot run here: {reason}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def requested() -> str | None:
    """The backend that ``use_backend`` or ``FASTNCE_BACKEND`` asks for; None: chosen automatically."""
    return _requested


def verdict(
    name: str, op: str, device: str | torch.device, dtype: torch.dtype
) -> dict[str, dict[str, str]]:
    """By form and size of the call, ``"ok"`` where the backend ``name`` is chosen by itself on a GPU, or why it is not.

    It is what ``fastnce verify`` found: "both gradients" -> "large" -> "no faster: 0.91 times as fast". Empty where there is no
    verdict on this op, and without a GPU.

    Examples:
        >>> import fastnce, torch
        >>> fastnce.backends.verdict("triton", "info_nce", "cuda", torch.bfloat16)  # doctest: +SKIP
        {'both gradients': {'small': 'ok', 'medium': 'ok', 'large': 'no faster: 0.91 times as fast', 'deep': 'ok'}}
    """
    _module(name)
    place = torch.device(device)
    if name not in verdicts.EARNING or place.type not in _VERIFIED:
        return {}
    if place.type == "cuda" and not torch.cuda.is_available():
        return {}
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return {
        form: {size: entry.why_not(size) for size in verdicts.SIZES}
        for (*call, form), entry in (verdicts.of(name, place) or {}).items()
        if call == [op, verdicts.name_of(dtype)]
    }


def select(
    op: str, tensor: torch.Tensor, backend: str | None = None, *found_by: object, called: str = ""
) -> ModuleType:
    """The module that runs ``op`` on tensors like ``tensor``.

    Args:
        op: by its name.
        tensor: one of the call.
        backend: asked for by name; None chooses.
        found_by: the arguments of the op's ``form``, by which the kernels of a GPU are chosen. Without them they are not.
        called: the public function that needs the op, which errors name; the op itself by default.

    Raises:
        ValueError: the requested backend's name is unknown.
        RuntimeError: the requested backend cannot run this op on this device and dtype; the message says why.
    """
    device, dtype = tensor.device, tensor.dtype
    name = backend or _requested
    if name is not None:
        module = _module(name, "backend" if backend else "FASTNCE_BACKEND")
        reason = _supports(module, op, device, dtype, found_by)
        if reason != "ok":
            raise RuntimeError(
                f"{called or op}: backend {name!r} cannot run it on {device.type} {dtype}: {reason}. "
                f"Use backend='torch', or leave the choice to fastnce with backend=None."
            )
        return module
    may_prove = device.type in _VERIFIED
    chosen, reasons = _proved(op, device, dtype, found_by) if may_prove else ("", [])
    for name, module in _TABLE.items():
        if chosen or name in verdicts.EARNING:
            continue
        reason = _supports(module, op, device, dtype, found_by)
        if reason == "ok":
            chosen = name
        else:
            reasons.append(f"{name}: {reason}")
    if not chosen:
        told = "; ".join(_told(op, device, dtype) + reasons)
        raise RuntimeError(
            f"{called or op}: no backend can run it on {device.type} {dtype}: {told}"
        )
    if not torch.compiler.is_compiling():
        _log_choice(op, device, dtype, chosen, reasons)
    return _TABLE[chosen]


def _told(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the backends that have to earn it were passed over where they cannot."""
    if device.type in _VERIFIED:
        return []
    answers = {name: _TABLE[name].supports(op, device, dtype) for name in _ON_CPU if name in _TABLE}
    return [f"{name}: {_ON_CPU[name] if x == 'ok' else x}" for name, x in answers.items()]


def _supports(
    module: ModuleType, op: str, device: torch.device, dtype: torch.dtype, found_by: tuple
) -> str:
    """What the module's ``supports`` says, and, of calls of a form that it lacks, why."""
    reason = module.supports(op, device, dtype)
    if reason == "ok" and found_by and hasattr(module, "lacks"):
        return module.lacks(op, dtype, OPS[op].form(*found_by)) or "ok"
    return reason


def _proved(
    op: str, device: torch.device, dtype: torch.dtype, found_by: tuple
) -> tuple[str, list[str]]:
    """The fastest of the backends that have proved themselves for this call, or ""; and why others have not.

    No other is asked whether it runs: no compiler starts where nothing was verified.
    """
    if not found_by:
        return "", [f"{name}: this depends on the call" for name in verdicts.EARNING]
    form = OPS[op].form(*found_by)
    size = verdicts.size_of(form)
    names: tuple[str, ...] = verdicts.EARNING
    reasons: list[str] = []
    while True:
        chosen, why = verdicts.fastest(names, op, device, dtype, form.name, size)
        reason = chosen and _supports(_TABLE[chosen], op, device, dtype, found_by)
        if reason in ("", "ok"):
            return chosen, [*reasons, *why]
        names = tuple(name for name in names if name != chosen)
        reasons.append(f"{chosen}: {reason}")


def _module(name: str, asked_by: str = "backend") -> ModuleType:
    if name not in _TABLE:
        raise ValueError(f"{asked_by}={name!r} is unknown. Expected one of: {', '.join(_TABLE)}.")
    return _TABLE[name]


def _log_choice(
    op: str, device: torch.device, dtype: torch.dtype, name: str, reasons: list[str]
) -> None:
    choice = (op, device.type, dtype, name)
    if choice not in _logged:
        _logged.add(choice)
        told = _told(op, device, dtype) + reasons
        why = f" ({'; '.join(told)})" if told else ""
        _log.info("%s on %s %s: backend %s%s", op, device.type, dtype, name, why)
