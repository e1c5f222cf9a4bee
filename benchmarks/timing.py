"""Calling a provider, forward and backward, and timing several in turns."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Call, Inputs, leaves

# The fewest and the most rounds, and the most calls of a provider in one.
_ROUNDS, _MOST_CALLS = (3, 25), 200


def run(call: Call, inputs: Inputs, wrt: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward: the outputs, and the gradient of each leaf of ``wrt``; without any, the forward alone.

    A loss is scaled by 4096, as gradient scaling does to keep fp16 gradients from underflow; other outputs are differentiated
    against a fixed pattern of upstream gradients.
    """
    outputs = call(inputs)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    if not wrt:
        return [x.detach() for x in outputs], []
    upstream = [_upstream(x.shape, x.dtype, x.device) for x in outputs]
    grads = torch.autograd.grad(outputs, leaves(inputs, wrt), upstream)
    return [x.detach() for x in outputs], list(grads)


@functools.cache
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for every call, so that making it is not part of a provider's time."""
    steps = torch.arange(shape.numel(), device=device, dtype=torch.float32)
    # bf16 values, so that all dtypes see the same gradient.
    pattern = steps.cos().bfloat16().reshape(shape) if shape else torch.tensor(4096.0)
    return pattern.to(device, dtype)


def forget_upstream() -> None:
    """Frees the upstream gradients of the last case."""
    _upstream.cache_clear()


def quartiles(samples: list[float]) -> dict[str, float | int]:
    """Median, first and third quartile, and the number of samples."""
    if len(samples) == 1:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "samples": len(samples)}


def seconds_of(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Seconds of each of ``count`` calls in a row.

    On a GPU between CUDA events, which wait for the host where it is the slower one.
    """
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for _ in range(count):
            call()
            ends.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def median_seconds(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """The median of ``count`` calls, after two that warm up."""
    return statistics.median(seconds_of(call, 2 + count, device)[2:])


def in_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, counts: dict[str, int], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of all ``calls``, a, b, c, a, b, c ..., so that whatever else the machine does hits all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += seconds_of(call, counts.get(name, 1), device)
    return samples


def time_interleaved(
    calls: dict[str, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, dict[str, float | int]]:
    """Times all ``calls`` in turn.

    In each round a provider gets a slice of equal time, at least one call. The calls have been warmed up with a first call; a
    second one here estimates their time. A call that by itself outlasts the whole budget is not repeated: that is its sample.

    Args:
        calls: name -> call.
        seconds: the budget for all of them together.
        device: where they run.

    Returns:
        name -> ``quartiles`` of the seconds per call.
    """
    samples = in_turns(calls, 1, {}, device)
    repeated = {name: first for name, (first,) in samples.items() if first <= seconds}
    if repeated:
        share = seconds / len(repeated)
        least, most = _ROUNDS
        rounds = max(least, min(most, int(share / max(repeated.values()))))
        counts = {
            name: max(1, min(_MOST_CALLS, int(share / rounds / max(estimate, 1e-7))))
            for name, estimate in repeated.items()
        }
        samples |= in_turns({name: calls[name] for name in repeated}, rounds, counts, device)
    return {name: quartiles(times) for name, times in samples.items()}
