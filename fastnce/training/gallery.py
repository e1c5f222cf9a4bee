"""Runs as one HTML page: reading what their folders hold."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnce.errors import UserError
from fastnce.systems import TrainConfig, system_named
from fastnce.systems.system import Rows
from fastnce.training.config import as_option, layered_values, to_dict
from fastnce.training.log import read_metrics
from fastnce.training.runs import Run
from fastnce.viz.gallery import GalleryRun, save_gallery
from fastnce.viz.plots import save_sample_grid


def write_gallery(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes runs of any systems, side by side, as one HTML page, by default `gallery.html` in the first run's folder.

    Of several runs on the same pairs the page begins with what each makes of the same test images, if the data are there.
    """
    if not runs:
        raise UserError("run is missing. Name the folder of a training run, or several.")
    path = Path(runs[0]) / "gallery.html" if out is None else Path(out)
    names = distinct_names(runs)
    shown = [read_run(run, name) for run, name in zip(runs, names, strict=True)]
    rows = same_images({name: Run(run) for name, run in zip(names, runs, strict=True)})
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder, "together.png") if rows else None
        if together is not None:
            save_sample_grid(rows, together)
        save_gallery(shown, path, together)
    return path


def same_images(runs: Mapping[str, Run]) -> Rows:
    """Rows of a grid: the first test images of pairs, such as label maps, what they should become, and what each run makes of them.

    Empty unless there are at least two runs that learnt from pairs and show the same images.
    """
    rows: Rows = {}
    outputs: Rows = {}
    for name, run in runs.items():
        if not run.system.paired:
            continue
        try:
            own = run.system.preview(run.config, None)(run.network)
        except UserError:  # no data, or no checkpoint yet
            continue
        output = own.pop("output")
        rows = rows or own
        if rows.keys() == own.keys() and all(_equal(rows[label], own[label]) for label in own):
            outputs[name] = output
    return rows | outputs if len(outputs) > 1 else {}


def _equal(images: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(images) == len(others) and all(map(torch.equal, images, others))


def read_run(run: Path, name: str) -> GalleryRun:
    """The content of the gallery for the run in the folder `run`."""
    config = Run(run).config
    run = Path(run)
    return GalleryRun(
        name=name,
        command=training_command(config),
        options=to_dict(config),
        defaults=_defaults(config),
        panels=system_named(config.system).panels,
        losses=read_metrics(run / "metrics.jsonl"),
        measurements=read_metrics(run / "measurements.jsonl"),
        samples=_samples(run / "samples"),
        evaluation=_evaluation(run / "metrics.json"),
    )


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of the folders above as it takes to tell them apart.

    Examples:
        >>> distinct_names([Path("out/cut/seed-0"), Path("out/fastcut/seed-0")])
        ['cut/seed-0', 'fastcut/seed-0']
    """
    parts = [Path(run).resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("run: a folder is named twice. Name each run once.")
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def training_command(config: TrainConfig) -> str:
    """The shortest `fastnce train` command with this configuration: a variant, a preset if it helps, and what they lack."""
    values = to_dict(config)
    commands = []
    system = system_named(config.system)
    for variant in system.variants:
        for preset in (None, *system.presets):
            config_class, given = layered_values(variant, preset, None)
            base = to_dict(config_class(**{"data": config.data, "out": config.out} | given))
            names = [
                name
                for name in values
                if (name in ("data", "out") and values[name] is not None)
                or (name != "system" and values[name] != base[name])
            ]
            words = ["fastnce", "train", variant]
            words += ["--preset", preset] if preset else []
            commands.append(
                words + [word for name in names for word in as_option(name, values[name])]
            )
    return shlex.join(min(commands, key=len))


def _defaults(config: TrainConfig) -> dict[str, Any]:
    """The default of each option that has one, as a JSON value."""
    values = to_dict(type(config)())
    return {name: v for name, v in values.items() if name not in ("system", "data", "out")}


def _samples(folder: Path) -> list[tuple[int, Path]]:
    found = [(path.stem.removeprefix("step_"), path) for path in folder.glob("step_*.png")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}). Evaluate the run again.") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: is no evaluation of fastnce. Evaluate the run again.")
    return result
