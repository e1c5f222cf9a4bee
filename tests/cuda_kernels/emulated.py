"""The CUDA backend's library for the host, by the emulator beside this file: ``python -m tests.cuda_kernels.emulated``.

With ``FASTNCE_CUDA_EMULATED`` naming the file, fastnce runs the CUDA kernels on CPU tensors (see :mod:`fastnce.cuda`).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import sys
from pathlib import Path

from fastnce import build, build_cuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "out" / "cuda-emulated"
LIBRARY = FOLDER / "libfastnce_cuda_emulated.so"

# -O1: half the time of -O2 to compile, and the fibers' switches decide how fast the tests run.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DFASTNCE_EMULATED")


def build_emulated(output: Path = LIBRARY, *, verbose: bool = False) -> Path:
    """Compiles what has changed. Objects are kept by what they are made of, so that a change of one kernel takes seconds."""
    sources = SOURCES.parent
    include, libraries = build.torch_folders()
    headers = [*sources.glob("common/*.h"), *SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")]
    common = hashlib.sha256(" ".join(FLAGS).encode())
    for header in sorted([*headers, *HERE.glob("*.h")]):
        common.update(header.read_bytes())
    objects = FOLDER / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(file: Path) -> Path:
        stamp = (
            f"{build.source_hash(sources, build_cuda.LIBRARY)}-emulated"
            if file.name == "ops.cpp"
            else ""
        )
        digest = common.copy()
        digest.update(file.read_bytes() + stamp.encode())
        target = objects / f"{file.name}-{digest.hexdigest()[:16]}.o"
        if not target.is_file():
            flags = [
                *FLAGS,
                *build.stamp_flags(stamp),
                f"-isystem{include}",
                f"-I{SOURCES}",
                f"-I{HERE}",
            ]
            partial = target.with_suffix(f".{os.getpid()}")
            command = [*build.cxx(), *flags, "-x", "c++", "-c", str(file), "-o", str(partial)]
            build.run_compiler(command, verbose)
            partial.replace(target)
        return target

    files = [*build_cuda.source_files(sources), HERE / "emulator.cpp"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, files))
    for old in set(objects.glob("*.o")) - set(compiled):
        old.unlink()
    link = [*build.cxx(), "-shared", *map(str, compiled), f"-L{libraries}"]
    build.link_library([*link, "-Wl,-z,defs", "-ltorch_cpu"], output, verbose)
    return output


if __name__ == "__main__":
    try:
        print(build_emulated(verbose="-v" in sys.argv))
    except build.BuildError as error:
        sys.exit(str(error))
