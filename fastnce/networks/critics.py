"""Critics: networks whose feature maps of two images are compared. Each is `critic(images) -> [map, ...]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks.layers import (
    Conv3x3,
    FeatureLossInit,
    InstanceNorm,
    init_feature_loss,
    spectral_norm,
)
from fastnce.networks.resnet_encoder import RESNETS, ResNetEncoder
from fastnce.networks.weights import load_scripted, load_strictly, read_state_dict
from fastnce.ops import maps


class Critic(nn.Module):
    """Base of the critics: `critic(images) -> [map, ...]`, (N, 3, H, W) in [-1, 1] to maps (N, C_l, h_l, w_l), the largest first.

    Their weights have no gradient, and they stay in eval mode, unless `frozen` is False. Gradients flow to the images all the
    same; for images without gradient call it under `torch.no_grad()`.

    Attributes:
        names: of the maps.
        channels: C_l of each.
        frozen: whether the weights stay as they are.
    """

    def __init__(self, names: Sequence[str], channels: Sequence[int], *, frozen: bool) -> None:
        super().__init__()
        self.names = tuple(names)
        self.channels = list(channels)
        self.frozen = frozen

    def _settle(self) -> None:
        """The last step of a subclass's construction."""
        self.requires_grad_(not self.frozen)
        self.train()

    def train(self, mode: bool = True) -> Critic:
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor, depth: int | None = None) -> list[Tensor]:
        """All maps, or the first `depth`, computing nothing behind them."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"{type(self).__name__}: images must have shape (N, 3, H, W), got {tuple(images.shape)}."
            )
        return list(islice(self._maps(images), depth))

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        raise NotImplementedError


class PixelCritic(Critic):
    """The pixels themselves: square patches of sizes 4, 8 and 16, at every second, fourth and eighth pixel. No parameters.

    Maps (N, 3 * size^2, (H - size) // stride + 1, (W - size) // stride + 1); a position's channels are colour by colour, then row
    by row.

    Raises:
        ValueError: an image of less than 16 pixels on a side.

    Examples:
        >>> import torch
        >>> [tuple(x.shape) for x in PixelCritic()(torch.zeros(1, 3, 16, 24))]
        [(1, 48, 7, 11), (1, 192, 3, 5), (1, 768, 1, 2)]
    """

    SIZES: ClassVar[tuple[int, ...]] = (4, 8, 16)

    def __init__(self) -> None:
        names = [f"patches{size}" for size in self.SIZES]
        super().__init__(names, [3 * size**2 for size in self.SIZES], frozen=True)
        self._settle()

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        height, width = images.shape[2:]
        if min(height, width) < self.SIZES[-1]:
            raise ValueError(
                f"PixelCritic: images must have at least {self.SIZES[-1]} pixels on a side, got {height}x{width}."
            )
        for size in self.SIZES:
            stride = size // 2
            columns = F.unfold(images, size, stride=stride)  # (N, 3 * size^2, positions)
            yield columns.unflatten(2, (-1, (width - size) // stride + 1))


# The convolutions of VGG19, by their index in torchvision's `features`, and their channels; the first of each group is compared.
_VGG_GROUPS = (
    {0: 64},
    {2: 64, 5: 128},
    {7: 128, 10: 256},
    {12: 256, 14: 256, 16: 256, 19: 512},
    {21: 512, 23: 512, 25: 512, 28: 512},
)
_VGG_FIRST_OF_BLOCK = (5, 10, 19, 28)
_VGG_BEHIND = ("classifier.", "features.30.", "features.32.", "features.34.", "projection.")
_VGG_HELP = (
    "Expected torchvision's ImageNet weights of VGG19, vgg19-dcbb9e9d.pth from https://download.pytorch.org/models/, or a "
    "published F_q file; or choose another critic, such as pixel."
)


Normalization = Literal["none", "imagenet", "published"]


class VGG19Critic(Critic):
    """VGG19's maps relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1, of 64, 128, 256, 512 and 512 channels.

    Each has half the height and width of the one before, rounded down. Images are seen in [-1, 1] at their own size, as published,
    unless an option says otherwise.

    State-dict keys are those of the published encoder: `slice1.0.weight`, ..., the number being torchvision's in `features`, and
    the constants `mean` and `std`.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.

    Args:
        weights: torchvision's file, of which the classifier is left out, or a published `*_net_F_q.pth`. None: random weights,
            which compare nothing that VGG19 has learnt.
        normalize: "imagenet" brings images to what the weights were trained on: to [0, 1], minus ImageNet's mean, over its standard
            deviation. "published" is that option of the published code, which leaves them in [-1, 1] before.
        resize: images to 224x224, bilinearly.

    Raises:
        UserError: no such file, or one that holds something else.

    Examples:
        >>> import torch
        >>> [tuple(x.shape) for x in VGG19Critic(None)(torch.zeros(1, 3, 32, 48), depth=3)]
        [(1, 64, 32, 48), (1, 128, 16, 24), (1, 256, 8, 12)]
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, weights: Path | str | None, *, normalize: Normalization = "none", resize: bool = False
    ) -> None:
        if normalize not in get_args(Normalization):
            raise ValueError(
                f"VGG19Critic: normalize={normalize!r} must be one of {get_args(Normalization)}."
            )
        names = [f"relu{index}_1" for index in range(1, 6)]
        super().__init__(names, [64, 128, 256, 512, 512], frozen=True)
        self.normalize = normalize
        self.resize = resize
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        before = 3
        for number, group in enumerate(_VGG_GROUPS, 1):
            layers = nn.Sequential()
            for index, channels in group.items():
                if index in _VGG_FIRST_OF_BLOCK:
                    layers.add_module(str(index - 1), nn.MaxPool2d(2))
                layers.add_module(str(index), Conv3x3(before, channels))
                layers.add_module(str(index + 1), nn.ReLU())
                before = channels
            self.add_module(f"slice{number}", layers)
        if weights is not None:
            self._load(Path(weights))
        self._settle()

    def _load(self, path: Path) -> None:
        slices = {
            str(index): f"slice{number}.{index}"
            for number, group in enumerate(_VGG_GROUPS, 1)
            for index in group
        }
        state = {"mean": self.mean, "std": self.std}
        for name, x in read_state_dict(path, _VGG_HELP).items():
            if name.startswith(_VGG_BEHIND):
                continue
            kind, _, rest = name.partition(".")
            index, _, part = rest.partition(".")
            if kind == "encoder":
                name = rest
            elif kind == "features" and index in slices:
                name = f"{slices[index]}.{part}"
            state[name] = x
        load_strictly(self, state, path, _VGG_HELP)

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        if self.normalize != "none":
            unit = (images + 1) / 2 if self.normalize == "imagenet" else images
            images = (unit - self.mean) / self.std
        if self.resize:
            images = F.interpolate(images, (224, 224), mode="bilinear")
        if min(images.shape[2:]) < 16:
            raise ValueError(
                f"VGG19Critic: images must have at least 16 pixels on a side, got {images.shape[2]}x{images.shape[3]}."
            )
        x = maps.in_kernel_layout(images, 64)
        for number in range(1, 6):
            x = self.get_submodule(f"slice{number}")(x)
            yield x


class ResNetCritic(Critic):
    """A ResNet's maps: the image at 224x224, what the stem makes of it, and the four stages' results.

    Published with random weights only, whatever its option promised. A file has the field's names, `conv1.weight`, ...; its `fc` is
    left out.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        weights: a file; None: random weights.
        frozen: see `Critic`.

    Raises:
        UserError: no such file, or one that holds something else.
        ValueError: an unknown name.

    Examples:
        >>> import torch
        >>> [tuple(x.shape[1:]) for x in ResNetCritic("resnet18")(torch.zeros(1, 3, 32, 32))[:3]]
        [(3, 224, 224), (64, 56, 56), (64, 56, 56)]
    """

    SIZE: ClassVar[int] = 224

    def __init__(
        self, name: str, weights: Path | str | None = None, *, frozen: bool = True
    ) -> None:
        known = [key for key in RESNETS if key.startswith("resnet")]
        if name not in known:
            raise ValueError(f"ResNetCritic: name={name!r} must be one of {', '.join(known)}.")
        blocks, bottleneck = RESNETS[name]
        widths = [64 * 2**stage * (4 if bottleneck else 1) for stage in range(len(blocks))]
        stages = [f"layer{stage}" for stage in range(1, len(blocks) + 1)]
        super().__init__(["image", "stem", *stages], [3, 64, *widths], frozen=frozen)
        self.encoder = ResNetEncoder(blocks, bottleneck)
        if weights is not None:
            instead = f"Expected torchvision's weights of {name}."
            state = read_state_dict(weights, instead)
            state = {key: x for key, x in state.items() if not key.startswith("fc.")}
            load_strictly(self.encoder, state, Path(weights), instead)
        self._settle()

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        size = (self.SIZE, self.SIZE)
        images = F.interpolate(images, size, mode="bilinear", align_corners=True)
        yield images
        yield from self.encoder.stages(images)


class ConvEncoderCritic(Critic):
    """The image at `size` x `size`, and the results of five 3x3 convolutions of stride 2; to be trained, as published.

    They have 1, 2, 4, 8 and 8 times `base_channels`, no bias, spectral norm, instance norm and leaky ReLU 0.2. The published
    encoder of images below 256 pixels has one less: leave out the last map.

    Args:
        base_channels: of the first.
        size: of the image that it sees, resized bilinearly; at least 64.
        frozen: see `Critic`. Random weights otherwise.
        init: see `fastnce.networks.layers.init_feature_loss`.

    Examples:
        >>> import torch
        >>> [tuple(x.shape[1:]) for x in ConvEncoderCritic(8, size=64)(torch.zeros(1, 3, 32, 32))[:3]]
        [(3, 64, 64), (8, 32, 32), (16, 16, 16)]
    """

    def __init__(
        self,
        base_channels: int = 64,
        size: int = 256,
        *,
        frozen: bool = True,
        init: FeatureLossInit = "published",
    ) -> None:
        if base_channels < 1 or size < 64:
            raise ValueError(
                f"ConvEncoderCritic: base_channels={base_channels}, size={size}: expected at least 1 and 64."
            )
        widths = [3, *(base_channels * factor for factor in (1, 2, 4, 8, 8))]
        names = ["image", *(f"layer{index}" for index in range(1, 6))]
        super().__init__(names, widths, frozen=frozen)
        self.size = size
        for name, (before, after) in zip(names[1:], pairwise(widths), strict=True):
            conv = spectral_norm(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False))
            self.add_module(name, nn.Sequential(conv, InstanceNorm(slope=0.2)))
        init_feature_loss("ConvEncoderCritic", self, init)
        self._settle()

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        x = F.interpolate(images, (self.size, self.size), mode="bilinear")
        yield x
        for name in self.names[1:]:
            x = self.get_submodule(name)(x)
            yield x


class ScriptedCritic(Critic):
    """A network from a TorchScript file, from images in [-1, 1] to a list of maps.

    Its channels are found by a run on zeros.

    Args:
        file: as `torch.jit.save` wrote it. Use only files whose origin you trust.
        size: height and width of the zeros.

    Raises:
        UserError: no such file, no TorchScript module, or one that gives something else.
    """

    def __init__(self, file: Path | str, size: tuple[int, int] = (64, 64)) -> None:
        module, self.file = load_scripted("critic", file)
        channels = [x.shape[1] for x in _scripted_maps(module, torch.zeros(1, 3, *size), file)]
        super().__init__([f"map{i}" for i in range(len(channels))], channels, frozen=True)
        self.module = module
        self._settle()

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        yield from self.module(images)


def _scripted_maps(module: nn.Module, images: Tensor, file: Path | str) -> list[Tensor]:
    try:
        with torch.no_grad():
            result = module(images)
    except Exception as error:
        reason = " ".join(str(error).split())[-120:]
        raise UserError(
            f"critic {file}: fails on images of shape {tuple(images.shape)} ({reason}). It must take (N, 3, H, W) in [-1, 1]."
        ) from error
    whole = isinstance(result, list | tuple) and len(result) > 0
    if not whole or not all(isinstance(x, Tensor) and x.ndim == 4 for x in result):
        raise UserError(
            f"critic {file}: gives {type(result).__name__}, expected a list of maps (N, C, h, w). Save a network that returns its maps."
        )
    return list(result)
