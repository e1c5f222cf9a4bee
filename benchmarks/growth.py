"""How time and memory grow with the rows: ``python -m benchmarks growth``.

Loss and gradients in float32, each form in a process of its own. Time should be linear in N M D, the products; memory beyond the
inputs in N + M, the rows. The slopes are those of straight lines through the last half of the points, in logarithms.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import fastnce
from benchmarks import machine, memory, report

_FEW_SECONDS = 0.3  # of which a time is the median

# n -> the call, N M D, N + M
Form = Callable[[int], tuple[Callable[[], Tensor], int, int]]


def _info_nce(keys: bool = True, **options: bool) -> Form:
    def make(n: int):
        query, key = torch.randn(n, 128, requires_grad=True), torch.randn(n, 128)
        key.requires_grad_(keys)
        return lambda: fastnce.info_nce(query, key, **options), n * n * 128, 2 * n

    return make


def _patch_nce(images: int | None, patches: int | None) -> Form:
    def make(n: int):
        count, size = images or n // (patches or n), patches or n // images
        query, key = (torch.randn(count, size, 256, requires_grad=x) for x in (True, False))
        return lambda: fastnce.patch_nce([query], [key]), count * size * size * 256, 2 * n

    return make


def _conditional(n: int):
    images, proxies = (torch.randn(n, 256, requires_grad=True) for _ in range(2))
    labels = torch.arange(n) % 10
    return (
        lambda: fastnce.conditional_contrastive(images, proxies, labels),
        n * n * 256,
        2 * n,
    )


FORMS: dict[str, Form] = {
    "info_nce, both gradients": _info_nce(),
    "info_nce, keys fixed": _info_nce(keys=False),
    "info_nce, symmetric": _info_nce(symmetric=True),
    "patch_nce, more images of 256 patches": _patch_nce(None, 256),
    "patch_nce, more patches of one image": _patch_nce(1, None),
    "conditional_contrastive": _conditional,
}


def measure(name: str, most: int, limit: float, threads: int) -> list[dict[str, float]]:
    """Of 2^8 rows and more, up to 2^``most``; no call that would take longer than ``limit`` seconds, by the one before."""
    torch.set_num_threads(threads)
    found: list[dict[str, float]] = []
    for exponent in range(8, most + 1):
        torch.manual_seed(0)
        call, products, rows = FORMS[name](2**exponent)
        if found and found[-1]["seconds"] * products / found[-1]["products"] > limit:
            break
        if not found:
            call().backward()  # loads the code
        before, begin = memory.reset_peak(), time.perf_counter()
        call().backward()
        seconds = [time.perf_counter() - begin]
        peak = memory.status_bytes("VmHWM") - before
        while sum(seconds) < _FEW_SECONDS:
            begin = time.perf_counter()
            call().backward()
            seconds.append(time.perf_counter() - begin)
        point = {"n": 2**exponent, "products": products, "rows": rows}
        found.append(point | {"seconds": float(numpy.median(seconds)), "bytes": max(peak, 1)})
    return found


def slope(points: list[dict[str, float]], x: str, y: str) -> float:
    """Of the logarithms, over the last half of the points."""
    last = points[len(points) // 2 :]
    logs = ([math.log(point[name]) for point in last] for name in (x, y))
    return float(numpy.polyfit(*logs, 1)[0]) if len(last) > 1 else math.nan


def _plot(path: Path, found: dict[str, list[dict[str, float]]], title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, x, y, unit, words in (
        (both[0], "products", "seconds", 1.0, ("N M D", "seconds")),
        (both[1], "rows", "bytes", 1e6, ("N + M", "MB beyond the inputs")),
    ):
        for name, points in found.items():
            label = f"{name}: slope {slope(points, x, y):.2f}"
            axes.plot(
                [p[x] for p in points], [p[y] / unit for p in points], "o-", ms=3, label=label
            )
        axes.set(xscale="log", yscale="log", xlabel=words[0], ylabel=words[1])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(out: Path | None, size: str, limit: float) -> int:
    """Measures, prints, and writes ``<device>-growth`` as ``.json``, ``.md`` and ``.png``.

    Args:
        out: folder for the files, or None.
        size: ``"full"``, up to 2^18 rows; else up to 2^11.
        limit: seconds that a call may take.
    """
    facts = machine.describe(torch.device("cpu"))
    most, threads = 18 if size == "full" else 11, torch.get_num_threads()
    found: dict[str, Any] = {}
    for name in FORMS:
        arguments = (name, most, limit, threads)
        found[name] = machine.in_fresh_process(os.environ | memory.GLIBC, measure, *arguments)
    rows = [
        {
            "form": name,
            "rows": f"2^8 to 2^{int(math.log2(points[-1]['n']))}",
            "the last one": report.duration(points[-1]["seconds"]),
            "memory": f"{points[-1]['bytes'] / 1e6:,.0f} MB",
            "time over N M D": f"{slope(points, 'products', 'seconds'):.2f}",
            "memory over N + M": f"{slope(points, 'rows', 'bytes'):.2f}",
        }
        for name, points in found.items()
    ]
    title = f"How cost grows on {facts['device']}: loss and gradients in float32"
    text = f"# {title}\n\n{facts['threads']} threads. Slopes in logarithms, over the last half of the sizes.\n\n"
    report.publish(out, "growth", facts, {"results": found}, text + report.table_of(rows) + "\n")
    if out is not None:
        _plot(out / f"{machine.slug(facts['device'])}-growth.png", found, title)
    return 0
