"""Facts about the machine, and its matrix product rate in this very run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.timing import median_seconds
from fastnce.backends import native
from fastnce.precision import float32_products

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """The facts by which a reader judges a timing: hardware, versions, threads, and what else was running."""
    facts = {
        "device": f"{_cpu_name()}, {os.cpu_count()} cores",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "commit": _commit(),
        "float32_matmul_precision": float32_products(device.type),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def slug(name: str) -> str:
    """A device's name as a file name."""
    plain = name.lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


class PeakMeter:
    """The rate of multiply-adds in registers, measured over and over while a case is measured.

    On a CPU with the native library; elsewhere it stays empty.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._runs = device.type == "cpu" and native.available() == "ok"
        self._samples: list[float] = []

    def measure(self, count: int = 3) -> None:
        """Takes ``count`` samples of 50 ms."""
        if self._runs:
            self._samples += [native.fma_peak(0.05, self._dtype) for _ in range(count)]

    def rate(self) -> float | None:
        """GFLOP/s, the median of all samples; None without any."""
        return statistics.median(self._samples) if self._samples else None


def matmul_rates(
    device: torch.device, dtypes: list[torch.dtype], calls: int = 5
) -> dict[str, float]:
    """GFLOP/s of ``torch.mm`` (the machine's own library) on a large square product, the median of ``calls``.

    On a GPU fp32 is measured a second time with tf32 allowed.
    """
    rates = {str(dtype).removeprefix("torch."): _rate(device, dtype, calls) for dtype in dtypes}
    if device.type == "cuda" and torch.float32 in dtypes:
        with matmul_precision("high"):
            rates["tf32"] = _rate(device, torch.float32, calls)
    return rates


def _rate(device: torch.device, dtype: torch.dtype, calls: int) -> float:
    size = 8192 if device.type == "cuda" else 1536
    if dtype == torch.float64:
        size //= 2
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: torch.mm(a, b), calls, device) / 1e9


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def in_fresh_process(
    environment: dict[str, str], call: Callable[..., Any], *arguments: object
) -> Any:
    """``call(*arguments)`` in a process that begins with this environment; raises what it raises."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        return pool.submit(call, *arguments).result()


@contextlib.contextmanager
def matmul_precision(precision: str | None) -> Iterator[None]:
    """torch.set_float32_matmul_precision inside the block; None leaves it as it is."""
    if precision is None:
        yield
        return
    before = float32_products("cpu")
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiplies_bfloat16() -> bool:
    """Whether the native kernels have the processor multiply bfloat16; without, it only halves what inputs take."""
    return _instructions() == "avx512bf16"


def _instructions() -> str | None:
    return native.instruction_set() if native.available() == "ok" else None


def _cpu_name() -> str:
    """The processor's name, and the instructions in use where these are less than AVX-512: other numbers, other files."""
    instructions = _instructions()
    narrow = {"avx2": "AVX2", "portable": "portable code"}.get(instructions)
    return f"{_cpu_model()} ({narrow})" if narrow else _cpu_model()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with local changes" if commit and changed else commit


def _driver() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0].strip() if answer else None
