"""Every kernel in every form, compiled for every target; ``make triton-sweep``. Needs Triton, but no GPU.

Writes the table of registers, spills and shared memory, beside those of other versions of Triton, and ends with status 1 where
something is wrong or missing. What was compiled is remembered in ``out/triton-sweep``: stopped, the same command goes on.
Another Triton: ``pip install --target FOLDER --no-deps triton==3.6.0``, and the folder first in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import collections
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
from launches import Launch, as_on  # noqa: E402
from resources import Memory, Resources, all_resources, operand  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.machine import matmul_precision  # noqa: E402

STEM = "triton-resources"
TARGETS = (80, 89, 90, 100)
# Of the rows given, what torch.set_float32_matmul_precision makes of products of float32, and depths: the largest of each class
# that has a tile of its own, one with head and tail, and one that goes through panels.
DTYPES = {
    "bf16": (torch.bfloat16, "highest", (256, 768, 192, 128)),
    "fp16": (torch.float16, "highest", (256, 768, 192, 128)),
    "fp32": (torch.float32, "highest", (64, 768, 48)),
    "tf32": (torch.float32, "high", (128, 768, 96)),
    "fp32 as bf16": (torch.float32, "medium", (256, 768, 192, 128)),
}


def jobs(
    capability: int, dtypes: Iterable[str] = tuple(DTYPES), depths: Iterable[int] | None = None
) -> list[tuple[Launch, int]]:
    """All different launches for a target with the tiles of the tables, of all of a dtype's ``depths`` or some."""
    found: list[Launch] = []
    for name in dtypes:
        dtype, products, all_depths = DTYPES[name]
        with as_on(capability), matmul_precision(products):
            found += calls.sampling_launches(dtype)
            for depth in all_depths if depths is None else depths:
                found += calls.launches(depth, dtype)
                # fp8 products came with compute capability 8.9.
                if capability >= 89 and name == "bf16":
                    found += calls.fp8_launches(depth, dtype)
    return [(each, capability) for each in dict.fromkeys(found)]


def widest_first(chosen: list[tuple[Launch, int]]) -> list[tuple[Launch, int]]:
    """One of every kernel, operand and target, then a second of each, and so on: a sweep that is stopped has seen all of them."""
    seen: collections.Counter[tuple] = collections.Counter()
    rank = {}
    for launch, target in chosen:
        of = launch.name, operand(launch), launch.constant("PRECISION"), target
        rank[launch, target] = seen[of]
        seen[of] += 1
    return sorted(chosen, key=rank.__getitem__)


def rows(results: list[Resources]) -> list[dict[str, object]]:
    """One row for a kernel's tile on a target: the most that any form of it takes."""
    groups: dict[tuple, list[Resources]] = {}
    for each in results:
        tile = ", ".join(f"{name} {value}" for name, value in each.tile.items())
        tile = f"{tile}; {each.warps} warps, {each.stages} stages".removeprefix("; ")
        groups.setdefault((each.kernel, each.dtype, each.target, tile), []).append(each)
    table = []
    for key, of in sorted(groups.items()):
        row = dict(zip(("kernel", "dtype", "target", "tile"), key, strict=True))
        most = ("registers", "spills", "shared")
        table.append({**row, "forms": len(of), **{x: max(getattr(r, x) for r in of) for x in most}})
    return table


def swept(
    good: list[Resources], wrong: list[str], left_out: list[tuple[Launch, int]]
) -> dict[str, object]:
    """What a sweep has found, for the file of all sweeps."""
    by_target: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for launch, target in left_out:
        by_target[f"sm_{target}"][f"{_short(launch.name)} {operand(launch)}".strip()] += 1
    listed = sorted({f"{each}: {why}" for each in good if (why := each.listed())})
    return {"wrong": wrong, "listed": listed, "left_out": by_target, "rows": rows(good)}


def written(folder: Path, found: dict[str, object]) -> None:
    """Writes what was found with this Triton beside what the files have of others."""
    path = folder / f"{STEM}.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    versions = dict(sorted({**versions, triton.__version__: found}.items()))
    report.save(folder, STEM, versions, markdown(versions))


def markdown(versions: dict[str, dict]) -> str:
    """A table for each version of Triton, with a line for each kernel and dtype."""
    parts = [
        "# Triton kernels: what they take",
        "Compiled without a GPU by `make triton-sweep`; no figure here is a time. A cell: the most registers of a thread, bytes "
        "of its stack, where registers go that do not fit, and KiB of shared memory of a program, over all tiles and forms of "
        "a kernel (their number in brackets). `triton-resources.json` has every tile.",
    ]
    for version, found in versions.items():
        parts.append(f"## Triton {version}")
        table, left_out, lines = found["rows"], found["left_out"], []
        for kernel, dtype in dict.fromkeys((row["kernel"], row["dtype"]) for row in table):
            of = [row for row in table if (row["kernel"], row["dtype"]) == (kernel, dtype)]
            cells = (_cell([row for row in of if row["target"] == target]) for target in TARGETS)
            lines.append((f"`{_short(kernel)}`", dtype, *cells))
        parts.append(report.table(("kernel", "rows", *(f"sm_{x}" for x in TARGETS)), lines))
        compiled = sum(row["forms"] for row in table)
        notes = [
            f"{compiled} launches compiled; {sum(sum(x.values()) for x in left_out.values())} left out."
        ]
        for target, kernels in left_out.items():
            names = ", ".join(f"{name} {count}" for name, count in kernels.items())
            notes.append(f"Left out on {target}: {names}.")
        notes += [
            f"Spills: {_place(row)}, {row['spills']} bytes." for row in table if row["spills"]
        ]
        notes += [f"Stays: {line}." for line in found.get("listed", ())]
        wrong = [f"Wrong: {line}" for line in found["wrong"]]
        notes += wrong or ["Nothing is wrong with what was compiled."]
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _cell(of: list[dict]) -> str:
    if not of:
        return ""
    registers, spills, shared = (
        max(r[name] for r in of) for name in ("registers", "spills", "shared")
    )
    return f"{registers}, {spills}, {shared / 1024:.0f} ({sum(r['forms'] for r in of)})"


def _short(kernel: str) -> str:
    return kernel.strip("_").removesuffix("_kernel")


def _place(row: dict) -> str:
    return f"`{row['kernel']}` {row['dtype']} on sm_{row['target']} ({row['tile']})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--targets", type=int, nargs="+", choices=TARGETS, default=TARGETS)
    add("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    add("--depths", type=int, nargs="+", help="by default one of each class")
    add("--processes", type=int, default=2)
    add("--seconds", type=float, default=float("inf"), help="begin none after this time")
    add("--out", type=Path, help="folder of the table; without it only faults are printed")
    args = parser.parse_args(argv)

    deadline = time.monotonic() + args.seconds
    chosen = [x for capability in args.targets for x in jobs(capability, args.dtypes, args.depths)]
    memory = Memory(ROOT / "out/triton-sweep/resources.jsonl")
    found = all_resources(widest_first(chosen), memory, args.processes, deadline)
    good = {job: each for job, each in found.items() if isinstance(each, Resources)}
    wrong = [each for each in found.values() if isinstance(each, str)]
    wrong += [fault for each in good.values() for fault in each.faults()]
    left_out = [job for job in chosen if job not in found]
    if args.out:
        written(args.out, swept([*good.values()], wrong, left_out))
    print("\n".join(wrong))
    print(f"{len(found)} of {len(chosen)} launches compiled, {len(wrong)} wrong")
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    sys.exit(main())
