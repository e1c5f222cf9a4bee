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
from fastnce.demo.mosaics import Parts, mosaic
from fastnce.demo.sets import random_crop

CRITIC, JUDGE, SEGMENTER = "critic.pt", "judge.pt", "segmenter.pt"

# Side of the critic's crops: whole textures, as small as the smallest images.
CRITIC_CROP = 32

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
    """Which texture each pixel shows: one strided 5x5 convolution, then dilated ones with shortcuts at half the size.

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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] to the first and the last maps, (N, C, h, w) and (N, 2 C, h, w)."""
        first = self.stem(images)
        later = first
        for block in self.blocks:
            later = later + block(later)
        return first, self.last(later)

    def logits(self, images: Tensor) -> Tensor:
        """The same images to one logit for each texture at each pixel, (N, classes, H, W)."""
        coarse = self.head(self(images)[1])
        return F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=False)


class _Features(nn.Module):
    """A judge's maps, averaged over the positions and divided by one number: features for FID."""

    def __init__(self, judge: TextureJudge) -> None:
        super().__init__()
        self.judge = judge
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        first, last = self.judge(images.float() / 127.5 - 1)
        return torch.cat([first.mean((2, 3)), last.mean((2, 3))], 1) / self.scale


class _Segmenter(nn.Module):
    def __init__(self, judge: TextureJudge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        coarse = self.judge.head(self.judge(x)[1])
        return F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)


def write_networks(
    folder: Path, parts: Sequence[Parts], size: int, recipe: TextureRecipe, progress: bool = True
) -> dict[str, Any]:
    """Trains the networks of a set and writes them, in TorchScript, beside its images.

    - `critic.pt`, from (N, 3, H, W) in [-1, 1] to maps of 16, 32, 64 and 96 channels at 1, 1/2, 1/4 and 1/8 of the size: trained to
      tell the textures of crops of the training parts apart. It stands in for VGG.
    - `judge.pt`, from (N, 3, H, W) uint8 to 96 features, for FID; `segmenter.pt`, from the same to one logit for each texture at each
      pixel. Both are one network, trained on mosaics of the judges' parts; the features of those have a variance of 1 on average.

    So that colours alone do not tell, half of the images are recoloured or grey.

    Args:
        folder: where to write.
        parts: of each texture.
        size: side of the mosaics in pixels.
        recipe: how they are trained.
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
        return F.cross_entropy(critic.logits(_recoloured(images, rng)), textures)

    def judge_loss(step: int) -> Tensor:
        rng = counter_rng(recipe.seed, _JUDGE_STREAM, step)
        images, textures = _mosaics(middle, recipe.judge_batch, size, rng)
        return F.cross_entropy(judge.logits(_recoloured(images, rng)), textures)

    rate = {"learning_rate": recipe.learning_rate, "progress": progress}
    fit(critic, critic_loss, "critic", steps=recipe.critic_steps, **rate)
    fit(judge, judge_loss, "judge", steps=recipe.judge_steps, **rate)
    critic.eval().requires_grad_(False)
    judge.eval().requires_grad_(False)

    rng = counter_rng(recipe.seed, _TEST_STREAM, 0)
    features = _Features(judge)
    seen = _mosaics(middle, 256, size, rng)[0]
    features.scale.copy_(features((seen + 1) * 127.5).var(0).mean().sqrt())
    for name, network in ((CRITIC, critic), (JUDGE, features), (SEGMENTER, _Segmenter(judge))):
        _save(network.eval(), folder / name)
    share = {
        CRITIC: _share(critic.logits, *_crops(test, 256, min(CRITIC_CROP, size), rng)),
        SEGMENTER: _share(judge.logits, *_mosaics(test, 64, size, rng)),
    }
    return {"networks": {name: {"test_accuracy": value} for name, value in share.items()}}


def _layer(
    before: int, after: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def _crops(
    textures: Sequence[np.ndarray], count: int, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) in [-1, 1], half of them mirrored, and their textures (N,)."""
    chosen = rng.integers(len(textures), size=count)
    images = [random_crop(textures[texture], size, rng)[0] for texture in chosen]
    mirrored = [x[:, ::-1] if rng.random() < 0.5 else x for x in images]
    return to_batch(mirrored), torch.from_numpy(chosen)


def _mosaics(
    textures: Sequence[np.ndarray], count: int, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(N, 3, size, size) in [-1, 1] and the texture of each pixel (N, size, size), of mosaics of one to eight cells."""
    images, labels = [], []
    for _ in range(count):
        image, cell, told = mosaic(textures, size, int(rng.integers(1, 9)), rng)
        images.append(image)
        labels.append(np.array([one["texture"] for one in told])[cell])
    return to_batch(images), torch.from_numpy(np.stack(labels))


def _recoloured(images: Tensor, rng: np.random.Generator) -> Tensor:
    """A quarter of the images in grey, a quarter with other contrast and brightness in each channel, the rest as they are."""
    kind = torch.from_numpy(rng.integers(4, size=len(images)))[:, None, None, None]
    grey = images.mean(1, keepdim=True).expand_as(images)
    gain = torch.from_numpy(rng.uniform(0.6, 1.4, (len(images), 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.4, 0.4, (len(images), 3, 1, 1)).astype(np.float32))
    other = (images * gain + shift).clamp(-1, 1)
    return torch.where(kind == 0, grey, torch.where(kind == 1, other, images))


@torch.no_grad()
def _share(logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of labels that have the largest logit."""
    return (logits(images).argmax(1) == labels).double().mean().item()


def _save(network: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        # torch.export is to replace TorchScript, but the extractors of other people are such files.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network).save(str(path))
