"""Line charts as SVG: text, so that a page with them needs no other file and no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# In the units of the viewBox; gallery.js knows LEFT, RIGHT and WIDTH too.
WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 8, 28
_COLOURS = 8  # in gallery.css


@dataclass(frozen=True)
class Series:
    """A line: a value for each step; None where there is none, which leaves a gap."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float | None, ...]


def thinned(series: Series, limit: int) -> Series:
    """The series with at most `limit` points: means over as many points as it takes, at their last step."""
    width = math.ceil(len(series.steps) / limit)
    if width <= 1:
        return series
    steps, values = [], []
    for start in range(0, len(series.steps), width):
        known = [v for v in series.values[start : start + width] if v is not None]
        steps.append(series.steps[start : start + width][-1])
        values.append(sum(known) / len(known) if known else None)
    return Series(series.name, tuple(steps), tuple(values))


def line_chart(series: Sequence[Series], *, title: str, log: bool = False) -> str:
    """An `<svg>` with a line for each series, of the class series-0, series-1 and so on, and those of `line_class`.

    The attributes data-first and data-last give the steps at the ends of the horizontal axis. There must be a known value among
    the series; with `log`, a logarithmic vertical axis, values that are not above 0 are left out.
    """
    points = [
        (step, value)
        for s in series
        for step, value in zip(s.steps, s.values, strict=True)
        if value is not None and (value > 0 or not log)
    ]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    if first == last:
        first, last = first - 1, last + 1
    across = _Axis(first, last, LEFT, WIDTH - RIGHT)
    up = _vertical_axis([p[1] for p in points], log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'data-first="{first:g}" data-last="{last:g}">'
    ]
    for value in log_ticks(up.low, up.high) if log else ticks(up.low, up.high):
        y = up.place(math.log10(value) if log else value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(first, last, 5):
        x = across.place(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 9}" text-anchor="{anchor}">{value:g}</text>')
    for index, s in enumerate(series):
        path = _path(s, across, up, log)
        parts.append(f'<path class="series-{index} {line_class(index)}" d="{path}"/>')
    return "".join([*parts, "</svg>"])


def line_class(index: int) -> str:
    """The CSS classes of the line with this index: one of the colours, and dashes once they are used up."""
    dashed = " dashed" if index // _COLOURS % 2 else ""
    return f"line colour-{index % _COLOURS}{dashed}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    digits = max(0, 1 - math.floor(math.log10(step)))
    start, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, digits) for i in range(start, end + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers from 10^low to 10^high for a logarithmic axis: powers of ten, or more where there are few of them."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [f * 10.0**d for d in decades for f in factors]
        inside = [v for v in values if low - 1e-9 <= math.log10(v) <= high + 1e-9]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / 6)]
    return [float(f"{value:.3g}") for value in (10**low, 10 ** ((low + high) / 2), 10**high)]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def _vertical_axis(values: Sequence[float], log: bool) -> _Axis:
    low, high = min(values), max(values)
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.04 * (high - low) or max(abs(high), 1.0) * 0.05
    return _Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _path(series: Series, across: _Axis, up: _Axis, log: bool) -> str:
    """M and L commands; a single point between gaps becomes a short stroke, which round ends make a dot."""
    runs: list[list[str]] = [[]]
    for step, value in zip(series.steps, series.values, strict=True):
        if value is None or (log and value <= 0):
            runs.append([])
            continue
        y = up.place(math.log10(value) if log else value)
        runs[-1].append(f"{across.place(step):.1f} {y:.1f}")
    return "".join("M" + "L".join(run if len(run) > 1 else run * 2) for run in runs if run)
