"""Networks of a set of textures: a small critic in the place of VGG, and what judges images, an architecture and crops of its own.

The critic is a stand-in: VGG19 has 12.9 million weights and learnt from 1.3 million photographs.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnce.data.stream import counter_rng
from fastnce.demo.judges import fit, to_batch
from fastnce.demo.mosaics import Part, Parts, mosaic

CRITIC, JUDGE, SEGMENTER = "critic.pt", "judge.pt", "segmenter.pt"

# Side of the critic's crops: whole textures, as small as the smallest images.
CRITIC_CROP = 32

# What the judge has to see beside the textures.
ALTERATIONS = ("as it is", "grey", "recoloured", "blurred", "noisy")

_CRITIC_STREAM, _JUDGE_STREAM, _TEST_STREAM = 70, 71, 72


@dataclass(frozen=True)
class TextureRecipe:
    """How the networks are trained.

    Attributes:
        critic_steps, judge_steps: optimiser steps.
        critic_batch, judge_batch: crops, and mosaics, in a step.
        learning_rate: peak of AdamW's.
        seed: of the weights and the images.
    """

    critic_steps: int = 400
    critic_batch: int = 64
    judge_steps: int = 400
    judge_batch: int = 16
    learning_rate: float = 4e-3
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """The numbers, for a set's recipe."""
        return asdict(self)


class TextureCritic(nn.Module):
    """A small network of VGG's kind: 3x3 convolutions and ReLU, halved by max-pooling.

    Args:
        classes: textures to tell apart.
        channels: of the maps, at 1, 1/2, 1/4, ... of the image's size.
    """

    def __init__(self, classes: int, channels: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.levels = nn.ModuleList([_layer(3, channels[0])])
        for before, after in zip(channels, channels[1:], strict=False):
            layers = nn.MaxPool2d(2), _layer(before, after), _layer(after, after)
            self.levels.append(nn.Sequential(*layers))
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] to a map (N, C, h, w) of each level."""
        maps: list[Tensor] = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def logits(self, images: Tensor) -> Tensor:
        """The same images to one logit for each texture, (N, classes)."""
        return self.head(self(images)[-1].mean((2, 3)))


class TextureJudge(nn.Module):
    """Which texture each pixel shows, and how the image was altered: one strided 5x5 convolution, then dilated ones with shortcuts at half the size.

    Args:
        classes: textures to tell apart.
        channels: of the first maps; the last ones have twice as many.
    """

    def __init__(self, classes: int, channels: int = 32) -> None:
        super().__init__()
        self.stem = _layer(3, channels, 5, stride=2)
        self.blocks = nn.ModuleList([_layer(channels, channels, dilation=d) for d in (1, 2, 4)])
        self.last = _layer(channels, 2 * channels, 1)
        self.head = nn.Conv2d(2 * channels, classes, 1)
        self.alteration = nn.Linear(3 * channels, len(ALTERATIONS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] to the first and the last maps, (N, C, h, w) and (N, 2 C, h, w)."""
        first = self.stem(images)
        later = first
        for block in self.blocks:
            later = later + block(later)
        return first, self.last(later)

    @torch.jit.export
    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same images to logits of the texture at each pixel, (N, classes, H, W), and of `ALTERATIONS`, (N, 5)."""
        first, last = self(images)
        coarse = F.interpolate(
            self.head(last), images.shape[2:], mode="bilinear", align_corners=False
        )
        return coarse, self.alteration(_averages(first, last))


def _averages(first: Tensor, last: Tensor) -> Tensor:
    """Of two maps, over the positions: (N, C + D)."""
    return torch.cat([first.mean((2, 3)), last.mean((2, 3))], 1)


class _Features(nn.Module):
    """A judge's maps, averaged over the positions and divided by one number: features for FID."""

    def __init__(self, judge: TextureJudge) -> None:
        super().__init__()
        self.judge = judge
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        first, last = self.judge(images.float() / 127.5 - 1)
        return _averages(first, last) / self.scale


class _Segmenter(nn.Module):
    """A judge's reading of each pixel."""

    def __init__(self, judge: TextureJudge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor) -> Tensor:
        return self.judge.logits(images.float() / 127.5 - 1)[0]


def write_networks(
    folder: Path,
    parts: Sequence[Parts],
    size: int,
    recipe: TextureRecipe,
    *,
    segmenter: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains the networks of a set and writes them, in TorchScript, beside its images.

    - `critic.pt`, from (N, 3, H, W) in [-1, 1] to maps of 16, 32, 64 and 96 channels at 1, 1/2, 1/4 and 1/8 of the size: trained to
      tell the textures of crops of the training parts apart. It stands in for VGG.
    - `judge.pt`, from (N, 3, H, W) uint8 to 96 features, for FID; `segmenter.pt`, from the same to one logit for each texture at each
      pixel. Both are one network, trained on mosaics of the judges' parts; the features of those have a variance of 1 on average.

    The critic learns from grey crops too, so that colours alone do not tell. The judge also has to tell images as they are from
    grey, recoloured, blurred and noisy ones: a network that only knows textures forgives wrong colours and a blur.

    Args:
        folder: where to write.
        parts: of each texture.
        size: side of the mosaics in pixels.
        recipe: how they are trained.
        segmenter: whether the set's labels are the textures, so that there is something to read.
        progress: shows a bar.

    Returns:
        {"networks": {file: {...}}}: how well they tell the textures of the test parts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        critic, judge = TextureCritic(len(parts)), TextureJudge(len(parts))
    train, middle, test = (list(each) for each in zip(*parts, strict=True))

    def critic_loss(step: int) -> Tensor:
        rng = counter_rng(recipe.seed, _CRITIC_STREAM, step)
        images, textures = _crops(train, recipe.critic_batch, min(CRITIC_CROP, size), rng)
        return F.cross_entropy(critic.logits(_greyed(images, rng)), textures)

    def judge_loss(step: int) -> Tensor:
        rng = counter_rng(recipe.seed, _JUDGE_STREAM, step)
        images, textures = _mosaics(middle, recipe.judge_batch, size, rng)
        altered, kinds = _altered(images, rng)
        logits, alterations = judge.logits(altered)
        return F.cross_entropy(logits, textures) + F.cross_entropy(alterations, kinds)

    rate = {"learning_rate": recipe.learning_rate, "progress": progress}
    fit(critic, critic_loss, "critic", steps=recipe.critic_steps, **rate)
    fit(judge, judge_loss, "judge", steps=recipe.judge_steps, **rate)
    critic.eval().requires_grad_(False)
    judge.eval().requires_grad_(False)

    rng = counter_rng(recipe.seed, _TEST_STREAM, 0)
    features = _Features(judge)
    seen = _mosaics(middle, 256, size, rng)[0]
    features.scale.copy_(features((seen + 1) * 127.5).var(0).mean().sqrt())
    _save(critic, folder / CRITIC)
    _save(features.eval(), folder / JUDGE)
    if segmenter:
        _save(_Segmenter(judge).eval(), folder / SEGMENTER)
    share = {
        CRITIC: _share(critic.logits, *_crops(test, 256, min(CRITIC_CROP, size), rng)),
        JUDGE: _share(lambda x: judge.logits(x)[0], *_mosaics(test, 64, size, rng)),
    }
    return {"networks": {name: {"test_accuracy": value} for name, value in share.items()}}


def _layer(
    before: int, after: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def _crops(
    textures: Sequence[Part], count: int, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) in [-1, 1], half of them mirrored, and their textures (N,)."""
    chosen = rng.integers(len(textures), size=count)
    images = [textures[texture].crop(size, rng)[0] for texture in chosen]
    mirrored = [x[:, ::-1] if rng.random() < 0.5 else x for x in images]
    return to_batch(mirrored), torch.from_numpy(chosen)


def _mosaics(
    textures: Sequence[Part], count: int, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) in [-1, 1] and the texture of each pixel (N, size, size), of mosaics of one to eight cells."""
    images, labels = [], []
    for _ in range(count):
        image, cell, told = mosaic(textures, size, int(rng.integers(1, 9)), rng)
        images.append(image)
        labels.append(np.array([one["texture"] for one in told])[cell])
    return to_batch(images), torch.from_numpy(np.stack(labels))


def _greyed(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A quarter of the images in grey."""
    return torch.where(_column(rng.random(len(images)) < 0.25), _grey(images), images)


def _altered(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) as they are or altered, and in which way, (N,): numbers of `ALTERATIONS`."""
    count = len(images)
    kind = rng.integers(len(ALTERATIONS), size=count)
    gain, shift = rng.uniform(0.6, 1.4, (count, 3)), rng.uniform(-0.4, 0.4, (count, 3))
    noise = rng.standard_normal(images.shape) * rng.uniform(0.05, 0.3, (count, 1, 1, 1))
    strength = _column(rng.uniform(0.3, 1, count))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    made = {
        "grey": _grey(images),
        "recoloured": images * _float(gain)[:, :, None, None] + _float(shift)[:, :, None, None],
        "blurred": images.lerp(blurred, strength),
        "noisy": images + _float(noise),
    }
    for number, name in enumerate(ALTERATIONS):
        if name in made:
            images = torch.where(_column(kind == number), made[name].clamp(-1, 1), images)
    return images, torch.from_numpy(kind)


def _grey(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True).expand_as(images)


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _column(values: np.ndarray) -> Tensor:
    """(N,) as (N, 1, 1, 1), float32 of numbers."""
    column = torch.from_numpy(values)[:, None, None, None]
    return column if column.dtype == torch.bool else column.float()


@torch.no_grad()
def _share(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of labels that have the largest logit."""
    return (logits(images).argmax(1) == labels).double().mean().item()


def _save(network: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        # torch.export is to replace TorchScript, but the extractors of other people are such files.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(path))
