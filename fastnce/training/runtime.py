"""Device, seeds, determinism, and stopping on a signal."""

from __future__ import annotations

import os
import random
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

import numpy as np
import torch

from fastnce.errors import UserError

# The first signal asks for a stop at the end of the step, the second one ends the process as it normally would.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU if there is none.

    Raises:
        UserError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is unknown. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"device={name} is not supported. Use auto, cpu, cuda or cuda:N.")
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU found"
        raise UserError(f"device={name} is not there: {built}. Use device=cpu or auto.")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device={name} is not there: GPUs 0 to {count - 1} are. Use one of them.")
    return device


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def use_deterministic_algorithms() -> None:
    """Makes torch use deterministic algorithms only, and raise where there is none."""
    # cuBLAS reads it when it starts, and is repeatable only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def rng_state() -> dict[str, object]:
    """The states of torch's default generators."""
    state: dict[str, object] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    """Restores what `rng_state` gave; states of devices that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for index, cuda_state in enumerate(state.get("cuda", [])):
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(cuda_state, index)


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done all that was asked of it, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StopOnSignal:
    """Context in which Ctrl-C (SIGINT) and SIGTERM only set `requested`.

    A second signal acts as it would outside. Outside the main thread, where handlers cannot be set, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in _STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def ignore_interrupt(worker_id: int) -> None:
    """For data workers: Ctrl-C reaches the whole process group, but only the main process decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
