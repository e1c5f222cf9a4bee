"""Every kernel in every form, compiled for every target; ``make triton-sweep``. Needs Triton, but no GPU.

Writes the table of registers, spills and shared memory, and ends with status 1 where something is wrong or missing. What was
compiled is remembered in ``out/triton-sweep``: stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import calls  # noqa: E402
from resources import Memory, Resources, all_resources  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.launches import Launch, as_on  # noqa: E402
from benchmarks.machine import matmul_precision  # noqa: E402

TARGETS = (80, 90, 100)
# Of the rows given, and what torch.set_float32_matmul_precision makes of products of float32.
DTYPES = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "fp32 as bf16": (torch.float32, "medium"),
}


def jobs(
    capability: int,
    dtypes: Iterable[str] = tuple(DTYPES),
    depths: Iterable[int] = calls.DEPTHS,
    sizes: Iterable[bool] = (True, False),
) -> list[tuple[Launch, int]]:
    """All different launches for a target with the tiles of the tables; ``sizes``: of large problems, of small ones."""
    found: list[Launch] = []
    for name in dtypes:
        dtype, products = DTYPES[name]
        with as_on(capability), matmul_precision(products):
            found += calls.sampling_launches(dtype)
            for depth in depths:
                for large in sizes:
                    found += calls.launches(depth, dtype, large)
                    # fp8 products came with compute capability 8.9.
                    if capability >= 90 and name == "bf16":
                        found += calls.fp8_launches(depth, dtype, large)
    return [(each, capability) for each in dict.fromkeys(found)]


def rows(results: list[Resources]) -> list[dict[str, object]]:
    """One row for a kernel's tile on a target: the most that any form of it takes."""
    groups: dict[tuple, list[Resources]] = {}
    for each in results:
        key = (each.kernel, each.dtype, *each.tile.items(), each.warps, each.stages, each.target)
        groups.setdefault(key, []).append(each)
    table = []
    for of in groups.values():
        one = dataclasses.asdict(of[0])
        same = ("kernel", "dtype", "tile", "warps", "stages", "target")
        most = {
            name: max(getattr(x, name) for x in of) for name in ("registers", "spills", "shared")
        }
        instructions = sorted({name for x in of for name in x.instructions})
        counts = {"forms": len(of), **most, "instructions": instructions}
        table.append({name: one[name] for name in same} | counts)
    return sorted(table, key=lambda row: str([*row.values()][:6]))


def markdown(table: list[dict], wrong: list[str], missing: int) -> str:
    """The table, a line for each kernel and dtype."""
    lines = []
    for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in table):
        of = [row for row in table if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        cells = (_cell([row for row in of if row["target"] == target]) for target in TARGETS)
        lines.append((f"`{kernel.strip('_').removesuffix('_kernel')}`", dtype, *cells))
    count = f"{sum(row['forms'] for row in table)} launches compiled; {missing} left out."
    notes = [f"Spills: {_place(row)}, {row['spills']} bytes." for row in table if row["spills"]]
    notes += [f"Wrong: {line}" for line in wrong] or ["Nothing is wrong with what was compiled."]
    return f"""\
# Triton kernels: what they take

Compiled with Triton {triton.__version__} without a GPU by `make triton-sweep`; no figure here is a time. A cell: the most
registers of a thread, bytes that it spills, and KiB of shared memory of a program, over all tiles and forms of a kernel
(their number in brackets). `triton-resources.json` has every tile.

{report.table(("kernel", "rows", *(f"sm_{x}" for x in TARGETS)), lines)}

{chr(10).join([count, *notes])}
"""


def _cell(of: list[dict]) -> str:
    if not of:
        return ""
    registers, spills, shared = (
        max(r[name] for r in of) for name in ("registers", "spills", "shared")
    )
    return f"{registers}, {spills}, {shared / 1024:.0f} ({sum(r['forms'] for r in of)})"


def _place(row: dict) -> str:
    tile = ", ".join(f"{name} {value}" for name, value in row["tile"].items())
    return f"`{row['kernel']}` {row['dtype']} on sm_{row['target']} ({tile})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    add("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    add("--depths", type=int, nargs="+", default=calls.DEPTHS)
    add("--processes", type=int, default=2)
    add("--seconds", type=float, default=float("inf"), help="begin none after this time")
    add("--out", type=Path, help="folder of the table; without it only faults are printed")
    args = parser.parse_args(argv)

    deadline = time.monotonic() + args.seconds
    chosen = [x for capability in args.targets for x in jobs(capability, args.dtypes, args.depths)]
    memory = Memory(ROOT / "out/triton-sweep/resources.jsonl")
    found = all_resources(chosen, memory, args.processes, deadline)
    good = {job: each for job, each in found.items() if isinstance(each, Resources)}
    wrong = [each for each in found.values() if isinstance(each, str)]
    wrong += [fault for each in good.values() for fault in each.faults()]
    missing = len(chosen) - len(found)
    if args.out:
        table = rows([*good.values()])
        text = ",\n".join(json.dumps(row) for row in table)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "triton-resources.json").write_text(f"[\n{text}\n]\n")
        (args.out / "triton-resources.md").write_text(markdown(table, wrong, missing))
    print("\n".join(wrong))
    print(f"{len(found)} of {len(chosen)} launches compiled, {len(wrong)} wrong")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
