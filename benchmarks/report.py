"""Results as JSON, as a Markdown table that also reads well as text, and as a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 2
_COLUMNS = (
    "provider",
    "median",
    "quartiles",
    "against eager",
    "GFLOP/s",
    "of peak",
    "of mm",
    "memory",
)

_LEGEND = (
    "Times are forward and backward together where gradients are named, medians of interleaved calls. GFLOP/s count only the products that loss and "
    "gradients cannot do without; *of peak* is that rate as a share of the multiply-adds that the processor makes in registers, "
    "measured before and after each case, *of mm* as a share of torch.mm's in the same dtype. *memory* is the peak beyond inputs "
    "and outputs. Ours in bold."
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
    # A reason may quote a path of this checkout.
    text = json.dumps(document, indent=1).replace(f"{ROOT}/", "")
    document = json.loads(text)
    _replace(files[0], text + "\n")
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
        f"Products of fp32 at torch's precision {machine['float32_matmul_precision']!r}. "
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
    gradients = f"gradients of {', '.join(entry['gradients'])}" if entry["gradients"] else "forward"
    facts = f"{sizes}; {gradients}{products}; on {entry['device']}"
    alone = entry.get("alone")
    if alone:
        spread = f"{duration(alone['q1'])} to {duration(alone['q3'])}"
        facts += f"; without the op {duration(alone['median'])} ({spread})"
    if entry.get("fma_peak_gflops") and entry["products"]:
        facts += f"; peak {entry['fma_peak_gflops']:,.0f} GFLOP/s"
    eager = _median(entry, "eager")
    timed = [row for row in entry["providers"] if row["seconds"]]
    rows = [_table_row(row, eager) for row in timed]
    columns = _COLUMNS
    if alone and rows:
        columns = (*_COLUMNS, "the op's share")
        of_eager = next((r["seconds_above_alone"] for r in timed if r["name"] == "eager"), None)
        rows = [(*cells, _share(row, of_eager)) for cells, row in zip(rows, timed, strict=True)]
    if any("rank_peak_bytes" in row for row in timed):
        columns = (*columns, "peak per rank")
        peaks = [f"{row['rank_peak_bytes'] / 1e6:,.0f} MB" for row in timed]
        rows = [(*cells, peak) for cells, peak in zip(rows, peaks, strict=True)]
    notes = [
        f"- {row['name']}: {_note(row)}" for row in entry["providers"] if row["status"] != "ok"
    ]
    unmeasured = {row["peak_extra_note"] for row in entry["providers"] if "peak_extra_note" in row}
    parts = [heading, facts]
    if rows:
        parts.append(_aligned([columns, *rows]))
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
    memory = row.get("working_bytes")
    return (
        f"**{row['name']}**" if row["ours"] else row["name"],
        duration(seconds["median"]),
        f"{duration(seconds['q1'])} to {duration(seconds['q3'])}, n = {seconds['samples']}",
        f"{eager / seconds['median']:.2f}x" if eager else "",
        _three_digits(row["gflops"]) if "gflops" in row else "",
        _percent(row["share_of_peak"]) if "share_of_peak" in row else "",
        _percent(row["share_of_matmul"]) if "share_of_matmul" in row else "",
        f"{memory / 1e6:,.1f} MB" if memory is not None else "",
    )


def _share(row: dict[str, Any], eager: float | None) -> str:
    """What a provider takes above what the case takes without the op, and how many times eager's that is quicker."""
    above = row["seconds_above_alone"]
    if above <= 0:
        return "none measurable"
    quicker = f", {eager / above:.1f}x" if eager and eager > 0 else ""
    return duration(above) + quicker


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


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
        # Of the rivals' precision: rounding more than they do is no win. Nor is being quicker than another loss.
        ours = [row for row in timed if row["ours"] and not row.get("rounds_products")]
        rivals = [row for row in timed if not row["ours"] and not row.get("other_function")]
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


def plots(out: Path, stem: str, results: list[dict[str, Any]], title: str) -> tuple[list[str], str]:
    """One figure per op: ``<stem>.png`` where there is one op, else ``<stem>-<op>.png``.

    Returns:
        The names of the files, and ``"ok"`` or why there is none.
    """
    ops = list(dict.fromkeys(entry["op"] for entry in results))
    names, note = [], "no plot: nothing was timed"
    for op in ops:
        name = f"{stem}.png" if len(ops) == 1 else f"{stem}-{op}.png"
        mine = [entry for entry in results if entry["op"] == op]
        done = plot(out / name, mine, title if len(ops) == 1 else f"{op}: {title}")
        if done == "ok":
            names.append(name)
        else:
            note = done
    return names, "ok" if names else note


def plot(path: Path, results: list[dict[str, Any]], title: str) -> str:
    """Speed relative to eager, one panel of bars per case, ours in colour.

    Returns:
        ``"ok"``, or why there is no plot.
    """
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for entry in results:
        eager = _median(entry, "eager")
        timed = [row for row in entry["providers"] if row["seconds"]]
        if eager is not None and timed:
            panels.append((entry, eager, timed))
    if not panels:
        return "no plot: nothing was timed beside eager"

    bars = sum(len(timed) for _, _, timed in panels)
    figure, all_axes = pyplot.subplots(
        len(panels),
        figsize=(9, 0.9 + 0.45 * len(panels) + 0.27 * bars),
        height_ratios=[len(timed) + 0.6 for _, _, timed in panels],
        squeeze=False,
        layout="constrained",
    )
    for axes, (entry, eager, timed) in zip(all_axes[:, 0], panels, strict=True):
        _draw_panel(axes, entry, eager, timed)
    all_axes[-1, 0].set_xlabel(
        "speed relative to eager PyTorch (the line at 1x); longer is faster; red: ours", size=9
    )
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return "ok"


def _draw_panel(axes, entry: dict[str, Any], eager: float, timed: list[dict[str, Any]]) -> None:
    speeds = [eager / _row_median(row) for row in timed]
    limit = 1.3 * max(*speeds, 1.0)  # a single wild quartile must not make all bars short
    for y, (row, speed) in enumerate(zip(timed, speeds, strict=True)):
        # The quartiles of the time, as speeds.
        ends = [min(limit, eager / row["seconds"][name]) for name in ("q3", "q1")]
        axes.barh(y, speed, color="#c44e52" if row["ours"] else "#b4bfce", height=0.78)
        axes.plot(ends, [y, y], color="#333333", linewidth=1.2, solid_capstyle="butt")
        share = f", {_percent(row['share_of_peak'])} of peak" if "share_of_peak" in row else ""
        axes.annotate(
            f"{speed:.2f}x   {duration(_row_median(row))}{share}",
            (max(speed, *ends), y),
            (5, 0),
            textcoords="offset points",
            va="center",
            size=8,
            weight="bold" if row["ours"] else "normal",
        )
    axes.set_title(f"{entry['case']} ({entry['dtype']})", size=9, loc="left", weight="bold", pad=3)
    axes.set_yticks(range(len(timed)), [row["name"] for row in timed], size=8)
    for label, row in zip(axes.get_yticklabels(), timed, strict=True):
        label.set_weight("bold" if row["ours"] else "normal")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(len(timed) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * limit)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.axvline(1.0, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
