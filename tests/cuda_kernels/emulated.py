"""The CUDA backend's library for the host, by the emulator beside this file: ``python -m tests.cuda_kernels.emulated [FILE]``.

With ``FASTNCE_CUDA_EMULATED`` naming the file, fastnce runs the CUDA kernels on CPU tensors (see :mod:`fastnce.backends.cuda`).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shlex
import sys
from pathlib import Path

from fastnce.backends import build, build_cuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "out" / "cuda-emulated"
LIBRARY = FOLDER / "libfastnce_cuda_emulated.so"

# -O2 makes the tests no faster, as measured: most of the time they switch between fibers.
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DFASTNCE_EMULATED")


def build_emulated(output: Path = LIBRARY) -> Path:
    """Compiles what has changed. Objects are kept by what they are made of: a change of one kernel takes seconds.

    Raises:
        BuildError: no torch, no compiler, or the compiler failed, with its message.
    """
    sources = SOURCES.parent
    compiler = build.cxx()
    include, libraries = build.torch_folders()
    includes = [f"-isystem{include}", f"-I{SOURCES}", f"-I{HERE}"]
    common = _digest(sources, [*compiler, *FLAGS])
    stamp = f"{build.source_hash(sources, build_cuda.LIBRARY)}-emulated"
    objects = output.parent / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(file: Path) -> Path:
        flags = build.stamp_flags(stamp if file.name == "ops.cpp" else "")
        digest = hashlib.sha256(" ".join([common, *flags]).encode() + file.read_bytes())
        target = objects / f"{file.name}-{digest.hexdigest()[:16]}.o"
        if not target.is_file():
            partial = target.with_suffix(f".{os.getpid()}")
            command = [
                *compiler,
                *FLAGS,
                *flags,
                *includes,
                *shlex.split(os.environ.get("CXXFLAGS", "")),
            ]
            build.run_compiler([*command, "-x", "c++", "-c", str(file), "-o", str(partial)], False)
            partial.replace(target)
        return target

    files = [*build_cuda.source_files(sources), HERE / "emulator.cpp"]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, files))
    for old in set(objects.glob("*.o")) - set(compiled):
        old.unlink()
    link = [*compiler, "-shared", *map(str, compiled), f"-L{libraries}"]
    build.link_library([*link, "-Wl,-z,defs", "-ltorch_cpu"], output, False)
    return output


def _digest(sources: Path, words: list[str]) -> str:
    """Of the compiler's words and of what every file may include."""
    digest = hashlib.sha256(" ".join(words).encode())
    folders = ((sources / "common", "*.h"), (SOURCES, "*.h"), (SOURCES, "*.cuh"), (HERE, "*.h"))
    for folder, pattern in folders:
        for header in sorted(folder.glob(pattern)):
            digest.update(header.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        print(build_emulated(*(Path(argument).absolute() for argument in sys.argv[1:])))
    except build.BuildError as error:
        sys.exit(str(error))
