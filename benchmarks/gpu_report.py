"""One command for a machine with a GPU: build, test, measure, judge, report, within a fixed time and without a network."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import dispatch_table, gpu_steps, gpu_targets, machine, report, suite
from fastnce.backends import dispatch

# Shares of the whole time at most; what these steps leave over, the benchmarks get.
_BUILD_SHARE, _TEST_SHARE, _SANITIZE_SHARE = 0.2, 0.25, 0.1
_DTYPES = ("bfloat16", "float32")
# (set of cases, dtypes, share of the time that is left): first what the targets are about, then the wider look.
_PHASES = (("target", ("bfloat16",), 0.7), ("quick", _DTYPES, 1.0))
# The ops whose targets name torch.compile. For the others it would compile for most of the time.
_COMPILED = ("patch_nce", "conditional_contrastive")


def main(out: Path, minutes: float = 9.0) -> int:
    """Makes the report.

    Args:
        out: folder for ``results.json``, ``results.md`` and, with matplotlib, ``results.png``.
        minutes: for everything together.

    Returns:
        0 if build, tests and sanitizers passed (or there was nothing to run) and no backend of this package was wrong; 1 otherwise,
        also on a machine without a GPU. Targets that are missed are reported and change nothing.
    """
    if not torch.cuda.is_available():
        print(
            f"benchmarks gpu-report: torch {torch.__version__} sees no GPU on this machine; nothing was built or measured.",
            file=sys.stderr,
        )
        return 1
    start = time.monotonic()
    total = minutes * 60 - 20  # for starting and for writing the report
    device = torch.device("cuda")
    facts = machine.describe(device)
    _say(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}")
    rates = machine.matmul_rates(device, [torch.bfloat16, torch.float32], calls=10)
    bandwidth = machine.bandwidth(device)
    _say(
        "torch.mm: "
        + ", ".join(f"{name} {rate / 1e3:.0f} TFLOP/s" for name, rate in rates.items())
        + f"; memory {bandwidth:,.0f} GB/s"
    )

    build = gpu_steps.build(_BUILD_SHARE * total)
    _say(f"build: {build['status']}")
    tests = gpu_steps.tests(_TEST_SHARE * total)
    _say(f"tests: {tests['status']}")
    backends = gpu_steps.backends_on_gpu()
    sanitizers = gpu_steps.sanitize(backends, _SANITIZE_SHARE * total)
    for name, found in sanitizers.items():
        _say(f"{name}: {found['status']}")
    results, failures = _benchmarks(total - (time.monotonic() - start))

    document = {"results": results, "matmul_gflops": rates, "bandwidth_gbs": bandwidth}
    verdicts = gpu_targets.verdicts_of(document)
    measured = dispatch_table.points(results)
    title = f"GPU report, {facts['device']}"
    files = report.write(
        out,
        "results",
        results,
        title=title,
        machine=facts,
        rates=rates,
        settings={"command": "gpu-report", "minutes": minutes, "dtypes": list(_DTYPES)},
        extra={
            "bandwidth_gbs": bandwidth,
            "build": build,
            "tests": tests,
            "sanitizers": sanitizers,
            "backends": backends,
            "failures": failures,
            "targets": [gpu_targets.as_row(verdict) for verdict in verdicts],
        },
    )
    with files[1].open("a") as text:
        text.write(f"\n## Targets\n\n{gpu_targets.table(verdicts)}\n")
        text.write(_steps(build, tests, sanitizers, backends, failures))
        generation = dispatch.generation(device) or "unknown"
        lines = dispatch_table.python(generation, measured)
        text.write(
            f"\n## For `fastnce.backends.dispatch.MEASURED`\n\n```python\n{lines}\n```\n"
            if measured
            else ""
        )
    report.plot(out / "results.png", results, title)
    print(files[1].read_text())
    good = build["status"] in ("ok", "nothing to build") and tests["status"] in ("ok", "no tests")
    sane = not any(found["status"].startswith("failed") for found in sanitizers.values())
    faulty = failures or report.has_fault(results)
    return 0 if good and sane and results and not faulty else 1


def _say(line: str) -> None:
    print(f"gpu-report: {line}", file=sys.stderr, flush=True)


def _benchmarks(seconds: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every op in its own process, phase after phase; results, and which ops failed and how."""
    end = time.monotonic() + seconds
    found: dict[tuple, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for size, dtypes, share in _PHASES:
        ops = [op for op in suite.OPS if suite.cases(op, size, torch.device("cuda"))]
        limit = time.monotonic() + share * (end - time.monotonic())
        for index, op in enumerate(ops):
            part = (limit - time.monotonic()) / (len(ops) - index)
            if op == "info_nce":  # the most cases, and the largest
                part *= 2
            with_compile = size != "target" or op in _COMPILED
            options = ["--size", size, "--dtype", *dtypes]
            options.append("--compile" if with_compile else "--no-compile")
            _say(f"{op}, {size} cases: up to {part:.0f} s")
            entries, failure = _benchmark(op, options, part)
            for entry in entries:
                key = (entry["op"], entry["case"], entry["dtype"])
                if key not in found or "not_run" in found[key]:
                    found[key] = entry
            if failure:
                failures[op] = failure
                _say(f"{op}: {failure.splitlines()[0]}")
    return list(found.values()), failures


def _benchmark(op: str, options: list[str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """One op's cases in a process of their own: entries, and how it failed, if it did."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "benchmarks", op, "--device", "cuda", "--seconds", "1.5"]
        arguments += ["--out", folder, "--limit", f"{max(1.0, 0.75 * seconds):.0f}", *options]
        status, output = gpu_steps.step(arguments, seconds)
        entries = []
        for path in Path(folder).glob("*.json"):
            entries += json.loads(path.read_text())["results"]
    return entries, "" if status == "ok" else f"{status}\n{output}"


def _steps(
    build: dict[str, str],
    tests: dict[str, str],
    sanitizers: dict[str, dict[str, str]],
    backends: dict[str, str],
    failures: dict[str, str],
) -> str:
    lines = ["", "## Build, tests, backends", "", f"- build: {build['status']}"]
    lines.append(f"- tests: {tests['status']}")
    if tests["output"].strip():
        lines.append(f"  - {tests['output'].strip().splitlines()[-1]}")
    lines += [f"- compute-sanitizer {name}: {x['status']}" for name, x in sanitizers.items()]
    lines += [
        f"- backend {name}: {'runs on the GPU' if reason == 'ok' else reason}"
        for name, reason in backends.items()
    ]
    for op, failure in failures.items():
        lines.append(f"- benchmark of {op}: {failure.splitlines()[0]}")
    return "\n".join(lines) + "\n"
