"""What is a device's own in a verification. Tests put another class in its place, of the same names, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnce.backends import verdicts
from fastnce.errors import UserError

NONE = f"torch {torch.__version__} sees no GPU on this machine"
Results = dict[str, Tensor]


class GPU:
    """A GPU of CUDA or ROCm.

    Attributes:
        patience: seconds without an answer after which a child process is given up.
        repeats: of each case, which have to be equal in every bit.
        rounds: of each race.
    """

    patience = 60.0
    repeats = 20
    rounds = 7

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)

    @staticmethod
    def place(device: str | torch.device | None) -> torch.device:
        """The device that a user names, by default the current one, with its index."""
        try:
            place = torch.device("cuda" if device is None else device)
        except (RuntimeError, TypeError):
            raise UserError(
                f"device={device!r} is no device. Name a GPU, such as 'cuda:0'."
            ) from None
        if place.type != "cuda" or not torch.cuda.is_available():
            what = "is no GPU" if place.type != "cuda" else f"is not there: {NONE}"
            raise UserError(f"device={place} {what}. Only the kernels of GPUs are verified.")
        index = torch.cuda.current_device() if place.index is None else place.index
        if index >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise UserError(f"device={place} is not there: GPUs 0 to {last} are. Use one of them.")
        return torch.device("cuda", index)

    @staticmethod
    def kinds() -> list[torch.device]:
        """The first GPU of each kind that torch sees here."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        first: dict[str, torch.device] = {}
        for place in (torch.device("cuda", index) for index in range(count)):
            first.setdefault(verdicts.machine(place)[0], place)
        return list(first.values())

    @staticmethod
    def workers(place: torch.device) -> int:
        """Child processes that look for errors side by side, 8 GiB for each; the races are run by one alone."""
        memory = torch.cuda.get_device_properties(place).total_memory
        return max(1, min(4, memory // (8 * 2**30)))

    @staticmethod
    def cut(count: int) -> int:
        """The number of rows that a case or race of ``count`` has here."""
        return count

    def poison(self) -> None:
        """Fills the memory that the next tensors will get with NaN, of every dtype."""
        torch.cuda.empty_cache()
        sizes = [2**exponent for exponent in range(9, 27)] * 2
        held = [torch.full((size,), 255, dtype=torch.uint8, device=self.device) for size in sizes]
        del held

    def busy(self) -> None:
        """Keeps another stream at work for a moment, beside what comes next."""
        if not hasattr(self, "_beside"):
            self._beside = torch.cuda.Stream(self.device)
            self._copied = torch.zeros(2, 2**24, device=self.device)
        with torch.cuda.stream(self._beside):
            for _ in range(4):
                self._copied[0].copy_(self._copied[1])

    def captured(self, call: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """The results of a call in a CUDA graph, and what computes them again, from the same memory into the same memory."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return results, graph.replay

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Of one of several calls, by the device's clock: the host's where that is what the device waits for."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
