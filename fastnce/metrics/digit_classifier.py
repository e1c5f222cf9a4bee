"""The network that judges generated digits: it reads them, and its last features compare them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnce.data.labelled import LabelledImages
from fastnce.data.recipe import read_labels
from fastnce.data.transforms import counter_rng
from fastnce.errors import UserError
from fastnce.metrics.distribution import as_saved, extract_features
from fastnce.metrics.trained import (
    conv_norm_relu,
    fit,
    load_or_train,
    random_affine,
    recipe_digest,
)

NUM_DIGITS = 10
# The classes of a digits set, by label.
DIGITS = tuple(map(str, range(NUM_DIGITS)))
SIZES = (16, 32)

_BATCH_STREAM = 60


@dataclass(frozen=True)
class DigitRecipe:
    """All that a digit classifier's weights depend on; its hash names the cached file."""

    data: str
    """Hash of the training images and their digits."""
    image_size: int
    """Height and width of the images: 16 or 32."""
    num_features: int = 64
    """Size of the features that FID and its relatives compare."""
    base_channels: int = 24
    """Channels of the first layer; the later ones have twice as many."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 64
    """Images in a step."""
    learning_rate: float = 4e-3
    """Peak learning rate of AdamW, reached after 30 % of the steps."""
    seed: int = 0
    """Seed of the weights and of the batches."""
    version: int = 1
    """Goes up when this file changes what a recipe gives."""

    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the recipe."""
        return recipe_digest(self)


class DigitClassifier(nn.Module):
    """Reads greyscale digits; also a feature extractor.

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
        if image_size not in SIZES:
            raise ValueError(
                f"DigitClassifier: image_size={image_size}: expected 16 or 32. "
                "Write the digits set at one of these sizes."
            )
        first, later = base_channels, 2 * base_channels
        self.trunk = nn.Sequential(
            conv_norm_relu(1, first, 3, image_size // 16),  # 16 x 16
            conv_norm_relu(first, later, 3, 2),  # 8 x 8
            conv_norm_relu(later, later, 3, 1),
            conv_norm_relu(later, later, 3, 2),  # 4 x 4
            nn.Flatten(),
            nn.Linear(later * 16, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, NUM_DIGITS)
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
    train = LabelledImages(data_root, image_size=size, channels=1, classes=DIGITS)
    images, digits = train.all_images()
    data = hashlib.sha256(images.numpy().tobytes() + digits.numpy().tobytes())
    recipe = DigitRecipe(data.hexdigest()[:12], size, **settings)
    return load_or_train(
        f"digit-classifier-{recipe.digest()}.pt",
        lambda: _build(recipe),
        lambda network: _train(network, recipe, images, digits, progress),
        cache=cache,
    )


def _train(
    network: DigitClassifier, recipe: DigitRecipe, images: Tensor, digits: Tensor, progress: bool
) -> None:
    batches = _batches(recipe, images, digits)

    def loss(step: int) -> Tensor:
        batch, labels = next(batches)
        return F.cross_entropy(network.logits(batch), labels)

    fit(network, loss, recipe.steps, recipe.learning_rate, "digit classifier", progress=progress)
    features = extract_features(as_saved(images), network.eval())
    network.scale.copy_(features.var(0).mean().sqrt())


def _batches(
    recipe: DigitRecipe, images: Tensor, digits: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images (N, 1, S, S) uint8, turned, scaled and shifted a little."""
    strokes = images[:, 0] / 255  # 0 where there is no ink
    for step in range(recipe.steps):
        rng = counter_rng(recipe.seed, _BATCH_STREAM, step)
        chosen = torch.from_numpy(rng.integers(len(digits), size=recipe.batch_size))
        moved = random_affine(strokes[chosen], rng, max_shift=recipe.image_size / 16)
        yield 2 * torch.from_numpy(moved)[:, None] - 1, digits[chosen]


def _build(recipe: DigitRecipe) -> DigitClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = DigitClassifier(recipe.image_size, recipe.num_features, recipe.base_channels)
    network.name = f"fastnce-digits-v{recipe.version}-{recipe.digest()}"
    return network
