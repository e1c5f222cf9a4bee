"""The cost of the waiting of OpenMP's threads, on a quiet machine and on a busy one: ``python -m benchmarks waiting``.

Each setting runs in processes of its own, in turn, on the machine as it is and beside one process that never stops. A row is a
step of training, in milliseconds on average, for it is the slow steps that a user waits for; the median of the rounds is shown.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.benchmark import Timer

import fastnce
from benchmarks import machine, report
from fastnce.waiting import SPINS, VARIABLES

SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    **{f"{n} spins": {"GOMP_SPINCOUNT": str(n)} for n in (300, 1000, 3000, 10000)},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHOSEN = f"{SPINS} spins"
_BUSY = {False: "quiet", True: "one core busy"}


def _convolutions() -> Callable[[], object]:
    layers: list[nn.Module] = []
    for index in range(8):
        layers += [nn.Conv2d(32 if index else 3, 32, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    images = torch.randn(8, 3, 32, 32)

    def step() -> None:
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()

    return step


def _cut() -> Callable[[], object]:
    from fastnce.models import CUT
    from fastnce.training import build_config

    config = build_config("cut", preset="digits", overrides={"data": ".", "out": "."})
    batch = {domain: torch.rand(8, 3, 32, 32) * 2 - 1 for domain in "AB"}
    model = CUT(config, (32, 32))
    return lambda: model.training_step(batch)


def _info_nce() -> Callable[[], object]:
    query, key = (torch.randn(512, 128, requires_grad=True) for _ in range(2))
    return lambda: fastnce.info_nce(query, key).backward()


STEPS = {
    "8 convolutions, 32 x 32": _convolutions,
    "CUT, digits preset": _cut,
    "`info_nce` 512 x 128": _info_nce,
}


def time_steps(seconds: float) -> dict[str, float]:
    """Milliseconds of a step of each of `STEPS` in this process, over `seconds` each."""
    found = {}
    for name, make in STEPS.items():
        torch.manual_seed(0)
        step = make()
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        timer.timeit(3)
        found[name] = 1e3 * timer.blocked_autorange(min_run_time=seconds).mean
    return found


@contextmanager
def _machine(busy: bool) -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other is not None:
            other.kill()
            other.wait()


def measure(rounds: int, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds by state of the machine, step and setting."""
    found: dict[tuple[str, str, str], list[float]] = {}
    plain = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "OMP_NUM_THREADS")}
    for _ in range(rounds):
        for busy, state in _BUSY.items():
            for setting, variables in SETTINGS.items():
                with _machine(busy):
                    times = machine.in_fresh_process(plain | variables, time_steps, seconds)
                for step, value in times.items():
                    found.setdefault((state, step, setting), []).append(value)
    return {
        state: {
            step: {setting: statistics.median(found[state, step, setting]) for setting in SETTINGS}
            for step in STEPS
        }
        for state in _BUSY.values()
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """As Markdown, milliseconds, with what the commands' setting costs."""
    lines = []
    for state, steps in found.items():
        for step, values in steps.items():
            ratio = values[CHOSEN] / min(values.values())
            shown = (f"{value:.3g}" for value in values.values())
            lines.append((f"{step}, {state}", *shown, f"{ratio:.2f}x"))
    return report.table(("step, ms", *SETTINGS, f"{CHOSEN} against the best"), lines)


def main(out: Path | None, rounds: int = 5, seconds: float = 1.0) -> int:
    """Prints the table; with `out` also writes it there."""
    facts = machine.describe(torch.device("cpu"))
    found = measure(rounds, seconds)
    text = f"# Waiting on {facts['device']}\n\n{table(found)}\n"
    report.publish(out, "waiting", facts, {"ms": found}, text)
    return 0
