"""How time and memory grow with the rows: ``python -m benchmarks growth``.

From 2^8 rows up, each size in a process of its own, doubled until `limit` is used up. The slopes are those of lines through the
larger half of the points, in logarithms: time over N M D, and the peak memory, gradients included, over N + M. Linear is a slope of 1.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

import fastnce
from benchmarks import cases, machine, memory, report, rivals, timing

_DIM, _PATCHES = 128, 256
_CPU = torch.device("cpu")


def _pair(shape: cases.Shape, draw: object) -> cases.Inputs:
    query, key = torch.randn(2, shape["N"], shape["D"], generator=torch.Generator().manual_seed(0))
    return {"query": query.clone(), "key": key.clone()}


def _layer(shape: cases.Shape, draw: object) -> cases.Inputs:
    sizes = 2, shape["B"], shape["S"], shape["D"]
    query, key = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    return {"query": [query.clone()], "key": [key.clone()]}


def _labelled(shape: cases.Shape, draw: object) -> cases.Inputs:
    return _pair(shape, draw) | {"labels": torch.arange(shape["N"]) % 100}


def _form(op: str) -> Callable[..., torch.Tensor]:
    def call(inputs: cases.Inputs, backend: str | None, **options: object) -> torch.Tensor:
        return getattr(fastnce, op)(*inputs.values(), **options, backend=backend)

    return call


def _of_rows(op: str, name: str, make: Callable, wrt: tuple[str, ...], **how: object) -> Callable:
    def case(rows: int) -> cases.Case:
        shape = {"N": rows, "D": _DIM}
        return cases.Case(
            op, name, shape, make, wrt, pairs=lambda s: s["N"] ** 2, **how, form=_form(op)
        )

    return case


def _of_patches(name: str, over_images: bool) -> Callable[[int], cases.Case]:
    def case(rows: int) -> cases.Case:
        images = rows // _PATCHES if over_images else 1
        shape = {"B": images, "S": rows // images, "D": _DIM}
        pairs = lambda s: s["B"] * s["S"] ** 2  # noqa: E731
        return cases.Case(
            "patch_nce", name, shape, _layer, _BOTH, pairs=pairs, form=_form("patch_nce")
        )

    return case


_BOTH = ("query", "key")
FORMS: dict[str, Callable[[int], cases.Case]] = {
    "info_nce, both gradients": _of_rows("info_nce", "both", _pair, _BOTH),
    "info_nce, keys detached": _of_rows("info_nce", "detached", _pair, ("query",)),
    "info_nce, symmetric": _of_rows(
        "info_nce", "symmetric", _pair, _BOTH, options={"symmetric": True}
    ),
    "patch_nce, over images": _of_patches("images", True),
    "patch_nce, over patches": _of_patches("patches", False),
    "conditional_contrastive": _of_rows(
        "conditional_contrastive", "2C", _labelled, _BOTH, options={"temperature": 1.0}
    ),
}


def measure(form: str, rows: int, threads: int) -> dict[str, float]:
    """Seconds of forward and backward, `work` N M D, and the bytes by which the memory rises."""
    torch.set_num_threads(threads)
    case = FORMS[form](rows)
    provider = cases.Provider("fastnce", rivals.fused(case, None))
    found = memory.peak_extra(case, provider, torch.float32)
    seconds = found["seconds"]
    if seconds < 0.5:
        inputs = case.inputs(_CPU, torch.float32)
        seconds = timing.median_seconds(
            lambda: timing.run(provider.call, inputs, case.wrt), 5, _CPU
        )
    work = case.pairs(case.shape) * _DIM
    return {"rows": rows, "work": work, "seconds": seconds, "peak": found["peak"]}


def measure_all(forms: list[str], rows: int, threads: int) -> dict[str, dict[str, float]]:
    """By form."""
    return {form: measure(form, rows, threads) for form in forms}


def slope(points: list[dict[str, float]], over: str, of: str) -> float:
    """Of the line through the larger half of the points that are above 0, at least two; nan for fewer."""
    shown = [(p[over], p[of]) for p in points if p[of] > 0]
    larger = shown[-max(2, math.ceil(len(shown) / 2)) :]
    if len(larger) < 2:
        return math.nan
    return float(np.polyfit(*np.log(np.array(larger)).T, 1)[0])


def main(
    out: Path | None, limit: float = 300.0, most: int = 2**18, log: Callable = lambda line: None
) -> int:
    """Measures all forms up to `most` rows, begins nothing that would end after `limit` seconds, and reports in `out`."""
    end, found = time.monotonic() + limit, {form: [] for form in FORMS}
    rows, chosen = 2**8, list(FORMS)
    while rows <= most and chosen:
        log(f"{rows} rows")
        arguments = chosen, rows, torch.get_num_threads()
        environment = os.environ | memory.GLIBC
        for form, point in machine.in_fresh_process(environment, measure_all, *arguments).items():
            found[form].append(point)
        rows *= 2
        # A start of Python, and calls of four times the work, of which short ones are repeated.
        at, fits = time.monotonic() + 5, []
        for form in chosen:
            last = 4 * found[form][-1]["seconds"]
            at += last if last > 0.5 else 8 * last
            if at <= end:
                fits.append(form)
        chosen = fits
    facts = machine.describe(_CPU)
    slopes = {
        form: (slope(points, "work", "seconds"), slope(points, "rows", "peak"))
        for form, points in found.items()
    }
    text = _markdown(facts, found, slopes)
    report.publish(out, "growth", facts, {"points": found, "slopes": slopes}, text)
    if out is not None:
        _plot(out / f"{machine.slug(facts['device'])}-growth.png", found, slopes)
    return 0


def _markdown(facts: Mapping, found: Mapping, slopes: Mapping) -> str:
    rows = [
        {
            "form": form,
            "most rows": str(points[-1]["rows"]),
            "time there": report.duration(points[-1]["seconds"]),
            "memory there, MB": f"{points[-1]['peak'] / 1e6:.1f}",
            "slope of time over N M D": f"{slopes[form][0]:.2f}",
            "slope of memory over N + M": f"{slopes[form][1]:.2f}",
        }
        for form, points in found.items()
        if points
    ]
    return (
        f"# How cost grows on {facts['device']}\n\n{facts['threads']} threads, fp32, D = {_DIM}, "
        f"forward and backward; patch_nce over images has {_PATCHES} patches in each.\n\n{report.table_of(rows)}\n"
    )


def _plot(path: Path, found: Mapping, slopes: Mapping) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for at, (over, of, scale, labels) in enumerate(
        (
            ("work", "seconds", 1.0, ("N M D", "seconds")),
            ("rows", "peak", 1e-6, ("rows of queries, as many keys", "peak memory, MB")),
        )
    ):
        for (form, points), mark in zip(found.items(), "os^Dvx", strict=True):
            shown = [p for p in points if p[of] > 0]
            x, y = [p[over] for p in shown], [scale * p[of] for p in shown]
            label = f"{form}: slope {slopes[form][at]:.2f}"
            axes[at].loglog(x, y, marker=mark, markersize=4, label=label)
        if over == "rows":
            axes[at].set_xscale("log", base=2)
        axes[at].set(xlabel=labels[0], ylabel=labels[1])
        axes[at].grid(alpha=0.3)
        axes[at].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
