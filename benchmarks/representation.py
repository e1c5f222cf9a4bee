"""Representation learning on the built-in sets, measured: ``python -m benchmarks.representation --help``.

Every row is a run of ``fastnce train`` in a folder of its own: interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from fastnce.data import write_digits, write_photo_crops
from fastnce.data.files import write_json
from fastnce.metrics.representation import RANDOM_ENCODER, RAW_PIXELS, TRAINED_ENCODER
from fastnce.metrics.tables import markdown_table
from fastnce.training import build_config, evaluate_run, train
from fastnce.training.checkpoint import load_checkpoint

DATASETS = {"digits": write_digits, "photo-crops": write_photo_crops}
MEASURES = {"knn_200": "k-NN, k=200", "knn_20": "k-NN, k=20", "linear": "linear"}


@dataclass(frozen=True)
class Row:
    """A training of `fastnce train variant --preset dataset`, with other values of some options."""

    dataset: str
    name: str
    variant: str
    options: dict[str, object] = field(default_factory=dict)


EXPERIMENTS = {
    "methods": [
        Row(dataset, label, variant)
        for dataset in DATASETS
        for label, variant in (("SimCLR", "simclr"), ("MoCo v2", "moco"), ("SupCon", "supcon"))
    ],
    "losses": [
        Row("digits", loss, "simclr", {"loss": loss})
        for loss in ("nt_xent", "info_nce", "n_pair", "triplet", "pair")
    ],
    "negatives": [
        Row("digits", str(2**power), "moco", {"queue_size": 2**power}) for power in range(6, 17, 2)
    ],
}
TITLES = {
    "methods": "SimCLR, MoCo v2 and SupCon on the built-in sets",
    "losses": "Losses of pairs, in SimCLR's place",
    "negatives": "MoCo v2: the number of negatives",
}


def run_row(row: Row, seed: int, folder: Path, common: dict[str, object]) -> list[dict[str, Any]]:
    """Trains and evaluates: an entry for the trained encoder, one for the same before training, one for raw pixels."""
    data = DATASETS[row.dataset](folder / row.dataset)
    out = folder / f"{row.dataset}-{row.variant}-{row.name}-{seed}".replace(" ", "-")
    options = {"data": data, "out": out, "seed": seed, "measure_every": 0, "device": "cpu"}
    config = build_config(row.variant, preset=row.dataset, overrides=options | row.options | common)
    train(config)
    state = load_checkpoint(out / "checkpoints" / "last.pt")
    result, _ = evaluate_run(out, device="cpu")
    spent = {"steps": state["step"], "seconds": round(state["seconds"])}
    entries = [{"dataset": row.dataset, "seed": seed} | entry for entry in result["rows"]]
    for entry in entries:
        if entry["name"] == TRAINED_ENCODER:
            entry |= spent | {"name": row.name}
    return entries


def table(entries: Iterable[dict[str, Any]]) -> str:
    """Means over the seeds, with the range where there are several."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["dataset"], entry["name"]), []).append(entry)
    last = {RANDOM_ENCODER: 1, RAW_PIXELS: 2}
    ordered = sorted(groups, key=lambda key: (list(DATASETS).index(key[0]), last.get(key[1], 0)))
    lines = [("data", "", *MEASURES.values(), "training")]
    for key in ordered:
        group = groups[key]
        seconds = statistics.mean(entry.get("seconds", 0) for entry in group)
        cells = (_cell([entry[name] for entry in group]) for name in MEASURES)
        lines.append((*key, *cells, f"{seconds:.0f} s" if seconds else "-"))
    return markdown_table(lines)


def _cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ({min(values):.3f} to {max(values):.3f})"


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the number of negatives; a point for each seed, a line through the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    trained = [entry for entry in entries if entry["name"].isdigit()]
    sizes = sorted({int(entry["name"]) for entry in trained})
    for colour, (name, label) in zip(("C0", "C1", "C2"), MEASURES.items(), strict=True):
        by_size = [[e[name] for e in trained if int(e["name"]) == size] for size in sizes]
        axes.plot(sizes, [statistics.mean(v) for v in by_size], color=colour, label=label)
        for size, values in zip(sizes, by_size, strict=True):
            axes.plot([size] * len(values), values, "o", color=colour, markersize=4)
        raw = next(e[name] for e in entries if e["name"] == RAW_PIXELS)
        axes.axhline(raw, color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("negatives (keys in the queue)")
    axes.set_ylabel("accuracy on test images (dotted: raw pixels)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Runs one experiment and writes `representation-NAME.json`, `.md`, and for negatives `.png`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.representation", description=__doc__
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--runs", type=Path, default=Path("out/representation"), help="their folder"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row")
    parser.add_argument("--steps", type=int, help="steps of each run; by default the preset's")
    args = parser.parse_args(argv)
    common = {} if args.steps is None else {"steps": args.steps}
    facts = machine.describe(torch.device("cpu"))
    entries: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for row in EXPERIMENTS[args.experiment]:
            entries += run_row(row, seed, args.runs / args.experiment, common)
            _write(args.experiment, entries, facts, args.out)
    print(table(entries))
    return 0


def _write(experiment: str, entries: list[dict[str, Any]], facts: dict, out: Path) -> None:
    title = TITLES[experiment]
    stem = out / f"representation-{experiment}"
    write_json({"title": title, "machine": facts, "rows": entries}, stem.with_suffix(".json"))
    where = f"{facts['device']}, {facts['threads']} thread(s), torch {facts['torch']}."
    stem.with_suffix(".md").write_text(f"# {title}\n\n{table(entries)}\n{where}\n")
    if experiment == "negatives":
        plot(entries, stem.with_suffix(".png"))


if __name__ == "__main__":
    raise SystemExit(main())
