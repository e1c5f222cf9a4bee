"""The share of a multiprocessor that a compiled kernel takes, and what is wrong with it; remembered from run to run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import re
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import triton
from launches import SHARED_MEMORY, Launch, compiled

Job = tuple[Launch, int]  # and a compute capability, 90 for 9.0
MATRIX_INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Reasoned exceptions: kernel -> bytes. They multiply no matrices and wait for memory; ptxas keeps them at 40 to 128 registers,
# far from the limit, for the sake of occupancy, and saves one to four registers for it.
SPILLS_ALLOWED = {"_fold_kernel": 16, "_own_sums_kernel": 16, "_row_gradients_kernel": 16}
# On sm_100, and for multiply-adds of fp32 ("ieee"), ptxas stops at 128 of the 255 registers (or at 80), so that more programs run
# side by side, and saves up to four for it.
_OCCUPANCY_REGISTERS, _OCCUPANCY_SPILLS = 128, 16
# What stays beyond those, named in the sweep's table with the reason (see ``Resources.listed``): (kernel, rows, compute
# capability, HEAD, TAIL, PRECISION) -> bytes.
LISTED = {
    ("_row_products_kernel", "bf16", 90, 128, 0, "tf32"): 40,
    ("_row_products_kernel", "bf16", 90, 128, 128, "tf32"): 24,
    ("_row_products_kernel", "fp16", 90, 128, 128, "tf32"): 40,
    ("_row_products_kernel", "fp16", 89, 128, 0, "tf32"): 8,
    ("_sums_kernel", "bf16", 89, 128, 64, "tf32"): 16,
    ("_sums_kernel", "fp32", 80, 0, 0, "tf32"): 8,
    ("_sums_kernel", "fp32", 80, 64, 0, "ieee"): 24,
    ("_sums_kernel", "fp32", 90, 0, 0, "ieee"): 16,
    ("_sums_kernel", "fp32", 100, 0, 0, "ieee"): 16,
}
_LIMIT = 255  # registers of a thread
_TILE = ("HEAD", "TAIL", "BLOCK_M", "BLOCK_N", "BLOCK_D", "PRECISION")
# Bumped when the meaning of what is remembered changes.
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Resources:
    """One launch for one target."""

    kernel: str
    target: int  # compute capability, 90 for 9.0
    dtype: str  # of the rows, "" where a kernel has none
    tile: dict[str, object]
    warps: int
    stages: int
    registers: int  # of a thread
    spills: int  # bytes of a thread's stack
    shared: int  # bytes of a program
    instructions: tuple[str, ...]  # the matrix instructions in the PTX
    atomics: bool

    def __str__(self) -> str:
        tile = ", ".join(f"{name} {value}" for name, value in self.tile.items())
        return (
            f"sm_{self.target} {self.kernel} {self.dtype} ({tile}; {self.warps} warps, {self.stages} stages): "
            f"{self.registers} registers, {self.spills} bytes spilled, {self.shared} shared"
        )

    def _allowed(self) -> int:
        allowed = SPILLS_ALLOWED.get(self.kernel, 0)
        stops_early = self.target == 100 or self.tile.get("PRECISION") == "ieee"
        if stops_early and self.registers <= _OCCUPANCY_REGISTERS:
            allowed = max(allowed, _OCCUPANCY_SPILLS)
        return allowed

    def listed(self) -> str:
        """Why these spills stay though they are more than is allowed; "" where they are not, or not listed."""
        tile = self.tile.get
        form = tile("HEAD", 0), tile("TAIL", 0), tile("PRECISION")
        most = LISTED.get((self.kernel, self.dtype, self.target, *form), 0)
        if not self._allowed() < self.spills <= most:
            return ""
        if self.registers < _LIMIT:
            return (
                "ptxas stops early, for more programs side by side; told to use 255 it spills none"
            )
        return "the registers are full; what spills none in all forms of its kind is half the tile"

    def faults(self) -> list[str]:
        """The faults, a line each."""
        found = []
        if self.spills > self._allowed() and not self.listed():
            found.append(f"spills: {self}")
        if self.shared > SHARED_MEMORY[self.target]:
            found.append(f"too much shared memory: {self}")
        if self.atomics:
            found.append(f"atomics: {self}")
        # Each query's own negatives are rows of their own: products of vectors.
        multiplies = "PRECISION" in self.tile and self.kernel != "_own_sums_kernel"
        wanted = MATRIX_INSTRUCTION[self.target]
        if multiplies and self.dtype in ("bf16", "fp16") and wanted not in self.instructions:
            found.append(f"no {wanted}: {self}")
        return found


def operand(launch: Launch) -> str:
    """The dtype of a kernel's rows, "" where it has none."""
    x = dict(launch.signature).get("x", "")
    return x.removeprefix("*") if isinstance(x, str) else ""


def resources(launch: Launch, target: int) -> Resources:
    """Compiles a launch for a target."""
    result = compiled(launch, target)
    options = dict(launch.options)
    return Resources(
        launch.name,
        target,
        operand(launch),
        {name: launch.constant(name) for name in _TILE if launch.constant(name) not in (None, 0)},
        options["num_warps"],
        options["num_stages"],
        result.registers,
        result.spills,
        result.shared,
        tuple(name for name in MATRIX_INSTRUCTION.values() if name in result.ptx),
        re.search(r"\b(atom|red)\.", result.ptx) is not None,
    )


class Memory:
    """Results by what they depend on: the kernel's source with all that it calls, the launch, target and compiler.

    One line of JSON each, added as soon as it is known, so that a sweep that was stopped goes on where it was.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path, self._known = path, {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                key, values = json.loads(line)
                instructions = tuple(values.pop("instructions"))
                self._known[key] = Resources(**values, instructions=instructions)

    def get(self, job: Job) -> Resources | None:
        """The result remembered of a launch for a target."""
        return self._known.get(_key(*job))

    def put(self, job: Job, result: Resources) -> None:
        """Remembers a result."""
        key = _key(*job)
        self._known[key] = result
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([key, dataclasses.asdict(result)]) + "\n")


def _key(launch: Launch, target: int) -> str:
    module, _, name = launch.kernel.rpartition(".")
    source = getattr(importlib.import_module(module), name).cache_key
    text = f"{_FORMAT} {triton.__version__} {target} {source} {launch!r}"
    return hashlib.sha256(text.encode()).hexdigest()


def _attempt(job: Job) -> Resources | str:
    warnings.simplefilter("ignore")
    try:
        return resources(*job)
    except Exception as error:
        return f"{job[0].name} for sm_{job[1]}: {type(error).__name__}: {error}"


def all_resources(
    jobs: Iterable[Job], memory: Memory, processes: int = 2, deadline: float = float("inf")
) -> dict[Job, Resources | str]:
    """Compiles what is not remembered, side by side in ``processes``, and remembers it.

    Returns:
        Job -> resources, or the compiler's error. Those not begun by ``deadline``, of ``time.monotonic()``, are missing.
    """
    jobs = list(dict.fromkeys(jobs))
    found = {job: known for job in jobs if (known := memory.get(job)) is not None}
    missing = [job for job in jobs if job not in found]
    timely = (job for job in missing if time.monotonic() < deadline)
    with contextlib.ExitStack() as stack:
        results = map(_attempt, timely)
        if processes > 1 and len(missing) >= 4:
            # Not forked: PyTorch's threads would not survive it.
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
            results = stack.enter_context(pool).map(_attempt, timely, chunksize=4)
        for job, result in zip(missing, results, strict=False):
            found[job] = result
            if not isinstance(result, str):
                memory.put(job, result)
    return found
