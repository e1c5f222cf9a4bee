"""Pictures of a run: sample grids and the loss plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastnce.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Images smaller than this are enlarged by a whole factor, pixel by pixel, so that a grid of 32x32 images can be seen.
_READABLE_SIDE = 96
_GAP = 4
_LABEL_SIZE = 15
_BACKGROUND = (255, 255, 255)

# From this ratio of values on an axis is logarithmic.
_MANY_TIMES = 10

_NOT_A_LOSS = ("step", "epoch", "lr_factor", "seconds")


def sample_grid(rows: Mapping[str, Sequence[Tensor]]) -> Image.Image:
    """A picture with a labelled row per entry of `rows`, and the images of an entry side by side.

    Args:
        rows: label -> images (C, H, W) in [-1, 1], on the CPU; see `as_rgb`. Images of different sizes are centred in cells
            of the largest one's size.
    """
    tiles = {label: [_enlarged(image) for image in images] for label, images in rows.items()}
    sizes = [tile.size for images in tiles.values() for tile in images]
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    columns = max(len(images) for images in tiles.values())
    font = ImageFont.load_default(size=_LABEL_SIZE)
    margin = max(int(font.getlength(label)) for label in tiles) + 4 * _GAP

    size = (margin + columns * (width + _GAP), _GAP + len(tiles) * (height + _GAP))
    grid = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(tiles.items()):
        top = _GAP + row * (height + _GAP)
        middle = (margin - 2 * _GAP, top + height // 2)
        draw.text(middle, label, fill=(0, 0, 0), font=font, anchor="rm")
        for column, tile in enumerate(images):
            left = margin + column * (width + _GAP)
            place = (left + (width - tile.width) // 2, top + (height - tile.height) // 2)
            grid.paste(tile, place)
    return grid


def save_sample_grid(rows: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """Writes `sample_grid(rows)` to `path`."""
    grid = sample_grid(rows)
    with atomic_path(path) as temporary:
        grid.save(temporary)


def save_loss_plot(
    metrics: Sequence[Mapping[str, float]], panels: Sequence[Sequence[str]], path: Path
) -> None:
    """Plots the losses of the lines of metrics.jsonl over the steps, see `loss_panels`; nothing for fewer than two lines."""
    if len(metrics) < 2:
        return
    save_curves(metrics, loss_panels(metrics, panels), path, ylabel="loss")


def save_measurement_plot(measurements: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plots the lines of measurements.jsonl over the steps, one panel per kind: the part of a name before the slash."""
    if len(measurements) < 2:
        return
    save_curves(measurements, measurement_panels(measurements), path)


def loss_panels(
    metrics: Sequence[Mapping[str, float]], panels: Sequence[Sequence[str]]
) -> list[list[str]]:
    """The names of the losses in each panel: those of `panels` that there are, and in the last one all others."""
    names = [name for name in metrics[-1] if name not in _NOT_A_LOSS] if metrics else []
    grouped = [[name for name in panel if name in names] for panel in panels] or [[]]
    placed = {name for panel in grouped for name in panel}
    grouped[-1] += [name for name in names if name not in placed]
    return [panel for panel in grouped if panel]


def measurement_panels(measurements: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """The names of the measurements in each panel: a panel for each kind, the part of a name before the slash."""
    kinds: dict[str, list[str]] = {}
    for name in measurements[-1] if measurements else ():
        if name not in _NOT_A_LOSS:
            kinds.setdefault(name.split("/")[0], []).append(name)
    return list(kinds.values())


def save_ablation_plot(values: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel for each measure: a dot for each seed of each choice, a line at the mean, and the mean as a number.

    Where the largest value is many times the smallest, as one failed choice makes it, the axis is logarithmic. `values`: choice
    -> measure -> a value for each seed.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(values)
    measures = list(values[names[0]])
    figure = new_figure(3.4 + 2.6 * len(measures), 0.45 * len(names) + 1.2)
    all_axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(all_axes, measures, strict=True):
        for height, name in enumerate(names):
            numbers = values[name][measure]
            mean = sum(numbers) / len(numbers)
            axes.plot([mean, mean], [height - 0.3, height + 0.3], color="black", linewidth=1.2)
            axes.scatter(numbers, [height] * len(numbers), s=18, alpha=0.7)
            # Beside the plot, in line with the row.
            place = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 9}
            axes.annotate(f"{mean:#.3g}", (1.01, height), **place)
        numbers = [number for name in names for number in values[name][measure]]
        if min(numbers) > 0 and max(numbers) > _MANY_TIMES * min(numbers):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(measure)
        axes.grid(alpha=0.3)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].invert_yaxis()
    save_figure(figure, path)


def save_curves(
    lines: Sequence[Mapping[str, float]],
    panels: Sequence[Sequence[str]],
    path: Path,
    ylabel: str | None = None,
) -> None:
    """Plots named values over "step", a panel for each sequence of names; `ylabel` None: the names' common first part."""
    figure = new_figure(9, 2.6 * len(panels) + 0.4)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, names in zip(all_axes, panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.3)
        axes.set_ylabel(names[0].split("/")[0] if ylabel is None else ylabel)
        axes.grid(alpha=0.3)
        # Beside the axes, where it hides no curve.
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    all_axes[-1].set_xlabel("step")
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    # Imported here because it takes half a second, and off screen whatever the user's settings are.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Writes a figure to `path`."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def as_rgb(image: Tensor) -> Tensor:
    """(C, H, W) as the (3, H, W) that are shown of it: the first three channels, or the first of fewer as grey."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def _enlarged(image: Tensor) -> Image.Image:
    array = ((as_rgb(image).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    factor = max(1, _READABLE_SIDE // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)
