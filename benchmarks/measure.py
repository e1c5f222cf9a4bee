"""How cases are measured: correctness first, then interleaved timing, rates and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import machine, memory, rivals
from benchmarks.cases import Call, Case, Inputs, Provider, leaves
from benchmarks.timing import forget_upstream, run, time_interleaved

Entry = dict[str, Any]

# The name among the calls of what a case does besides the op.
_ALONE = "alone"
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


def errors(got: tuple[list, list], truth: tuple[list, list]) -> dict[str, float]:
    """The largest relative l2 error among the outputs and among the gradients; inf where either is not finite."""
    pairs = {"output": (got[0], truth[0]), "gradient": (got[1], truth[1])}
    return {
        name: max((_relative(a, b) for a, b in zip(x, y, strict=True)), default=0.0)
        for name, (x, y) in pairs.items()
    }


def _relative(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape:
        return math.inf
    truth = truth.double()
    scale = truth.norm().item() or 1.0
    error = (got.double() - truth).norm().item() / scale
    return math.inf if math.isnan(error) else error


def in_double(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tree_map(convert, inputs)


def _fault(error: dict[str, float], bound: dict[str, float], against: str) -> str:
    """The reason why a result is wrong; "" if it is not."""
    return "; ".join(
        f"{name} error {error[name]:.1e} against {against}, allowed {bound[name]:.1e}"
        for name in error
        if not error[name] <= bound[name]
    )


class _Gate:
    """Lets only what computes the case go on to the timing.

    A result may be off by twice what plain PyTorch is off by in the inputs' dtype, and a slack. The truth in fp64 is at cut-down
    sizes where it does not fit at the timed ones; there the providers are compared with the first of them.
    """

    def __init__(self, case: Case, eager: Call, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        # On a CPU time is the limit: 2048 x 2048 is checked as it is.
        free = machine.free_bytes(device) if device.type == "cuda" else None
        self.shape = case.gate_shape(64 * 2048**2 if free is None else 0.4 * free)
        self.inputs = case.inputs(device, dtype, self.shape)
        self._of_case = self._truth(eager)
        self._first: tuple[str, tuple[list, list]] | None = None

    def _truth(self, reference: Call) -> tuple[tuple[list, list], dict[str, float]]:
        """Results in fp64, and how far those in the inputs' dtype are from them."""
        truth = run(reference, in_double(self.inputs), self.case.wrt)
        return truth, errors(run(reference, self.inputs, self.case.wrt), truth)

    def check(self, provider: Provider, row: dict[str, Any], inputs: Inputs) -> str:
        """The reason why a provider is wrong, "" if it is not; its error and bound go into ``row``."""
        case, exact = self.case, provider.truth is None
        truth, eager_error = self._of_case if exact else self._truth(provider.truth)
        slack = (OWN_SLACK if provider.ours else RIVAL_SLACK)[self.dtype]
        # Where its own truth rounds the products as well, they need no allowance.
        rounding = ROUNDED_SLACK if provider.rounds_products and exact else 0.0
        bound = {name: 2 * error + slack + rounding for name, error in eager_error.items()}
        row["error"] = errors(run(provider.call, self.inputs, case.wrt), truth)
        row["allowed"] = bound
        fault = _fault(row["error"], bound, "fp64")
        if fault or case.once:
            return fault
        result = run(provider.call, inputs, case.wrt)  # warms up as well
        if exact:
            self._first = self._first or (provider.name, result)
            if not case.gate_only and self.shape != case.shape:
                name, first = self._first
                loose = dict.fromkeys(bound, RIVAL_SLACK[self.dtype])
                loose = bound if provider.rounds_products else loose
                fault = _fault(errors(result, first), loose, f"{name} at full size")
        return fault


def measure(
    case: Case,
    providers: list[Provider],
    reference: Call,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    log: Callable[[str], None] = lambda line: None,
) -> Entry:
    """Checks and times the providers of a case, within ``seconds`` of timing for all together.

    ``reference`` is plain PyTorch; called with fp64 it is the truth.

    Returns:
        The case's facts, and under ``"providers"`` a row for each: ``status`` ("ok", "wrong", "failed", "out of memory",
        "unavailable", "skipped") and ``reason``, ``seconds`` (quartiles, None if it was not timed), its error and bound.
    """
    log(f"{case.op}, {case.name}: checking")
    gate = _Gate(case, reference, device, dtype)
    inputs = case.inputs(device, dtype)
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    for provider in providers:
        row = {"name": provider.name, "ours": provider.ours, "seconds": None}
        rows.append(row)
        row["status"], row["reason"] = _can_run(provider, case, device)
        if row["status"] != "ok":
            continue
        if provider.rounds_products:
            row["rounds_products"] = True
        if provider.truth:
            row["other_function"] = True
        try:
            fault = gate.check(provider, row, inputs)
            if fault:
                row["status"], row["reason"] = "wrong", fault
        except Exception as error:  # a rival that breaks must not take the others' numbers along
            row["status"], row["reason"] = _failure(error)
        if row["status"] == "ok" and not case.once:
            calls[provider.name] = partial(run, provider.call, inputs, case.wrt)

    gate_shape = gate.shape
    del gate
    if case.alone is not None and calls:
        calls[_ALONE] = partial(run, case.alone, inputs, case.wrt)
        calls[_ALONE]()
    log(f"{case.op}, {case.name}: timing {', '.join(calls) or 'nothing'}")
    times = time_interleaved(calls, seconds, device) if calls else {}
    alone = times.pop(_ALONE, None)
    for row in rows:
        row["seconds"] = times.get(row["name"])
        if alone and row["seconds"]:
            row["seconds_above_alone"] = row["seconds"]["median"] - alone["median"]
    forget_upstream()
    return {
        **({"alone": alone} if alone else {}),
        **_facts(case, device, dtype),
        "gate_shape": gate_shape,
        "options": case.options,
        "gradients": list(case.wrt),
        "products": case.products,
        "flop": case.flop,
        "input_bytes": sum(x.nbytes for x in leaves(inputs, inputs) if isinstance(x, Tensor)),
        "once": case.once,
        "providers": rows,
    }


def _facts(case: Case, device: torch.device, dtype: torch.dtype) -> Entry:
    name = str(dtype).removeprefix("torch.")
    facts = {"op": case.op, "case": case.name, "shape": case.shape, "dtype": name}
    return {**facts, "device": device.type}


def _can_run(provider: Provider, case: Case, device: torch.device) -> tuple[str, str]:
    if provider.reason != "ok":
        return "unavailable", provider.reason
    free = machine.free_bytes(device)
    if free is not None and provider.extra_bytes > 0.8 * free:
        need = f"needs about {provider.extra_bytes / 1e9:.1f} GB"
        return "skipped", f"{need}, {free / 1e9:.1f} GB are free"
    if case.once and not provider.ours:
        return "skipped", "too large here; only ours runs, once"
    return "ok", "ok"


def _failure(error: Exception) -> tuple[str, str]:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in line:
        torch.cuda.empty_cache()
        return "out of memory", line
    return "failed", f"{type(error).__name__}: {line}"


def add_rates(
    entry: Entry, matmul: float | None, peak: float | None, rounded_peak: float | None = None
) -> None:
    """Adds to each timed provider its rate on the mandatory products, and what shares these are of torch.mm's and of the peak.

    All in GFLOP/s, where known; ``rounded_peak`` is that of bfloat16, for providers that round float32 to it.
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


def run_cases(
    chosen: list[Case],
    device: torch.device,
    dtypes: list[torch.dtype],
    *,
    seconds: float,
    with_compile: bool = True,
    with_memory: bool = True,
    rates: dict[str, float] | None = None,
    deadline: float = float("inf"),
    log: Callable[[str], None] = lambda line: None,
    keep: Callable[[list[Entry]], None] = lambda results: None,
) -> list[Entry]:
    """Measures all cases in all dtypes, each within ``seconds`` of timing.

    ``rates`` are torch.mm's by dtype, for the share. ``log`` gets lines of progress, ``keep`` the results after every case,
    so that nothing is lost if a later one hangs.

    Returns:
        One entry per case and dtype; those not begun by ``deadline``, of ``time.monotonic()``, have ``"not_run"``.
    """
    results: list[Entry] = []
    for case, dtype in ((case, dtype) for case in chosen for dtype in dtypes):
        if time.monotonic() > deadline:
            facts = _facts(case, device, dtype)
            results.append({**facts, "not_run": "out of time", "providers": []})
            continue
        # Compiled functions of one code object share a cache with a limit, beyond which they quietly run uncompiled.
        if with_compile:
            torch.compiler.reset()
        competitors = rivals.providers(case, device, dtype, with_compile)
        peaks = [machine.PeakMeter(device, dtype)]
        if any(provider.rounds_products for provider in competitors):
            peaks.append(machine.PeakMeter(device, torch.bfloat16))
        for peak in peaks:
            peak.measure()
        entry = measure(case, competitors, rivals.fused(case, "torch"), device, dtype, seconds, log)
        if case.once:
            log(f"{case.op}, {case.name}: the one call")
            memory.add_cpu_peaks([entry], deadline)
        for peak in peaks:
            peak.measure()
        add_rates(entry, (rates or {}).get(entry["dtype"]), *(peak.rate() for peak in peaks))
        if with_memory and device.type == "cuda":
            memory.add_cuda_peaks(entry, case, competitors, device, dtype)
        results.append(entry)
        keep(results)
    if with_memory and device.type == "cpu":
        log("measuring peak memory")
        memory.add_cpu_peaks(results, deadline)
        keep(results)
    return results
