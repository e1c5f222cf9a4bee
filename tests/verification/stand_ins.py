"""A device on the CPU, and backends for it that are right, wrong, slow, or end their process, as the op has it.

The child process of a verification imports this file, by the name ``stand_ins:Device``.
"""

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
CALLS: dict[str, int] = {}
# Memory beside that of the tensors, which a verification fills with NaN.
BESIDE = torch.zeros(1)
CPU = torch.device("cpu")


def right(results: tuple) -> tuple:
    return results


def wrong(results: tuple) -> tuple:
    """One element of the first gradient."""
    gradients = results[-1] if isinstance(results[-1], tuple) else results
    gradient = next(x for x in gradients if x is not None)
    gradient = gradient[0] if isinstance(gradient, list) else gradient
    gradient.view(-1)[-1] += 0.5 * gradient.abs().max() + 1e-3
    return results


def wrong_when_large(results: tuple) -> tuple:
    """In more rows than the cases have."""
    *others, gradients = results
    return (
        (*others, tuple(None if x is None else 2 * x for x in gradients))
        if len(results[0]) > 200
        else results
    )


def late(results: tuple) -> tuple:
    """In the 13th repeat."""
    CALLS["late"] = CALLS.get("late", 0) + 1
    return wrong(results) if CALLS["late"] == 13 else results


def reading(results: tuple) -> tuple:
    """Memory that is not its own."""
    results[0].add_(BESIDE[0])
    return results


def raising(results: tuple) -> tuple:
    raise RuntimeError("no kernel image is available\nand more lines")


def hanging(results: tuple) -> tuple:
    time.sleep(600)
    return results


def crashing(results: tuple) -> tuple:
    os.kill(os.getpid(), signal.SIGSEGV)
    return results


def slow(results: tuple) -> tuple:
    COST["seconds"] = 10.0
    return results


def quick(results: tuple) -> tuple:
    COST["seconds"] = 1.0
    return results


# By backend and dtype: what the forwards do. The others are right, and as fast as plain PyTorch.
BEHAVIOUR: dict[tuple[str, str, torch.dtype], Callable] = {
    ("triton", "info_nce", torch.bfloat16): quick,
    ("triton", "info_nce", torch.float32): wrong,
    ("triton", "info_nce", torch.float16): late,
    ("triton", "sup_con", torch.bfloat16): raising,
    ("triton", "sup_con", torch.float32): slow,
    ("triton", "sup_con", torch.float16): wrong_when_large,
    ("triton", "conditional_contrastive", torch.bfloat16): hanging,
    ("triton", "conditional_contrastive", torch.float32): crashing,
    ("triton", "pairwise_cosine_similarity", torch.float32): quick,
    ("triton", "pairwise_cosine_similarity", torch.bfloat16): reading,
}


def stand_in(name: str) -> types.ModuleType:
    """The backend: the functions of ``blocks``, each followed by what its name, op and dtype are given above."""
    module = types.ModuleType(f"stand_in_{name}")
    ops = {op for _, op, _ in BEHAVIOUR}
    module.available = lambda: "ok"
    module.supports = lambda op, device, dtype: (
        "ok" if (name, op, dtype) in BEHAVIOUR else f"{op} is not for it"
    )
    for op in ops:
        for operator in OPS[op].runs:
            setattr(module, operator, _operator(name, op, operator))
    return module


def _operator(name: str, op: str, operator: str) -> Callable:
    function = getattr(blocks, operator)

    def call(*arguments, **options):
        tensor = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
        results = function(*arguments, **options)
        if operator.endswith("_backward"):
            return results
        found = results if isinstance(results, tuple) else (results,)
        found = BEHAVIOUR[name, op, tensor.dtype](found)
        return found if isinstance(results, tuple) else results

    return call


def prepare(monkeypatch: Any, cache: Path) -> None:
    """The CPU is a GPU, the stand-in is its Triton backend, and nothing is known of it."""
    monkeypatch.setenv("FASTNCE_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(verification, "_DEVICE", "stand_ins:Device")
    monkeypatch.setattr(backends, "_TABLE", {**backends._TABLE, "triton": stand_in("triton")})
    monkeypatch.setattr(backends, "_VERIFIED", ("cpu", "cuda"))
    monkeypatch.setattr(verdicts, "machine", lambda device: ("Stand-in 9000", "1.0"))
    monkeypatch.setattr(verdicts, "_said", set())
    verdicts.forget()


class Device:
    """See ``fastnce.verification.device.GPU``."""

    patience = 5.0
    repeats = 20
    rounds = 3
    share = 0.02

    def __init__(self, index: int) -> None:
        self.device = CPU
        torch.set_num_threads(1)
        backends._TABLE["triton"] = stand_in("triton")

    @staticmethod
    def place(device: object) -> torch.device:
        return CPU

    @staticmethod
    def kinds() -> list[torch.device]:
        return [CPU]

    @staticmethod
    def workers(place: torch.device) -> int:
        return 1

    def synchronize(self) -> None:
        pass

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
