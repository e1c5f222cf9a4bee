"""The targets of the GPU kernels, row by row, and judging a run of ``make gpu-report`` by it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report

# What is compared of a case's providers, all in bfloat16.
SHARE = "share of cuBLAS"  # rate on the mandatory products / the rate of torch.mm in the same run
SPEED = "speed over"  # time of the fastest of the rivals / time of ours
# The same of the times above what the case takes without the op.
SPEED_ABOVE = "speed above the network over"
# At most: peak beyond the inputs, results and gradients included / bytes of the inputs.
MEMORY = "memory over inputs"
# At most: time / (reading the inputs once + the mandatory products at cuBLAS's rate).
LEAST_TIME = "time over the least"
NO_HARDWARE = "not measured on hardware"

_DTYPE = "bfloat16"
_EAGER = ("eager", "published")
_COMPILED = ("compile", "published, compiled")
_MATMUL = ("matmul + logsumexp, compiled", "compile")
_ATTENTION = ("attention (flash)", "attention (cudnn)", "attention (efficient)")
_FP8 = "triton, fp8 similarities"


class Target(NamedTuple):
    """The ``bound`` of a quantity of one provider in one case, ``against`` the fastest of some rivals."""

    op: str
    case: str
    quantity: str
    bound: float
    against: tuple[str, ...] = ()
    provider: str = "triton"


def _info_nce(case: str, quantity: str, bound: float, *against: str, provider="triton") -> Target:
    return Target("info_nce", case, quantity, bound, against, provider)


_BOTH, _FIXED = "two directions, both gradients, {}", "keys without gradient, 65536 x {}"
_DRAWN, _TAP = "CUT's 5 maps, 1 image, drawn positions", "CUT's 5 maps, 1 image, inside a network"
_CUT = ("CUT, 1 image", "CUT, 16 images")
_2C = ("Tiny ImageNet, 1024 x 768", "large batch, 2048 x 1536")
_MOCO = "MoCo, queue of 65536, 256 x 128"

TARGETS: tuple[Target, ...] = (
    *(
        target
        for depth, share in ((256, 0.40), (512, 0.52), (1024, 0.62))
        for case in (_BOTH.format(f"65536 x {depth}"),)
        for target in (
            _info_nce(case, SHARE, share),
            _info_nce(case, SPEED, 2, "memeff"),
            _info_nce(case, SPEED, 8, "inf-cl"),
            _info_nce(case, SPEED, 3, *_EAGER),
        )
    ),
    _info_nce(_BOTH.format("32768 x 256"), SPEED, 3, *_EAGER),  # eager fits on every GPU
    *(
        target
        for depth in (256, 512)
        for target in (
            _info_nce(_FIXED.format(depth), SHARE, 0.60),
            _info_nce(_FIXED.format(depth), SPEED, 1.3, *_ATTENTION),
            _info_nce(_FIXED.format(depth), SPEED, 1.3, "triton", provider=_FP8),
        )
    ),
    _info_nce(_BOTH.format("262144 x 512"), MEMORY, 4),
    *(Target("patch_nce", case, SPEED, 15, _EAGER) for case in _CUT),
    *(Target("patch_nce", case, SPEED, 3, _COMPILED) for case in _CUT),
    Target("sample_patches", "CUT's 5 maps, 1 image, forward alone", SPEED, 3, _EAGER),
    Target("sample_patches", _DRAWN, SPEED, 6, _EAGER),
    Target("sample_patches", _TAP, SPEED_ABOVE, 12, _EAGER),
    *(Target("conditional_contrastive", case, SPEED, 100, ("published",)) for case in _2C),
    *(Target("conditional_contrastive", case, SPEED, 3, _MATMUL) for case in _2C),
    _info_nce(_MOCO, SPEED, 5, *_EAGER),
    _info_nce(_MOCO, LEAST_TIME, 2),
    Target("patch_nce", _CUT[0], SPEED, 1.3, ("triton",), "cuda"),
    Target("sample_patches", _DRAWN, SPEED, 1.3, ("triton",), "cuda"),
    *(
        _info_nce(_BOTH.format(f"65536 x {depth}"), SPEED, 1.15, "triton", provider="cuda")
        for depth in (128, 256, 512)
    ),
    *(_info_nce(_FIXED.format(depth), SHARE, 0.75, provider="cuda") for depth in (256, 512)),
)


def judge(
    document: dict[str, Any] | None, targets: tuple[Target, ...] = TARGETS
) -> list[dict[str, Any]]:
    """A row for each target: what it is, and its ``status``, "met", "missed" or "not measured", and ``figure``, as ``is`` tells.

    Args:
        document: the ``results.json`` of a run; None if there was none.
        targets: the targets.
    """
    results = [] if document is None else document["results"]
    entries = {(x["op"], x["case"]): x for x in results if x["dtype"] == _DTYPE}
    rows = []
    for target in targets:
        entry = entries.get((target.op, target.case))
        found: float | str = "the case was not run"
        if entry is not None:
            found = entry.get("not_run") or _figure(target, entry, document)
        bound, at_most = target.bound, target.quantity in (MEMORY, LEAST_TIME)
        shown = "{:.0%}" if target.quantity == SHARE else "{:.3g}x"
        if isinstance(found, str):
            status, figure, text = "not measured", None, f"not measured: {found}"
        else:
            status = "met" if (found <= bound if at_most else found >= bound) else "missed"
            figure = found if math.isfinite(found) else None  # JSON has no infinity
            text = f"{status}: {shown.format(found)} of {shown.format(bound)}"
        rivals = f" {' / '.join(target.against)}" if target.against else ""
        limit = f"{'at most' if at_most else 'at least'} {shown.format(bound)}"
        rows.append(
            {
                **target._asdict(),
                "must be": f"{target.quantity}{rivals}: {limit}",
                "is": NO_HARDWARE if document is None else text,
                "status": status,
                "figure": figure,
            }
        )
    return rows


def _figure(target: Target, entry: dict[str, Any], document: dict[str, Any]) -> float | str:
    """The figure, or why there is none."""
    rows = {row["name"]: row for row in entry["providers"]}
    ours = rows.get(target.provider)
    if ours is None or not ours["seconds"]:
        return _why_not(target.provider, ours)
    seconds = ours["seconds"]["median"]
    if target.quantity == SHARE:
        return ours.get("share_of_matmul", "torch.mm's rate is missing")
    if target.quantity == MEMORY:
        if "peak_extra_bytes" not in ours:
            return ours.get("peak_extra_note", "peak memory is missing")
        return ours["peak_extra_bytes"] / entry["input_bytes"]
    if target.quantity == LEAST_TIME:
        rate, bandwidth = document["matmul_gflops"].get(_DTYPE), document.get("bandwidth_gbs")
        if not (rate and bandwidth):
            return "the memory's bandwidth or torch.mm's rate is missing"
        return seconds * 1e9 / (entry["input_bytes"] / bandwidth + entry["flop"] / rate)
    timed = [rows[name] for name in target.against if name in rows and rows[name]["seconds"]]
    if not timed:
        return "; ".join(_why_not(name, rows.get(name)) for name in target.against)
    if target.quantity == SPEED:
        return min(row["seconds"]["median"] for row in timed) / seconds
    if "seconds_above_alone" not in ours:
        return "the time without the op is missing"
    above = ours["seconds_above_alone"]
    # What cannot be told from nothing is as quick as can be told.
    return min(row["seconds_above_alone"] for row in timed) / above if above > 0 else math.inf


def _why_not(name: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return f"{name} did not take part"
    return f"{name}: {row['reason']}" if row["reason"] != "ok" else f"{name} was not timed"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each row of ``judge``, and how many targets are met."""
    columns = ("op", "case", "provider", "must be", "is")
    met, missed = (sum(row["status"] == status for row in rows) for status in ("met", "missed"))
    count = f"{met} met, {missed} missed, {len(rows) - met - missed} not measured."
    shown = report.table(columns, [[row[name] for name in columns] for row in rows])
    return f"{shown}\n\n{count}\n"


_LEGEND = """\
What the GPU kernels are to reach on an H200, row by row, in bfloat16. A figure is of a run of `make gpu-report` on a GPU.
*Share of cuBLAS* is the rate on the mandatory products (3 for both gradients, 2 with keys without gradient) as a share of
torch.mm's in the same run. Of several rivals the fastest counts. *Not measured* claims no speed;
`docs/gpu.md` tells what is known without hardware."""


def main(out: Path | None, results: Path | None = None) -> int:
    """``python -m benchmarks gpu-targets``: judges the results of a run, or says of every row that it was not measured.

    Args:
        out: folder of ``gpu.json`` and ``gpu.md``; without it the table is only printed.
        results: ``results.json`` of ``gpu-report``; None where there was no run.
    """
    document = None
    try:
        if results is not None:
            document = json.loads(results.read_text())
        device = document and document["machine"]["device"]
        rows = judge(document)
    except (ValueError, LookupError, TypeError) as error:
        print(
            f"benchmarks gpu-targets: --results {results} is no results.json of make gpu-report: {error!r}",
            file=sys.stderr,
        )
        return 1
    title = f"# Targets of the GPU kernels: {device or 'no GPU at hand'}"
    text = "\n\n".join([title, _LEGEND, table(rows)])
    print(text)
    document = {"format": report.FORMAT, "device": device, "targets": rows}
    report.save(out, "gpu", document, text)
    return 0
