"""metrics.jsonl: the means of the losses, a line every few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from fastnce.errors import UserError
from fastnce.files import atomic_path


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; an empty list if there is none. A last line cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def append_line(path: Path, values: dict[str, float]) -> None:
    """Appends a line to a file such as metrics.jsonl."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Free some space and run the same command again."
        ) from error


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, which a run that goes on from there will write again."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with atomic_path(path) as temporary:
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary.write_text(text, encoding="utf-8")


class MetricLog:
    """Averages losses over the steps between two lines and appends the lines to `path`.

    The sums are kept on the losses' device in fp64, so that adding a step never waits for the device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """Adds one step's losses, scalars."""
        for name, loss in losses.items():
            previous = self._sums.get(name)
            value = loss.detach().double()
            self._sums[name] = value if previous is None else previous + value
        self._count += 1

    def means(self) -> dict[str, float]:
        """The means since the last line; raises `UserError` if one of them is not finite."""
        if not self._sums:
            return {}
        values = (torch.stack(list(self._sums.values())) / self._count).tolist()
        for name, value in zip(self._sums, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the training has diverged: loss {name} is {value}. Use a smaller lr; to go on from the last checkpoint "
                    "with the same values is likely to diverge again."
                )
        return dict(zip(self._sums, values, strict=True))

    def take(self) -> dict[str, float]:
        """The means since the last line, which start anew."""
        means = self.means()
        self._sums, self._count = {}, 0
        return means

    def write(self, **values: float) -> dict[str, float]:
        """Appends a line: `values`, then the means, which start anew. Returns the means."""
        means = self.take()
        append_line(self.path, values | means)
        return means

    def state_dict(self) -> dict[str, object]:
        """The sums since the last line."""
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Restores what `state_dict` gave."""
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._count = state["count"]
