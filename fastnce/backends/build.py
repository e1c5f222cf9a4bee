"""Compiling the native library, and what :mod:`fastnce.backends.build_cuda` does the same way. One code path for ``setup.py`` and ``fastnce build``.

``setup.py`` loads this file by its path, where torch, and so the package, may not be importable: nothing but the standard
library is imported at the top.

Environment:
    FASTNCE_NATIVE: 0 leaves the library out of an installation; 1 makes a failed build an error.
    CXX: the compiler, ``g++`` by default.
    CXXFLAGS: further flags for compiling and linking.
    FASTNCE_LIBRARY: the one file to build and to load, in place of the package's (``make sanitize``).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Library:
    """A compiled library: its file's name, its sources as patterns inside ``csrc``, and what may name another file."""

    file: str
    sources: tuple[str, ...]
    variable: str = ""


LIBRARY = "libfastnce_cpu.so"
NATIVE = Library(LIBRARY, ("cpu/*", "ops.cpp"), "FASTNCE_LIBRARY")

TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
_STAMP = b"fastnce-build:"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
# Compiled once per instruction set, chosen at run time; everything else is for any processor.
_ISA_FLAGS = {
    "image_kernels_avx2.cpp": ("-mavx2", "-mfma"),
    "image_kernels_avx512.cpp": ("-mavx512f", "-mavx2", "-mfma"),
    "tile_kernels_avx2.cpp": ("-mavx2", "-mfma"),
    "tile_kernels_avx512.cpp": ("-mavx512f", "-mavx2", "-mfma"),
    "tile_kernels_avx512bf16.cpp": (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512bf16",
        "-mavx2",
        "-mfma",
    ),
}
_X86 = ("x86_64", "amd64")


class BuildError(RuntimeError):
    """The native library cannot be built here; the message says why."""


def source_folder() -> Path | None:
    """``csrc``: inside an installed package, beside it in a checkout; None if neither is there."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    return None


def library_candidates(library: Library = NATIVE) -> list[Path]:
    """Where the library may be, in the order in which it is looked for."""
    if library.variable and (named := os.environ.get(library.variable)):
        return [Path(named).absolute()]
    return [PACKAGE / library.file, _user_folder() / library.file]


def find_library(library: Library = NATIVE) -> Path | None:
    """The file that was built from the present sources, else any; None if there is none."""
    found = [path for path in library_candidates(library) if path.is_file()]
    return next((path for path in found if is_current(path, library)), found[0] if found else None)


def is_current(file: Path, library: Library = NATIVE) -> bool:
    """Whether a file was built from the present sources (True where there are no sources to compare with)."""
    folder = source_folder()
    return folder is None or read_stamp(file).startswith(source_hash(folder, library))


def wanted() -> str:
    """``"ok"``, or why the library is not to be built here."""
    return "FASTNCE_NATIVE=0" if choice("FASTNCE_NATIVE") == "0" else "ok"


def choice(variable: str) -> str:
    """What an environment variable asks for: "0", "1", or "", which leaves the choice to us.

    Raises:
        BuildError: it has another value.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{variable} must be 0 or 1, got {value!r}. Set one of them, or unset it")
    return value


def build(
    output: Path | None = None, *, sources: Path | None = None, verbose: bool = False
) -> Path:
    """Compiles the native library against the torch of this interpreter, unless it is there already and current.

    Args:
        output: the file to write; by default the package folder's, or, if that is read-only, one in the user's cache.
        sources: the ``csrc`` folder; by default the package's own.
        verbose: print the compiler's commands.

    Returns:
        The library's path.

    Raises:
        BuildError: no sources, no torch, no compiler, or the compiler failed, with its message.
    """
    sources = sources or source_folder()
    if sources is None:
        raise BuildError(f"there is no csrc folder in or beside {PACKAGE}. Reinstall fastnce.")
    output = output or writable_output(NATIVE)
    compiler = cxx()
    include, libraries = torch_folders()
    stamp = f"{source_hash(sources, NATIVE)}-{_configuration_hash(compiler)}"
    if output.is_file() and read_stamp(output) == stamp:
        return output
    common = [
        *compiler,
        *_FLAGS,
        *stamp_flags(stamp),
        f"-ffile-prefix-map={sources}=csrc",
        f"-isystem{include}",
        *shlex.split(os.environ.get("CXXFLAGS", "")),  # once more: the last of two -O counts
    ]
    files = [*sorted(sources.glob("cpu/*.cpp")), sources / "ops.cpp"]
    if platform.machine().lower() not in _X86:
        files = [file for file in files if file.name not in _ISA_FLAGS]

    def command(file: Path) -> list[str]:
        return [*common, *_ISA_FLAGS.get(file.name, ())]

    with tempfile.TemporaryDirectory(prefix="fastnce-build-") as folder:
        objects = compile_files(files, command, Path(folder), verbose)
        link = [*compiler, "-shared", *map(str, objects)]
        link += [f"-L{libraries}", "-Wl,--as-needed", "-ltorch_cpu", "-Wl,-z,defs"]
        link_library(link, output, verbose)
    tell_installer(output)
    return output


def stamp_flags(stamp: str) -> list[str]:
    """For every file: the torch whose interface is used, and what the library is built from."""
    return [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f'-DFASTNCE_BUILD_STAMP="{_STAMP.decode()}{stamp};"',
    ]


def compile_files(
    files: Iterable[Path], command: Callable[[Path], list[str]], folder: Path, verbose: bool
) -> list[Path]:
    """The objects of ``files`` in ``folder``, as many at a time as there are processors."""

    def compile_one(file: Path) -> Path:
        target = folder / f"{file.name}.o"
        run_compiler([*command(file), "-c", str(file), "-o", str(target)], verbose)
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))


def link_library(command: list[str], output: Path, verbose: bool) -> None:
    """Written beside its place and renamed: nobody ever loads half a library, and a process that has the old one mapped keeps it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=".fastnce-", suffix=".so")
    os.close(handle)
    try:
        run_compiler([*command, "-o", temporary], verbose)
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    finally:
        Path(temporary).unlink(missing_ok=True)


def tell_installer(library: Path) -> None:
    """Adds a library built after the installation to the installer's list, so that uninstalling removes it.

    Left behind, its folder would stand in the way of an editable installation.
    """
    try:
        distribution = importlib.metadata.distribution("fastnce")
    except importlib.metadata.PackageNotFoundError:
        return
    root = Path(str(distribution.locate_file(""))).resolve()
    listed = {str(file): file for file in distribution.files or ()}
    record = next((file for name, file in listed.items() if name.endswith("/RECORD")), None)
    if root not in library.parents or record is None:
        return
    name = library.relative_to(root).as_posix()
    if name not in listed:
        with contextlib.suppress(OSError), open(record.locate(), "a") as file:
            file.write(f"{name},,\n")


def run_compiler(command: list[str], verbose: bool) -> None:
    """Raises :class:`BuildError` with the compiler's message."""
    if verbose:
        print(shlex.join(command), flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(
            f"the compiler failed with exit code {result.returncode}:\n"
            f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
        )


def cxx() -> list[str]:
    """The C++ compiler with the caller's flags."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"there is no C++ compiler {command[0]!r}. Install g++, or name another with CXX=..."
        )
    return [*command, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def torch_folders() -> tuple[Path, Path]:
    """torch's folders of headers and of libraries, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch cannot be seen from here (an isolated build hides it). "
            "Install torch, then run: fastnce build"
        )
    root = Path(spec.origin).parent
    include = root / "include"
    if not (include / "torch/csrc/stable/library.h").is_file():
        raise BuildError(f"the torch in {root} has no stable C++ interface. Install torch>=2.10.")
    return include, root / "lib"


def writable_output(library: Library) -> Path:
    """Where to build a library that nobody gave a place."""
    first, *others = library_candidates(library)
    return first if not others or os.access(PACKAGE, os.W_OK) else others[0]


def _user_folder() -> Path:
    """A folder per place of installation, so that two versions do not share one library."""
    if sys.platform == "darwin":
        cache = Path("~/Library/Caches")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    place = hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]
    return cache.expanduser() / "fastnce" / place


def source_hash(folder: Path, library: Library) -> str:
    """Of what a library is built from."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in library.sources for file in folder.glob(pattern)):
        if file.suffix in (".cpp", ".h", ".cu", ".cuh"):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()}:{len(content)}:".encode())
            digest.update(content)
    return digest.hexdigest()[:20]


@functools.cache
def compiler_version(compiler: str) -> str:
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return result.stdout


def _configuration_hash(compiler: list[str]) -> str:
    parts = (*compiler, compiler_version(compiler[0]), *_FLAGS, str(_ISA_FLAGS), TORCH_TARGET)
    return hashlib.sha256("\n".join((*parts, platform.machine())).encode()).hexdigest()[:12]


def read_stamp(library: Path) -> str:
    """What a library was built from. The stamp is compiled into the library, so the two cannot part."""
    data = library.read_bytes()
    start = data.find(_STAMP)
    if start < 0:
        return ""
    start += len(_STAMP)
    return data[start : data.find(b";", start)].decode(errors="replace")
