"""One command for a machine with a GPU: build, test, measure, report, within a fixed time and without a network.

Every step is a subprocess with a time limit of its own, so that a crash or a hang on the device costs that step alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastnce
from benchmarks import machine, report, suite

# Shares of the whole time at most; what build and tests leave over, the benchmarks get.
_BUILD_SHARE, _TEST_SHARE = 0.25, 0.35
_DTYPES = ("bfloat16", "float32")


def main(out: Path, minutes: float = 9.0) -> int:
    """Makes the report.

    Args:
        out: folder for ``results.json``, ``results.md`` and, with matplotlib, ``results.png``.
        minutes: for everything together.

    Returns:
        0 if build and tests passed (or there was nothing to build) and no backend of this package was wrong; 1 otherwise, also on
        a machine without a GPU.
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
    _say(
        "torch.mm: " + ", ".join(f"{name} {rate / 1e3:.0f} TFLOP/s" for name, rate in rates.items())
    )

    build = _build(_BUILD_SHARE * total)
    _say(f"build: {build['status']}")
    tests = _tests(_TEST_SHARE * total)
    _say(f"tests: {tests['status']}")
    backends = _backends()
    results, failures = _benchmarks(total - (time.monotonic() - start))

    title = f"GPU report, {facts['device']}"
    files = report.write(
        out,
        "results",
        results,
        title=title,
        machine=facts,
        rates=rates,
        settings={"command": "gpu-report", "minutes": minutes, "dtypes": list(_DTYPES)},
        extra={"build": build, "tests": tests, "backends": backends, "failures": failures},
    )
    with files[1].open("a") as table:
        table.write(_steps(build, tests, backends, failures))
    report.plot(out / "results.png", results, title)
    print(files[1].read_text())
    good = build["status"] in ("ok", "nothing to build") and tests["status"] in ("ok", "no tests")
    return 0 if good and results and not failures and not report.has_fault(results) else 1


def _say(line: str) -> None:
    print(f"gpu-report: {line}", file=sys.stderr, flush=True)


def _step(arguments: list[str], limit: float) -> tuple[str, str]:
    """Runs ``python`` with the arguments, in a process group that ends with it; status and the end of what it printed."""
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=machine.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(machine.ROOT)},
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
        return status, log.read()[-4000:]


def _build(limit: float) -> dict[str, str]:
    if importlib.util.find_spec("fastnce.build") is None:
        return {"status": "nothing to build", "output": ""}
    status, output = _step(["-c", "from fastnce.build import build; print(build())"], limit)
    return {"status": status, "output": output}


def _tests(limit: float) -> dict[str, str]:
    if importlib.util.find_spec("pytest") is None:
        return {"status": "not run: pytest is not installed", "output": ""}
    if not (machine.ROOT / "tests" / "ops").is_dir():
        return {"status": "no tests", "output": ""}
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
    suites = ["tests/ops", "tests/triton_kernels/test_triton_numerics.py"]
    status, output = _step(["-m", "pytest", *suites, *options], limit)
    return {"status": status, "output": output}


def _backends() -> dict[str, str]:
    """Each fused backend: "ok", or why it does not run on the GPU. Asked anew, after the build."""
    code = (
        "import json, torch, fastnce\n"
        "out = {}\n"
        "for name, reason in fastnce.backends.available().items():\n"
        "    try:\n"
        "        fastnce.backends.select('info_nce', torch.empty(0, device='cuda'), name)\n"
        "    except RuntimeError as error:\n"
        "        reason = str(error)\n"
        "    out[name] = reason\n"
        "print(json.dumps(out))\n"
    )
    status, output = _step(["-c", code], 60)
    try:
        return json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return dict.fromkeys(fastnce.backends.names(), f"could not be asked: {status}")


def _benchmarks(seconds: float) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every op in its own process; results, and which ops failed and how."""
    end = time.monotonic() + seconds
    results, failures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for index, op in enumerate(suite.OPS):
            share = (end - time.monotonic()) / (len(suite.OPS) - index)
            if op == "info_nce":  # the most cases, and the largest
                share *= 2
            _say(f"{op}: up to {share:.0f} s")
            out = Path(folder) / op
            status, output = _step(
                ["-m", "benchmarks", op, "--device", "cuda", "--seconds", "1.5", "--out", str(out)]
                + ["--dtype", *_DTYPES, "--limit", f"{max(1.0, 0.75 * share):.0f}"],
                share,
            )
            written = list(out.glob("*.json")) if out.is_dir() else []
            for path in written:
                results += json.loads(path.read_text())["results"]
            if status != "ok":
                failures[op] = f"{status}\n{output}"
                _say(f"{op}: {status}")
    return results, failures


def _steps(
    build: dict[str, str],
    tests: dict[str, str],
    backends: dict[str, str],
    failures: dict[str, str],
) -> str:
    lines = ["", "## Build, tests, backends", "", f"- build: {build['status']}"]
    lines.append(f"- tests: {tests['status']}")
    if tests["output"].strip():
        lines.append(f"  - {tests['output'].strip().splitlines()[-1]}")
    lines += [
        f"- backend {name}: {'runs on the GPU' if reason == 'ok' else reason}"
        for name, reason in backends.items()
    ]
    for op, failure in failures.items():
        lines.append(f"- benchmark of {op}: {failure.splitlines()[0]}")
    return "\n".join(lines) + "\n"
