"""A device on the CPU, and backends for it that are right, wrong, slow, or end their process, as the op has it.

The child process of a verification imports this file, by the name ``stand_ins:Device``.
"""

import itertools
import os
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastnce import backends, verification
from fastnce.backends import blocks, verdicts
from fastnce.registry import OPS

# What a call has cost, in seconds of no clock; and calls since the first sample.
COST = {"seconds": 3.0}
CALLS = itertools.count(1)
# Memory beside that of the tensors, which a verification fills with NaN.
BESIDE = torch.zeros(1)
CPU = torch.device("cpu")


def wrong(results: tuple) -> tuple:
    """One element of the first gradient."""
    gradient = next(x for x in results[-1] if x is not None)
    gradient.view(-1)[-1] += 0.5 * gradient.abs().max() + 1e-3
    return results


def wrong_when_large(results: tuple) -> tuple:
    """In more rows than the cases have."""
    *others, gradients = results
    if len(results[0]) <= 200:
        return results
    return (*others, tuple(None if x is None else 2 * x for x in gradients))


def late(results: tuple) -> tuple:
    """In the 13th repeat."""
    return wrong(results) if next(CALLS) == 13 else results


def reading(results: tuple) -> tuple:
    """Memory that is not its own."""
    results[0].add_(BESIDE[0])
    return results


def raising(results: tuple) -> tuple:
    raise RuntimeError("no kernel image is available\nand more lines")


def costing(seconds: float) -> Callable[[tuple], tuple]:
    def cost(results: tuple) -> tuple:
        COST["seconds"] = seconds
        return results

    return cost


# By op and dtype: what the forwards do.
BEHAVIOUR: dict[tuple[str, torch.dtype], Callable] = {
    ("info_nce", torch.bfloat16): costing(1.0),
    ("info_nce", torch.float32): wrong,
    ("info_nce", torch.float16): late,
    ("sup_con", torch.bfloat16): raising,
    ("sup_con", torch.float32): costing(10.0),
    ("sup_con", torch.float16): wrong_when_large,
    ("conditional_contrastive", torch.bfloat16): lambda _: time.sleep(600),
    ("conditional_contrastive", torch.float32): lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    ("pairwise_cosine_similarity", torch.float32): costing(1.0),
    ("pairwise_cosine_similarity", torch.bfloat16): reading,
}


def stand_in() -> types.ModuleType:
    """The backend: the functions of ``blocks``, each forward followed by what its op and dtype are given above."""
    module = types.ModuleType("stand_in")
    module.available = lambda: "ok"
    module.supports = lambda op, device, dtype: (
        "ok" if (op, dtype) in BEHAVIOUR else f"{op} is not for it"
    )
    for op in {op for op, _ in BEHAVIOUR}:
        for operator in OPS[op].runs:
            function = getattr(blocks, operator)
            backward = operator.endswith("_backward")
            setattr(module, operator, function if backward else _changed(op, function))
    return module


def _changed(op: str, forward: Callable) -> Callable:
    def call(rows, *arguments, **options):
        results = forward(rows, *arguments, **options)
        change = BEHAVIOUR[op, rows.dtype]
        return change(results) if isinstance(results, tuple) else change((results,))[0]

    return call


def answering(monkeypatch: Any, **fields: object) -> list[tuple]:
    """In the place of child processes: this, if anything, is found of each task. Returns the tasks that they get."""
    began = []

    def run(request, tasks, limit, patience, tell) -> None:
        for task in tasks:
            began.append(task)
            if fields:
                tell(task, fields)

    monkeypatch.setattr(verification, "run", run)
    return began


def prepare(monkeypatch: Any, cache: Path) -> None:
    """The CPU is a GPU, the stand-in is its Triton backend, and nothing is known of it."""
    monkeypatch.setenv("FASTNCE_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")  # which must take no check out
    monkeypatch.setattr(verification, "_DEVICE", "stand_ins:Device")
    monkeypatch.setattr(backends, "_TABLE", {**backends._TABLE, "triton": stand_in()})
    monkeypatch.setattr(backends, "_VERIFIED", ("cpu", "cuda"))
    monkeypatch.setattr(verdicts, "machine", lambda device: ("Stand-in 9000", "1.0"))
    monkeypatch.setattr(verdicts, "_said", set())
    verdicts.forget()


class Device:
    """See ``fastnce.verification.device.GPU``."""

    patience = 5.0
    repeats = 20
    rounds = 3

    def __init__(self, index: int) -> None:
        self.device = CPU
        torch.set_num_threads(1)
        backends._TABLE["triton"] = stand_in()

    @staticmethod
    def place(device: object) -> torch.device:
        return CPU

    @staticmethod
    def kinds() -> list[torch.device]:
        return [CPU]

    @staticmethod
    def workers(place: torch.device) -> int:
        return 1

    @staticmethod
    def cut(count: int) -> int:
        return max(1, count // 50)

    def poison(self) -> None:
        BESIDE.fill_(torch.nan)

    def busy(self) -> None:
        pass

    def captured(self, call: Callable) -> tuple:
        results = call()

        def replay() -> None:
            for name, x in call().items():
                results[name].copy_(x)

        return results, replay

    def seconds(self, call: Callable, calls: int) -> float:
        COST["seconds"] = 3.0
        call()
        return COST["seconds"]
