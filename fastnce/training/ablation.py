"""Ablations: the same training with one choice changed at a time, over several seeds, as a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastnce.errors import UserError, known
from fastnce.metrics.tables import format_number, markdown_table, write_result
from fastnce.systems import SYSTEMS
from fastnce.systems.system import Ablation
from fastnce.training.config import build_config
from fastnce.training.evaluation import evaluate_run
from fastnce.training.gallery import same_images
from fastnce.training.loop import train
from fastnce.training.runs import Run
from fastnce.viz.plots import save_ablation_plot, save_sample_grid


def ablations() -> dict[str, Ablation]:
    """The comparisons, by the name of the variant."""
    return {name: a for system in SYSTEMS.values() for name, a in system.ablations.items()}


def ablate(
    variant: str,
    *,
    data: Path,
    out: Path,
    preset: str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    only: Sequence[str] = (),
    config_file: Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> tuple[dict[str, Any], str]:
    """Trains and evaluates every choice with every seed; runs that are there already are continued, finished ones kept.

    A run is in `out/CHOICE/seed-N`. Writes `ablation.json`, `ablation.md` and `ablation.png` into `out`, and of trainings on pairs
    `samples.png`: what the first seed's run of each choice makes of the same test images.

    Args:
        variant: a key of `ablations()`.
        preset, config_file: of all runs, see `build_config`.
        seeds: at least one; from two on there is a spread.
        only: names of the choices to compare; by default all for which there is what they need.
        overrides: option values of all runs; a choice's own win. `steps` are multiplied for choices that take longer.

    Returns:
        {"choices": [{"name", "seeds", "against", measure: {"mean", "spread", "values", "beyond_spread"}}], "beside": [{"name",
        measure: value}]} and the table, without measures that no run has. The spread is the standard deviation over the seeds;
        `beyond_spread` says whether the mean differs by more than the spreads of both together, sqrt(a^2 + b^2), from that
        of `against`, by default the first choice; None without a spread, and for the first choice. "beside" are the data's own
        numbers.
    """
    ablation = ablations()[known(variant, ablations(), "ablation")]
    how: dict[str, Any] = {"preset": preset, "config_file": config_file}
    every = {"data": data, "out": out} | dict(overrides or {})
    names = chosen(variant, only, every, **how)
    if not seeds:
        raise UserError("seeds is empty. Give at least one, such as --seeds 0 1 2.")
    values: dict[str, dict[str, list[float]]] = {}
    for name in names:
        collected: dict[str, list[float]] = {measure: [] for measure in ablation.measures}
        for seed in seeds:
            run = Path(out) / _folder(name) / f"seed-{seed}"
            merged = every | dict(ablation.choices[name]) | {"out": run, "seed": seed}
            config = build_config(variant, **how, overrides=merged)
            if name in ablation.longer:
                config = replace(config, steps=round(ablation.longer[name] * config.steps))
            train(config)
            evaluation = evaluate_run(run)[0]
            row = _row(evaluation, ablation.row)
            for measure in ablation.measures:
                value = row.get(measure)
                collected[measure].append(math.nan if value is None else value)
        values[name] = collected
    kept = {m: title for m, title in ablation.measures.items() if _has_numbers(m, values)}
    ablation = ablation._replace(measures=kept)
    values = {name: {m: numbers[m] for m in kept} for name, numbers in values.items()}
    result = compare(values, ablation, seeds)
    result["beside"] = [
        {"name": row["name"]} | {m: row[m] for m in kept}
        for row in evaluation["rows"]
        if row["name"] in ablation.beside
    ]
    table = format_ablation(result, ablation)
    write_result(result, table, out, stem="ablation")
    save_ablation_plot(
        {
            name: {ablation.measures[m][0]: v for m, v in kept.items()}
            for name, kept in values.items()
        },
        Path(out) / "ablation.png",
    )
    runs = {name: Run(Path(out) / _folder(name) / f"seed-{seeds[0]}") for name in names}
    if rows := same_images(runs):
        save_sample_grid(rows, Path(out) / "samples.png")
    return result, table


def chosen(
    variant: str, only: Sequence[str], options: Mapping[str, object], **how: Any
) -> list[str]:
    """The choices `only`; if that is empty all whose `needs` the options have. `how` as `build_config`."""
    ablation = ablations()[variant]
    if only:
        return [known(name, ablation.choices, "choice") for name in only]
    first = next(iter(ablation.choices.values()))
    shared = build_config(variant, **how, overrides={**options, **first})
    needs = ablation.needs
    return [n for n in ablation.choices if n not in needs or getattr(shared, needs[n]) is not None]


def compare(
    values: Mapping[str, Mapping[str, Sequence[float]]], ablation: Ablation, seeds: Sequence[int]
) -> dict[str, Any]:
    """Means, spreads and what differs, from choice -> measure -> a value for each seed; see `ablate`."""
    choices: list[dict[str, Any]] = []
    for name, measured in values.items():
        other = next((c for c in choices if c["name"] == ablation.against.get(name)), None)
        first = other or (choices[0] if choices else None)
        entry: dict[str, Any] = {
            "name": name,
            "seeds": list(seeds),
            "against": first and first["name"],
        }
        for measure, numbers in measured.items():
            spread = statistics.stdev(numbers) if len(numbers) > 1 else None
            mean = statistics.fmean(numbers)
            beyond = None
            if first and spread is not None:
                one = first[measure]
                beyond = abs(mean - one["mean"]) > math.hypot(spread, one["spread"])
            entry[measure] = {
                "mean": mean,
                "spread": spread,
                "values": list(numbers),
                "beyond_spread": beyond,
            }
        choices.append(entry)
    return {"measures": list(ablation.measures), "choices": choices}


def format_ablation(result: Mapping[str, Any], ablation: Ablation) -> str:
    """The result of `compare` as a Markdown table that also reads well as text."""
    lines = [("choice", *(title for title, _ in ablation.measures.values()))]
    for choice in result["choices"]:
        cells = []
        for measure, (_, form) in ablation.measures.items():
            entry = choice[measure]
            cell = format(entry["mean"], form)
            if entry["spread"] is not None:
                cell += f" +- {entry['spread']:{form}}"
            cells.append(cell + (" *" if entry["beyond_spread"] else ""))
        lines.append((choice["name"], *cells))
    for row in result.get("beside", ()):
        cells = [format_number(row[m], form) for m, (_, form) in ablation.measures.items()]
        lines.append((row["name"], *cells))
    count = len(result["choices"][0]["seeds"])
    notes = [f"Mean and standard deviation over {count} seeds." if count > 1 else "One seed."]
    if count > 1:
        first = result["choices"][0]["name"]
        note = f"* differs from {first!r} by more than both standard deviations together"
        for other in dict.fromkeys(ablation.against.values()):
            held = [c["name"] for c in result["choices"] if c["against"] == other != first]
            note += f"; from {other!r}: {', '.join(held)}" if held else ""
        notes.append(note + ".")
    return markdown_table(lines, notes)


def _row(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(row for row in result["rows"] if row["name"] == name)


def _has_numbers(measure: str, values: Mapping[str, Mapping[str, Sequence[float]]]) -> bool:
    return any(
        math.isfinite(number) for of_choice in values.values() for number in of_choice[measure]
    )


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in name.replace("'", ""))
