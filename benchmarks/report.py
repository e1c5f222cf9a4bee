"""Results as JSON, as a Markdown table that also reads well as text, and as a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, slug

FORMAT = 2
_LEGEND = (
    "Times are forward and backward together where gradients are named, medians of interleaved calls. GFLOP/s count only the "
    "products that loss and gradients cannot do without. *of peak* is that rate as a share of the multiply-adds that the "
    "processor makes in registers, measured before and after each case. *of mm* is its share of torch.mm's in the same dtype. "
    "*memory* is the peak beyond inputs and outputs. Ours in bold."
)


def save(out: Path | None, stem: str, document: dict[str, Any], text: str) -> None:
    """Writes ``<stem>.json`` and ``<stem>.md``, each replacing its former self at once; nothing without ``out``."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, content in ((".json", json.dumps(document, indent=1) + "\n"), (".md", text)):
        beside = out / f"{stem}{name}.new"
        # A reason may quote a path of this checkout.
        beside.write_text(content.replace(f"{ROOT}/", ""))
        os.replace(beside, out / f"{stem}{name}")


def publish(
    out: Path | None, name: str, machine: dict[str, Any], document: dict[str, Any], text: str
) -> None:
    """Prints a text, and saves it and the document, with the machine's facts, as ``<device>-<name>``."""
    print(text)
    save(out, f"{slug(machine['device'])}-{name}", {"machine": machine, **document}, text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, the columns aligned."""
    lines = [columns, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = [f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def table_of(rows: Sequence[dict[str, str]]) -> str:
    """Markdown of rows that have the same keys, the titles."""
    return table([*rows[0]], [[*row.values()] for row in rows])


def write(
    out: Path | None,
    stem: str,
    results: list[dict[str, Any]],
    *,
    title: str,
    machine: dict[str, Any],
    rates: dict[str, float],
    settings: dict[str, Any],
    more: dict[str, Any] | None = None,
    text: str = "",
) -> str:
    """Saves the report of a run, with ``more`` in its JSON and ``text`` at the end of its Markdown, which it returns."""
    facts = {"format": FORMAT, "title": title, "machine": machine, "matmul_gflops": rates}
    document = {**facts, "settings": settings, **(more or {}), "results": results}
    parts = [f"# {title}", _machine_lines(machine, rates), *map(case_table, results)]
    parts.append("## Ours against the fastest rival\n\n" + "\n".join(summary(results)))
    text = "\n\n".join(parts) + "\n" + text
    save(out, stem, document, text)
    return text


def _machine_lines(machine: dict[str, Any], rates: dict[str, float]) -> str:
    shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in sorted(rates.items()))
    return (
        f"{machine['device']}; {machine['threads']} CPU threads; torch {machine['torch']}, "
        f"triton {machine['triton'] or 'absent'}, Python {machine['python']}; commit {machine['commit'] or 'unknown'}.\n"
        f"torch.mm in this run: {shown or 'not measured'} GFLOP/s. "
        f"Products of fp32 at torch's precision {machine['float32_matmul_precision']!r}. "
        f"Load average before the run: {machine['load_average_before']}.\n{_LEGEND}"
    )


def case_table(entry: dict[str, Any]) -> str:
    """Heading and table of one case."""
    sizes = ", ".join(f"{key} = {size}" for key, size in entry["shape"].items())
    heading = f"## {entry['op']}: {entry['case']}, {entry['dtype']}"
    if "not_run" in entry:
        return f"{heading}\n\nNot run: {entry['not_run']}."
    gradients = f"gradients of {', '.join(entry['gradients'])}" if entry["gradients"] else "forward"
    products = f"; {entry['products']} mandatory products" if entry["products"] else ""
    facts = f"{sizes}; {gradients}{products}; on {entry['device']}"
    alone = entry.get("alone")
    if alone:
        facts += f"; without the op {duration(alone['median'])} ({_spread(alone)})"
    if entry.get("fma_peak_gflops") and entry["products"]:
        facts += f"; peak {entry['fma_peak_gflops']:,.0f} GFLOP/s"
    timed = [row for row in entry["providers"] if row["seconds"]]
    eager = next((row for row in timed if row["name"] == "eager"), None)
    rows = [_cells(row, eager) for row in timed]
    unmeasured = {row["peak_extra_note"] for row in entry["providers"] if "peak_extra_note" in row}
    notes = []
    for row in entry["providers"]:
        status = "" if row["status"] in ("unavailable", "skipped") else f"{row['status'].upper()}, "
        if row["status"] != "ok":
            notes.append(f"- {row['name']}: {status}{row['reason']}")
    parts = [heading, facts, *([table_of(rows)] if rows else [])]
    if unmeasured:
        parts.append(f"Peak memory is missing: {'; '.join(sorted(unmeasured))}.")
    if notes:
        parts.append("Not timed:\n" + "\n".join(notes))
    return "\n\n".join(parts)


def _spread(seconds: dict[str, float]) -> str:
    return f"{duration(seconds['q1'])} to {duration(seconds['q3'])}"


def _cells(row: dict[str, Any], eager: dict[str, Any] | None) -> dict[str, str]:
    """By the columns' titles."""
    seconds, memory = row["seconds"], row.get("working_bytes")
    cells = {
        "provider": f"**{row['name']}**" if row["ours"] else row["name"],
        "median": duration(seconds["median"]),
        "quartiles": f"{_spread(seconds)}, n = {seconds['samples']}",
        "against eager": f"{_median(eager) / seconds['median']:.2f}x" if eager else "",
        "GFLOP/s": _three_digits(row["gflops"]) if "gflops" in row else "",
        "of peak": _percent(row["share_of_peak"]) if "share_of_peak" in row else "",
        "of mm": _percent(row["share_of_matmul"]) if "share_of_matmul" in row else "",
        "memory": f"{memory / 1e6:,.1f} MB" if memory is not None else "",
    }
    if "seconds_above_alone" in row:
        cells["the op's share"] = _share(row, eager)
    if "rank_peak_bytes" in row:
        cells["peak per rank"] = f"{row['rank_peak_bytes'] / 1e6:,.0f} MB"
    return cells


def _share(row: dict[str, Any], eager: dict[str, Any] | None) -> str:
    """A provider's time above that of the case without the op, and how many times eager's that is quicker."""
    above = row["seconds_above_alone"]
    if above <= 0:
        return "none measurable"
    of_eager = eager["seconds_above_alone"] if eager else 0.0
    return duration(above) + (f", {of_eager / above:.1f}x" if of_eager > 0 else "")


def _median(row: dict[str, Any]) -> float:
    return row["seconds"]["median"]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``12.3 ms``, with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _is_fault(row: dict[str, Any]) -> bool:
    return row["ours"] and row["status"] in ("wrong", "failed")


def has_fault(results: list[dict[str, Any]]) -> bool:
    """Whether a backend of ours gave a wrong result or broke."""
    return any(_is_fault(row) for entry in results for row in entry["providers"])


def summary(results: list[dict[str, Any]]) -> list[str]:
    """One line per case, losses as plainly as wins, faulty results first."""
    faults, ratios, lines = [], [], []
    for entry in results:
        where = f"{entry['op']}, {entry['case']}, {entry['dtype']}"
        for row in filter(_is_fault, entry["providers"]):
            faults.append(f"- FAULT {where}: {row['name']} is {row['status']}: {row['reason']}")
        timed = [row for row in entry["providers"] if row["seconds"]]
        # Of the rivals' precision: rounding more than they do is no win. Nor is being quicker than another loss.
        ours = [row for row in timed if row["ours"] and not row.get("rounds_products")]
        rivals = [row for row in timed if not row["ours"] and not row.get("other_function")]
        if not ours or not rivals:
            continue
        mine, rival = (min(rows, key=_median) for rows in (ours, rivals))
        ratio = _median(rival) / _median(mine)
        ratios.append(ratio)
        word = f"{ratio:.2f}x faster than" if ratio >= 1 else f"LOSS, {1 / ratio:.2f}x slower than"
        lines.append(f"- {where}: {mine['name']} {word} {rival['name']}")
    if not lines and not faults:
        return ["No fused backend was timed; the tables say why."]
    wins = sum(ratio >= 1 for ratio in ratios)
    return [*faults, *lines, f"- {wins} won, {len(ratios) - wins} lost"]


def plots(
    out: Path, stem: str, results: list[dict[str, Any]], title: str, together: bool
) -> tuple[list[str], str]:
    """One figure, ``<stem>.png``, or one per op, ``<stem>-<op>.png``.

    Returns:
        The names of the files, and why there is none, as the end of a sentence.
    """
    try:
        import matplotlib
    except ImportError:
        return [], "; no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    figures = {f"{stem}.png": (title, results)}
    if not together:
        figures = {
            f"{stem}-{op}.png": (f"{op}: {title}", [x for x in results if x["op"] == op])
            for op in dict.fromkeys(entry["op"] for entry in results)
        }
    names = [name for name, figure in figures.items() if _plot(out / name, *figure)]
    return names, "" if names else "; no plot: nothing was timed beside eager"


def _plot(path: Path, title: str, results: list[dict[str, Any]]) -> bool:
    """Speed relative to eager, one panel of bars per case, ours in colour; False if there is nothing to show."""
    from matplotlib import pyplot

    panels = []
    for entry in results:
        timed = {row["name"]: row for row in entry["providers"] if row["seconds"]}
        if "eager" in timed:
            panels.append((entry, _median(timed["eager"]), [*timed.values()]))
    if not panels:
        return False

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
    return True


def _draw_panel(axes, entry: dict[str, Any], eager: float, timed: list[dict[str, Any]]) -> None:
    speeds = [eager / _median(row) for row in timed]
    names = [row["name"] for row in timed]
    limit = 1.3 * max(*speeds, 1.0)  # a single wild quartile must not make all bars short
    # The quartiles of the time, as speeds.
    slow, quick = (
        [min(limit, eager / row["seconds"][quartile]) for row in timed] for quartile in ("q3", "q1")
    )
    beside = [
        [max(0.0, speed - low) for speed, low in zip(speeds, slow, strict=True)],
        [max(0.0, high - speed) for speed, high in zip(speeds, quick, strict=True)],
    ]
    bars = axes.barh(
        names,
        speeds,
        xerr=beside,
        color=["#c44e52" if row["ours"] else "#b4bfce" for row in timed],
        height=0.78,
        error_kw={"ecolor": "#333333", "elinewidth": 1.2},
    )
    labels = [
        f"{speed:.2f}x   {duration(_median(row))}"
        + (f", {_percent(row['share_of_peak'])} of peak" if "share_of_peak" in row else "")
        for row, speed in zip(timed, speeds, strict=True)
    ]
    shown = axes.bar_label(bars, labels, padding=5, size=8)
    for row, *texts in zip(timed, shown, axes.get_yticklabels(), strict=True):
        for text in texts:
            text.set_weight("bold" if row["ours"] else "normal")
    axes.set_title(f"{entry['case']} ({entry['dtype']})", size=9, loc="left", weight="bold", pad=3)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(len(timed) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * limit)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.axvline(1.0, color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.spines[["top", "right"]].set_visible(False)
