"""Tables of results: Markdown that also reads well as text, and JSON."""

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from fastnce.files import atomic_path, write_json

# Of fidelity and diversity, see `rows_table`.
NEIGHBOURHOOD_COLUMNS = {
    name: (name, ".3f") for name in ("precision", "recall", "density", "coverage")
}


def markdown_table(lines: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Cells as a Markdown table, the first line its head, with notes below."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    table.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*table, "", *notes]) + "\n"


def rows_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str]],
    notes: Sequence[str] = (),
    first: str = "images",
) -> str:
    """A line for each row: its name and its numbers, a dash where there is none.

    `columns` are titles and formats, such as ".2f", by key; values that are text already are taken as they are. `first` is the
    title of the names, `notes` are lines below the table.
    """
    lines = [(first, *(title for title, _ in columns.values()))]
    for row in rows:
        cells = (format_number(row.get(key), form) for key, (_, form) in columns.items())
        lines.append((row["name"], *cells))
    return markdown_table(lines, notes)


def measured(
    columns: Mapping[str, tuple[str, str]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:
    """Those of the columns of `rows_table` that some row has a number for."""
    return {k: v for k, v in columns.items() if any(row.get(k) is not None for row in rows)}


def write_result(
    result: Mapping[str, Any], table: str, folder: Path | str, stem: str = "metrics"
) -> list[Path]:
    """Writes `STEM.json` and `STEM.md` into a folder, atomically; returns their paths."""
    paths = [Path(folder) / f"{stem}.json", Path(folder) / f"{stem}.md"]
    write_json(result, paths[0])
    with atomic_path(paths[1]) as temporary:
        temporary.write_text(table, encoding="utf-8")
    return paths


def one_or_several(sizes: Set[str]) -> str:
    """The size of images, "256x256", or "several sizes"."""
    return next(iter(sizes)) if len(sizes) == 1 else "several sizes"


def finite_or_none(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def format_number(value: float | str | None, form: str) -> str:
    """The value in a format such as ".2f"; a dash if there is none."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)
