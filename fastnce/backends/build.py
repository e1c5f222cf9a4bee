"""Compiling the native library, ``csrc/cpu``, and the CUDA library, ``csrc/cuda``: what has changed, by ninja.

Neither a GPU nor a torch for CUDA is needed. ``setup.py`` loads this file by its path, where torch, and so the package, may not be
importable: nothing but the standard library is imported.

Environment:
    FASTNCE_NATIVE: 0 leaves the native library out of an installation; 1 makes a failed build an error.
    FASTNCE_CUDA: 1 builds the CUDA library, 0 does not; without either it is built where there is a GPU.
    FASTNCE_CUDA_ARCHS: the GPUs to build for, for example ``80;90a``; by default this machine's, or all of TARGETS.
    CXX, CXXFLAGS: the C++ compiler, ``g++`` by default, and further flags for compiling and linking.
    NVCC, CUDA_HOME: the CUDA compiler, or the toolkit that has it; otherwise the ``nvcc`` of the PATH.
    NVCCFLAGS: further flags for it.
    FASTNCE_LIBRARY: the one native library to build and to load, in place of the package's (``make sanitize``).
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
# Ampere, whose code runs on Ada too; Hopper with its own instructions; Blackwell.
TARGETS = ("80", "90a", "100")
# Files that only one target can compile: always compiled, for their launchers are linked in whatever GPU is asked for.
ONLY_FOR = {"pairs_sm90.cu": ("90a",)}

_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
_CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden"
# By the end of a file's name: compiled once per instruction set, chosen at run time. Everything else is for any processor.
_ISA_FLAGS = {
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx2 -mfma",
    "avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512bf16 -mavx2 -mfma",
}


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why."""


class Plan(NamedTuple):
    """How a library is made: what compiles each file, and what stands before and after the objects where they are linked."""

    commands: dict[Path, list[str]]
    link: list[str]
    libraries: list[str]


class Library(NamedTuple):
    """A compiled library.

    Args:
        file: its name.
        sources: what its stamp counts, as patterns inside ``csrc``.
        switch: the variable that asks for it or forbids it.
        plan: how it is made of the files of a ``csrc``.
        variable: what may name another file to build and to load.
    """

    file: str
    sources: tuple[str, ...]
    switch: str
    plan: Callable[[Path], Plan]
    variable: str = ""


def _native_plan(sources: Path) -> Plan:
    common = for_torch([*cxx(), *_FLAGS.split()], sources)
    commands = {}
    for file in sorted(sources.glob("cpu/*.cpp")):
        isa = _ISA_FLAGS.get(file.stem.rpartition("_")[2], "")
        if not isa or platform.machine().lower() in ("x86_64", "amd64"):
            commands[file] = [*common, *isa.split()]
    libraries = [f"-L{torch_folder() / 'lib'}", "-Wl,--as-needed", "-ltorch_cpu", "-Wl,-z,defs"]
    return Plan(commands, [*cxx(), "-shared"], libraries)


def _cuda_plan(sources: Path) -> Plan:
    commands = dict.fromkeys(cuda_files(sources), for_torch([*cxx(), *_FLAGS.split()], sources))
    for file in sources.glob("cuda/*.cu"):
        commands[file] = for_gpu(*generate(ONLY_FOR.get(file.name) or targets()))
    # libtorch itself, though nothing of it is used: through it the loader finds libtorch_cuda, where there is one.
    libraries = [f"-L{torch_folder() / 'lib'}", "-Xlinker", "--no-as-needed,-z,defs"]
    libraries += ["-ltorch", "-ltorch_cpu"]
    return Plan(commands, [*nvcc(), "-shared", "-cudart", "static"], libraries)


NATIVE = Library(
    "libfastnce_cpu.so",
    ("common/*.h", "cpu/*.cpp", "cpu/*.h"),
    "FASTNCE_NATIVE",
    _native_plan,
    "FASTNCE_LIBRARY",
)
CUDA = Library(
    "libfastnce_cuda.so",
    ("common/*.h", "cuda/*.cpp", "cuda/*.h", "cuda/*.cu", "cuda/*.cuh"),
    "FASTNCE_CUDA",
    _cuda_plan,
)


def wanted(library: Library) -> str:
    """``"ok"``, or why a library is not to be built here.

    Raises:
        BuildError: its switch has another value than 0 and 1.
    """
    choice = os.environ.get(library.switch, "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"{library.switch} must be 0 or 1, got {choice!r}. Set one, or unset it")
    if choice == "0":
        return f"{library.switch}=0"
    if library is CUDA and not choice and not gpu_targets():
        return "this machine has no GPU. Build it all the same with FASTNCE_CUDA=1"
    return "ok"


def build(
    library: Library = NATIVE,
    output: Path | None = None,
    *,
    sources: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """Compiles of a library what has changed, against the torch of this interpreter.

    Args:
        library: which one.
        output: the file to write; by default the package folder's, or, if that is read-only, one in the user's cache.
        sources: the ``csrc`` folder; by default the package's own.
        folder: keeps the objects and ``build.ninja``; by default one per output, in a checkout's ``build`` or in the user's cache.

    Returns:
        The library's path.

    Raises:
        BuildError: no sources, no torch, no compiler, no ninja, or the compiler failed, with its message.
    """
    sources = sources or source_folder()
    if sources is None:
        raise BuildError(f"there is no csrc folder in or beside {PACKAGE}. Reinstall fastnce.")
    if output is None:
        first, *others = library_candidates(library)
        output = others[0] if others and not os.access(PACKAGE, os.W_OK) else first
    output = output.absolute()
    stamp = source_hash(sources, library.sources)
    compile_library(library.plan(sources), output, folder or _build_folder(output), stamp)
    _tell_installer(output)
    return output


def compile_library(plan: Plan, output: Path, folder: Path, stamp: str = "") -> None:
    """Compiles in ``folder`` what has changed, links, and puts the library with its stamp in the place of ``output``.

    Raises:
        BuildError: no ninja, or the compiler failed, with its message.
    """
    link = plan.link
    if stamp:  # as the library's build id: no object changes with it, and the two cannot part
        link = [*link, "-Xlinker", f"--build-id=0x{_stamp(stamp).hex()}"]
    lines = [
        "rule compile",
        # With the compiler's version: of another everything is made again.
        "  command = $words -DCOMPILER=$version -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        "  command = $words -o $out $in $libraries",
    ]
    objects = []
    for file, command in plan.commands.items():
        made = escaped(f"{file.parent.name}/{file.name}.o")
        objects.append(made)
        lines += [f"build {made}: compile {escaped(file)}", _words("words", command)]
        lines += [f"  version = {hash_of(compiler_version(command[0]).encode())}"]
    lines += [f"build {escaped(output.name)}: link {' '.join(objects)}"]
    lines += [_words("words", link), _words("libraries", plan.libraries)]
    with locked(folder):
        run_ninja(folder, lines)
        _install(folder / output.name, output)


def run_ninja(folder: Path, lines: list[str]) -> None:
    """Writes ``build.ninja`` into ``folder`` and makes all that it names. One process at a time.

    ninja goes by times. Where a file has changed without becoming newer (unpacked, or copied with its time), everything is made again.
    """
    program = ninja()
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    record = folder / "inputs.json"
    if record.is_file():
        read = {Path(name): digest for name, digest in json.loads(record.read_text()).items()}
        time = record.stat().st_mtime_ns
        older = [file for file in read if file.is_file() and file.stat().st_mtime_ns <= time]
        if any(hash_of(file.read_bytes()) != read[file] for file in older):
            (folder / ".ninja_log").unlink(missing_ok=True)
    done = subprocess.run([program], cwd=folder, capture_output=True, text=True, close_fds=False)
    if done.returncode != 0:
        raise BuildError(f"the build failed:\n{done.stdout}{done.stderr}")
    known = subprocess.run([program, "-t", "deps"], cwd=folder, capture_output=True, text=True)
    inputs = {line.strip() for line in known.stdout.splitlines() if line.startswith("    ")}
    record.write_text(
        json.dumps({name: hash_of(Path(name).read_bytes()) for name in sorted(inputs)})
    )


def escaped(path: Path | str) -> str:
    """A path as ``build.ninja`` has it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _words(name: str, words: list[str]) -> str:
    """A variable of a statement of ``build.ninja``."""
    return f"  {name} = {shlex.join(words).replace('$', '$$')}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Who comes second waits, and finds nothing left to do. ninja holds the lock too: it may outlive who started it."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("the kernels are compiled on Linux only") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise BuildError(f"the folder for objects cannot be written: {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.set_inheritable(file.fileno(), True)
        yield


def _install(made: Path, output: Path) -> None:
    """Copied beside its place and renamed: nobody loads half a library, and a process that has the old one mapped keeps it.

    One that has not changed stays: where it is loaded, it is the same file.
    """
    if output.is_file() and filecmp.cmp(made, output, shallow=False):
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copy(made, temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _tell_installer(library: Path) -> None:
    """Adds a library built after the installation to the installer's list, so that uninstalling removes it.

    Left behind, its folder would stand in the way of an editable installation.
    """
    try:
        distribution = importlib.metadata.distribution("fastnce")
    except importlib.metadata.PackageNotFoundError:
        return
    record = next((file for file in distribution.files or () if file.name == "RECORD"), None)
    root = Path(str(distribution.locate_file(""))).resolve()
    if record is not None and library.is_relative_to(root):
        name = library.relative_to(root).as_posix()
        with contextlib.suppress(OSError), open(record.locate(), "r+") as file:
            if name not in {line.partition(",")[0] for line in file}:
                file.write(f"{name},,\n")


# What the compilers are and get.


def cxx() -> list[str]:
    """The C++ compiler with the caller's flags."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"there is no C++ compiler {command[0]!r}. Install g++, or name another with CXX=..."
        )
    return [*command, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def nvcc() -> list[str]:
    """nvcc, and the host compiler for it if the caller names one."""
    home = os.environ.get("CUDA_HOME")
    command = os.environ.get("NVCC") or (f"{home}/bin/nvcc" if home else "nvcc")
    if shutil.which(command) is None:
        raise BuildError(
            f"there is no CUDA compiler {command!r}. Install the CUDA toolkit, or name the compiler with NVCC=..."
        )
    return [command, *(["-ccbin", cxx()[0]] if os.environ.get("CXX") else [])]


def for_gpu(*flags: str) -> list[str]:
    """nvcc's command, ending in the caller's flags."""
    return [*nvcc(), *_CUDA_FLAGS.split(), *flags, *shlex.split(os.environ.get("NVCCFLAGS", ""))]


def ninja() -> str:
    """The ninja of its Python package, else of the PATH."""
    places = [os.environ.get("PATH", os.defpath)]
    with contextlib.suppress(ImportError):
        places.insert(0, getattr(importlib.import_module("ninja"), "BIN_DIR", ""))
    found = shutil.which("ninja", path=os.pathsep.join(filter(None, places)))
    if found is None:
        raise BuildError("there is no ninja, which runs the compiler. Run: pip install ninja")
    return found


@functools.cache
def compiler_version(compiler: str) -> str:
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return result.stdout


def torch_folder() -> Path:
    """torch's own folder, with its headers and libraries, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch cannot be seen from here (an isolated build hides it). "
            "Install torch, then run: fastnce build"
        )
    root = Path(spec.origin).parent
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"the torch in {root} has no stable C++ interface. Install torch>=2.10.")
    return root


def for_torch(command: list[str], sources: Path) -> list[str]:
    """A C++ compiler's command with the torch whose interface is used, and the caller's flags once more: the last of two -O counts."""
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    include = f"-isystem{torch_folder() / 'include'}"
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    return [*command, target, f"-ffile-prefix-map={sources}=csrc", include, *flags]


def targets() -> tuple[str, ...]:
    """``FASTNCE_CUDA_ARCHS``, or this machine's GPUs, or all."""
    value = os.environ.get("FASTNCE_CUDA_ARCHS", "")
    named = tuple(re.findall(r"[^,;\s]+", value))
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
    """The architecture to compile for a GPU of a compute capability, ``"8.6"``: code for x.0 runs on every x.y but Orin's 8.7."""
    if capability == "8.7":
        return "87"
    major = int(capability.partition(".")[0])
    return {9: "90a"}.get(major, f"{major}0")


def generate(targets: tuple[str, ...]) -> list[str]:
    """nvcc's flags for targets; of the last of all of TARGETS also the intermediate code, for GPUs that come later."""
    flags = []
    for target in targets:
        code = f"sm_{target},compute_{target}" if target == TARGETS[-1] else f"sm_{target}"
        flags += ["-gencode", f"arch=compute_{target},code=[{code}]"]
    return flags


# Where things lie, and what a library was built from.


def source_folder() -> Path | None:
    """``csrc``: inside an installed package, beside it in a checkout; None if neither is there."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    return None


def cuda_files(sources: Path) -> list[Path]:
    """All that is compiled for GPUs: the kernels, which take longest, first."""
    return [*sorted(sources.glob("cuda/*.cu")), *sorted(sources.glob("cuda/*.cpp"))]


def library_candidates(library: Library = NATIVE) -> list[Path]:
    """Where the library may be, in the order in which it is looked for."""
    if library.variable and (named := os.environ.get(library.variable)):
        return [Path(named).absolute()]
    return [PACKAGE / library.file, _user_folder() / library.file]


def find_library(library: Library = NATIVE) -> Path | None:
    """The file that was built from the present sources, else any; None if there is none."""
    found = filter(Path.is_file, library_candidates(library))
    return max(found, key=lambda file: is_current(file, library), default=None)


def is_current(file: Path, library: Library = NATIVE) -> bool:
    """Whether a file was built from the present sources (True where there are no sources to compare with)."""
    folder = source_folder()
    return folder is None or _stamp(source_hash(folder, library.sources)) in file.read_bytes()


def _build_folder(output: Path) -> Path:
    root = PACKAGE.parent
    checkout = (root / "csrc" / "cpu").is_dir() and os.access(root, os.W_OK)
    name = f"{output.stem}-{hash_of(str(output).encode())}"
    return (root / "build" if checkout else _user_folder()) / name


def _user_folder() -> Path:
    """A folder per place of installation, so that two versions do not share one library."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "fastnce" / hash_of(str(PACKAGE).encode())


def source_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Of the files there."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    read = [
        f"{file.relative_to(folder).as_posix()}: {hash_of(file.read_bytes())}" for file in files
    ]
    return hash_of("\n".join(read).encode())


def _stamp(source_hash: str) -> bytes:
    """As it stands in a library."""
    return f"fastnce-build:{source_hash};".encode()


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
