"""Figures of what a model's encoder learnt: similarity maps, the main components of its features, the changes of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from fastnce.networks.resnet_generator import PixelGrid
from fastnce.viz.plots import as_rgb, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["similarity", "cosine"]

_CELL = 1.55  # inches
_DPI = 100
_FONT = 8
# How much a similarity map covers the grey input where it is 0; where it is 1, it covers it wholly.
_FAINTEST = 0.5


@dataclass(frozen=True)
class SimilarityMap:
    """How similar every position of the input is to one place in the output, in one layer."""

    layer: int  # index of the generator's layer
    cosine: Tensor  # (h, w), of the projected features with that of the query
    temperature: float  # of the contrastive loss
    position: tuple[
        int, int
    ]  # row and column of the query, where the loss wants the largest cosine
    grid: PixelGrid  # the pixels that rows and columns look at

    def values(self, scale: Scale = "similarity") -> Tensor:
        """(h, w) in [0, 1]: exp(cosine / temperature) relative to its largest value, or the cosine from its least to its largest."""
        low, high = self.cosine.min(), self.cosine.max()
        if scale == "similarity":
            return ((self.cosine - high) / self.temperature).exp()
        return (self.cosine - low) / (high - low).clamp(min=1e-6)

    @property
    def own_cosine(self) -> float:
        """The cosine at the query's own position: that of its positive."""
        return self.cosine[self.position].item()

    @property
    def rank(self) -> int:
        """Rank of the own position among all, 1 for the most similar."""
        return int((self.cosine > self.cosine[self.position]).sum()) + 1


@dataclass(frozen=True)
class FeatureColours:
    """The main components of one layer's features, as colours."""

    layer: int  # index of the generator's layer
    colours: Tensor  # (N, h, w, 3) in [0, 1], for each image
    explained: tuple[float, ...]  # shares of the variance that the three components have
    grid: PixelGrid  # the pixels that rows and columns look at


def save_similarity(
    input: Tensor,
    output: Tensor,
    maps: Mapping[tuple[int, int], Sequence[SimilarityMap]],
    path: Path,
    scale: Scale = "similarity",
) -> None:
    """A row for each point: the output and the input with the point marked, then a heat map over the input for each layer.

    Below a map stand the cosine at the point's own position and that position's rank among all. Images are (C, H, W) in [-1, 1],
    points (x, y) pixels of the output.
    """
    columns = 2 + len(next(iter(maps.values())))
    figure, all_axes = _grid_of_axes(len(maps), columns, input, below=0.2)
    for row, ((x, y), layers) in zip(all_axes, maps.items(), strict=True):
        for axes, image, name in ((row[0], output, "output"), (row[1], input, "input")):
            axes.imshow(_pixels(image))
            _mark(axes, x, y)
            axes.set_title(name, fontsize=_FONT)
        row[0].set_ylabel(f"({x}, {y})", fontsize=_FONT)
        for axes, shown in zip(row[2:], layers, strict=True):
            heat = _over_pixels(shown.values(scale), shown.grid, input)
            axes.imshow(_pixels(input.mean(0, keepdim=True)))
            axes.imshow(
                heat, cmap="inferno", vmin=0, vmax=1, alpha=_FAINTEST + (1 - _FAINTEST) * heat
            )
            _mark(axes, x, y)
            axes.set_title(f"layer {shown.layer}", fontsize=_FONT)
            below = f"cos {shown.own_cosine:.2f}, {shown.rank} of {shown.cosine.numel()}"
            axes.set_xlabel(below, fontsize=_FONT - 1, labelpad=2)
    _titles_in_the_first_row_only(all_axes)
    save_figure(figure, path, _DPI)


def save_feature_colours(
    images: Sequence[tuple[str, Tensor]], layers: Sequence[FeatureColours], path: Path
) -> None:
    """A row for each labelled image (C, H, W) in [-1, 1]: the image itself, then its features in each layer."""
    figure, all_axes = _grid_of_axes(len(images), 1 + len(layers), images[0][1])
    for index, (row, (label, image)) in enumerate(zip(all_axes, images, strict=True)):
        row[0].imshow(_pixels(image))
        row[0].set_title("image", fontsize=_FONT)
        row[0].set_ylabel(label, fontsize=_FONT)
        for axes, layer in zip(row[1:], layers, strict=True):
            axes.imshow(_over_pixels(layer.colours[index], layer.grid, image))
            share = f"{100 * sum(layer.explained):.0f} % of variance"
            axes.set_title(f"layer {layer.layer}\n{share}", fontsize=_FONT)
    _titles_in_the_first_row_only(all_axes)
    save_figure(figure, path, _DPI)


def save_changes(names: Sequence[str], maps: Tensor, path: Path) -> None:
    """A heat map for each named step, (steps, H, W): above on a scale of its own, below on one scale for all, with the mean.

    Colours stand for the root of the values, so that small steps are seen beside large ones.
    """
    figure, all_axes = _grid_of_axes(2, len(maps), maps, below=0.2)
    for column, (name, values) in enumerate(zip(names, maps, strict=True)):
        for axes, greatest in zip(all_axes[:, column], (values.max(), maps.max()), strict=True):
            axes.imshow(values.sqrt().numpy(), cmap="inferno", vmin=0, vmax=greatest.sqrt())
        all_axes[0, column].set_title(name, fontsize=_FONT)
        all_axes[1, column].set_xlabel(f"{values.mean():.2g}", fontsize=_FONT, labelpad=2)
    for axes, label in zip(all_axes[:, 0], ("where", "how much"), strict=True):
        axes.set_ylabel(label, fontsize=_FONT)
    save_figure(figure, path, _DPI)


def _grid_of_axes(
    rows: int, columns: int, image: Tensor, below: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """Axes without ticks, in the shape of the image; `below`: inches for a line under each."""
    height = _CELL * image.shape[1] / image.shape[2]
    figure = new_figure(columns * _CELL + 0.4, rows * (height + below) + 0.4)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    all_axes = figure.subplots(rows, columns, squeeze=False)
    for axes in all_axes.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    return figure, all_axes


def _pixels(image: Tensor) -> np.ndarray:
    """(C, H, W) in [-1, 1] as (H, W, 3) in [0, 1]."""
    return ((as_rgb(image).clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()


def _over_pixels(values: Tensor, grid: PixelGrid, image: Tensor) -> np.ndarray:
    """(h, w, ...) -> (H, W, ...): every pixel of the image has the value of the position nearest to it."""
    rows = [grid.nearest(y, values.shape[0]) for y in range(image.shape[1])]
    columns = [grid.nearest(x, values.shape[1]) for x in range(image.shape[2])]
    return values[rows][:, columns].numpy()


def _mark(axes: Axes, x: int, y: int) -> None:
    """A circle around a pixel, seen on any colour; what is inside stays visible."""
    for colour, width in (("black", 2.4), ("cyan", 1.2)):
        axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", color=colour, mew=width)


def _titles_in_the_first_row_only(all_axes: np.ndarray) -> None:
    for axes in all_axes[1:].flat:
        axes.set_title("")
