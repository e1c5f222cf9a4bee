"""`fastnce evaluate`: measures a run, and writes the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastnce.errors import UserError
from fastnce.metrics.tables import write_result
from fastnce.training.cost import cost_lines, read_cost
from fastnce.training.runs import Run, opened


class Report(NamedTuple):
    """Where an evaluation is written: `FOLDER/STEM.json` and `.md`."""

    folder: Path
    stem: str = "metrics"

    @classmethod
    def of(cls, run: Run, data: Path | None, out: Path | None) -> Report:
        """In `out`, else in the run's folder; there under the data's name, if these are not the run's own."""
        if out is not None:
            return cls(out)
        if run.path.is_file():
            raise UserError(
                f"run={run.path} is a file, and the report needs a folder. Give --out DIR."
            )
        own = run.config.data
        if data is None or own is None or data.resolve() == own.resolve():
            return cls(run.path)
        return cls(run.path, f"metrics-{data.resolve().name}")


def evaluate_run(
    run: Run | Path,
    data: Path | None = None,
    *,
    without_nce: Path | None = None,
    first: Path | None = None,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] = "ema",
    device: str = "auto",
    broken_files: Literal["error", "skip"] | None = None,
    report: Report | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], str]:
    """Evaluates a run of any system; see `evaluate` of its system for the settings and for what is measured.

    If a run that translates has a best checkpoint, it is judged beside the last one. Writes `metrics.json` and `metrics.md` into
    the run's folder, of other data than its own `metrics-NAME.json` and `.md`.

    Args:
        run: the run, or its folder.
        data: folder of the data; by default that of the run.
        without_nce: folder of the same training without the contrastive loss, for a row of its own.
        first: folder of a run of ReStyle whose encoder makes the first steps.
        checkpoint: "last", "best", or a file; of a run that is opened already, its own.
        weights: the running average, or the weights themselves; likewise.
        device: where the networks run; likewise.
        broken_files: "skip" leaves out files that cannot be read and names them in the log, "error" stops at the first one; by
            default as in the training.
        report: where it is written instead.

    Returns:
        The result and its table.

    Raises:
        UserError: no such run, checkpoint or data, a setting that is not for this system, or nothing to judge with.
    """
    run = opened(run, weights=weights, checkpoint=checkpoint, device=device)
    system, config = run.system, run.config
    report = report or Report.of(run, data, None)
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in (given | {"without_nce": without_nce, "first": first}).items():
        if value is not None and name not in system.judged_by:
            if name == "segmenter" and "segmentation" in system.judged_by:
                raise UserError(
                    f"segmenter={value} needs the label maps that a run of {system.name} does not know. Give --labels DIR."
                )
            if name == "segmentation":
                name, value = "labels", value.labels
            raise UserError(f"{name}={value} is not for a run of {system.name}. Leave it out.")
    if data is None:
        _expect_data(run)
    if broken_files is not None:
        config = replace(config, broken_files=broken_files)
    networks = {"run": run.network}
    if system.compares_best and run.checkpoint == "last" and run.checkpoint_path("best").is_file():
        networks["best"] = run.network_of("best")
    if without_nce is not None:
        other = Run(without_nce, weights=run.weights, checkpoint=run.checkpoint, device=run.device)
        networks["without_nce"] = other.network
    if first is not None:
        given["first"] = Run(first, weights=run.weights, device=run.device)
    facts = {name: getattr(config, name) for name in system.reported}
    facts |= {"checkpoint": run.checkpoint}
    if system.reports_cost:
        facts |= read_cost(run.path)
    result, table = system.evaluate(
        config, networks, config.folders if data is None else data, run.device, **given
    )
    result = {"run": facts} | result
    table = "\n".join([table, *cost_lines(facts)])
    write_result(result, table, *report)
    return result, table


def _expect_data(run: Run) -> None:
    """Raises `UserError`, saying where the path is from, if a run's own data are not there."""
    folders = run.config.folders
    for folder in folders.values() if isinstance(folders, dict) else [folders]:
        if not folder.exists():
            relative = "" if folder.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"data={folder}, which {run.path / 'config.json'} names, is not there{relative}. Run this where the training was "
                "started, or give the folder's place now: --data DIR."
            )
