"""The table of targets: judged by a run on a GPU, or, without one, what is known instead of each row."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks import report, targets
from benchmarks.targets import NO_HARDWARE, Verdict

RESULTS = Path(__file__).parent / "results"
_LEGEND = """\
What the GPU kernels are to reach on an H200, row by row. A figure is of a run of `make gpu-report` on a GPU; *share of cuBLAS* is the rate on
the mandatory products (3 for both gradients, 2 with keys without gradient) as a share of torch.mm's in bf16 in the same run; of several
rivals the fastest counts. *Not measured* is no statement about speed, and claims none."""

_INSTEAD = """\
## What is known without hardware

No kernel of either GPU backend has run on a GPU, and none is chosen by default. What shows that they are right, and what they take:

- Triton: `make test-kernels` runs every kernel in Triton's interpreter against the reference in fp64, and compiles kernels for sm_80, sm_90
  and sm_100; `make triton-sweep` compiles all of them in all forms and writes [triton-resources.md](triton-resources.md).
- CUDA C++: `make test-kernels` builds every file for every target, where `nvcc` is installed, and runs the kernels in an emulator on the
  host; `python -m tests.cuda_kernels.cuda_resources` writes [cuda-resources.md](cuda-resources.md)."""


def main(out: Path | None, results: Path | None = None) -> int:
    """``python -m benchmarks gpu-targets``: judges the results of a run, or says of every row that it was not measured.

    Args:
        out: folder of ``gpu.json`` and ``gpu.md``; without it the table is only printed.
        results: ``results.json`` of ``gpu-report``; None where there was no run.

    Returns:
        0.
    """
    if results is None:
        verdicts = targets.judge(targets.ALL, [], {}, reason=NO_HARDWARE)
        device = None
    else:
        try:
            document = json.loads(results.read_text())
            verdicts = verdicts_of(document)
            device = document["machine"]["device"]
        except (ValueError, LookupError, TypeError) as error:
            print(
                f"benchmarks gpu-targets: --results {results} is no results.json of make gpu-report: {error!r}",
                file=sys.stderr,
            )
            return 1
    text = markdown(verdicts, device)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rows = [as_row(verdict) for verdict in verdicts]
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = json.dumps({"format": report.FORMAT, "device": device})[:-1]
        (out / "gpu.json").write_text(f'{head}, "targets": [\n  {lines}\n]}}\n')
        (out / "gpu.md").write_text(text)
    return 0


def verdicts_of(document: dict[str, Any]) -> list[Verdict]:
    """The verdicts of a report of a GPU."""
    return targets.judge(
        targets.ALL,
        document["results"],
        document["matmul_gflops"],
        document.get("bandwidth_gbs"),
    )


def as_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict for JSON."""
    target, figure = verdict.target, verdict.figure
    return {
        "op": target.op,
        "case": target.case,
        "dtype": target.dtype,
        "provider": target.provider,
        "quantity": target.quantity,
        "against": list(target.against),
        "bound": target.bound,
        "status": verdict.status,
        "figure": "inf" if figure == math.inf else figure,  # JSON has no such number
        "reason": verdict.reason,
    }


def table(verdicts: list[Verdict]) -> str:
    """One line for each row."""
    lines = ["| op | case | provider | must be | is |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        target = verdict.target
        cells = (target.op, target.case, target.provider, str(target), str(verdict))
        lines.append(f"| {' | '.join(cells)} |")
    count = {name: sum(v.status == name for v in verdicts) for name in ("met", "missed")}
    rest = len(verdicts) - sum(count.values())
    lines += ["", f"{count['met']} met, {count['missed']} missed, {rest} not measured."]
    return "\n".join(lines)


def markdown(verdicts: list[Verdict], device: str | None) -> str:
    """The whole file."""
    where = device or "no GPU at hand"
    parts = [f"# Targets of the GPU kernels: {where}", _LEGEND, table(verdicts)]
    if device is None:
        parts += [_INSTEAD, compiled_kernels()]
    return "\n\n".join(parts) + "\n"


def compiled_kernels(path: Path = RESULTS / "triton-resources.json") -> str:
    """What the compile sweep found, a line for each target."""
    if not path.exists():
        return "The compile sweep has not been run: `make triton-sweep`."
    rows = json.loads(path.read_text())
    lines = ["Triton kernels in the last sweep:", ""]
    for capability in sorted({row["target"] for row in rows}):
        of = [row for row in rows if row["target"] == capability]
        spilling = sorted({row["kernel"] for row in of if row["spills"]})
        spills = f"spills in {', '.join(spilling)}" if spilling else "no spills"
        shared = max(row["shared"] for row in of) / 1024
        lines.append(
            f"- sm_{capability}: {sum(row['forms'] for row in of)} launches compiled; at most "
            f"{max(row['registers'] for row in of)} registers and {shared:.0f} KiB of shared memory; {spills}"
        )
    return "\n".join(lines)
