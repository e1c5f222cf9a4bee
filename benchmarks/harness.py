"""How a case is measured: correctness first, then interleaved timing. Knows nothing of any particular op."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Inputs, Provider, leaves

# The name among the calls of what a case does besides the op.
ALONE = "alone"

# What a result of our own may add to twice plain PyTorch's error in the same dtype (relative, in the l2 norm).
OWN_SLACK = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
# A rival rounds where its authors chose to; it is wrong only if it computes something else.
RIVAL_SLACK = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 5e-3}
# Of float32 inputs whose products are of bfloat16: a logit of 1 / 0.07 is known to 2^-9 of itself.
ROUNDED_SLACK = 0.03


def run(call: Call, inputs: Inputs, wrt: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Forward and backward: the outputs, and the gradient of each leaf of ``wrt``; without any, the forward alone.

    A loss is scaled by 4096, as gradient scaling does to keep fp16 gradients from underflow; other outputs are differentiated
    against a fixed pattern of upstream gradients.
    """
    outputs = call(inputs)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    if not wrt:
        return [x.detach() for x in outputs], []
    grads = torch.autograd.grad(outputs, leaves(inputs, wrt), [_upstream(x) for x in outputs])
    return [x.detach() for x in outputs], list(grads)


_patterns: dict[tuple, Tensor] = {}


def _upstream(x: Tensor) -> Tensor:
    """The same for every call, so that making it is not part of a provider's time."""
    key = (tuple(x.shape), x.dtype, x.device)
    if key not in _patterns:
        steps = torch.arange(x.numel(), device=x.device, dtype=torch.float32)
        # bf16 values, so that all dtypes see the same gradient.
        pattern = steps.cos().bfloat16().reshape(x.shape) if x.dim() else torch.tensor(4096.0)
        _patterns[key] = pattern.to(x.device, x.dtype)
    return _patterns[key]


def forget_upstream() -> None:
    """Frees the upstream gradients of the last case."""
    _patterns.clear()


def errors(got: tuple[list, list], truth: tuple[list, list]) -> dict[str, float]:
    """The largest relative l2 error among the outputs and among the gradients; inf where either is not finite."""
    pairs = {"output": (got[0], truth[0]), "gradient": (got[1], truth[1])}
    return {
        name: max((_relative(a, b) for a, b in zip(x, y, strict=True)), default=0.0)
        for name, (x, y) in pairs.items()
    }


def _relative(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape:
        return float("inf")
    truth = truth.double()
    scale = truth.norm().item() or 1.0
    error = (got.double() - truth).norm().item() / scale
    return float("inf") if math.isnan(error) else error


def in_double(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""

    def convert(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [convert(x) for x in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in inputs.items()}


def gate_bound(eager: dict[str, float], dtype: torch.dtype, ours: bool) -> dict[str, float]:
    """The largest error that passes: ``2 * err(plain PyTorch) + slack``, for rivals with a slack of their own."""
    slack = OWN_SLACK[dtype] if ours else RIVAL_SLACK[dtype]
    return {name: 2 * error + slack for name, error in eager.items()}


def verdict(error: dict[str, float], bound: dict[str, float], against: str) -> str:
    """``"ok"``, or what is wrong."""
    wrong = [
        f"{name} error {error[name]:.1e} against {against}, allowed {bound[name]:.1e}"
        for name in error
        if not error[name] <= bound[name]
    ]
    return "; ".join(wrong) or "ok"


def quartiles(samples: list[float]) -> dict[str, float | int]:
    """Median, first and third quartile, and the number of samples."""
    if len(samples) == 1:
        q1 = median = q3 = samples[0]
    else:
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "samples": len(samples)}


def cpu_clock(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of ``count`` calls in a row."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def cuda_clock(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of ``count`` calls in a row, between CUDA events; waits for the host count where it is the slower."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def clock_for(device: torch.device) -> Callable[[Callable[[], Any], int], list[float]]:
    """The clock of a device."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def time_interleaved(
    calls: dict[str, Callable[[], Any]],
    seconds: float,
    clock: Callable[[Callable[[], Any], int], list[float]] = cpu_clock,
    rounds: tuple[int, int] = (3, 25),
    most_calls: int = 200,
) -> dict[str, dict[str, float | int]]:
    """Times all ``calls`` in turn: a, b, c, a, b, c ..., so that whatever else the machine does hits all of them alike.

    In each round a provider gets a slice of equal time, at least one call. The calls have been warmed up with a first call; a
    second one here estimates their time. A call that by itself outlasts the whole budget is not repeated: that is its sample.

    Args:
        calls: name -> call.
        seconds: the budget for all of them together.
        clock: ``(call, count) -> seconds of each``.
        rounds: the fewest and the most rounds.
        most_calls: the most calls in a slice.

    Returns:
        name -> :func:`quartiles` of the seconds per call.
    """
    samples = {name: clock(call, 1) for name, call in calls.items()}
    repeated = {name: first[0] for name, first in samples.items() if first[0] <= seconds}
    if repeated:
        share = seconds / len(repeated)
        count = max(rounds[0], min(rounds[1], int(share / max(repeated.values()))))
        per_round = {
            name: max(1, min(most_calls, int(share / count / max(estimate, 1e-7))))
            for name, estimate in repeated.items()
        }
        for name in repeated:
            samples[name] = []
        for _ in range(count):
            for name, calls_now in per_round.items():
                samples[name] += clock(calls[name], calls_now)
    return {name: quartiles(times) for name, times in samples.items()}


def measure(
    case: Case,
    providers: list[Provider],
    reference: Call,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Gates and times every provider of a case.

    Args:
        case: the problem.
        providers: who computes it, in the order of the table.
        reference: plain PyTorch; run in fp64 it is the truth, run in ``dtype`` its error sets the bounds.
        device: where.
        dtype: of the inputs.
        seconds: the budget of the timing; gate, compilation and warm-up are not counted.
        log: gets a line of progress.

    Returns:
        The case's entry in the JSON; only providers whose ``status`` is ``"ok"`` have ``seconds``, and none has where the
        case runs once: :mod:`benchmarks.memory` makes that call.
    """
    gate_shape = case.gate_shape(_truth_bytes(device))
    gate_inputs = case.inputs(device, dtype, gate_shape)
    common = _Gate(reference, gate_inputs, case.wrt)

    inputs = case.inputs(device, dtype)
    rows, calls, first = [], {}, None
    for provider in providers:
        log(f"{case.op}, {case.name}: checking {provider.name}")
        row = {"name": provider.name, "ours": provider.ours, "seconds": None}
        rows.append(row)
        row["status"], row["reason"] = _can_run(provider, device)
        if case.once and not provider.ours:
            row["status"], row["reason"] = "skipped", "too large here; only ours runs, once"
        if row["status"] != "ok":
            continue
        if provider.rounds_products:
            row["rounds_products"] = True
        if provider.truth:
            row["other_function"] = True
        try:
            gate = _Gate(provider.truth, gate_inputs, case.wrt) if provider.truth else common
            row["error"] = errors(run(provider.call, gate_inputs, case.wrt), gate.truth)
            row["allowed"] = bound = _bound(provider, gate.error, dtype)
            fault = verdict(row["error"], bound, "fp64")
            if fault == "ok" and not case.once:
                result = run(provider.call, inputs, case.wrt)
                if provider.truth is None:
                    first = first or (provider.name, result)
                    if not case.gate_only and gate_shape != case.shape:
                        loose = gate_bound({"output": 0.0, "gradient": 0.0}, dtype, ours=False)
                        loose = bound if provider.rounds_products else loose
                        fault = verdict(errors(result, first[1]), loose, f"{first[0]} at full size")
            if fault != "ok":
                row["status"], row["reason"] = "wrong", fault
        except Exception as error:  # a rival that breaks must not take the others' numbers along
            row["status"], row["reason"] = _failure(error)
        if row["status"] == "ok" and not case.once:
            calls[provider.name] = _bind(provider.call, inputs, case.wrt)

    del first
    if case.alone is not None and calls:
        run(case.alone, inputs, case.wrt)
        calls[ALONE] = _bind(case.alone, inputs, case.wrt)
    log(f"{case.op}, {case.name}: timing {', '.join(calls) or 'nothing'}")
    times = time_interleaved(calls, seconds, clock_for(device)) if calls else {}
    alone = times.pop(ALONE, None)
    for row in rows:
        row["seconds"] = times.get(row["name"])
        if alone and row["seconds"]:
            row["seconds_above_alone"] = row["seconds"]["median"] - alone["median"]
    forget_upstream()
    return {
        **({"alone": alone} if alone else {}),
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "gate_shape": gate_shape,
        "options": case.options,
        "gradients": list(case.wrt),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "products": case.products,
        "flop": case.flop,
        "input_bytes": sum(x.nbytes for x in leaves(inputs, inputs) if isinstance(x, Tensor)),
        "once": case.once,
        "providers": rows,
    }


def add_rates(
    entry: dict[str, Any],
    matmul: float | None,
    peak: float | None,
    rounded_peak: float | None = None,
) -> None:
    """Adds to each timed provider its rate on the mandatory products, and what shares these are of torch.mm's and of the peak.

    Args:
        entry: of :func:`measure`.
        matmul: GFLOP/s of torch.mm in the case's dtype, if known.
        peak: GFLOP/s of multiply-adds in registers during the case, if known.
        rounded_peak: the same of bfloat16, for providers that round float32 to it.
    """
    entry["fma_peak_gflops"] = peak
    for row in entry["providers"]:
        if row["seconds"] and entry["flop"]:
            row["gflops"] = entry["flop"] / row["seconds"]["median"] / 1e9
            if matmul:
                row["share_of_matmul"] = row["gflops"] / matmul
            own_peak = rounded_peak if row.get("rounds_products") else peak
            if own_peak:
                row["share_of_peak"] = row["gflops"] / own_peak


class _Gate:
    """The truth in fp64, and how far plain PyTorch in the inputs' dtype is from it."""

    def __init__(self, reference: Call, inputs: Inputs, wrt: tuple[str, ...]) -> None:
        self.truth = run(reference, in_double(inputs), wrt)
        self.error = errors(run(reference, inputs, wrt), self.truth)


def _bound(provider: Provider, eager: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    bound = gate_bound(eager, dtype, provider.ours)
    # Where its own truth rounds the products as well, they need no allowance.
    slack = ROUNDED_SLACK if provider.rounds_products and provider.truth is None else 0.0
    return {name: limit + slack for name, limit in bound.items()}


def _bind(call: Call, inputs: Inputs, wrt: tuple[str, ...]) -> Callable[[], Any]:
    return lambda: run(call, inputs, wrt)


def _can_run(provider: Provider, device: torch.device) -> tuple[str, str]:
    if provider.reason != "ok":
        return "unavailable", provider.reason
    free = free_bytes(device)
    if free is not None and provider.extra_bytes > 0.8 * free:
        return (
            "skipped",
            f"needs about {provider.extra_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
        )
    return "ok", "ok"


def _truth_bytes(device: torch.device) -> float:
    # On a CPU time is the limit: 2048 x 2048 is checked as it is.
    return 0.4 * free_bytes(device) if device.type == "cuda" else 64 * 2048**2


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system does not say."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info()[0]
            + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated()
        )
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _failure(error: Exception) -> tuple[str, str]:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in line:
        torch.cuda.empty_cache()
        return "out of memory", line
    return "failed", f"{type(error).__name__}: {line}"
