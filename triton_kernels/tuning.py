"""Tiles chosen by timing them, if FASTNCE_AUTOTUNE=1: each class of problems once, on its first call.

A class is a pass, the element's size, and ranges of the depth and of the number of tiles. Within it the candidates of
``config.CANDIDATES`` are timed in the very call that asks, all its kernels together, and the fastest serves the process from then
on, and later processes through a file. Without the variable this module costs nothing: :func:`tuned` changes no function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from .config import Tile

# A candidate must be faster than the table's tile by this much: less is noise.
MARGIN = 0.03
_REPEATS = 5


def device_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of ``function`` on a GPU, after one call that compiles."""
    function()
    times = []
    with torch.cuda.device(device):
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(1e-3 * start.elapsed_time(end))
    return sorted(times)[_REPEATS // 2]


def may_time(device: torch.device) -> bool:
    """Timing waits for the device, which a graph's capture forbids; while tracing there is nothing to time."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


@functools.cache
def device_key(device: torch.device) -> str:
    """What the choice of tiles holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


def default_path() -> Path:
    """``tiles.json`` in $FASTNCE_CACHE, else in ~/.cache/fastnce."""
    folder = os.environ.get("FASTNCE_CACHE") or Path.home() / ".cache" / "fastnce"
    return Path(folder) / "tiles.json"


@dataclasses.dataclass
class _Run(threading.local):
    """What happens within one call of a tuned function, in one thread."""

    depth: int = 0
    # The same answer all through a call: parts are allocated for the tile that a kernel then has.
    answers: dict[tuple[str, str], Tile] = dataclasses.field(default_factory=dict)
    asked: dict[tuple[str, str], tuple[torch.device, tuple[Tile, ...]]] = dataclasses.field(
        default_factory=dict
    )


class Tuner:
    """Remembers the fastest tile of each class.

    Args:
        path: JSON file of what is known, shared by processes; None for none.
        clock: seconds that a function takes on a device.
    """

    def __init__(
        self,
        path: Path | None,
        clock: Callable[[Callable[[], object], torch.device], float] = device_seconds,
    ) -> None:
        self._path, self._clock = path, clock
        self._known: dict[tuple[str, str], Tile] = _read(path)
        self._run = _Run()

    def tile(self, device: torch.device, name: str, candidates: tuple[Tile, ...]) -> Tile:
        """The tile of the class ``name``: the known one, else ``candidates[0]``, which is the table's."""
        if torch.are_deterministic_algorithms_enabled():
            return candidates[0]  # whatever was or will be fastest
        key = (device_key(device), name)
        answer = self._run.answers.get(key) or self._known.get(key)
        if answer not in candidates:
            answer = candidates[0]
            if self._run.depth and may_time(device):
                self._run.asked[key] = (device, candidates)
        if self._run.depth:
            self._run.answers[key] = answer
        return answer

    def run(self, function: Callable[[], object]) -> object:
        """The result of ``function``, which may be called more often: to time the classes that it asks for and nobody knows."""
        if self._run.depth:
            return function()
        with self._scope():
            result = function()
            asked = dict(self._run.asked)
        for key, (device, candidates) in asked.items():
            self._known[key] = self._fastest(key, device, candidates, function)
        if asked:
            self._write()
        return result

    @contextlib.contextmanager
    def _scope(self, trial: dict[tuple[str, str], Tile] | None = None) -> Iterator[None]:
        self._run.depth += 1
        self._run.answers, self._run.asked = dict(trial or {}), {}
        try:
            yield
        finally:
            self._run.depth -= 1
            self._run.answers, self._run.asked = {}, {}

    def _fastest(self, key, device: torch.device, candidates: tuple[Tile, ...], function) -> Tile:
        times = {}
        for tile in candidates:
            with (
                self._scope({key: tile}),
                contextlib.suppress(OutOfResources, torch.OutOfMemoryError),
            ):
                times[tile] = self._clock(function, device)
        table = candidates[0]
        best = min(times, key=times.__getitem__, default=table)
        enough = times.get(table, float("inf")) * (1 - MARGIN)
        return best if times and times[best] <= enough else table

    def _write(self) -> None:
        """Adds what is known to what other processes have written meanwhile."""
        if self._path is None:
            return
        tables: dict[str, dict[str, list[int]]] = {}
        for (device, name), tile in {**_read(self._path), **self._known}.items():
            tables.setdefault(device, {})[name] = list(dataclasses.astuple(tile))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
                whole = Path(folder) / self._path.name
                whole.write_text(json.dumps(tables, indent=1))
                whole.replace(self._path)  # at once: no process reads half a file
        except OSError as error:
            warnings.warn(f"fastnce: the tuned tiles cannot be kept: {error}", stacklevel=2)


def _read(path: Path | None) -> dict[tuple[str, str], Tile]:
    if path is None or not path.exists():
        return {}
    try:
        tables = json.loads(path.read_text())
        return {
            (device, name): Tile(*map(int, values))
            for device, table in tables.items()
            for name, values in table.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"fastnce: {path} is ignored, tiles will be timed anew: {error}", stacklevel=2
        )
        return {}


def tuned(function: Callable) -> Callable:
    """Marks a function that can be called again with the same result, and whose passes are timed together."""
    return function if TUNER is None else wrapped(function)


def wrapped(function: Callable) -> Callable:
    """``function``, run by the tuner."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        return TUNER.run(functools.partial(function, *args, **kwargs))

    return run


def _asked_for() -> bool:
    value = os.environ.get("FASTNCE_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        warnings.warn(
            f"fastnce: FASTNCE_AUTOTUNE must be 0 or 1, got {value!r}: tiles are not timed",
            stacklevel=2,
        )
    return value == "1"


TUNER = Tuner(default_path()) if _asked_for() else None
