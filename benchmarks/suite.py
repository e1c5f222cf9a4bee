"""The ops' tables of cases, who competes in each, and running them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import fastnce
from benchmarks import machine, memory
from benchmarks.case import Call, Case, Inputs, Provider
from benchmarks.harness import add_rates, measure

OPS = (
    "info_nce",
    "patch_nce",
    "conditional_contrastive",
    "sample_patches",
    "sup_con",
    "nt_xent",
    "pairwise_cosine_similarity",
)

# Those that have products of bfloat16 for float32 inputs at torch's precision "medium".
ROUNDING_OPS = ("info_nce", "patch_nce", "pairwise_cosine_similarity")

# Rivals that are quicker when compiled, and whose products are of the inputs' dtype. The reference multiplies in fp32.
COMPILED_TOO = ("published", "matmul + logsumexp")

# Plain PyTorch keeps about this many bytes per pair (i, j): a few N x M arrays in fp32.
EAGER_BYTES_PER_PAIR = 24


def cases(op: str, size: str, device: torch.device) -> list[Case]:
    """The cases of ``op`` in the set ``size`` that are meant for ``device``."""
    table = importlib.import_module(f"benchmarks.{op}").CASES
    return [case for case in table if size in case.sets and device.type in case.devices]


def find_case(op: str, name: str) -> Case:
    """The case of that name."""
    table = importlib.import_module(f"benchmarks.{op}").CASES
    return next(case for case in table if case.name == name)


def fused(case: Case, backend: str | None) -> Call:
    """The public op on one backend; for sample_patches the patches alone."""
    op = getattr(fastnce, case.op)
    if case.form is not None:
        return lambda inputs: case.form(inputs, **case.options, backend=backend)
    if case.op == "sample_patches":
        return lambda inputs: op(**inputs, **case.options, backend=backend)[0]
    return lambda inputs: op(**inputs, **case.options, backend=backend)


def providers(
    case: Case, device: torch.device, dtype: torch.dtype, with_compile: bool = True
) -> list[Provider]:
    """Plain PyTorch, compiled and not, the op's rivals, and every fused backend of the package."""
    eager = fused(case, "torch")
    can_compile = compiler(device) if with_compile else "not asked for; --compile adds it"
    eager_bytes = EAGER_BYTES_PER_PAIR * case.pairs(case.shape)
    out = [
        Provider("eager", eager, extra_bytes=eager_bytes),
        _compiled("compile", eager, can_compile, eager_bytes // 2),
    ]
    for rival in importlib.import_module(f"benchmarks.{case.op}").rivals(case, device, dtype):
        out.append(rival)
        half = dtype in (torch.bfloat16, torch.float16)
        if half and rival.name in COMPILED_TOO and case.products:
            half_bytes = rival.extra_bytes // 2
            out.append(_compiled(f"{rival.name}, compiled", rival.call, can_compile, half_bytes))
    for name in _fused_names():
        exact = _fused_provider(case, device, dtype, name)
        out.append(exact)
        if name == "triton" and device.type == "cuda" and _has_fp8(case):
            out.append(_fp8(exact, case))
        # Of other backends the products' precision is the whole run's, for all providers: --precision.
        if name == "native" and dtype == torch.float32 and case.op in ROUNDING_OPS:
            out.append(_rounding(exact))
    return out


def _fused_names() -> list[str]:
    return [name for name in fastnce.backends.available() if name != "torch"]


def _fused_provider(case: Case, device: torch.device, dtype: torch.dtype, name: str) -> Provider:
    # The backend's own predicate: its reason without the advice that the public op adds for a caller.
    reason = fastnce.backends.supports(name, case.op, device.type, dtype)
    return Provider(name, fused(case, name), ours=True, reason=reason)


def _rounding(exact: Provider) -> Provider:
    """The same with products of bfloat16, which PyTorch's own products on a CPU do not take for float32."""

    def call(inputs: Inputs) -> Any:
        with machine.matmul_precision("medium"):
            return exact.call(inputs)

    return dataclasses.replace(
        exact, name=f"{exact.name}, bf16 products", call=call, rounds_products=True
    )


def _has_fp8(case: Case) -> bool:
    return case.op == "info_nce" and "M" not in case.shape


def _fp8(exact: Provider, case: Case) -> Provider:
    """The same with similarities of rows rounded to e4m3, for which the reference does so too."""
    options = {**case.options, "similarity_dtype": torch.float8_e4m3fn}
    rounded = dataclasses.replace(case, options=options)
    known = "similarity_dtype" in inspect.signature(fastnce.info_nce).parameters
    return dataclasses.replace(
        exact,
        name=f"{exact.name}, fp8 similarities",
        call=fused(rounded, exact.name),
        reason=exact.reason if known else "info_nce has no similarity_dtype",
        rounds_products=True,
        truth=fused(rounded, "torch"),
    )


def _compiled(name: str, call: Call, reason: str, extra_bytes: int) -> Provider:
    if reason == "ok":
        # Deprecations inside the compiler are of no use to the reader of a table.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
        call = torch.compile(call, dynamic=False)
    return Provider(name, call, reason=reason, extra_bytes=extra_bytes, compiled=True)


def compiler(device: torch.device) -> str:
    """``"ok"`` where torch.compile can generate code for ``device``, or what is missing."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "no C++ compiler found; install g++"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "ok"


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
    keep: Callable[[list[dict]], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Measures all cases in all dtypes.

    Args:
        chosen: the cases.
        device: where.
        dtypes: of the inputs.
        seconds: timing budget of one case in one dtype.
        with_compile: whether torch.compile takes part.
        with_memory: whether peak memory is measured.
        rates: GFLOP/s of the machine's matrix product by dtype, for the share.
        deadline: ``time.monotonic()`` after which no further case is begun.
        log: gets lines of progress.
        keep: gets the results so far after every case, so that nothing is lost if a later one hangs.

    Returns:
        One entry per case and dtype; those not begun have ``"not_run": "out of time"``.
    """
    results: list[dict[str, Any]] = []
    for case in chosen:
        for dtype in dtypes:
            if time.monotonic() > deadline:
                results.append(_not_run(case, device, dtype))
                continue
            # Compiled functions of one code object share a cache with a limit, beyond which they quietly run uncompiled.
            if with_compile:
                torch.compiler.reset()
            competitors = providers(case, device, dtype, with_compile)
            peaks = [machine.PeakMeter(device, dtype)]
            if any(provider.rounds_products for provider in competitors):
                peaks.append(machine.PeakMeter(device, torch.bfloat16))
            for peak in peaks:
                peak.measure()
            entry = measure(case, competitors, fused(case, "torch"), device, dtype, seconds, log)
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


def _not_run(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "op": case.op,
        "case": case.name,
        "shape": case.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "not_run": "out of time",
        "providers": [],
    }
