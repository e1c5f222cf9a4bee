"""``fastnce doctor``: what is installed, which backends run, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import fastnce
from fastnce import backends, verification, waiting
from fastnce.backends import build, native
from fastnce.precision import float32_products
from fastnce.registry import OPS

_TRAINING_PACKAGES = ("PIL", "tqdm", "tyro", "matplotlib", "torchmetrics", "scipy")
_DEMO_PACKAGES = ("sklearn", "skimage")


def report() -> str:
    """The machine, the backends with their reasons, and the backend that each op would run on, as text."""
    lines = [
        f"fastnce {fastnce.__version__}  ({Path(fastnce.__file__).parent})",
        f"python  {platform.python_version()}  {platform.system()} {platform.machine()}",
        f"torch   {torch.__version__}, {torch.get_num_threads()} threads, "
        f"fp32 products: {float32_products('cpu')}, on a GPU {float32_products('cuda')}",
        f"waiting {waiting.shown()}",
        f"cpu     {_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        f"gpu     {_gpu_name()}",
        f"triton  {_version('triton')}",
        f"nvcc    {_nvcc()}",
        "",
        "Backends:",
    ]
    for name, reason in backends.available().items():
        instructions = _instructions() if name == "native" and reason == "ok" else ""
        lines.append(f"  {name:8} {reason}{instructions}")
    if backends.available()["native"] != "ok":
        lines.append(
            "  Without it everything runs in plain PyTorch: slower, with the N x N matrix in memory."
        )
    lines += ["", "Chosen on this machine (float32):"]
    for op in (op.name for op in OPS.values() if op.function is not None):
        lines.append(f"  {op:27} cpu: {_chosen(op)}")
    for device in verification.kinds():
        lines += ["", f"Chosen on {device}, {torch.cuda.get_device_name(device)}:"]
        lines += [f"  {line}" for line in verification.report.choices(device)]
    if os.environ.get("FASTNCE_BACKEND"):
        lines.append(f"FASTNCE_BACKEND={os.environ['FASTNCE_BACKEND']} decides for all of them.")
    lines += ["", f"Training: {_packages(_TRAINING_PACKAGES, 'train')}"]
    lines += [f"Demo data: {_packages(_DEMO_PACKAGES, 'demo')}"]
    return "\n".join(lines)


def _chosen(op: str) -> str:
    try:
        module = backends.select(op, torch.empty(0))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return module.__name__.rpartition(".")[2].replace("reference", "torch")


def _instructions() -> str:
    try:
        return f", instructions: {native.instruction_set()}"
    except RuntimeError as error:  # FASTNCE_CPU_ISA
        return f", but {str(error).splitlines()[0].rpartition('fastnce: ')[2]}"


def _packages(names: tuple[str, ...], extra: str) -> str:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if not missing:
        return "ok"
    return f"missing {', '.join(missing)}. Install with: pip install 'fastnce[{extra}]'"


def _cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _gpu_name() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"


def _nvcc() -> str:
    """The compiler of the CUDA library, which nothing needs where there is no GPU."""
    try:
        command = build.nvcc()[0]
    except build.BuildError:
        return "not installed"
    found = re.search(r"release ([\d.]+)", build.compiler_version(command))
    return found.group(1) if found else command


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
