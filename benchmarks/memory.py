"""Peak memory that loss and gradients need beyond their inputs, and beyond inputs and outputs.

On a GPU PyTorch's allocator counts it. On a CPU a subprocess does nothing else. Its environment tells it to take every array of
64 kB and more from the system and give it straight back. So the kernel's own high-water mark of the process, reset just before
the call, shows what the call took. ``python -m benchmarks.memory`` is that subprocess.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, rivals
from benchmarks.cases import Case, Provider
from benchmarks.machine import ROOT
from benchmarks.timing import forget_upstream, quartiles, run
from fastnce.precision import float32_products

# Arrays of 64 kB and more come from the system and go straight back.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# The sizes of a first call that only has to load code.
_TINY = {"N": 32, "M": 32, "S": 32, "image": 32}
_CLEAR = Path("/proc/self/clear_refs")


def status_bytes(field: str) -> int:
    """A size that the kernel knows of this process: ``VmRSS``, or ``VmHWM``, its highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Starts ``VmHWM`` anew; the bytes that are resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    _CLEAR.write_text("5")
    return before


def storage_bytes(results: tuple[list[Tensor], list[Tensor]]) -> int:
    """Bytes of outputs and gradients, what they share counted once."""
    storages = [x.untyped_storage() for part in results for x in part]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _figures(peak: int, outputs: int) -> dict[str, int]:
    return {"peak_extra_bytes": peak, "working_bytes": max(0, peak - outputs)}


def add_cuda_peaks(
    entry: dict[str, Any],
    case: Case,
    providers: list[Provider],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Adds ``peak_extra_bytes`` and ``working_bytes`` to each timed provider of ``entry``."""
    inputs = case.inputs(device, dtype)
    for row, provider in zip(entry["providers"], providers, strict=True):
        if row["seconds"] is None:
            continue
        # Warmed up by the timing; the upstream gradients that all providers share were freed since.
        try:
            run(provider.call, inputs, case.wrt)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results = run(provider.call, inputs, case.wrt)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            row |= _figures(peak, storage_bytes(results))
            del results
        except torch.OutOfMemoryError:
            row["peak_extra_note"] = "out of memory"
    forget_upstream()


def add_cpu_peaks(results: list[dict[str, Any]], deadline: float) -> None:
    """Adds ``peak_extra_bytes`` and ``working_bytes`` to each timed provider of all ``results``, from one subprocess.

    A case that runs once gets the time of that call as well. A provider without a figure has ``peak_extra_note`` with the
    reason.
    """
    rows, jobs = [], []
    for entry in results:
        for row in entry["providers"]:
            wanted = row["status"] == "ok" if entry.get("once") else row["seconds"] is not None
            if wanted and not row.keys() & {"peak_extra_bytes", "peak_extra_note"}:
                rows.append((entry, row))
                jobs.append([entry["op"], entry["case"], entry["dtype"], row["name"]])
    answers, note = _ask_subprocess(jobs, deadline)
    for index, (entry, row) in enumerate(rows):
        if index >= len(answers):
            row["peak_extra_note"] = note
            continue
        row |= _figures(answers[index]["peak"], answers[index]["outputs"])
        if entry.get("once"):
            row["seconds"] = quartiles([answers[index]["seconds"]])


def _ask_subprocess(jobs: list[list[str]], deadline: float) -> tuple[list[dict], str]:
    if not jobs or not os.access(_CLEAR, os.W_OK):
        return [], "not measured: needs Linux's /proc/self/clear_refs"
    limit = None if deadline == float("inf") else max(30.0, deadline - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.memory", str(torch.get_num_threads())]
    command.append(float32_products("cpu"))
    try:
        done = subprocess.run(
            command,
            check=False,
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=ROOT,
            env=os.environ | GLIBC,
        )
        text, note = done.stdout, f"the measuring process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        text, note = (expired.stdout or b"").decode(), "out of time"
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"peak"')], note


def peak_extra(case: Case, provider: Provider, dtype: torch.dtype) -> dict[str, Any]:
    """One forward and backward: ``peak``, the bytes by which this process's resident memory rises; ``outputs``, the bytes of
    results and gradients; ``seconds``.

    A first, small call loads the code. Where the call at full size would still compile, or make the upstream gradients that all
    providers share, one goes before the measured one.
    """
    device = torch.device("cpu")
    outputs, _ = run(provider.call, case.inputs(device, dtype, case.cut(_TINY)), case.wrt)
    inputs = case.inputs(device, dtype)
    if provider.compiled or any(x.dim() > 0 for x in outputs):
        run(provider.call, inputs, case.wrt)
    del outputs
    before = reset_peak()
    start = time.perf_counter()
    results = run(provider.call, inputs, case.wrt)
    seconds = time.perf_counter() - start
    peak = max(0, status_bytes("VmHWM") - before)
    return {"peak": peak, "outputs": storage_bytes(results), "seconds": seconds}


def main() -> None:
    """Reads jobs as JSON from stdin, writes one answer as JSON per line."""
    torch.set_num_threads(int(sys.argv[1]))
    torch.set_float32_matmul_precision(sys.argv[2])
    for op, case_name, dtype_name, name in json.load(sys.stdin):
        case, dtype = cases.find(op, case_name), getattr(torch, dtype_name)
        with_compile = "compile" in name
        if with_compile:
            torch.compiler.reset()
        found = rivals.providers(case, torch.device("cpu"), dtype, with_compile)
        provider = next(p for p in found if p.name == name)
        print(json.dumps(peak_extra(case, provider, dtype)), flush=True)


if __name__ == "__main__":
    main()
