"""``fastnce verify``: the kernels of a GPU earn their place on the user's machine.

For each backend that can run there, child processes look for errors (stage A) and then race it against plain PyTorch (stage B): op by
op, dtype by dtype, form by form. What they find is written into the user's cache, and decides which backend is chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from fastnce import backends
from fastnce.backends import cuda, verdicts
from fastnce.backends.verdicts import Entry, Key, Task, Verdict
from fastnce.errors import UserError, known
from fastnce.registry import Form
from fastnce.verification import report
from fastnce.verification.cases import CASES, DTYPES
from fastnce.verification.device import GPU
from fastnce.verification.process import Fields, Limit, run

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SECONDS = 120.0
# Of the time of a backend that may go into the search for errors.
_SHARE_OF_ERRORS = 0.6
# Ranks wait so long for rank 0, which may wait for another program's verification.
_PATIENCE = datetime.timedelta(hours=1)
_DEVICE = "fastnce.verification.device:GPU"

Found = dict[Key, Verdict | None]
Say = Callable[[str], None]


def verify(
    device: str | torch.device | None = None,
    *,
    backend: str | None = None,
    seconds: float = SECONDS,
    again: bool = False,
    progress: bool = True,
) -> str:
    """Finds out which kernels are right, and faster than plain PyTorch, on a GPU; from then on those are chosen by themselves there.

    What an earlier call has found on the same GPU, driver and versions stays, and what it has not reached is done. Under
    ``torch.distributed`` every rank has to call it: rank 0 verifies, and the ranks with the same kind of GPU take its verdict.

    Args:
        device: a GPU, by default the current one.
        backend: "triton" or "cuda" alone; by default both.
        seconds: what is not reached by then stays unverified.
        again: does everything anew.
        progress: shows it on standard error.

    Returns:
        A report in Markdown.

    Raises:
        UserError: there is no GPU, or an argument is wrong.

    Examples:
        >>> import fastnce
        >>> print(fastnce.verify())  # doctest: +SKIP
    """
    if backend is not None:
        known(backend, verdicts.EARNING, "backend")
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise UserError(
            f"seconds={seconds!r} must be a positive number. The default is {SECONDS:.0f}."
        )
    place = _device().place(device)
    names = [name for name in verdicts.EARNING if backend in (None, name)]

    def find() -> Found:
        return _verify(place, names, seconds, again, _print if progress else lambda line: None)

    _of_rank_0(place, find)
    return report.text(place)


def verify_once(device: torch.device) -> None:
    """Verifies, before a training, what can run on its GPU and never was verified there. An error ends no training."""
    place = _device().place(device)

    def find() -> Found:
        new = [key.backend for key in _keys(place) if verdicts.find(key) is None]
        if new:
            most = f"for at most {SECONDS:.0f} s (--no-verify: not)"
            _print(f"before the first training on this GPU, {most}")
        try:
            return _verify(place, new, SECONDS, False, _print)
        except Exception as error:
            verdicts.say(f"The GPU kernels could not be verified, and are not used: {error}")
            return {}

    _of_rank_0(place, find)


def kinds() -> list[torch.device]:
    """The first GPU of each kind that torch sees here."""
    return _device().kinds()


def _device() -> type[GPU]:
    return pkgutil.resolve_name(_DEVICE)


def _keys(place: torch.device) -> list[Key]:
    """Of the backends that can run there."""
    able = [name for name in verdicts.EARNING if report.runs(name, place) == "ok"]
    return [verdicts.key_of(name, place) for name in able]


def _of_rank_0(place: torch.device, find: Callable[[], Found]) -> None:
    """Keeps what ``find`` has found, on rank 0; an error there is one on every rank."""
    answer: list[Any] = [None]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        answer = [find()]
    else:
        # A group of its own: to NCCL's, waiting for so long would be an error.
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if dist.get_rank() == 0:
            try:
                answer = [find()]
            except Exception as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=group)
        dist.destroy_process_group(group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    for key, verdict in answer[0].items():
        # The ranks' GPUs may be of several kinds.
        if key == verdicts.key_of(key.backend, place):
            verdicts.keep(key.backend, place, verdict)


def _verify(place: torch.device, names: list[str], seconds: float, again: bool, say: Say) -> Found:
    """Verifies the backends ``names`` one after the other, and writes what it has found, interrupted or not.

    Returns:
        What is known then, of the other backends too.
    """
    found = {key: verdicts.find(key) for key in _keys(place)}
    new = [key for key in found if key.backend in names]
    with _alone(say) if new else contextlib.nullcontext():
        end = time.monotonic() + seconds
        for left, key in zip(range(len(new), 0, -1), new, strict=True):
            limit = Limit(time.monotonic() + (end - time.monotonic()) / left)
            # Another verification may have ended by now.
            verdict = found[key] = (None if again else verdicts.find(key)) or {}
            try:
                _stages(key.backend, place, verdict, limit, say)
            finally:
                _write(key, verdict)
    return found


def _write(key: Key, verdict: Verdict) -> None:
    try:
        verdicts.write(key, verdict)
    except UserError as error:
        verdicts.say(
            f"{error} FASTNCE_CACHE names another. Until then what was found holds in this process alone."
        )


def _tasks(name: str, place: torch.device) -> list[Task]:
    """All that a backend takes there."""
    return [
        (op, verdicts.name_of(dtype), form)
        for dtype in DTYPES
        for op in CASES
        if backends.supports(name, op, place, dtype) == "ok"
        for form in CASES[op]
        if not (name == "cuda" and cuda.lacks(op, dtype, Form(form, 0, 0)))
    ]


def _stages(name: str, place: torch.device, verdict: Verdict, limit: Limit, say: Say) -> None:
    """Stage A, then stage B, of what is not known yet of a backend; ``verdict`` gets what is found."""
    device = _device()
    request = {"device": _DEVICE, "index": place.index or 0, "backend": name}

    def work(stage: str, tasks: list[Task], limit: Limit, workers: int) -> None:
        done = itertools.count(1)

        def tell(task: Task, fields: Fields) -> None:
            entry = verdict[task] = dataclasses.replace(verdict[task], **fields)
            number = f"{next(done)} of {len(tasks)}"
            say(f"{name}, {stage}? {number}: {', '.join(task)}: {report.told(entry)}")

        def take(part: list[Task]) -> None:
            run({**request, "stage": stage}, part, limit, device.patience, tell)

        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(take, [tasks[first::workers] for first in range(workers)]))
            except BaseException:  # Ctrl-C: the processes end, and the threads with them
                limit.end = 0
                raise

    tasks = _tasks(name, place)
    for task in tasks:
        verdict.setdefault(task, Entry())
    errors = Limit(time.monotonic() + _SHARE_OF_ERRORS * limit.seconds)
    new = [task for task in tasks if verdict[task].status == verdicts.NOT_REACHED]
    work("right", new, errors, device.workers(place))
    right = [task for task in tasks if verdict[task].status == verdicts.RIGHT]
    unraced = [task for task in right if not verdict[task].speed]
    work("faster", unraced, limit, 1)
    if not new and not unraced:
        say(f"{name}: everything is known already; --again does it anew")


def _print(line: str) -> None:
    print(f"fastnce verify: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(say: Say) -> Iterator[None]:
    """Two that race at once would disturb each other: who comes second waits, and finds little left to do."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that is read-only, or has no locks
            verdicts.folder().mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(verdicts.folder() / "lock", "w"))
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_NB | fcntl.LOCK_EX)
                except BlockingIOError:
                    say("waiting for another verification on this machine")
                    fcntl.flock(handle, fcntl.LOCK_EX)
        yield
