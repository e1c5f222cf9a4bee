"""What the CUDA kernels take of each GPU that they are built for, as the compiler reports it; no GPU is needed.

``python -m tests.cuda_kernels.cuda_resources`` writes benchmarks/results/cuda-resources.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastnce.backends import build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
RESULTS = ROOT / "benchmarks" / "results" / "cuda-resources.md"
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
    """A file for a target: its kernels, and what the compiler warns of."""

    kernels: list[Kernel]
    warnings: list[str]


def jobs() -> list[tuple[Path, str]]:
    """Every file with every target that it is compiled for."""
    of = {file: build.ONLY_FOR.get(file.name, build.TARGETS) for file in files()}
    return [(file, target) for file in files() for target in of[file]]


def files() -> list[Path]:
    return sorted(SOURCES.glob("*.cu"))


def compile_all() -> list[Compiled]:
    """All jobs; what has not changed is kept in ``out/``."""
    lines = [
        "rule compile",
        f"  command = {sys.executable} {Path(__file__)} $in $target $out $told",
        "  deps = gcc",
        "  depfile = $out.d",
    ]
    # With the compiler and its flags: of others everything is made again.
    told = shlex.join([_nvcc_version(), *build.for_gpu()])
    for file, target in jobs():
        lines += [f"build {file.stem}-{target}.json: compile {file} | {Path(__file__)}"]
        lines += [f"  target = {target}", f"  told = {told}"]
    with build.locked(CACHE):
        build.run_ninja(CACHE, lines)
        return [_read(CACHE / f"{file.stem}-{target}.json") for file, target in jobs()]


def _read(file: Path) -> Compiled:
    data = json.loads(file.read_text())
    return Compiled(**data | {"kernels": [Kernel(**kernel) for kernel in data["kernels"]]})


def compile_one(file: Path, target: str, output: Path) -> None:
    """Writes what there is to know, as JSON, and what the file includes, for ninja.

    Raises:
        BuildError: the compiler failed, with its message.
    """
    with tempfile.TemporaryDirectory(prefix="fastnce-cubin-") as folder:
        cubin = Path(folder) / f"{file.stem}.cubin"
        command = build.for_gpu("-cubin", f"-arch=sm_{target}", "-Xptxas=-v")
        command += [str(file), "-o", str(cubin), "-MMD", "-MF", f"{output}.d"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log = done.stdout
        if done.returncode != 0:
            raise build.BuildError(f"the compiler failed:\n{shlex.join(command)}\n{log}")
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
    found = Compiled(sorted(kernels, key=lambda kernel: kernel.name), warnings)
    output.write_text(json.dumps(dataclasses.asdict(found)))


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
    beside = shutil.which(build.nvcc()[0])
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
    lines = [
        "# Resources of the CUDA kernels",
        "",
        "As the compiler reports them; nothing here has run on a GPU. Bytes are of a thread's own memory: 0 is what is wanted.",
        f"nvcc {_nvcc_version()}, targets {', '.join(f'sm_{target}' for target in build.TARGETS)}.",
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
    return "\n".join([*lines, ""])


def _nvcc_version() -> str:
    version = build.compiler_version(build.nvcc()[0])
    found = re.search(r"release ([\d.]+)", version)
    return found.group(1) if found else "of unknown version"


if __name__ == "__main__":
    if len(sys.argv) > 1:  # as compile_all calls it
        compile_one(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        RESULTS.write_text(table(compile_all()))
        print(RESULTS)
