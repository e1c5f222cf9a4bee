"""The CUDA backend's library for the host, by the emulator beside this file: ``python -m tests.cuda_kernels.emulated [FILE]``.

With ``FASTNCE_CUDA_EMULATED`` naming the file, fastnce runs the CUDA kernels on CPU tensors (see :mod:`fastnce.backends.cuda`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from fastnce.backends import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = ROOT / "out" / "cuda-emulated" / "libfastnce_cuda_emulated.so"

# -O2 makes the tests no faster, as measured: most of the time they switch between fibers.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DFASTNCE_EMULATED")


def build_emulated(output: Path = LIBRARY) -> Path:
    """Compiles what has changed of the kernels and the emulator.

    Raises:
        BuildError: no torch, no compiler, no ninja, or the compiler failed, with its message.
    """
    files = [*build.cuda_files(SOURCES.parent), HERE / "emulator.cpp", HERE / "plans.cpp"]
    stamp = build.source_hash(SOURCES.parent, build.CUDA.sources)
    build.compile_library(plan(files), output, output.parent / "objects", stamp)
    return output


def plan(files: Iterable[Path], *flags: str) -> build.Plan:
    """``files`` and whatever they include of the kernels and the emulator, compiled as C++."""
    command = build.for_torch([*build.cxx(), *FLAGS, *flags], SOURCES.parent)
    command += [f"-I{SOURCES}", f"-I{HERE}", "-x", "c++"]
    libraries = [f"-L{build.torch_folder() / 'lib'}", "-Wl,-z,defs", "-ltorch_cpu"]
    return build.Plan(dict.fromkeys(files, command), [*build.cxx(), "-shared"], libraries)


if __name__ == "__main__":
    try:
        print(build_emulated(*(Path(argument).absolute() for argument in sys.argv[1:])))
    except build.BuildError as error:
        sys.exit(str(error))
