"""The cost of a training: seconds per step, and the most memory it held."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastnce.files import write_json
from fastnce.training.log import read_metrics

_FILE = "cost.json"


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: of a GPU what its tensors took, else what was resident of the process.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_cost(run: Path, device: torch.device) -> None:
    """Writes `cost.json` into a run's folder: the peak of memory of this process and of those before it, and the device."""
    peak = peak_memory(device)
    before = _read(run).get("peak_memory_bytes")
    peaks = [value for value in (peak, before) if value is not None]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    write_json({"peak_memory_bytes": max(peaks, default=None), "device": name}, run / _FILE)


def read_cost(run: Path) -> dict[str, Any]:
    """{"seconds_per_step", "peak_memory_bytes", "device"} of a run, without what is not known of it.

    Seconds per step are those from the request for a batch to the end of its step, pictures, measurements and checkpoints
    left out: the median over the lines of metrics.jsonl, so that neither the first steps nor a pause count.
    """
    cost = {name: value for name, value in _read(run).items() if value is not None}
    seconds = seconds_per_step(read_metrics(Path(run) / "metrics.jsonl"))
    return cost if seconds is None else {"seconds_per_step": seconds} | cost


def seconds_per_step(lines: Sequence[Mapping[str, float]]) -> float | None:
    """The median over the lines of a metrics.jsonl; None if there are fewer than two."""
    pairs = list(zip(lines, lines[1:], strict=False))
    if not pairs:
        return None
    return statistics.median(
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs
    )


def cost_lines(cost: Mapping[str, Any]) -> list[str]:
    """`read_cost` in words, for under a table."""
    words = []
    if "seconds_per_step" in cost:
        words.append(f"{cost['seconds_per_step']:.3g} s a step")
    if "peak_memory_bytes" in cost:
        kind = "resident" if cost.get("device") == "CPU" else "allocated"
        words.append(f"at most {cost['peak_memory_bytes'] / 2**20:.0f} MiB {kind}")
    where = f", on {cost['device']}" if "device" in cost else ""
    return [f"Training: {', '.join(words)}{where}.\n"] if words else []


def _read(run: Path) -> dict[str, Any]:
    path = Path(run) / _FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
