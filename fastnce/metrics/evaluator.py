"""The network that judges digits-photos: which digit an image shows, and what it was taken from.

It has one trunk with two heads. The heads are what makes its features useful: a network that only
reads digits is blind to style, because to it the same digit is the same on black and on a
photograph; having to tell the photographs apart, and plain digits from all of them, it has to see
the background too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnce.data.folders import SIGNED_UNIT
from fastnce.data.recipe import read_labels
from fastnce.data.samples import (
    BACKGROUND_SIDE,
    DIGIT_MARGIN,
    DIGIT_SIZE,
    NOISE_SIGMA,
    PHOTOS,
    composite,
    load_background,
    load_digits,
    noisy_digit,
)
from fastnce.data.transforms import counter_rng
from fastnce.errors import UserError
from fastnce.metrics.trained import (
    conv_norm_relu,
    fit,
    load_or_train,
    random_affine,
    recipe_digest,
)

NUM_DIGITS = 10

_EVALUATOR_STREAM = 20


@dataclass(frozen=True)
class EvaluatorRecipe:
    """All that an evaluator's weights depend on; its hash names the cached file."""

    sources: tuple[int, ...]
    """Numbers, in scikit-learn's set, of the digits to train on: those of the training folders."""
    photos: tuple[str, ...] = tuple(PHOTOS)
    """Photographs to tell apart."""
    num_features: int = 64
    """Size of the features that FID and KID compare."""
    base_channels: int = 24
    """Channels of the first layer; the later ones have twice as many."""
    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 64
    """Images in a step."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW, reached after 30 % of the steps."""
    seed: int = 0
    """Seed of the weights and of the images."""
    images: tuple[int, int, float, int] = (DIGIT_SIZE, DIGIT_MARGIN, NOISE_SIGMA, BACKGROUND_SIDE)
    """Size, margin and noise of the digits and size of the photographs, which change what there is to learn."""
    version: int = 1
    """Goes up when this file changes what a recipe gives."""

    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the recipe."""
        return recipe_digest(self)


class Evaluator(nn.Module):
    """One trunk, two heads; also a feature extractor for FID and KID.

    Args:
        num_photos: Photographs to tell apart. The last class of that head is "no photograph".
        num_features: Size of the features.
        base_channels: Channels of the first layer.
    """

    def __init__(self, num_photos: int, num_features: int = 64, base_channels: int = 24) -> None:
        super().__init__()
        first, later = base_channels, 2 * base_channels
        self.trunk = nn.Sequential(
            conv_norm_relu(3, first, 5, 2),  # 16 x 16
            conv_norm_relu(first, later, 3, 1),
            conv_norm_relu(later, later, 3, 2),  # 8 x 8
            conv_norm_relu(later, later, 3, 1),
            conv_norm_relu(later, later, 3, 2),  # 4 x 4
            nn.Flatten(),
            nn.Linear(later * 16, num_features),
            nn.ReLU(),
        )
        self.digit = nn.Linear(num_features, NUM_DIGITS)
        self.photo = nn.Linear(num_features, num_photos + 1)
        self.num_features = num_features
        self.name = "untrained evaluator"

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 32, 32) float32 in [-1, 1] to features (N, num_features), none negative."""
        return self.trunk(images)

    @torch.inference_mode()
    def read_digits(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """The digit that each image shows, 0 to 9: (N, 3, 32, 32) in [-1, 1] to (N,) int64."""
        return torch.cat([self.digit(self(part)).argmax(1) for part in images.split(batch_size)])


def recipe_for(data_root: Path | str, **settings: object) -> EvaluatorRecipe:
    """The recipe for a digits-photos set: trained on its training digits, never on its test digits.

    Raises:
        UserError: If `data_root` is not such a set.
    """
    labels = read_labels(data_root)
    if labels["recipe"].get("kind") != "digits-photos":
        raise UserError(
            f'{data_root}: is a "{labels["recipe"].get("kind")}" set, and the built-in evaluator '
            "reads digits-photos sets only. For other images call fastnce.metrics.compare_folders "
            "with a feature extractor of your own."
        )
    images = labels["images"].items()
    sources = tuple(sorted(x["source"] for name, x in images if name.startswith("train")))
    return EvaluatorRecipe(sources, **settings)


def load_evaluator(
    recipe: EvaluatorRecipe, *, cache: Path | str | None = None, progress: bool = True
) -> Evaluator:
    """The evaluator of a recipe: from the cache if it is there, else trained and put there.

    Args:
        recipe: See `recipe_for`.
        cache: Folder of the cache; by default `FASTNCE_CACHE` or `~/.cache/fastnce`.
        progress: Shows a progress bar while training.

    Returns:
        The evaluator in eval mode, its parameters frozen, on the CPU.
    """
    return load_or_train(
        f"evaluator-{recipe.digest()}.pt",
        lambda: _build(recipe),
        lambda evaluator: train_evaluator(evaluator, recipe, progress=progress),
        cache=cache,
    )


def train_evaluator(
    evaluator: Evaluator, recipe: EvaluatorRecipe, *, progress: bool = True
) -> None:
    """Trains in place on images made for each step; the sum of both heads' cross-entropies.

    Takes about half a minute.
    """
    batches = EvaluatorBatches(recipe)

    def loss(step: int) -> Tensor:
        images, digits, photos = batches(step)
        features = evaluator(images)
        reading = F.cross_entropy(evaluator.digit(features), digits)
        return reading + F.cross_entropy(evaluator.photo(features), photos)

    fit(evaluator, loss, recipe.steps, recipe.learning_rate, "evaluator", progress=progress)


class EvaluatorBatches:
    """Digits on every photograph, and plain ones; those of a step depend on (seed, step) only."""

    def __init__(self, recipe: EvaluatorRecipe) -> None:
        strokes, digits = load_digits()
        sources = list(recipe.sources)
        self.strokes, self.digits = torch.from_numpy(strokes[sources]), digits[sources]
        self.photos = [load_background(name) for name in recipe.photos]
        self.batch_size, self.seed = recipe.batch_size, recipe.seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, 32, 32) in [-1, 1], their digits (N,) and their photographs (N,)."""
        rng = counter_rng(self.seed, _EVALUATOR_STREAM, step)
        chosen = rng.integers(len(self.digits), size=self.batch_size)
        origins = rng.integers(len(self.photos) + 1, size=self.batch_size)
        strokes = random_affine(self.strokes[chosen], rng)
        images = np.empty((*strokes.shape, 3), dtype=np.uint8)
        for number, photo in enumerate(self.photos):
            here = origins == number
            images[here] = composite(strokes[here], random_crops(photo, here.sum(), rng))
        plain = origins == len(self.photos)
        images[plain] = noisy_digit(strokes[plain], rng)
        return (
            to_batch(images),
            torch.from_numpy(self.digits[chosen]),
            torch.from_numpy(origins),
        )


def random_crops(photo: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 32, 32, 3) uint8 from random places of a photograph (H, W, 3)."""
    window = np.arange(DIGIT_SIZE)
    y, x = (rng.integers(side - DIGIT_SIZE + 1, size=count) for side in photo.shape[:2])
    return photo[(y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :]]


def to_batch(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """(N, H, W, C) uint8 to (N, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(SIGNED_UNIT[np.asarray(images).transpose(0, 3, 1, 2)])


def _build(recipe: EvaluatorRecipe) -> Evaluator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        evaluator = Evaluator(len(recipe.photos), recipe.num_features, recipe.base_channels)
    evaluator.name = f"fastnce-digits-photos-v{recipe.version}-{recipe.digest()}"
    return evaluator
