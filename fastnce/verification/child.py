"""The child process of a verification, in which a kernel may crash or hang: ``python -m fastnce.verification.child``.

It reads what to do, one JSON object, from its standard input, and writes a JSON object a line to its standard output: ``{"in": case}``
when it begins with something, and the fields of an ``Entry`` when it has finished a task.
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
from fastnce.verification.cases import CASES, RACES, QuickMake
from fastnce.verification.device import GPU

# A race's sample lasts about so long, in seconds; a slow one has fewer rounds.
_SAMPLE, _RACE = 0.01, 1.5
_LEAST_ROUNDS = 3
Run = Callable[[], dict[str, Tensor]]
Begin = Callable[[str], None]


def main() -> None:
    """Works through the tasks."""
    # Compilers and libraries write where they like.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")

    def begin(name: str) -> None:
        answer({"in": name})

    device = pkgutil.resolve_name(request["device"])(request["index"])
    check = {"right": _is_right, "faster": _is_faster}[request["stage"]]
    for op, dtype, form in request["tasks"]:
        answer(check(device, request["backend"], op, getattr(torch, dtype), form, begin))
        try:
            torch.ones(1, device=device.device).item()
        except RuntimeError:  # the context has ended with an error; another process goes on
            return


def _end_with_parent() -> None:
    """However the parent has ended, its end of the standard input is closed then."""
    sys.stdin.read()
    os._exit(1)


def _is_right(
    device: GPU, backend: str, op: str, dtype: torch.dtype, form: str, begin: Begin
) -> dict[str, Any]:
    """Stage A: status, reason and errors of one form."""
    errors: dict[str, float] = {}
    for name, arguments in CASES[op][form].items():
        begin(name)
        try:
            make = Make(dtype, str(device.device), torch.Generator().manual_seed(0))
            sample = Sample(name, arguments(make, device.cut))
            run = functools.partial(testing.run, op, sample, backend=backend)
            got = _repeated(device, run)
            errors[name] = testing.assert_close_to_truth(op, backend, sample, dtype, got=got)
            if len(errors) == 1 and op != "tap_patches":  # which adds sparse gradients
                _expect_graph(device, run, sample)
        except Exception as error:
            return _blame(name, error) | {"errors": errors}
        finally:
            testing.forget()
    return {"status": verdicts.RIGHT, "reason": "", "errors": errors}


def _blame(name: str, error: Exception) -> dict[str, str]:
    """Status and reason after an error in a case or a race."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, AssertionError):
        # Without the op, which the reader knows.
        return {"status": "wrong", "reason": f"{name}: {line.rpartition(f'{name!r}: ')[2]}"}
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": verdicts.NOT_REACHED, "reason": f"{name}: not enough memory"}
    return {"status": "failed", "reason": f"{name}: {type(error).__name__}: {line}"}


def _repeated(device: GPU, run: Run) -> dict[str, Tensor]:
    """The results, after repeats beside another stream that must not differ."""
    device.poison()
    first = run()
    for repeat in range(2, device.repeats + 1):
        device.busy()
        _expect_equal(first, run(), f"repeat {repeat}")
    return first


def _expect_graph(device: GPU, run: Run, sample: Sample) -> None:
    """A graph replays with other numbers in the same memory."""
    results, replay = device.captured(run)
    with torch.no_grad():
        for x in testing.leaves_of(sample):
            x.mul_(0.5) if x.dim() == 0 else x.copy_(x.flip(0) * 0.5 + 0.1)
    replay()
    _expect_equal(run(), results, "a graph that is replayed")


def _expect_equal(first: dict[str, Tensor], again: dict[str, Tensor], what: str) -> None:
    for name, x in first.items():
        # As integers: where the first is NaN, the contract says so.
        assert torch.equal(_bits(x), _bits(again[name])), f"{what} gives another {name}"


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def _is_faster(
    device: GPU, backend: str, op: str, dtype: torch.dtype, form: str, begin: Begin
) -> dict[str, Any]:
    """Stage B: the speed of one form in each size, relative to what would be chosen without the backend."""
    speed: dict[str, float | str] = {}
    can = backends.supports("blocks", op, device.device, dtype) == "ok"
    rivals = (backend, "blocks" if can else "torch")
    for size, arguments in RACES[op][form].items():
        name = f"the {size} race"
        begin(name)
        try:
            sample = Sample("", arguments(QuickMake(dtype, device.device), device.cut))
            speed[size] = _speed(
                device, functools.partial(_step, op, sample, testing.leaves_of(sample)), rivals
            )
        except torch.OutOfMemoryError:
            speed[size] = "not raced: not enough memory"
        except Exception as error:
            return _blame(name, error)
    return {"status": verdicts.RIGHT, "speed": speed}


def _step(op: str, sample: Sample, leaves: list[Tensor], backend: str) -> list[Tensor]:
    """The results of a forward, and the gradients of a backward."""
    outputs = testing.outputs_of(op, sample.arguments, backend)
    ones = [torch.ones_like(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, ones)]


def _speed(device: GPU, step: Callable[[str], list[Tensor]], names: tuple[str, str]) -> float:
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
            off = f"off by {apart / size:.1e} of {tuple(x.shape)} from the rival"
            assert apart <= allowed * size, off


if __name__ == "__main__":
    main()
