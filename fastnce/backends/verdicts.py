"""Verdicts on a GPU's kernels, which ``fastnce verify`` writes and the automatic choice reads.

A verdict is about one backend on one kind of GPU, with one driver, torch, Triton and source of the kernels: its :class:`Key`, and
a file in the user's cache. Files that come with the package serve users of the same GPU and versions, whatever their driver.
A process reads the verdicts of a device once, and keeps to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastnce.backends import build
from fastnce.files import write_json
from fastnce.precision import float32_products
from fastnce.registry import Form

_log = logging.getLogger("fastnce")

# The backends that are chosen only where a verdict says so.
EARNING = ("triton", "cuda")
RIGHT, NOT_REACHED = "right", "not verified"
# Of what the losses' own choice would be, to be chosen instead.
LEAST_SPEED = 1.03
# Sizes of a call: below the first number small, from the second on large. Work is what Form has.
_WORK = (2**29, 2**34)
_WORK_OF_MAPS = (2**20, 2**25)
# Longer rows than this take other kernels; small problems wait for launches, whatever their depth.
_DEEP = 256
SIZES = ("small", "medium", "large", "deep")
SHIPPED = build.PACKAGE / "verification" / "results"

# Of the files.
_VERSION = 1
_TASK = ("op", "dtype", "form")
_COMMAND = "Run: fastnce verify"

Task = tuple[str, str, str]  # op, dtype ("bfloat16"), the form's name


class Key(NamedTuple):
    """What a verdict holds for. ``kernels`` is a hash of both sides of the race: the kernels, and the backend ``blocks``."""

    backend: str
    gpu: str
    driver: str
    torch: str
    triton: str
    kernels: str


@dataclasses.dataclass
class Entry:
    """What was found of one form of an op in one dtype.

    Args:
        status: "right", or what became of it: "wrong", "failed", "crashed", "hung", "not verified".
        reason: in words, unless it is right.
        errors: by case, the largest error as a share of what the numerical contract allows.
        speed: by size, how many times as fast as without the backend; or why there was no race.
    """

    status: str = NOT_REACHED
    reason: str = "time ran out"
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    speed: dict[str, float | str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return RIGHT if self.status == RIGHT else f"{self.status}: {self.reason}"

    def why_not(self, size: str) -> str:
        """``"ok"``, or why the backend is not chosen for calls of this size; "any" stands for all sizes."""
        if self.status != RIGHT:
            return str(self)
        if size == "any":
            reasons = [self.why_not(raced) for raced in self.speed] or [self.why_not("small")]
            return next((reason for reason in reasons if reason != "ok"), "ok")
        missing = "not raced at this size" if self.speed else "not raced: time ran out"
        speed = self.speed.get(size, missing)
        if isinstance(speed, str):
            return speed
        return "ok" if speed >= LEAST_SPEED else f"no faster: {speed:.2f} times as fast"

    def least_speed(self, size: str) -> float:
        """At this size; of all sizes, where there was no race at it."""
        raced = {key: x for key, x in self.speed.items() if not isinstance(x, str)}
        return raced.get(size, min(raced.values(), default=0.0))


Verdict = dict[Task, Entry]
# Of a task that the backend does not take.
_NOT_ASKED = Entry(reason="no kernel takes such calls")
_kept: dict[tuple[str, int | None], Verdict | None] = {}
_said: set[str] = set()


def size_of(form: Form) -> str:
    """The class of sizes, one of SIZES; "any" where a compiler keeps the size variable, so that no size is compiled in."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # heavy

        if not (has_static_value(form.work) and has_static_value(form.depth)):
            return "any"
    medium, large = _WORK if form.depth else _WORK_OF_MAPS
    if form.work < medium:
        return "small"
    if form.depth > _DEEP:
        return "deep"
    return "medium" if form.work < large else "large"


@torch.compiler.assume_constant_result  # compiled in: a process does not change its mind
def fastest(
    names: tuple[str, ...], op: str, device: torch.device, dtype: torch.dtype, form: str, size: str
) -> tuple[str, tuple[str, ...]]:
    """That of the backends ``names`` which has proved itself for such calls, and is the fastest, "" where none has; and why others not."""
    if dtype == torch.float32 and float32_products(device.type) != "highest":
        return "", ("float32 is verified for products in full precision alone",)
    return _fastest(names, device, (op, name_of(dtype), form), size)


@functools.cache
def _fastest(
    names: tuple[str, ...], device: torch.device, task: Task, size: str
) -> tuple[str, tuple[str, ...]]:
    reasons, speeds = {}, {}
    for name in names:
        verdict = of(name, device)
        entry = (verdict or {}).get(task, _NOT_ASKED)
        reasons[name] = _unverified(name) if verdict is None else entry.why_not(size)
        if reasons[name] == "ok":
            speeds[name] = entry.least_speed(size)
    chosen = max(speeds, key=lambda name: speeds[name], default="")
    reasons |= dict.fromkeys(speeds, f"slower than {chosen}")
    return chosen, tuple(f"{name}: {x}" for name, x in reasons.items() if name != chosen)


def _unverified(backend: str) -> str:
    if not is_installed(backend):
        return "not installed"
    return f"not verified on this GPU. {_COMMAND}"


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def of(backend: str, device: torch.device) -> Verdict | None:
    """The verdict, read when first asked for; None if there is none."""
    place = (backend, device.index)
    if place not in _kept:
        _kept[place] = find(key_of(backend, device))
        if _kept[place] is None and is_installed(backend):
            say(
                f"The GPU kernels of the backend {backend!r} are not verified on this GPU, so losses run without them. "
                f"{_COMMAND}",
                once="not verified",
            )
    return _kept[place]


def is_installed(backend: str) -> bool:
    """Whether there is something to verify, without loading it."""
    if backend == "triton":
        return importlib.util.find_spec("triton") is not None
    return build.find_library(build.CUDA) is not None


def keep(backend: str, device: torch.device, verdict: Verdict | None) -> None:
    """The verdict that holds in this process from now on."""
    _kept[backend, device.index] = verdict
    _fastest.cache_clear()


def forget() -> None:
    """Reads all verdicts anew when they are next asked for."""
    _kept.clear()
    _fastest.cache_clear()


def say(line: str, once: str = "") -> None:
    """Logs a warning, at most once in a process: the line itself, or all those with one name ``once``."""
    if (once or line) not in _said:
        _said.add(once or line)
        _log.warning(line)


def key_of(backend: str, device: torch.device) -> Key:
    """What a verdict on this backend and device would hold for."""
    gpu, driver = machine(device)
    triton = ""
    if backend == "triton":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            triton = importlib.metadata.version("triton")
    return Key(backend, gpu, driver, torch.__version__, triton, _kernels(backend))


def machine(device: torch.device) -> tuple[str, str]:
    """The GPU's name, and the version of its driver."""
    name = torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return name, torch.version.hip or ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return name, found.group(1) if found else text.strip()


@functools.cache
def _kernels(backend: str) -> str:
    parts = [build.source_hash(build.PACKAGE, ("precision.py", "blocks/*.py"))]
    if backend == "triton":
        spec = importlib.util.find_spec("fastnce.triton_kernels")
        if spec is not None and spec.origin is not None:
            parts.append(build.source_hash(Path(spec.origin).parent, ("*.py",)))
    elif (sources := build.source_folder()) is not None:
        parts.append(build.source_hash(sources, build.CUDA.sources))
    elif (library := build.find_library(build.CUDA)) is not None:
        parts.append(build.hash_of(library.read_bytes()))
    return build.hash_of("\n".join(parts).encode())


def folder() -> Path:
    """Of the user's own verdicts."""
    # Path's own ways to a home, and to whether a file is there, raise errors where these do not.
    cache = os.environ.get("FASTNCE_CACHE") or os.path.expanduser("~/.cache/fastnce")
    return Path(cache) / "verdicts"


def path_of(key: Key) -> Path:
    """The user's own file."""
    gpu = re.sub(r"[^a-z0-9]+", "-", key.gpu.lower()).strip("-")
    return folder() / f"{gpu}-{key.backend}-{build.hash_of(json.dumps(key).encode())}.json"


def find(key: Key) -> Verdict | None:
    """The user's own verdict, else one that came with the package; None if there is none, or none that can be read."""
    path = path_of(key)
    if os.path.isfile(path) and (verdict := _read(path, key)) is not None:
        return verdict
    found = (_read(path, key, any_driver=True) for path in sorted(SHIPPED.glob("*.json")))
    return next((verdict for verdict in found if verdict is not None), None)


def _read(path: Path, key: Key, any_driver: bool = False) -> Verdict | None:
    """The verdict in a file, if it is one for the key. A file that cannot be used is told of, and never an error."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != _VERSION:
            say(f"{path} is of another version of fastnce and is not used. {_COMMAND}")
            return None
        of_file = Key(**document["key"])
        if any_driver:
            of_file = of_file._replace(driver=key.driver)
        if of_file != key:
            return None
        return dict(map(_from_json, document["found"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        say(f"{path} is not used: {reason}. {_COMMAND}")
        return None


def write(key: Key, verdict: Verdict) -> Path:
    """Writes the user's own file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    path = path_of(key)
    found = [
        dict(zip(_TASK, task, strict=True)) | dataclasses.asdict(entry)
        for task, entry in verdict.items()
    ]
    document = {"version": _VERSION, "key": key._asdict(), "found": found}
    write_json(document, path)
    return path


def _from_json(found: dict[str, Any]) -> tuple[Task, Entry]:
    """Raises ValueError, TypeError or KeyError where it is none."""
    op, dtype, form = (str(found.pop(name)) for name in _TASK)
    entry = Entry(**found)
    numbers = [*entry.errors.values(), *(x for x in entry.speed.values() if not isinstance(x, str))]
    if not all(isinstance(x, (int, float)) for x in numbers):
        raise ValueError("not a number")
    return (op, dtype, form), entry
