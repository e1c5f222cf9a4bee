"""The run gallery: runs as one static HTML page that holds everything and loads nothing.

Without JavaScript the page is complete: charts are SVG, series and scales are switched by CSS. The script adds the slider
through the samples, the values under the pointer, and the switch of the theme.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastnce.files import atomic_path
from fastnce.viz.line_chart import Series, line_chart, line_class, thinned
from fastnce.viz.plots import loss_panels, measurement_panels

# The page stays below about this size, however long the runs are.
_PICTURE_BYTES = 8_000_000
_PICTURES = 24  # of each run
_POINTS = 400  # of each curve
_LINES = 64  # that can be switched off in a chart
# Of a picture, tried in this order until it is small enough: JPEG quality, and the share of its width and height.
_REDUCTIONS = ((90, 1.0), (80, 1.0), (80, 0.7), (75, 0.5), (70, 0.35), (60, 0.25))


@dataclass(frozen=True, kw_only=True)
class GalleryRun:
    """A run as the page shows it."""

    name: str  # distinct among the runs of a page
    command: str  # trains it again
    options: Mapping[str, Any]  # its configuration, as JSON values
    defaults: Mapping[str, Any]  # of the options that have one
    panels: Sequence[Sequence[str]] = ()  # the losses that belong into one chart
    losses: Sequence[Mapping[str, Any]] = ()  # lines of metrics.jsonl
    measurements: Sequence[Mapping[str, Any]] = ()  # lines of measurements.jsonl
    samples: Sequence[tuple[int, Path]] = ()  # step and picture of each sample grid
    evaluation: Mapping[str, Any] | None = None  # metrics.json, if there is one


def save_gallery(runs: Sequence[GalleryRun], path: Path, together: Path | None = None) -> None:
    """Writes `gallery_page(runs, together)` to `path`."""
    page = gallery_page(runs, together)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def gallery_page(runs: Sequence[GalleryRun], together: Path | None = None) -> str:
    """The page of one or more runs; `together` is a picture of what all of them make of the same images.

    At most 24 sample grids of each run are on it, spread evenly from the first to the last, reduced so that all pictures
    of samples take at most about 8 MB together. A curve has at most 400 points, means over its lines where there are more.
    """
    title = " and ".join(run.name for run in runs)
    commands = (f'<pre tabindex="0"><code>{escape(run.command)}</code></pre>' for run in runs)
    sections = [
        _section("Side by side", _together(together)),
        _section("Samples", _samples(runs)),
        _section("Losses", _charts(runs, "losses")),
        _section("Measurements", _charts(runs, "measurements")),
        _section("Evaluation", "".join(_evaluation(run, len(runs) > 1) for run in runs)),
        _section("Configuration", _configuration(runs)),
        _section("Train it again", "".join(commands)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Whatever a run's names and values hold, the page runs its own script only and loads nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_resource('gallery.css')}{_switches()}</style>"
        "</head>\n<body><header>"
        f"<h1>{escape(title)}</h1><p>{_summary(runs)}</p>"
        '<button id="theme" type="button" hidden>Light or dark</button></header>\n<main>'
        + "\n".join(sections)
        + f"</main>\n<script>{_resource('gallery.js')}</script></body></html>\n"
    )


def _resource(name: str) -> str:
    return files("fastnce.viz").joinpath(name).read_text(encoding="utf-8")


def _switches() -> str:
    """CSS that hides a line whose box in the legend is not ticked."""
    return "".join(
        f".chart:has(.key-{i}:not(:checked)) .series-{i}{{display:none}}" for i in range(_LINES)
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _summary(runs: Sequence[GalleryRun]) -> str:
    parts = []
    for run in runs:
        text = str(run.options["system"])
        if run.losses:
            last = run.losses[-1]
            text += f", {last['step']} steps"
            if "seconds" in last:
                text += f" in {last['seconds'] / 60:.1f} minutes of training"
        parts.append(escape(f"{run.name}: {text}" if len(runs) > 1 else text))
    return "<br>".join(parts)


def _together(path: Path | None) -> str:
    if path is None:
        return ""
    picture = embed(path, _PICTURE_BYTES // 4)
    return (
        f'<div class="samples"><img src="{picture.uri}" width="{picture.width}" height="{picture.height}" '
        'alt="The same test images, and what each run makes of them"></div>'
    )


def _samples(runs: Sequence[GalleryRun]) -> str:
    chosen = {run.name: _spread(run.samples, _PICTURES) for run in runs if run.samples}
    if not chosen:
        return ""
    count = sum(map(len, chosen.values()))
    parts = [
        '<div class="slider" hidden><label for="step">Step <output id="shown"></output></label>'
        '<input id="step" type="range" min="0" value="0"></div><div class="runs">'
    ]
    for name, samples in chosen.items():
        heading = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'<div class="samples">{heading}<ol>')
        for step, path in samples:
            picture = embed(path, _PICTURE_BYTES // count)
            parts.append(
                f'<li data-step="{step}"><figure><img src="{picture.uri}" width="{picture.width}" '
                f'height="{picture.height}" alt="Samples of {escape(name)} after step {step}">'
                f"<figcaption>step {step}</figcaption></figure></li>"
            )
        parts.append("</ol></div>")
    left_out = sum(len(run.samples) for run in runs) - count
    note = f'<p class="note">{left_out} of the sample grids in between are left out.</p>'
    return "".join([*parts, "</div>", note if left_out else ""])


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly spread, with the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _charts(runs: Sequence[GalleryRun], kind: str) -> str:
    """A chart for each panel with a line for each name; of several runs a chart for each name, with a line for each run."""
    lines = {run.name: getattr(run, kind) for run in runs}
    charts: list[tuple[str, list[Series]]] = []
    if len(runs) == 1:
        (run,) = runs
        named = loss_panels(lines[run.name], run.panels)
        if kind == "measurements":
            named = measurement_panels(lines[run.name])
        for names in named:
            title = names[0].split("/")[0] if kind == "measurements" else ", ".join(names)
            charts.append((title, [_series(name, name, lines[run.name]) for name in names]))
    else:
        names = dict.fromkeys(
            name for run in runs for panel in measurement_panels(lines[run.name]) for name in panel
        )
        for name in names:
            drawn = [_series(run.name, name, lines[run.name]) for run in runs]
            charts.append((name, drawn))
    shown = [_chart(title, drawn) for title, drawn in charts]
    return f'<div class="charts">{"".join(shown)}</div>' if any(shown) else ""


def _series(label: str, name: str, lines: Sequence[Mapping[str, Any]]) -> Series:
    steps, values = [], []
    for line in lines:
        value = line.get(name)
        is_number = isinstance(value, int | float) and math.isfinite(value)
        steps.append(line["step"])
        values.append(float(f"{value:.6g}") if is_number else None)
    return thinned(Series(label, tuple(steps), tuple(values)), _POINTS)


def _known(series: Series) -> list[float]:
    return [value for value in series.values if value is not None]


def _chart(title: str, series: Sequence[Series]) -> str:
    """A chart; a series without values is left out, and the others keep their colours."""
    known = {i: s for i, s in enumerate(series) if _known(s)}
    if not known:
        return ""
    drawn = line_chart(series, title=f"{title} over the steps")
    scale = ""
    if any(value > 0 for s in series for value in _known(s)):
        logarithmic = line_chart(series, title=f"{title} over the steps, logarithmic", log=True)
        drawn = f'<div class="linear">{drawn}</div><div class="log">{logarithmic}</div>'
        scale = '<label class="scale"><input type="checkbox" class="log-scale"> log scale</label>'
    keys = "".join(
        f'<li><label><input type="checkbox" class="key-{i}" checked>'
        f'<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">'
        f'<path class="{line_class(i)}" d="M2 4H20"/></svg>'
        f"{escape(s.name)}</label> <output>{_known(s)[-1]:.4g}</output></li>"
        for i, s in known.items()
    )
    # Numbers only: nothing in it can end the script element.
    lines = [{"steps": s.steps, "values": s.values} for s in known.values()]
    data = json.dumps(lines, separators=(",", ":"), allow_nan=False)
    return (
        f'<figure class="chart"><figcaption>{escape(title)} '
        f'<output class="at"></output>{scale}</figcaption>'
        f'{drawn}<ul class="legend">{keys}</ul>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _evaluation(run: GalleryRun, named: bool) -> str:
    """The rows of metrics.json as a table, and below it the rows' notes and what else it says.

    Lists and nested values within a row are left out. A note is a sentence, which as a column would not fit beside the numbers.
    """
    if not run.evaluation:
        return ""
    rows = [row for row in run.evaluation.get("rows", []) if isinstance(row, Mapping)]
    columns = dict.fromkeys(
        key
        for row in rows
        for key, value in row.items()
        if key != "note" and not isinstance(value, Mapping | list)
    )
    head = "".join(f'<th scope="col">{escape(_words(name))}</th>' for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{_value(row.get(name))}</th>'
            if name == "name"
            else f"<td>{_value(row.get(name))}</td>"
            for name in columns
        )
        + "</tr>"
        for row in rows
    )
    rest = {k: v for k, v in _flat(run.evaluation).items() if k != "rows"}
    facts = "".join(
        f"<dt>{escape(_words(name))}</dt><dd>{_value(value)}</dd>" for name, value in rest.items()
    )
    notes = "".join(
        f'<p class="note">{_value(row.get("name"))}: {escape(str(row["note"]))}</p>'
        for row in rows
        if row.get("note")
    )
    heading = f"<h3>{escape(run.name)}</h3>" if named else ""
    table = f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return heading + (table + notes if rows else "") + (f"<dl>{facts}</dl>" if facts else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", ", ")


def _value(value: object) -> str:
    if value is None:
        return "&ndash;"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(value if isinstance(value, str) else json.dumps(value))


def _configuration(runs: Sequence[GalleryRun]) -> str:
    """First what differs from the defaults or between the runs, then, folded away, the rest."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    changed, rest = [], []
    for name in names:
        values = [run.options.get(name) for run in runs]
        is_changed = any(_is_changed(run, name) for run in runs)
        (changed if is_changed or any(v != values[0] for v in values) else rest).append(name)
    columns = "".join(
        f'<th scope="col">{escape(run.name) if len(runs) > 1 else "value"}</th>' for run in runs
    )
    head = (
        f'<thead><tr><th scope="col">option</th>{columns}<th scope="col">default</th></tr></thead>'
    )

    def table(shown: list[str]) -> str:
        body = "".join(_option(runs, name) for name in shown)
        return f'<div class="wide" tabindex="0"><table class="options">{head}<tbody>{body}</tbody></table></div>'

    note = '<p class="note">Marked with *: differs from the default.</p>'
    return (
        f"{note}{table(changed)}<details><summary>{len(rest)} options as by default</summary>"
        f"{table(rest)}</details>"
    )


def _is_changed(run: GalleryRun, name: str) -> bool:
    return name in run.defaults and run.options.get(name) != run.defaults[name]


def _option(runs: Sequence[GalleryRun], name: str) -> str:
    cells = ""
    for run in runs:
        text = _setting(run.options[name]) if name in run.options else "&ndash;"
        changed = _is_changed(run, name)
        cells += f'<td class="changed">{text}&nbsp;*</td>' if changed else f"<td>{text}</td>"
    known = [run.defaults[name] for run in runs if name in run.defaults]
    default = _setting(known[0]) if known else "&ndash;"
    return f'<tr><th scope="row">{escape(name)}</th>{cells}<td>{default}</td></tr>'


def _setting(value: object) -> str:
    """An option's value as it is written in JSON, but text without its quotes."""
    return escape(value if isinstance(value, str) else json.dumps(value))


class Embedded(NamedTuple):
    """A picture as a data URI."""

    uri: str
    width: int
    height: int


def embed(path: Path, limit: int) -> Embedded:
    """The picture as it is if it takes at most `limit` bytes of the page; else smaller, as JPEG.

    The smallest of the reductions is taken where even that is larger.
    """
    data = path.read_bytes()
    with Image.open(path) as picture:
        width, height = picture.size
        if path.suffix == ".png" and _length(data) <= limit:
            return Embedded(_uri(data, "png"), width, height)
        whole = picture.convert("RGB")
    for quality, share in _REDUCTIONS:
        size = max(1, round(width * share)), max(1, round(height * share))
        buffer = io.BytesIO()
        whole.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
        if _length(buffer.getvalue()) <= limit:
            break
    return Embedded(_uri(buffer.getvalue(), "jpeg"), *size)


def _length(data: bytes) -> int:
    return (len(data) + 2) // 3 * 4


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
