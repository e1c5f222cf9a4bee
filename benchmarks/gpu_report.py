"""One command for a machine with a GPU: build, verify, test, measure, report, within a fixed time and without a network.

Each step is a process of its own with a time limit: a crash or a hang on the device costs that step alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, machine, report

# Shares of the whole time at most; what these steps leave over, the benchmarks get.
_BUILD_SHARE, _VERIFY_SHARE, _TEST_SHARE, _SANITIZE_SHARE = 0.2, 0.25, 0.25, 0.1
_DTYPES = ("bfloat16", "float32")
# (set of cases, dtypes, share of the time that is left): first the large ones, then the wider look.
_PHASES = (("target", ("bfloat16",), 0.7), ("quick", _DTYPES, 1.0))
# The ops that torch.compile takes part in. For the others it would compile for most of the time.
_COMPILED = ("patch_nce", "conditional_contrastive")

_PYTEST = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
# The ops' suite on every backend, and the kernels' own tests that run on a GPU.
_SUITES = [
    "tests/ops",
    "tests/triton_kernels/test_triton_numerics.py",
    "tests/triton_kernels/test_triton_fp8.py",
    "tests/cuda_kernels/test_cuda_losses.py",
    "tests/cuda_kernels/test_cuda_sample_patches.py",
]
# Under a sanitizer a kernel runs many times slower: the ops' own tests on the one backend, and of these the plain ones.
_SANITIZED = ["tests/ops", "-k", "cuda and not repeatable and not compile and not memory"]
_SANITIZERS = ("memcheck", "racecheck")
_FOUND = 9  # the status by which compute-sanitizer says that it found something
Step = dict[str, str]  # status and output


def step(arguments: list[str], limit: float, before: tuple[str, ...] = (), **environment) -> Step:
    """Runs ``python`` with the arguments, in a process group that ends with it.

    Args:
        arguments: of Python.
        limit: seconds.
        before: a command that runs Python, such as a sanitizer.
        environment: variables beside those of this process.

    Returns:
        ``status``, "ok" or what became of it, and ``output``, the end of what it printed.
    """
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [*before, sys.executable, *arguments],
            cwd=machine.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(machine.ROOT), **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
            status = "ok" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {time.monotonic() - begun:.0f} s, its limit"
        finally:
            # A worker that outlives its parent would go on loading the device.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return {"status": status, "output": log.read()[-4000:]}


def main(out: Path, minutes: float = 9.0) -> int:
    """Makes the report.

    Args:
        out: folder for ``results.json``, ``results.md``, ``verdicts/*.json``, which ``fastnce/verification/results`` may take,
            ``verify.md``, and, with matplotlib, ``results.png``.
        minutes: for everything together.

    Returns:
        0 if build, verification, tests and sanitizers passed (or there was nothing to run) and no backend of this package was wrong; 1 otherwise,
        also on a machine without a GPU.
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
    rates = machine.matmul_rates(device, [torch.bfloat16, torch.float32], calls=10)
    _say(f"{facts['device']}, torch.mm {rates} GFLOP/s")

    steps = {
        "build": step(["-m", "fastnce", "build"], _BUILD_SHARE * total),
        "verify": _verify(out, _VERIFY_SHARE * total),
        "backends": step(["-m", "fastnce", "doctor"], 60, FASTNCE_CACHE=str(out.resolve())),
        "tests": _test(_SUITES, _TEST_SHARE * total),
    }
    for name in _SANITIZERS:
        steps[name] = _sanitize(name, _SANITIZE_SHARE * total / len(_SANITIZERS))
    results = _benchmarks(total - (time.monotonic() - start), steps)
    lines = [f"- {name}: {found['status']}" for name, found in steps.items()]
    lines += ["", "```", steps["backends"]["output"].strip(), "```"]
    title = f"GPU report, {facts['device']}"
    text = report.write(
        out,
        "results",
        results,
        title=title,
        machine=facts,
        rates=rates,
        settings={"command": "gpu-report", "minutes": minutes, "dtypes": list(_DTYPES)},
        more={"steps": steps},
        text="\n".join(["\n## Steps\n", *lines, ""]),
    )
    report.plots(out, "results", results, title, together=True)
    print(text)
    good = all(found["status"].startswith(("ok", "not run")) for found in steps.values())
    return 0 if good and results and not report.has_fault(results) else 1


def _say(line: str) -> None:
    print(f"gpu-report: {line}", file=sys.stderr, flush=True)


def _verify(out: Path, limit: float) -> Step:
    """Every kernel that can be, anew; of the time some goes into starting."""
    options = ["--again", "--seconds", f"{max(1.0, limit - 20):.0f}"]
    options += ["--report", str(out.resolve() / "verify.md")]
    _say("verifying the kernels")
    return step(["-m", "fastnce", "verify", *options], limit, FASTNCE_CACHE=str(out.resolve()))


def _test(arguments: list[str], limit: float, **options) -> Step:
    if importlib.util.find_spec("pytest") is None:
        return {"status": "not run: pytest is not installed", "output": ""}
    return step([*_PYTEST, *arguments], limit, **options)


def _sanitize(name: str, limit: float) -> Step:
    """The ops' suite on the ``cuda`` backend under one of compute-sanitizer's tools."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"status": "not run: compute-sanitizer comes with the CUDA toolkit", "output": ""}
    options = ("--tool", name, "--error-exitcode", str(_FOUND), "--target-processes", "all")
    # Arrays of their own, not pieces of a pool, so that an access beyond an end shows.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = _test(_SANITIZED, limit, before=(tool, *options), **apart)
    status, output = found["status"], found["output"]
    if f"status {_FOUND}" in status or "= Error:" in output or "= Invalid" in output:
        found["status"] = "failed: the sanitizer found an error"
    elif status.startswith("stopped"):
        found["status"] = f"ok until it was {status}"
    elif status.endswith("status 5"):
        found["status"] = "not run: there is no test of the cuda backend, see the backends"
    return found


def _benchmarks(seconds: float, steps: dict[str, Step]) -> list[dict[str, Any]]:
    """The results of every op, phase after phase, each a step of its own."""
    end = time.monotonic() + seconds
    found: dict[tuple, dict[str, Any]] = {}
    for size, dtypes, share in _PHASES:
        ops = [op for op in cases.OPS if cases.select(op, size, torch.device("cuda"))]
        limit = time.monotonic() + share * (end - time.monotonic())
        for index, op in enumerate(ops):
            part = (limit - time.monotonic()) / (len(ops) - index)
            if op == "info_nce":  # the most cases, and the largest
                part *= 2
            with_compile = size != "target" or op in _COMPILED
            options = ["--size", size, "--dtype", *dtypes]
            options += ["--compile" if with_compile else "--no-compile", "--device", "cuda"]
            options += ["--limit", f"{max(1.0, 0.75 * part):.0f}", "--seconds", "1.5"]
            name = f"{op}, {size} cases"
            with tempfile.TemporaryDirectory() as folder:
                steps[name] = step(["-m", "benchmarks", op, *options, "--out", folder], part)
                _say(f"{name}: {steps[name]['status']}")
                for path in Path(folder).glob("*.json"):
                    for entry in json.loads(path.read_text())["results"]:
                        key = (entry["op"], entry["case"], entry["dtype"])
                        if key not in found or "not_run" in found[key]:
                            found[key] = entry
    return list(found.values())
