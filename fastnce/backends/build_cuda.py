"""Compiling the CUDA library, ``csrc/cuda``, with nvcc. Neither a GPU nor a torch for CUDA is needed.

Like :mod:`fastnce.backends.build`, this file is loaded by ``setup.py`` where the package may not be importable.

Environment:
    FASTNCE_CUDA: 1 builds the library, 0 does not; without either it is built where there is a GPU.
    FASTNCE_CUDA_ARCHS: the GPUs to build for, for example ``80;90a``; by default this machine's, or all of TARGETS.
    NVCC, CUDA_HOME: the compiler, or the toolkit that has it; otherwise the ``nvcc`` of the PATH.
    NVCCFLAGS: further flags for compiling.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import build as native
from .build import BuildError

LIBRARY = native.Library("libfastnce_cuda.so", ("cuda/*",))
# Ampere, whose code runs on Ada too; Hopper with its own instructions; Blackwell.
TARGETS = ("80", "90a", "100")
# Files that only one target can compile: always compiled, for their launchers are linked in whatever GPU is asked for.
ONLY_FOR = {"pairs_sm90.cu": ("90a",)}

FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")
_HOST_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden")


def wanted() -> str:
    """``"ok"``, or why the library is not to be built here."""
    choice = native.choice("FASTNCE_CUDA")
    if choice == "0":
        return "FASTNCE_CUDA=0"
    if choice != "1" and not gpu_targets():
        return "this machine has no GPU. Build it all the same with FASTNCE_CUDA=1"
    return "ok"


def build(
    output: Path | None = None, *, sources: Path | None = None, verbose: bool = False
) -> Path:
    """Compiles the CUDA library, unless it is there already and current. Arguments and errors as :func:`fastnce.backends.build.build`."""
    sources = sources or native.source_folder()
    if sources is None:
        raise BuildError(
            f"there is no csrc folder in or beside {native.PACKAGE}. Reinstall fastnce."
        )
    output = output or native.writable_output(LIBRARY)
    compiler, host = nvcc(), native.cxx()
    include, libraries = native.torch_folders()
    stamp = f"{native.source_hash(sources, LIBRARY)}-{_configuration_hash(compiler, host)}"
    if output.is_file() and native.read_stamp(output) == stamp:
        return output
    for_torch = [*host, *_HOST_FLAGS, *native.stamp_flags(stamp), f"-isystem{include}"]
    for_torch += [f"-ffile-prefix-map={sources}=csrc"]

    def command(file: Path) -> list[str]:
        if file.suffix == ".cpp":
            return for_torch
        return [*compiler, *FLAGS, *generate(targets_of(file)), *nvcc_flags()]

    with tempfile.TemporaryDirectory(prefix="fastnce-build-") as folder:
        objects = native.compile_files(source_files(sources), command, Path(folder), verbose)
        # libtorch itself, though nothing of it is used: through it the loader finds libtorch_cuda, where there is one.
        link = [*compiler, "-shared", "-cudart", "static", *map(str, objects), f"-L{libraries}"]
        link += ["-Xlinker", "--no-as-needed,-z,defs", "-ltorch", "-ltorch_cpu"]
        native.link_library(link, output, verbose)
    native.tell_installer(output)
    return output


def source_files(sources: Path) -> list[Path]:
    """All that is compiled: the kernels, which take longest, first."""
    return [*sorted(sources.glob("cuda/*.cu")), *sorted(sources.glob("cuda/*.cpp"))]


def targets_of(file: Path) -> tuple[str, ...]:
    """What a file of kernels is compiled for."""
    return ONLY_FOR.get(file.name) or targets()


def targets() -> tuple[str, ...]:
    """``FASTNCE_CUDA_ARCHS``, or this machine's GPUs, or all."""
    value = os.environ.get("FASTNCE_CUDA_ARCHS", "")
    named = tuple(filter(None, map(str.strip, value.replace(",", ";").split(";"))))
    for target in named:
        if re.fullmatch(r"\d{2,3}[af]?", target) is None:
            raise BuildError(
                f"FASTNCE_CUDA_ARCHS has no target {target!r}. Name compute capabilities, such as {';'.join(TARGETS)}"
            )
    return named or gpu_targets() or TARGETS


@functools.cache
def gpu_targets() -> tuple[str, ...]:
    """The targets of this machine's GPUs, as the driver's tool tells them; () without one."""
    if shutil.which("nvidia-smi") is None:
        return ()
    question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(question, capture_output=True, text=True)
    found = {target_of(line.strip()) for line in answer.stdout.splitlines() if "." in line}
    return tuple(sorted(found, key=lambda target: int(target.rstrip("a"))))


def target_of(capability: str) -> str:
    """What to compile for a GPU of a compute capability, ``"8.6"``: code for x.0 runs on every x.y."""
    major = int(capability.partition(".")[0])
    return {9: "90a"}.get(major, f"{major}0")


def generate(targets: tuple[str, ...]) -> list[str]:
    """nvcc's flags for targets; of the last of all of TARGETS also the intermediate code, for GPUs that come later."""
    flags = []
    for target in targets:
        code = f"sm_{target},compute_{target}" if target == TARGETS[-1] else f"sm_{target}"
        flags += ["-gencode", f"arch=compute_{target},code=[{code}]"]
    return flags


def nvcc() -> list[str]:
    """nvcc, and the host compiler for it if the caller names one."""
    home = os.environ.get("CUDA_HOME")
    command = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    if shutil.which(command) is None:
        raise BuildError(
            f"there is no CUDA compiler {command!r}. Install the CUDA toolkit, or name the compiler with NVCC=..."
        )
    return [command, *(["-ccbin", native.cxx()[0]] if os.environ.get("CXX") else [])]


def nvcc_flags() -> list[str]:
    return shlex.split(os.environ.get("NVCCFLAGS", ""))


def _configuration_hash(compiler: list[str], host: list[str]) -> str:
    versions = [native.compiler_version(command[0]) for command in (compiler, host)]
    parts = [*compiler, *host, *versions, *FLAGS, *_HOST_FLAGS, *nvcc_flags()]
    parts += [*generate(targets()), str(ONLY_FOR), native.TORCH_TARGET]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
