"""The steps of the GPU report before the measuring: build, tests, sanitizers. Each is a subprocess with a time limit of its own.

A crash or a hang on the device costs that step alone.
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

import fastnce
from benchmarks import machine

_PYTEST = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
# Under a sanitizer a kernel runs many times slower: the ops' own tests on the one backend, and of these the plain ones.
_SANITIZED = ["tests/ops", "-k", "cuda and not repeatable and not compile and not memory"]
# The ops' suite on every backend, and the kernels' own tests that run on a GPU.
_SUITES = [
    "tests/ops",
    "tests/triton_kernels/test_triton_numerics.py",
    "tests/triton_kernels/test_triton_fp8.py",
    "tests/cuda_kernels/test_cuda_losses.py",
    "tests/cuda_kernels/test_cuda_patch_nce.py",
    "tests/cuda_kernels/test_cuda_sample_patches.py",
]
SANITIZERS = ("memcheck", "racecheck")
_FOUND = 9  # the status by which compute-sanitizer says that it found something


def step(
    arguments: list[str],
    limit: float,
    before: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> tuple[str, str]:
    """Runs ``python`` with the arguments, in a process group that ends with it.

    Args:
        arguments: of Python.
        limit: seconds.
        before: a command that runs Python, such as a sanitizer.
        environment: variables beside those of this process.

    Returns:
        ``"ok"`` or what became of it, and the end of what it printed.
    """
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [*before, sys.executable, *arguments],
            cwd=machine.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(machine.ROOT)} | (environment or {}),
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


def build(limit: float) -> dict[str, str]:
    """Compiles what is not compiled."""
    if importlib.util.find_spec("fastnce.backends.build") is None:
        return {"status": "nothing to build", "output": ""}
    status, output = step(["-c", "from fastnce.backends.build import build; print(build())"], limit)
    return {"status": status, "output": output}


def tests(limit: float) -> dict[str, str]:
    """What of the tests a GPU is needed for."""
    reason = _cannot_test()
    if reason:
        return {"status": reason, "output": ""}
    status, output = step([*_PYTEST, *_SUITES], limit)
    return {"status": status, "output": output}


def _cannot_test() -> str:
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    return "" if (machine.ROOT / "tests" / "ops").is_dir() else "no tests"


def sanitize(backends: dict[str, str], limit: float) -> dict[str, dict[str, str]]:
    """The ops' suite on the ``cuda`` backend under each of compute-sanitizer's tools.

    Args:
        backends: of :func:`backends_on_gpu`.
        limit: seconds for all together.

    Returns:
        Tool -> status and output. A status begins with "ok", "not run", "stopped" (nothing was found until then) or "failed".
    """
    tool = shutil.which("compute-sanitizer")
    reason = "" if tool else "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    if backends.get("cuda") != "ok":
        reason = f"the cuda backend: {backends.get('cuda', 'there is none')}"
    reason = (reason and f"not run: {reason}") or _cannot_test()
    if reason:
        return {name: {"status": reason, "output": ""} for name in SANITIZERS}
    end, found = time.monotonic() + limit, {}
    for index, name in enumerate(SANITIZERS):
        options = ["--tool", name, "--error-exitcode", str(_FOUND), "--target-processes", "all"]
        status, output = step(
            [*_PYTEST, *_SANITIZED],
            (end - time.monotonic()) / (len(SANITIZERS) - index),
            before=(tool, *options),
            # Arrays of their own, not pieces of a pool, so that an access beyond an end shows.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        found[name] = {"status": _read(status, output), "output": output}
    return found


def _read(status: str, output: str) -> str:
    """A sanitizer's status, from that of the process and what it printed."""
    faulty = status.endswith(f"status {_FOUND}") or "========= Error:" in output
    if faulty or "========= Invalid" in output:
        return "failed: the sanitizer found an error"
    return f"{status}; nothing was found until then" if status.startswith("stopped") else status


def backends_on_gpu() -> dict[str, str]:
    """Each backend: "ok", or why it does not run on the GPU. Asked anew, after the build."""
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
    status, output = step(["-c", code], 60)
    try:
        return json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return dict.fromkeys(fastnce.backends.names(), f"could not be asked: {status}")
