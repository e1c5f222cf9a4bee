"""What the CUDA kernels take of each GPU that they are built for, as the compiler reports it; no GPU is needed.

``python -m tests.cuda_kernels.cuda_resources`` writes benchmarks/results/cuda-resources.md and .json.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import filelock  # torch brings it along

from fastnce.backends import build, build_cuda

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "out" / "cuda-resources"

# In the machine code: mma.sync, wgmma, TMA's loads; loads and stores of a thread's own memory.
INSTRUCTIONS = ("HMMA", "HGMMA", "UTMALDG", "LDL", "STL")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for a target: registers, and bytes per thread; how often each of INSTRUCTIONS stands in its code."""

    file: str
    target: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    instructions: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A file for a target: its kernels, what the compiler warns of, and the seconds of one processor that it took."""

    kernels: list[Kernel]
    warnings: list[str]
    seconds: float


def jobs() -> list[tuple[Path, str]]:
    """Every file with every target that it is compiled for."""
    of = {file: build_cuda.ONLY_FOR.get(file.name, build_cuda.TARGETS) for file in files()}
    return [(file, target) for file in files() for target in of[file]]


def files() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def compile_all() -> list[Compiled]:
    """All jobs, as many at a time as there are processors; kept in ``out/`` while the sources stay as they are.

    Who comes while another compiles waits for what that one keeps.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (
        filelock.FileLock(CACHE / "lock"),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        return list(pool.map(lambda job: _kept(*job), jobs()))


def _kept(file: Path, target: str) -> Compiled:
    place = CACHE / f"{file.stem}-{target}-{_digest(file)}.json"
    if not place.is_file():
        done = compile_one(file, target)
        for old in CACHE.glob(f"{file.stem}-{target}-*.json"):
            old.unlink(missing_ok=True)
        place.write_text(json.dumps(dataclasses.asdict(done)))
    data = json.loads(place.read_text())
    return Compiled(**data | {"kernels": [Kernel(**kernel) for kernel in data["kernels"]]})


def _digest(file: Path) -> str:
    digest = hashlib.sha256(build.compiler_version(build_cuda.nvcc()[0]).encode())
    digest.update(" ".join((*build_cuda.FLAGS, *build_cuda.nvcc_flags())).encode())
    for part in (Path(__file__), *sorted(included(file))):
        digest.update(part.read_bytes())
    return digest.hexdigest()[:16]


def included(file: Path) -> set[Path]:
    """A file of ``csrc/cuda`` and those of that folder that it includes."""
    found, open_ = set(), {file}
    while open_:
        found |= open_
        names = {
            name for path in open_ for name in re.findall(r'#include "(.+?)"', path.read_text())
        }
        open_ = {SOURCES / name for name in names if (SOURCES / name).is_file()} - found
    return found


def compile_one(file: Path, target: str) -> Compiled:
    """Raises :class:`fastnce.backends.build.BuildError` with the compiler's message."""
    with tempfile.TemporaryDirectory(prefix="fastnce-cubin-") as folder:
        cubin = Path(folder) / f"{file.stem}.cubin"
        command = [*build_cuda.nvcc(), *build_cuda.FLAGS, *build_cuda.nvcc_flags(), "-cubin"]
        command += [f"-arch=sm_{target}", "-Xptxas=-v", str(file), "-o", str(cubin)]
        seconds, log = _run(command)
        reports = reports_of(log)
        counts = instructions_of(disassembled(cubin)) if reports else {}
    names = dict(zip(reports, readable(list(reports)), strict=True))
    kernels = [
        Kernel(file.name, target, names[symbol], **numbers, instructions=counts.get(symbol, {}))
        for symbol, numbers in reports.items()
    ]
    # For example of wgmma instructions that it makes wait for one another.
    warnings = [
        line for line in log.splitlines() if "warning" in line or "Performance Loss" in line
    ]
    return Compiled(sorted(kernels, key=lambda kernel: kernel.name), warnings, round(seconds, 1))


def _run(command: list[str]) -> tuple[float, str]:
    """The seconds of one processor, of the program with all that it starts, and what it prints."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        printed = log.read()
    if process.returncode != 0:
        raise build.BuildError(f"the compiler failed:\n{' '.join(command)}\n{printed}")
    return usage.ru_utime + usage.ru_stime, printed


def reports_of(log: str) -> dict[str, dict[str, int]]:
    """The numbers of each kernel in what ``ptxas -v`` prints, by its symbol."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        # What follows of other functions than the kernel is no report of it.
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part).group(1)
        found[part.partition("'")[0]] = {
            "registers": int(registers),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
        }
    return found


def instructions_of(listing: str) -> dict[str, dict[str, int]]:
    """How often each of INSTRUCTIONS stands in each function of a listing of machine code."""
    found = {}
    for part in listing.split("Function : ")[1:]:
        words = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", part, re.MULTILINE)
        counts = collections.Counter(words)
        found[part.split(None, 1)[0]] = {
            name: counts[name] for name in INSTRUCTIONS if counts[name]
        }
    return found


def disassembled(cubin: Path) -> str:
    command = [disassembler(), "-sass", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def disassembler() -> str:
    """The toolkit's cuobjdump, or the one that Triton comes with."""
    beside = shutil.which(build_cuda.nvcc()[0])
    places = [
        shutil.which("cuobjdump"),
        str(Path(beside).resolve().parent / "cuobjdump") if beside else None,
    ]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    for place in places:
        if place and Path(place).is_file():
            return place
    raise build.BuildError("there is no cuobjdump. Install the CUDA toolkit's, or Triton.")


def readable(symbols: list[str]) -> list[str]:
    """C++ names without the namespaces and the arguments that all kernels share."""
    if not symbols or shutil.which("c++filt") is None:
        return symbols
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    return [_short(name) for name in done.stdout.splitlines()]


def _short(name: str) -> str:
    for word in ("fastnce::cuda::", "(anonymous namespace)::", "void "):
        name = name.replace(word, "")
    depth = 0
    for place, letter in enumerate(name):  # the arguments begin at the first bracket outside of <>
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:place]
    return name


def table(done: list[Compiled]) -> str:
    """As Markdown."""
    seconds = collections.Counter()
    for (file, _), each in zip(jobs(), done, strict=True):
        seconds[file.name] += each.seconds
    lines = [
        "# Resources of the CUDA kernels",
        "",
        "As the compiler reports them; nothing here has run on a GPU. Bytes are of a thread's own memory: 0 is what is wanted.",
        f"nvcc {_nvcc_version()}, targets {', '.join(f'sm_{target}' for target in build_cuda.TARGETS)}.",
        "",
        "| file | kernel | target | registers | bytes | matrix instructions |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in (kernel for each in done for kernel in each.kernels):
        matrix = ", ".join(
            f"{n} {name}" for name, n in kernel.instructions.items() if name not in ("LDL", "STL")
        )
        own = kernel.stack + kernel.spill_stores + kernel.spill_loads
        lines.append(
            f"| {kernel.file} | `{kernel.name}` | sm_{kernel.target} | {kernel.registers} | {own} | {matrix} |"
        )
    lines += ["", "Seconds of one processor to compile, all targets together:", ""]
    lines += ["| file | seconds |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in seconds.items()]
    lines += [f"| all | {sum(seconds.values()):.1f} |", ""]
    return "\n".join(lines)


def _nvcc_version() -> str:
    version = build.compiler_version(build_cuda.nvcc()[0])
    found = re.search(r"release ([\d.]+)", version)
    return found.group(1) if found else "of unknown version"


def main() -> None:
    done = compile_all()
    (RESULTS / "cuda-resources.md").write_text(table(done))
    data = [dataclasses.asdict(each) for each in done]
    (RESULTS / "cuda-resources.json").write_text(json.dumps(data, indent=1) + "\n")
    print(RESULTS / "cuda-resources.md")


if __name__ == "__main__":
    main()
