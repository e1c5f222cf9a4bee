"""Gloo ranks that are started once, for starting is slow, and then run one function after the other."""

from __future__ import annotations

import datetime
import multiprocessing
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# No test measures it: it ends ranks that wait for each other, and is long for a busy machine.
_LIMIT = datetime.timedelta(minutes=10)
_groups: dict[int, dist.ProcessGroup | None] = {}  # in a worker: by size


class Workers:
    """``size`` processes that meet in a folder, each a rank of the default group."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size, self._results = size, context.Queue()
        self._tasks = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(
                target=_serve,
                args=(rank, size, str(folder / "meet"), self._tasks[rank], self._results),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable, *args: Any, ranks: int | None = None) -> list[Any]:
        """``function(group, *args)`` on the first ``ranks`` ranks (all), which are ``group``; their results, exceptions as such.

        That of a rank that has died is a ChildProcessError.
        """
        count = ranks or self.size
        for tasks in self._tasks:
            tasks.put((function, args, count))
        answers: dict[int, Any] = {}
        while len(answers) < count:
            dead = [rank for rank in range(count) if not self._processes[rank].is_alive()]
            try:
                rank, answer = self._results.get(timeout=1)
                answers[rank] = answer
            except queue.Empty:  # nothing is on its way from ranks that were dead before
                for rank in dead:
                    code = self._processes[rank].exitcode
                    answers.setdefault(rank, ChildProcessError(f"exit code {code}"))
        return [answers[rank] for rank in range(count)]

    def results(self, function: Callable, *args: Any, ranks: int | None = None) -> list[Any]:
        """The same, where an exception on any rank is one here."""
        answers = self.run(function, *args, ranks=ranks)
        for rank, answer in enumerate(answers):
            if isinstance(answer, BaseException):
                notes = "\n".join(getattr(answer, "__notes__", []))
                raise AssertionError(f"rank {rank}: {answer}\n{notes}") from answer
        return answers

    def stop(self) -> None:
        """Ends the processes."""
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(timeout=10)
            process.kill()


def _serve(rank: int, size: int, meet: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meet}", timeout=_LIMIT, rank=rank, world_size=size)
    _groups[size] = None
    for count in range(2, size):
        _groups[count] = dist.new_group(list(range(count)), timeout=_LIMIT)
    while (task := tasks.get()) is not None:
        function, args, count = task
        if rank >= count:
            continue
        try:
            answer = function(_groups[count], *args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        results.put((rank, answer))
    dist.destroy_process_group()
