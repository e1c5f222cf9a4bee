"""The network that judges digits-photos: which digit an image shows, and what it was taken from.

It has one trunk with two heads. The heads are what makes its features useful: a network that only
reads digits is blind to style, because to it the same digit is the same on black and on a
photograph; having to tell the photographs apart, and plain digits from all of them, it has to see
the background too.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastnce.data.files import atomic_path
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
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
            _conv(3, first, 5, 2),  # 16 x 16
            _conv(first, later, 3, 1),
            _conv(later, later, 3, 2),  # 8 x 8
            _conv(later, later, 3, 1),
            _conv(later, later, 3, 2),  # 4 x 4
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
    folder = Path(cache or os.environ.get("FASTNCE_CACHE") or Path.home() / ".cache" / "fastnce")
    path = folder / f"evaluator-{recipe.digest()}.pt"
    evaluator = _build(recipe)
    if path.is_file():
        try:
            evaluator.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return _frozen(evaluator)
        except Exception as error:  # whatever a damaged file makes torch raise
            warnings.warn(f"{path}: not readable ({error}); training again.", stacklevel=2)
            evaluator = _build(recipe)
    train_evaluator(evaluator, recipe, progress=progress)
    try:
        with atomic_path(path) as temporary:
            torch.save(evaluator.state_dict(), temporary)
    except UserError as error:
        warnings.warn(f"The evaluator will be trained anew each time: {error}", stacklevel=2)
    return _frozen(evaluator)


def train_evaluator(
    evaluator: Evaluator, recipe: EvaluatorRecipe, *, progress: bool = True
) -> None:
    """Trains in place on images made for each step; the sum of both heads' cross-entropies.

    Runs on one thread, about half a minute: so the weights do not depend on the number of cores,
    and a busy machine does not make a small network wait for its second thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _train(evaluator, recipe, progress)
    finally:
        torch.set_num_threads(threads)


def _train(evaluator: Evaluator, recipe: EvaluatorRecipe, progress: bool) -> None:
    batches = EvaluatorBatches(recipe)
    optimizer = torch.optim.AdamW(evaluator.parameters(), recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps
    )
    evaluator.train()
    for step in tqdm(range(recipe.steps), "evaluator", disable=not progress, dynamic_ncols=True):
        images, digits, photos = batches(step)
        features = evaluator(images)
        loss = F.cross_entropy(evaluator.digit(features), digits)
        loss = loss + F.cross_entropy(evaluator.photo(features), photos)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


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
        strokes = _move(self.strokes[chosen], rng)
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


def _move(strokes: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Turns by up to 10 degrees, scales by up to 10 %, shifts by up to 2 pixels. (N, H, W)."""
    u = torch.from_numpy(2 * rng.random((len(strokes), 4), dtype=np.float32) - 1)
    angle, scale = u[:, 0] * np.deg2rad(10), 1 + 0.1 * u[:, 1]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = u[:, 2:] * (4 / strokes.shape[-1])
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, (len(strokes), 1, *strokes.shape[1:]), align_corners=False)
    return F.grid_sample(strokes[:, None], grid, align_corners=False)[:, 0].numpy()


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _build(recipe: EvaluatorRecipe) -> Evaluator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        evaluator = Evaluator(len(recipe.photos), recipe.num_features, recipe.base_channels)
    evaluator.name = f"fastnce-digits-photos-v{recipe.version}-{recipe.digest()}"
    return evaluator


def _frozen(evaluator: Evaluator) -> Evaluator:
    return evaluator.eval().requires_grad_(False)
