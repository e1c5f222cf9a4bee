"""Tiles chosen by timing them, if FASTNCE_AUTOTUNE=1: each class of problems once, on its first call.

A class is a pass, the element's size, and ranges of the depth and of the number of tiles. Within it the candidates of
``config.CANDIDATES`` are timed in the very call that asks, all its kernels together, and the fastest serves the process from then
on, and later processes through a file. Without the variable this module costs nothing: ``tuned`` changes no function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from .config import Tile

Key = tuple[str, str]  # device and class

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
    return statistics.median(times)


def may_time(device: torch.device) -> bool:
    """Timing waits for the device, which a graph's capture forbids; while tracing there is nothing to time."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


@functools.cache
def device_key(device: torch.device) -> str:
    """The GPU and compiler that a choice of tiles holds for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


class _Call(threading.local):
    """The tuned call that a thread is in: the tiles that it has, and those asked for that nobody knows; None outside."""

    tiles: dict[Key, Tile] | None = None
    unknown: dict[Key, tuple[torch.device, tuple[Tile, ...]]] | None = None


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
        self.path, self._clock = path, clock
        self.known = _read(path)
        self._call = _Call()

    def tile(self, device: torch.device, name: str, candidates: tuple[Tile, ...]) -> Tile:
        """The tile of the class ``name``: the known one, else ``candidates[0]``, which is the table's."""
        if torch.are_deterministic_algorithms_enabled():
            return candidates[0]  # whatever was or will be fastest
        key, call = (device_key(device), name), self._call
        tile = (call.tiles or {}).get(key) or self.known.get(key)
        if tile not in candidates:
            tile = candidates[0]
            if call.unknown is not None and may_time(device):
                call.unknown[key] = (device, candidates)
        if call.tiles is not None:
            # The same all through a call: parts are allocated for the tile that a kernel then has.
            call.tiles[key] = tile
        return tile

    def run(self, function: Callable[[], object]) -> object:
        """The result of ``function``, which may be called more often: to time the classes that it asks for and nobody knows."""
        if self._call.tiles is not None:
            return function()
        result, unknown = self._with({}, function)
        for key, (device, candidates) in unknown.items():
            times = {}
            for tile in candidates:
                timed = functools.partial(self._clock, function, device)
                with contextlib.suppress(OutOfResources, torch.OutOfMemoryError):
                    times[tile], _ = self._with({key: tile}, timed)
            table = candidates[0]
            best = min(times, key=times.__getitem__, default=table)
            enough = times.get(table, float("inf")) * (1 - MARGIN)
            self.known[key] = best if times and times[best] <= enough else table
        if unknown:
            self._write()
        return result

    def _with(self, tiles: dict[Key, Tile], function: Callable[[], object]):
        """The result of ``function`` with these tiles, and what it asked for beyond them."""
        call = self._call
        call.tiles, call.unknown = tiles, {}
        try:
            return function(), call.unknown
        finally:
            call.tiles = call.unknown = None

    def _write(self) -> None:
        """Adds what is known to what other processes have written meanwhile."""
        if self.path is None:
            return
        tables: dict[str, dict[str, list[int]]] = {}
        for (device, name), tile in {**_read(self.path), **self.known}.items():
            tables.setdefault(device, {})[name] = list(dataclasses.astuple(tile))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                whole = Path(folder) / self.path.name
                whole.write_text(json.dumps(tables, indent=1))
                whole.replace(self.path)  # at once: no process reads half a file
        except OSError as error:
            warnings.warn(f"fastnce: the tuned tiles cannot be kept: {error}", stacklevel=2)


def _read(path: Path | None) -> dict[Key, Tile]:
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


def _from_environment() -> Tuner | None:
    value = os.environ.get("FASTNCE_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        message = f"FASTNCE_AUTOTUNE must be 0 or 1, got {value!r}: tiles are not timed"
        warnings.warn(f"fastnce: {message}", stacklevel=2)
    folder = os.environ.get("FASTNCE_CACHE") or Path.home() / ".cache" / "fastnce"
    return Tuner(Path(folder) / "tiles.json") if value == "1" else None


TUNER = _from_environment()


def tuned(function: Callable, tuner: Tuner | None = TUNER) -> Callable:
    """Marks a function that can be called again with the same result, and whose passes are timed together."""
    if tuner is None:
        return function

    @functools.wraps(function)
    def run(*args, **kwargs):
        return tuner.run(functools.partial(function, *args, **kwargs))

    return run
