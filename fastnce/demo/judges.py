"""The two networks that judge images made after the digits sets: trained once, in half a minute, then read from a cache."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastnce.data.images import SIGNED_UNIT
from fastnce.data.labelled import LabelledImages
from fastnce.data.stream import counter_rng
from fastnce.demo.sets import (
    BACKGROUND_SIDE,
    DIGIT_MARGIN,
    DIGIT_SIZE,
    NOISE_SIGMA,
    PHOTOS,
    composite,
    kind_of,
    load_digits,
    noisy_digit,
    random_crops,
    read_labels,
    scaled_photo,
)
from fastnce.errors import UserError
from fastnce.files import atomic_path
from fastnce.metrics.distribution import as_saved, extract_features
from fastnce.metrics.extractors import load_extractor

# The classes of a digits set, by label.
DIGITS = tuple("0123456789")

_EVALUATOR_STREAM, _CLASSIFIER_STREAM = 20, 60

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """All that a network's weights depend on; its hash names the cached file."""

    num_features: int = 64
    """Size of the features that FID and its relatives compare."""
    base_channels: int = 24
    """Channels of the first layer; the later ones have twice as many."""
    batch_size: int = 64
    """Images in a step."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW, reached after 30 % of the steps."""
    seed: int = 0
    """Seed of the weights and of the images."""
    version: int = 1
    """Goes up when this file changes what a recipe gives."""

    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the recipe."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class EvaluatorRecipe(_Recipe):
    """All that an evaluator's weights depend on; its hash names the cached file."""

    sources: tuple[int, ...]
    """Numbers, in scikit-learn's set, of the digits to train on: those of the training folders."""
    photos: tuple[str, ...] = tuple(PHOTOS)
    """Photographs to tell apart."""
    images: tuple[int, int, float, int] = (DIGIT_SIZE, DIGIT_MARGIN, NOISE_SIGMA, BACKGROUND_SIDE)
    """Size, margin and noise of the digits and size of the photographs, which change what there is to learn."""
    steps: int = field(default=800, kw_only=True)
    """Optimiser steps."""


@dataclass(frozen=True)
class DigitRecipe(_Recipe):
    """All that a digit classifier's weights depend on; its hash names the cached file."""

    data: str
    """Hash of the training images and their digits."""
    image_size: int
    """Height and width of the images: 16 or 32."""
    steps: int = field(default=600, kw_only=True)
    """Optimiser steps."""


class Evaluator(nn.Module):
    """Which digit an image of a digits-photos set shows, and what it was taken from; also a feature extractor.

    One trunk, two heads. The heads are what makes its features useful. A network that only reads digits is blind to style: to
    it the same digit is the same on black and on a photograph. Having to tell the photographs apart, and plain digits from all
    of them, it has to see the background too.

    Args:
        num_photos: Photographs to tell apart. The last class of that head is "no photograph".
        num_features: Size of the features.
        base_channels: Channels of the first layer.
    """

    def __init__(self, num_photos: int, num_features: int = 64, base_channels: int = 24) -> None:
        super().__init__()
        later = 2 * base_channels
        layers = (base_channels, 5, 2), (later, 3, 1), (later, 3, 2), (later, 3, 1), (later, 3, 2)
        self.trunk = _trunk(3, layers, num_features)
        self.digit = nn.Linear(num_features, len(DIGITS))
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


class DigitClassifier(nn.Module):
    """Reads the greyscale digits of a digits set; also a feature extractor.

    The features are divided by one number, after training, that gives those of the training images a
    variance of 1 on average: without it, the unit of FID would hang on how long the training was.
    So num_features is the FID of images that all have the mean features.

    Args:
        image_size: Height and width of the images, 16 or 32.
        num_features: Size of the features.
        base_channels: Channels of the first layer.

    Raises:
        ValueError: If the image size is another one.
    """

    reads_labels = True

    def __init__(self, image_size: int = 16, num_features: int = 64, base_channels: int = 24):
        super().__init__()
        if image_size not in (16, 32):
            raise ValueError(
                f"DigitClassifier: image_size={image_size}: expected 16 or 32. "
                "Write the digits set at one of these sizes."
            )
        later = 2 * base_channels
        first = (base_channels, 3, image_size // 16)
        self.trunk = _trunk(1, (first, (later, 3, 2), (later, 3, 1), (later, 3, 2)), num_features)
        self.head = nn.Linear(num_features, len(DIGITS))
        self.register_buffer("scale", torch.ones(()))
        self.image_size = image_size
        self.name = "untrained digit classifier"

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, S, S) float32 in [-1, 1] to features (N, num_features), none negative."""
        return self._trunk(images) / self.scale

    def logits(self, images: Tensor) -> Tensor:
        """The same images to one logit for each digit, (N, 10)."""
        return self.head(self._trunk(images))

    def class_probabilities(self, images: Tensor) -> Tensor:
        """The same images to the probability of each digit, (N, 10)."""
        return self.logits(images).softmax(1)

    def _trunk(self, images: Tensor) -> Tensor:
        expected = (1, self.image_size, self.image_size)
        if images.shape[1:] != expected:
            raise ValueError(
                f"DigitClassifier: images: expected (N, {', '.join(map(str, expected))}), the shape "
                f"of its training images, got {tuple(images.shape)}. "
                "Load the classifier of a digits set of that size."
            )
        return self.trunk(images)


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

    def train(evaluator: Evaluator) -> None:
        batches = EvaluatorBatches(recipe)

        def loss(step: int) -> Tensor:
            images, digits, photos = batches(step)
            features = evaluator(images)
            reading = F.cross_entropy(evaluator.digit(features), digits)
            return reading + F.cross_entropy(evaluator.photo(features), photos)

        _fit(evaluator, loss, recipe, "evaluator", progress)

    name = f"fastnce-digits-photos-v{recipe.version}-{recipe.digest()}"
    return _load_or_train(
        "evaluator", name, recipe, partial(Evaluator, len(recipe.photos)), train, cache
    )


class EvaluatorBatches:
    """Digits on every photograph, and plain ones; those of a step depend on (seed, step) only."""

    def __init__(self, recipe: EvaluatorRecipe) -> None:
        strokes, digits = load_digits()
        sources = list(recipe.sources)
        self.strokes, self.digits = torch.from_numpy(strokes[sources]), digits[sources]
        self.photos = [scaled_photo(name) for name in recipe.photos]
        self.batch_size, self.seed = recipe.batch_size, recipe.seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, 32, 32) in [-1, 1], their digits (N,) and their photographs (N,)."""
        rng = counter_rng(self.seed, _EVALUATOR_STREAM, step)
        chosen = rng.integers(len(self.digits), size=self.batch_size)
        origins = rng.integers(len(self.photos) + 1, size=self.batch_size)
        strokes = _random_affine(self.strokes[chosen], rng)
        images = np.empty((*strokes.shape, 3), dtype=np.uint8)
        for number, photo in enumerate(self.photos):
            here = origins == number
            images[here] = composite(strokes[here], random_crops(photo, here.sum(), rng))
        plain = origins == len(self.photos)
        images[plain] = noisy_digit(strokes[plain], rng)
        digits = torch.from_numpy(self.digits[chosen])
        return to_batch(images), digits, torch.from_numpy(origins)


def to_batch(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """(N, H, W, C) uint8 to (N, C, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(SIGNED_UNIT[np.asarray(images).transpose(0, 3, 1, 2)])


def load_digit_classifier(
    data_root: Path | str,
    *,
    cache: Path | str | None = None,
    progress: bool = True,
    **settings: object,
) -> DigitClassifier:
    """The classifier of a digits set: from the cache if it is there, else trained and put there.

    It is trained on the training images alone, turned and shifted a little, in about 12 s on one
    core, and reads 99 % of the test images.

    Args:
        data_root: A folder that `fastnce data digits` wrote.
        cache: Folder of the cache; by default `FASTNCE_CACHE` or `~/.cache/fastnce`.
        progress: Shows a progress bar while training.
        settings: Fields of `DigitRecipe` other than `data` and `image_size`.

    Returns:
        The classifier in eval mode, its parameters frozen, on the CPU.

    Raises:
        UserError: If `data_root` is no digits set.
    """
    made = read_labels(data_root)["recipe"]
    if made.get("kind") != "digits":
        raise UserError(
            f'{data_root}: is a "{made.get("kind")}" set, and the digit classifier reads digits '
            "sets only. Write one with `fastnce data digits --out FOLDER`."
        )
    size = made["size"]
    dataset = LabelledImages(data_root, image_size=size, channels=1, classes=DIGITS)
    images, digits = dataset.all_images()
    data = hashlib.sha256(images.numpy().tobytes() + digits.numpy().tobytes())
    recipe = DigitRecipe(data.hexdigest()[:12], size, **settings)

    def train(network: DigitClassifier) -> None:
        strokes = images[:, 0] / 255  # 0 where there is no ink

        def loss(step: int) -> Tensor:
            rng = counter_rng(recipe.seed, _CLASSIFIER_STREAM, step)
            chosen = torch.from_numpy(rng.integers(len(digits), size=recipe.batch_size))
            moved = _random_affine(strokes[chosen], rng, max_shift=size / 16)
            batch = 2 * torch.from_numpy(moved)[:, None] - 1
            return F.cross_entropy(network.logits(batch), digits[chosen])

        _fit(network, loss, recipe, "digit classifier", progress)
        features = extract_features(as_saved(images), network.eval())
        network.scale.copy_(features.var(0).mean().sqrt())

    name = f"fastnce-digits-v{recipe.version}-{recipe.digest()}"
    return _load_or_train(
        "digit-classifier", name, recipe, partial(DigitClassifier, size), train, cache
    )


def generation_evaluator(
    data_root: Path | str,
    extractor: Path | str | None = None,
    *,
    device: torch.device | str = "cpu",
    cache: Path | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """The judge of images generated after a data set.

    Args:
        data_root: Folder of the set.
        extractor: See `fastnce.metrics.extractors.load_extractor`; by default a digits set's classifier.
        device: Where a scripted extractor runs.
        cache: Folder of the classifier's cache; see `load_digit_classifier`.
        progress: Shows a bar if the classifier has to be trained first.

    Raises:
        UserError: If there is no extractor and the set is not a digits set, or the file is no
            TorchScript module.
    """
    if extractor is not None:
        return load_extractor(extractor, device)
    if not Path(data_root).is_dir():
        raise UserError(f"{data_root}: no such folder. Expected the folder of a data set.")
    if kind_of(data_root) != "digits":
        raise UserError(
            f"{data_root}: the built-in judge of generated images reads sets of "
            "`fastnce data digits` only. For other images give --extractor FILE, a TorchScript "
            "module from (N, 3, H, W) uint8 to features, such as the Inception-v3 of 2015-12-05."
        )
    return load_digit_classifier(data_root, cache=cache, progress=progress)


def _load_or_train(
    stem: str,
    name: str,
    recipe: _Recipe,
    build: Callable[[int, int], Network],
    train: Callable[[Network], None],
    cache: Path | str | None,
) -> Network:
    """The network, its weights from the cache's file STEM-DIGEST.pt if it is there, else trained in place and put there."""
    folder = Path(cache or os.environ.get("FASTNCE_CACHE") or Path.home() / ".cache" / "fastnce")
    path = folder / f"{stem}-{recipe.digest()}.pt"

    def built() -> Network:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            network = build(recipe.num_features, recipe.base_channels)
        network.name = name
        return network

    network = built()
    if path.is_file():
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return network.eval().requires_grad_(False)
        except Exception as error:  # whatever a damaged file makes torch raise
            warnings.warn(f"{path}: not readable ({error}); training again.", stacklevel=3)
            network = built()
    train(network)
    try:
        with atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
    except UserError as error:
        warnings.warn(f"The network will be trained anew each time: {error}", stacklevel=3)
    return network.eval().requires_grad_(False)


def _fit(
    network: nn.Module, loss: Callable[[int], Tensor], recipe: _Recipe, name: str, progress: bool
) -> None:
    steps, rate = recipe.steps, recipe.learning_rate
    fit(network, loss, name, steps=steps, learning_rate=rate, progress=progress)


def fit(
    network: nn.Module,
    loss: Callable[[int], Tensor],
    name: str,
    *,
    steps: int,
    learning_rate: float,
    progress: bool,
) -> None:
    """Trains in place: AdamW on `loss(step)`, the learning rate rising and falling once.

    Runs on one thread: so the weights do not depend on the number of cores, and a busy machine
    does not make a small network wait for its second thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        network.train()
        for step in tqdm(
            range(steps), name, disable=None if progress else True, dynamic_ncols=True
        ):
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)


def _random_affine(images: Tensor, rng: np.random.Generator, max_shift: float = 2) -> np.ndarray:
    """Turns by up to 10 degrees, scales by up to 10 %, shifts by up to `max_shift` pixels; (N, H, W) float32.

    0 is where nothing is: that is what moves in at the edges.
    """
    u = torch.from_numpy(2 * rng.random((len(images), 4), dtype=np.float32) - 1)
    angle, scale = u[:, 0] * np.deg2rad(10), 1 + 0.1 * u[:, 1]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = u[:, 2:] * (2 * max_shift / images.shape[-1])
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, (len(images), 1, *images.shape[1:]), align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0].numpy()


def _trunk(
    channels: int, layers: Iterable[tuple[int, int, int]], num_features: int
) -> nn.Sequential:
    """Convolutions (channels, kernel, stride), each with batch norm and ReLU, to a map of 4x4; a linear layer and ReLU."""
    trunk = nn.Sequential()
    for width, kernel, stride in layers:
        conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        trunk.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    return trunk.extend([nn.Flatten(), nn.Linear(channels * 16, num_features), nn.ReLU()])
