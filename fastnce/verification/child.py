"""The child process of a verification, in which a kernel may crash or hang: ``python -m fastnce.verification.child``.

It reads what to do, one JSON object, from its standard input, and writes a JSON object a line to its standard output: ``{"in": case}``
when it begins with something, and ``{"task": [op, dtype, form], ...}`` with the fields of an ``Entry`` when it has finished a task.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import statistics
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnce import backends, testing
from fastnce.backends import verdicts
from fastnce.registry import Make, Sample
from fastnce.verification.cases import CASES, RACES, Arguments, Cut, QuickMake
from fastnce.verification.device import GPU

# A race's sample lasts about so long, in seconds; a slow one has fewer rounds.
_SAMPLE, _RACE = 0.01, 1.5
_LEAST_ROUNDS = 3


def main() -> None:
    """Works through the tasks."""
    # Compilers and libraries write where they like.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(**found: object) -> None:
        answers.write(json.dumps(found) + "\n")

    def begin(name: str) -> None:
        answer(**{"in": name})

    device = pkgutil.resolve_name(request["device"])(request["index"])
    check = {"right": is_right, "faster": is_faster}[request["stage"]]
    for task in request["tasks"]:
        op, dtype, form = task
        found = check(device, request["backend"], op, getattr(torch, dtype), form, begin)
        answer(task=task, **found)
        if not _is_alive(device):  # its context has ended with an error; another process goes on
            return


def _end_with_parent() -> None:
    """However the parent has ended, its end of the standard input is closed then."""
    sys.stdin.read()
    os._exit(1)


def _is_alive(device: GPU) -> bool:
    try:
        torch.zeros(1, device=device.device).add_(1)
        device.synchronize()
    except RuntimeError:
        return False
    return True


def is_right(
    device: GPU, backend: str, op: str, dtype: torch.dtype, form: str, begin: Callable[[str], None]
) -> dict[str, Any]:
    """Stage A: status, reason and errors of one form."""
    errors: dict[str, float] = {}
    of_form = [case for case in CASES[op] if case.form == form]
    for case in of_form:
        begin(case.name)
        try:
            make = Make(dtype, str(device.device), torch.Generator().manual_seed(0))
            sample = Sample(case.name, case.arguments(make, _cut(device)))
            errors[case.name] = _checked(device, backend, op, sample, dtype)
            if case is of_form[0] and op != "tap_patches":  # which adds sparse gradients
                _expect_graph(device, backend, op, sample)
        except AssertionError as wrong:
            return {"status": "wrong", "reason": f"{case.name}: {_line(wrong)}", "errors": errors}
        except torch.OutOfMemoryError:
            reason = f"{case.name}: not enough memory"
            return {"status": verdicts.NOT_REACHED, "reason": reason, "errors": errors}
        except Exception as error:
            reason = f"{case.name}: {type(error).__name__}: {_line(error)}"
            return {"status": "failed", "reason": reason, "errors": errors}
        finally:
            testing.forget()
    return {"status": verdicts.RIGHT, "reason": "", "errors": errors}


def _checked(device: GPU, backend: str, op: str, sample: Sample, dtype: torch.dtype) -> float:
    """The largest error as a share of what is allowed, after repeats beside another stream that must not differ."""
    device.poison()
    first = testing.run(op, sample, backend=backend)
    for repeat in range(2, device.repeats + 1):
        device.busy()
        _expect_equal(first, testing.run(op, sample, backend=backend), f"repeat {repeat}")
    try:
        return testing.assert_close_to_truth(op, backend, sample, dtype, got=first)
    except AssertionError as wrong:
        # Without the op, which the reader knows.
        raise AssertionError(_line(wrong).rpartition(f"{sample.name!r}: ")[2]) from wrong


def _expect_graph(device: GPU, backend: str, op: str, sample: Sample) -> None:
    """A graph replays with other numbers in the same memory."""
    run = functools.partial(testing.run, op, sample, backend=backend)
    results, replay = device.captured(run)
    with torch.no_grad():
        for x in testing.leaves_of(sample):
            x.mul_(0.5) if x.dim() == 0 else x.copy_(x.flip(0) * 0.5 + 0.1)
    replay()
    _expect_equal(run(), results, "a graph that is replayed")


def _expect_equal(first: dict[str, Tensor], again: dict[str, Tensor], what: str) -> None:
    for name, x in first.items():
        # As integers: where the first is NaN, the contract says so.
        if not torch.equal(_bits(x), _bits(again[name])):
            raise AssertionError(f"{what} gives another {name}")


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def is_faster(
    device: GPU, backend: str, op: str, dtype: torch.dtype, form: str, begin: Callable[[str], None]
) -> dict[str, Any]:
    """Stage B: the speed of one form in each size, relative to what would be chosen without the backend."""
    speed: dict[str, float | str] = {}
    can = backends.supports("blocks", op, device.device, dtype) == "ok"
    rival = "blocks" if can else "torch"
    for race in RACES[op]:
        if race.form != form:
            continue
        begin(f"the {race.name} race")
        try:
            make = QuickMake(dtype, device.device)
            speed[race.name] = _speed(
                device, _step(op, race.arguments, make, device), (backend, rival)
            )
        except torch.OutOfMemoryError:
            speed[race.name] = "not raced: not enough memory"
        except AssertionError as wrong:
            return {"status": "wrong", "reason": f"the {race.name} race: {_line(wrong)}"}
        except Exception as error:
            reason = f"the {race.name} race: {type(error).__name__}: {_line(error)}"
            return {"status": "failed", "reason": reason}
    return {"status": verdicts.RIGHT, "speed": speed}


Step = Callable[[str], list[Tensor]]


def _step(op: str, arguments: Arguments, make: Make, device: GPU) -> Step:
    """Runs a forward and a backward on a backend; returns results and gradients."""
    sample = Sample("", arguments(make, _cut(device)))
    leaves = testing.leaves_of(sample)

    def step(backend: str) -> list[Tensor]:
        outputs = testing.outputs_of(op, sample.arguments, backend)
        ones = [torch.ones_like(x) for x in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, ones)]

    return step


def _speed(device: GPU, step: Step, names: tuple[str, str]) -> float:
    """How many times as fast the first backend is as the second: they take turns, the medians count."""
    _expect_alike(step(names[0]), step(names[1]))
    for name in names:
        for _ in range(3):  # compiled, cached
            step(name)
    once = [device.seconds(functools.partial(step, name), 1) for name in names]
    calls = [max(1, int(_SAMPLE / max(seconds, 1e-6))) for seconds in once]
    round_seconds = sum(max(seconds, _SAMPLE) for seconds in once)
    rounds = max(_LEAST_ROUNDS, min(device.rounds, int(_RACE / round_seconds)))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for name, number, found in zip(names, calls, times, strict=True):
            found.append(device.seconds(functools.partial(step, name), number))
    ours, theirs = map(statistics.median, times)
    return round(theirs / ours, 3)


def _expect_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """No contract, for which these sizes are too large: it sees what goes wrong beyond the sizes of the cases alone."""
    for x, y in zip(ours, theirs, strict=True):
        if x.dim() > 0:  # the temperature's gradient may cancel
            apart, size = (x.double() - y.double()).norm(), y.double().norm()
            allowed = 1e-3 + 8 * torch.finfo(y.dtype).eps
            if not apart <= allowed * size:
                raise AssertionError(
                    f"off by {apart / size:.1e} of {tuple(x.shape)} from the rival"
                )


def _cut(device: GPU) -> Cut:
    return lambda count: max(1, int(count * device.share))


def _line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


if __name__ == "__main__":
    main()
