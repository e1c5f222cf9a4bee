"""Pictures of a translation model's encoder: the similarity that it sees, and the main components of its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.data import list_images, save_image
from fastnce.data.images import fitting_suffixes, read_image, to_array, to_image, to_tensor
from fastnce.data.transforms import resize_to_multiple
from fastnce.errors import UserError
from fastnce.files import expect_apart
from fastnce.networks import PatchProjector
from fastnce.networks.resnet_generator import pixel_grid
from fastnce.systems import TrainConfig, variants
from fastnce.systems.translating import image_scaling
from fastnce.systems.translation import convert_channels
from fastnce.training.checkpoint import below
from fastnce.training.runs import Run, opened
from fastnce.viz.feature_maps import (
    FeatureColours,
    Scale,
    SimilarityMap,
    save_feature_colours,
    save_similarity,
)

# Points that are chosen keep this share of the image's side away from its border.
_MARGIN = 1 / 16
# Colours reach from this quantile of a component to its counterpart.
_DARKEST = 0.01


@dataclass(frozen=True)
class PatchEncoder:
    """The part of a trained model that its contrastive loss compares patches with: the generator's encoder E and F behind it.

    A checkpoint has a running average of the generator but not of F: F was trained beside the weights themselves. So "raw"
    weights show exactly what the loss saw. With "ema" the generator is the one that is used after the training, and F is
    slightly ahead of it; as long as the weights moved little in the last steps, the two agree.

    Attributes:
        generator: in eval mode.
        projector: F; None where patches are compared as they are, or not at all.
        config: of the run.
        in_channels: of the images that it takes; others are converted as in training.
        output_side: what encodes translated images, if not this one: in DCLGAN the generator of the other direction and the
            projector behind it.
    """

    generator: nn.Module
    projector: PatchProjector | None
    config: TrainConfig
    in_channels: int
    output_side: PatchEncoder | None = None

    @classmethod
    def of(cls, run: Run | Path, **how: Any) -> PatchEncoder:
        """That of a run, or of its folder and what `Run` needs to open it."""
        run = opened(run, **{"weights": "raw"} | how)
        if run.path.is_file():
            raise UserError(f"run={run.path} holds a generator alone. Name the folder of its run.")
        if not run.system.compared:
            others = (n for n, s in variants().items() if s.compared)
            raise UserError(
                f"run={run.path} is a run of {run.system.name}, which compares no patches. Name a run of {', '.join(others)}."
            )
        state, encoder = run.state()["model"], None
        for part, projector, channels in reversed(run.system.compared):
            encoder = cls(
                getattr(run.network, part) if part else run.network,
                _projector(below(state, projector), run.device),
                run.config,
                getattr(run.config, channels),
                encoder,
            )
        return encoder

    @property
    def of_output(self) -> PatchEncoder:
        """The encoder of translated images."""
        return self.output_side or self

    def read(self, path: Path) -> Tensor:
        """(C, H, W) in [-1, 1]: an image as for translation, scaled as in training and not cropped, with sides a multiple of 4."""
        config = self.config
        image = read_image(path, config.in_channels, config.bits, config.value_range)
        array = image_scaling(config, [path]).prepare(image)
        return to_tensor(to_array(resize_to_multiple(to_image(array))))

    @torch.inference_mode()
    def translate(self, image: Tensor) -> Tensor:
        """The translation of one image (C, H, W), on the CPU."""
        return self.generator(image[None].to(self._device))[0].float().cpu()

    @torch.inference_mode()
    def encode(self, image: Tensor) -> list[Tensor]:
        """The features E(image), (1, C_l, h_l, w_l) for each of `config.nce_layers`, on the CPU."""
        images = convert_channels(image[None].to(self._device), self.in_channels)
        features = self.generator.encode(images, self.config.nce_layers)
        return [feature.float().cpu() for feature in features]

    @torch.inference_mode()
    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """F(features), L2-normalised, (1, dim, h_l, w_l) for each layer, on the CPU."""
        if self.config.lambda_nce == 0:
            raise UserError(
                "the run was trained without the contrastive loss (lambda_nce=0), so it has no learnt similarity. "
                "Name another run."
            )
        if self.projector is None:
            return [F.normalize(x, dim=1) for x in features]
        patches = [x.to(self._device).flatten(2).transpose(1, 2) for x in features]
        projected = [F.normalize(x, dim=2).cpu() for x in self.projector(patches)]
        return [
            x.transpose(1, 2).unflatten(2, feature.shape[2:])
            for x, feature in zip(projected, features, strict=True)
        ]

    def chosen(self, layers: Sequence[int]) -> list[int]:
        """Indices in `config.nce_layers` of the layers asked for; of all if none is named."""
        known = self.config.nce_layers
        unknown = sorted(set(layers) - set(known))
        if unknown:
            raise UserError(
                f"layers={' '.join(map(str, layers))}: the run compares the layers {' '.join(map(str, known))} only. "
                "Choose from these."
            )
        return [index for index, layer in enumerate(known) if not layers or layer in layers]

    @property
    def _device(self) -> torch.device:
        return next(self.generator.parameters()).device


def _projector(weights: dict[str, Tensor], device: torch.device) -> PatchProjector | None:
    """The projector with these weights; None if there are none."""
    if not weights:
        return None
    count = sum(name.endswith(".0.weight") for name in weights)
    first = [weights[f"mlp_{index}.0.weight"] for index in range(count)]
    projector = PatchProjector([weight.shape[1] for weight in first], first[0].shape[0])
    projector.load_state_dict(weights)
    return projector.to(device).eval().requires_grad_(False)


def visualize_similarity(
    encoder: PatchEncoder,
    input: Path,
    out: Path,
    *,
    points: Sequence[tuple[int, int]] = (),
    count: int = 4,
    layers: Sequence[int] = (),
    scale: Scale = "similarity",
) -> Path:
    """Translates an image and draws the learned similarity of points of the result to the image, layer by layer.

    Args:
        encoder: see `PatchEncoder`.
        input: image file.
        out: folder; gets `similarity.png`, and the translation as `output.png` (of more than four channels `output.npy`).
        points: (x, y) of pixels of the output; by default `count` of them are chosen, see `distinct_points`.
        count: How many points are chosen, where none is given.
        layers: Layers to show, of those that the run compares; by default all.
        scale: exp(cosine / temperature) as the loss has it, or the cosine, which shows small similarities too.
    """
    _expect_count(count)
    image = encoder.read(input)
    output = encoder.translate(image)
    points = list(points) or distinct_points(encoder, output, count)
    maps = similarity_maps(encoder, image, output, points, layers)
    path = Path(out) / "similarity.png"
    save_image(output, path.with_name(f"output{fitting_suffixes(len(output))[0]}"))
    save_similarity(image, output, maps, path, scale)
    return path


def visualize_features(
    encoder: PatchEncoder, input: Path, out: Path, *, count: int = 3, layers: Sequence[int] = ()
) -> list[Path]:
    """Draws the main components of the features of images and of their translations, layer by layer.

    Args:
        encoder: see `PatchEncoder`.
        input: image file, or a folder of images, of which the first `count` ones of the same size are taken.
        out: folder; gets `pca-encoder.png` and, in a run with the contrastive loss, `pca-projected.png`.
        count: How many images of a folder to take.
        layers: Layers to show, of those that the run compares; by default all.
    """
    _expect_count(count)
    input = Path(input)
    if input.is_dir():
        expect_apart(out, [input])
    paths = list_images(input)[:count] if input.is_dir() else [input]
    inputs = [encoder.read(path) for path in paths]
    rows: list[tuple[str, Tensor]] = []
    for image in inputs:
        if image.shape == inputs[0].shape:
            rows += [("input", image), ("output", encoder.translate(image))]
    written = []
    kinds = {"encoder": False} | ({"projected": True} if encoder.projector is not None else {})
    # Features of two encoders have nothing in common until they are projected.
    sides = {"input": encoder, "output": encoder}
    for name, projected in kinds.items():
        if projected:
            sides["output"] = encoder.of_output
        images = [(sides[label], image) for label, image in rows]
        colours = feature_colours(images, projected=projected, layers=layers)
        written.append(Path(out) / f"pca-{name}.png")
        save_feature_colours(rows, colours, written[-1])
    return written


def _expect_count(count: int) -> None:
    if count < 1:
        raise UserError(f"count={count} is too small. Use count >= 1.")


def similarity_maps(
    encoder: PatchEncoder,
    input: Tensor,
    output: Tensor,
    points: Sequence[tuple[int, int]],
    layers: Sequence[int] = (),
) -> dict[tuple[int, int], list[SimilarityMap]]:
    """The similarity of every position of the input to points of the output, as the contrastive loss sees it.

    The query of a point is F(E(output)), in DCLGAN with the other direction's E and F, at the position nearest to it, the keys are
    F(E(input)) at all positions; the loss wants exp(cosine / temperature) to be large at the query's own position only.

    Source: Park et al., "Contrastive Learning for Unpaired Image-to-Image Translation", ECCV 2020, the figure of the
    learned similarity.

    Args:
        input: (C, H, W) in [-1, 1], sides a multiple of 4.
        output: (C', H, W), its translation.
        points: (x, y) of pixels of the output, counted from 0 at the left and the top.
    """
    height, width = output.shape[1:]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"points: {x},{y} is outside the image, which is {width}x{height} pixels here. "
                f"Use x from 0 to {width - 1} and y from 0 to {height - 1}."
            )
    indices = encoder.chosen(layers)
    features = encoder.encode(input)
    other = encoder.of_output
    keys, queries = encoder.project(features), other.project(other.encode(output))
    maps: dict[tuple[int, int], list[SimilarityMap]] = {point: [] for point in points}
    for index in indices:
        layer = encoder.config.nce_layers[index]
        key, query = keys[index][0], queries[index][0]  # (D, h, w)
        grid = pixel_grid(encoder.generator, layer, features[index], input[None])
        for x, y in maps:
            position = grid.nearest(y, key.shape[1]), grid.nearest(x, key.shape[2])
            cosine = torch.einsum("dhw,d->hw", key, query[:, *position])
            shown = SimilarityMap(layer, cosine, encoder.config.temperature, position, grid)
            maps[x, y].append(shown)
    return maps


def distinct_points(encoder: PatchEncoder, output: Tensor, count: int) -> list[tuple[int, int]]:
    """At most `count` pixels (x, y) of the output (C, H, W) whose patches differ most, by the encoder's features in the middle layer.

    The first is the most typical patch; each further one is the farthest from those before it (farthest-point sampling).
    F(E) would be no good here: it tells all patches apart, alike or not. What is at the border is partly padding, and left out.
    """
    features = encoder.of_output.encode(output)
    middle = (len(features) - 1) // 2
    layer = encoder.config.nce_layers[middle]
    grid = pixel_grid(encoder.generator, layer, features[middle], output[None])
    feature = features[middle][0]
    height, width = output.shape[1:]
    pixels = [
        (round(grid.pixel(column)), round(grid.pixel(row)))
        for row in range(feature.shape[1])
        for column in range(feature.shape[2])
    ]
    inside = [
        index
        for index, (x, y) in enumerate(pixels)
        if min(x, width - 1 - x) >= _MARGIN * width and min(y, height - 1 - y) >= _MARGIN * height
    ]
    patches = feature.flatten(1).T[inside]  # (S, C)
    patches = F.normalize(patches - patches.mean(0), dim=1)
    chosen = [int((patches @ patches.sum(0)).argmax())]
    while len(chosen) < min(count, len(inside)):
        nearest = (patches @ patches[chosen].T).max(dim=1).values
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    return [pixels[inside[index]] for index in chosen]


def main_components(maps: Sequence[Tensor]) -> tuple[Tensor, tuple[float, ...]]:
    """The first three principal components of feature maps, as colours, with one basis for all of them.

    A component's sign is such that its largest coefficient is positive, so the result is the same on every machine. Colours
    reach from the first to the last percent of a component's values. Features with fewer than three channels leave the rest
    of the colours at their middle.

    Of N maps (C, h, w) these are (N, h, w, 3) in [0, 1], and the share of the variance that each component has.
    """
    stacked = torch.stack(list(maps)).double()  # (N, C, h, w)
    channels = stacked.shape[1]
    rows = stacked.movedim(1, 3).reshape(-1, channels)
    rows = rows - rows.mean(0)
    # Exact and deterministic, and small: C x C.
    variances, basis = torch.linalg.eigh(rows.T @ rows / len(rows))
    variances, basis = variances.flip(0)[:3], basis.flip(1)[:, :3]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    components = rows @ (basis * largest.sign())
    ends = np.quantile(components.numpy(), [_DARKEST, 1 - _DARKEST], axis=0)
    low, high = torch.from_numpy(ends)
    scaled = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.full((len(rows), 3), 0.5)
    colours[:, : scaled.shape[1]] = scaled.float()
    total = rows.square().sum(1).mean().clamp(min=1e-12)
    shares = tuple((variances.clamp(min=0) / total).tolist())
    return colours.view(len(stacked), *stacked.shape[2:], 3), shares


def feature_colours(
    images: Sequence[tuple[PatchEncoder, Tensor]], *, projected: bool, layers: Sequence[int] = ()
) -> list[FeatureColours]:
    """The main components of the features of images (C, H, W) of one size in each layer, with one basis for all of them.

    Each image comes with what encodes it. `projected`: of F(E(image)), L2-normalised, rather than of E(image).
    """
    encoder = images[0][0]
    indices = encoder.chosen(layers)
    features = [part.encode(image) for part, image in images]
    shown = features
    if projected:
        shown = [part.project(maps) for (part, _), maps in zip(images, features, strict=True)]
    result = []
    for index in indices:
        layer = encoder.config.nce_layers[index]
        colours, explained = main_components([maps[index][0] for maps in shown])
        grid = pixel_grid(encoder.generator, layer, features[0][index], images[0][1][None])
        result.append(FeatureColours(layer, colours, explained, grid))
    return result
