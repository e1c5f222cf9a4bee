"""Compiling the native library. One code path for ``setup.py`` and ``fastnce build``.

``setup.py`` loads this file by its path, where torch, and so the package, may not be importable: nothing but the standard
library is imported at the top.

Environment:
    CXX: the compiler, ``g++`` by default.
    CXXFLAGS: further flags for compiling and linking.
    FASTNCE_LIBRARY: the one file to build and to load, in place of the package's (``make sanitize``).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
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
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LIBRARY = "libfastnce_cpu.so"

_STAMP = b"fastnce-build:"
_TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
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


def library_candidates() -> list[Path]:
    """Where the library may be, in the order in which it is looked for."""
    if named := os.environ.get("FASTNCE_LIBRARY"):
        return [Path(named).absolute()]
    return [PACKAGE / LIBRARY, _user_folder() / LIBRARY]


def find_library() -> Path | None:
    """The library that was built from the present sources, else any; None if there is none."""
    found = [path for path in library_candidates() if path.is_file()]
    return next((path for path in found if is_current(path)), found[0] if found else None)


def is_current(library: Path) -> bool:
    """Whether a library was built from the present sources (True where there are no sources to compare with)."""
    folder = source_folder()
    return folder is None or _read_stamp(library).startswith(_source_hash(folder))


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
    output = output or _writable_output()
    compiler = _compiler()
    include, libraries = _torch_folders()
    stamp = f"{_source_hash(sources)}-{_configuration_hash(compiler)}"
    if output.is_file() and _read_stamp(output) == stamp:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastnce-build-") as folder:
        objects = _compile(compiler, sources, include, stamp, Path(folder), verbose)
        _link(compiler, objects, libraries, output, verbose)
    _tell_installer(output)
    return output


def _compile(
    compiler: list[str], sources: Path, include: Path, stamp: str, folder: Path, verbose: bool
) -> list[Path]:
    """Compiles every source file, as many at a time as there are processors, the slowest first."""
    files = [*sorted(sources.glob("cpu/*.cpp")), sources / "ops.cpp"]
    if platform.machine().lower() not in _X86:
        files = [file for file in files if file.name not in _ISA_FLAGS]
    common = [
        *_FLAGS,
        f"-DTORCH_TARGET_VERSION={_TORCH_TARGET}",
        f'-DFASTNCE_BUILD_STAMP="{_STAMP.decode()}{stamp};"',
        f"-ffile-prefix-map={sources}=csrc",
        f"-isystem{include}",
        *shlex.split(os.environ.get("CXXFLAGS", "")),  # once more: the last of two -O counts
    ]

    def compile_one(file: Path) -> Path:
        target = folder / f"{file.stem}.o"
        flags = [*common, *_ISA_FLAGS.get(file.name, ())]
        _run([*compiler, *flags, "-c", str(file), "-o", str(target)], verbose)
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))


def _link(
    compiler: list[str], objects: list[Path], libraries: Path, output: Path, verbose: bool
) -> None:
    # Written beside its place and renamed: nobody ever loads half a library, and a process that has the old one
    # mapped keeps it.
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=".fastnce-", suffix=".so")
    os.close(handle)
    try:
        command = [*compiler, "-shared", *map(str, objects), "-o", temporary]
        command += [f"-L{libraries}", "-Wl,--as-needed", "-ltorch_cpu", "-Wl,-z,defs"]
        _run(command, verbose)
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _tell_installer(library: Path) -> None:
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


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(
            f"the compiler failed with exit code {result.returncode}:\n"
            f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
        )


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"there is no C++ compiler {command[0]!r}. Install g++, or name another with CXX=..."
        )
    return [*command, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _torch_folders() -> tuple[Path, Path]:
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


def _writable_output() -> Path:
    first, *others = library_candidates()
    return first if not others or os.access(PACKAGE, os.W_OK) else others[0]


def _user_folder() -> Path:
    """A folder per place of installation, so that two versions do not share one library."""
    if sys.platform == "darwin":
        cache = Path("~/Library/Caches")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    place = hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]
    return cache.expanduser() / "fastnce" / place


def _source_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".cpp", ".h"):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()}:{len(content)}:".encode())
            digest.update(content)
    return digest.hexdigest()[:20]


@functools.cache
def _compiler_version(compiler: str) -> str:
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return result.stdout


def _configuration_hash(compiler: list[str]) -> str:
    parts = (*compiler, _compiler_version(compiler[0]), *_FLAGS, str(_ISA_FLAGS), _TORCH_TARGET)
    return hashlib.sha256("\n".join((*parts, platform.machine())).encode()).hexdigest()[:12]


def _read_stamp(library: Path) -> str:
    """The stamp is compiled into the library, so the two cannot part."""
    data = library.read_bytes()
    start = data.find(_STAMP)
    if start < 0:
        return ""
    start += len(_STAMP)
    return data[start : data.find(b";", start)].decode(errors="replace")
