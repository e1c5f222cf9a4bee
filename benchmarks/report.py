"""Results as JSON, as a Markdown table that also reads well as text, and as a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
_COLUMNS = ("provider", "median", "quartiles", "against eager", "GFLOP/s", "of mm", "peak extra")

_LEGEND = (
    "Times are forward and backward together, medians of interleaved calls. GFLOP/s count only the products that loss and "
    "gradients cannot do without; *of mm* is that rate as a share of torch.mm's in the same dtype. Ours in bold."
)


def write(
    out: Path,
    stem: str,
    results: list[dict[str, Any]],
    *,
    title: str,
    machine: dict[str, Any],
    rates: dict[str, float],
    settings: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> list[Path]:
    """Writes ``<stem>.json`` and ``<stem>.md``, each replacing its former self at once.

    Returns:
        The files.
    """
    document = {
        "format": FORMAT,
        "title": title,
        "machine": machine,
        "matmul_gflops": rates,
        "settings": settings,
        **(extra or {}),
        "results": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{stem}.json", out / f"{stem}.md"]
    _replace(files[0], json.dumps(document, indent=1) + "\n")
    _replace(files[1], markdown(document))
    return files


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def markdown(document: dict[str, Any]) -> str:
    """The whole report."""
    parts = [f"# {document['title']}", _machine_lines(document)]
    parts += [case_table(entry) for entry in document["results"]]
    parts.append("## Ours against the fastest rival\n\n" + "\n".join(summary(document["results"])))
    return "\n\n".join(parts) + "\n"


def _machine_lines(document: dict[str, Any]) -> str:
    machine = document["machine"]
    rates = ", ".join(
        f"{name} {rate:,.0f}" for name, rate in sorted(document["matmul_gflops"].items())
    )
    where = (
        f"{machine['device']}; {machine['threads']} CPU threads; torch {machine['torch']}, "
        f"triton {machine['triton'] or 'absent'}, Python {machine['python']}; commit {machine['commit'] or 'unknown'}."
    )
    rate = (
        f"torch.mm in this run: {rates or 'not measured'} GFLOP/s. "
        f"Load average before the run: {machine['load_average_before']}."
    )
    return f"{where}\n{rate}\n{_LEGEND}"


def case_table(entry: dict[str, Any]) -> str:
    """Heading and table of one case."""
    sizes = ", ".join(f"{key} = {size}" for key, size in entry["shape"].items())
    heading = f"## {entry['op']}: {entry['case']}, {entry['dtype']}"
    if "not_run" in entry:
        return f"{heading}\n\nNot run: {entry['not_run']}."
    products = f"; {entry['products']} mandatory products" if entry["products"] else ""
    gradients = ", ".join(entry["gradients"])
    facts = f"{sizes}; gradients of {gradients}{products}; on {entry['device']}"
    eager = _median(entry, "eager")
    rows = [_table_row(row, eager) for row in entry["providers"] if row["seconds"]]
    notes = [
        f"- {row['name']}: {_note(row)}" for row in entry["providers"] if row["status"] != "ok"
    ]
    unmeasured = {row["peak_extra_note"] for row in entry["providers"] if "peak_extra_note" in row}
    parts = [heading, facts]
    if rows:
        parts.append(_aligned([_COLUMNS, *rows]))
    if unmeasured:
        parts.append(f"Peak memory is missing: {'; '.join(sorted(unmeasured))}.")
    if notes:
        parts.append("Not timed:\n" + "\n".join(notes))
    return "\n\n".join(parts)


def _note(row: dict[str, Any]) -> str:
    absent = row["status"] in ("unavailable", "skipped")
    return row["reason"] if absent else f"{row['status'].upper()}, {row['reason']}"


def _table_row(row: dict[str, Any], eager: float | None) -> tuple[str, ...]:
    seconds = row["seconds"]
    peak = row.get("peak_extra_bytes")
    return (
        f"**{row['name']}**" if row["ours"] else row["name"],
        duration(seconds["median"]),
        f"{duration(seconds['q1'])} to {duration(seconds['q3'])}, n = {seconds['samples']}",
        f"{eager / seconds['median']:.2f}x" if eager else "",
        _three_digits(row["gflops"]) if "gflops" in row else "",
        f"{row['share_of_matmul']:.0%}" if "share_of_matmul" in row else "",
        f"{peak / 1e6:,.1f} MB" if peak is not None else "",
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``12.3 ms``, with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{_three_digits(value)} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _median(entry: dict[str, Any], name: str) -> float | None:
    for row in entry["providers"]:
        if row["name"] == name and row["seconds"]:
            return row["seconds"]["median"]
    return None


def summary(results: list[dict[str, Any]]) -> list[str]:
    """One line per case, losses as plainly as wins, faulty results first."""
    faults, lines = [], []
    wins = losses = 0
    for entry in results:
        where = f"{entry['op']}, {entry['case']}, {entry['dtype']}"
        for row in entry["providers"]:
            if row["ours"] and row["status"] in ("wrong", "failed"):
                faults.append(f"- FAULT {where}: {row['name']} is {row['status']}: {row['reason']}")
        timed = [row for row in entry["providers"] if row["seconds"]]
        ours = [row for row in timed if row["ours"]]
        rivals = [row for row in timed if not row["ours"]]
        if not ours or not rivals:
            continue
        mine, rival = (min(rows, key=_row_median) for rows in (ours, rivals))
        ratio = _row_median(rival) / _row_median(mine)
        wins, losses = wins + (ratio >= 1), losses + (ratio < 1)
        word = f"{ratio:.2f}x faster than" if ratio >= 1 else f"LOSS, {1 / ratio:.2f}x slower than"
        lines.append(f"- {where}: {mine['name']} {word} {rival['name']}")
    if not lines and not faults:
        return ["No fused backend was timed; the tables say why."]
    return [*faults, *lines, f"- {wins} won, {losses} lost"]


def _row_median(row: dict[str, Any]) -> float:
    return row["seconds"]["median"]


def has_fault(results: list[dict[str, Any]]) -> bool:
    """Whether a backend of ours gave a wrong result or broke."""
    return any(
        row["ours"] and row["status"] in ("wrong", "failed")
        for entry in results
        for row in entry["providers"]
    )


def plot(path: Path, results: list[dict[str, Any]], title: str) -> str:
    """Speed relative to eager, one group of bars per case.

    Returns:
        ``"ok"``, or why there is no plot.
    """
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = []  # (label, speed, text, colour), from top to bottom; a case's heading has no speed
    for entry in results:
        eager = _median(entry, "eager")
        timed = [row for row in entry["providers"] if row["seconds"]]
        if eager is None or not timed:
            continue
        bars.append((f"{entry['op']}: {entry['case']} ({entry['dtype']})", None, "", ""))
        for row in timed:
            speed = eager / _row_median(row)
            text = f"{speed:.2f}x, {duration(_row_median(row))}"
            bars.append((row["name"], speed, text, "#c44e52" if row["ours"] else "#8c9bb0"))
    if not bars:
        return "no plot: nothing was timed beside eager"

    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.27 * len(bars)), layout="constrained")
    for y, (label, speed, text, colour) in enumerate(bars):
        if speed is None:
            where = axes.get_yaxis_transform()
            axes.text(0.01, y + 0.1, label, transform=where, va="center", size=8, weight="bold")
        else:
            axes.barh(y, speed, color=colour, height=0.8)
            axes.annotate(text, (speed, y), (4, 0), textcoords="offset points", va="center", size=8)
    labels = ["" if speed is None else label for label, speed, *_ in bars]
    axes.set_yticks(range(len(bars)), labels, size=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(bars) - 0.4, -0.8)
    axes.set_xscale("log")
    speeds = [speed for _, speed, *_ in bars if speed is not None]
    axes.set_xlim(min(0.3, min(speeds) / 2), 4 * max(speeds))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.axvline(1.0, color="black", linewidth=0.8, zorder=0)
    axes.set_xlabel(
        "speed relative to eager PyTorch (log scale), longer is faster; red: ours", size=9
    )
    figure.suptitle(title, size=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return "ok"
