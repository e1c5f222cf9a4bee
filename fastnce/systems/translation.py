"""Shared by the systems that translate images: options, networks, and the parts of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import PatchDiscriminator, ResnetGenerator
from fastnce.networks.layers import init_default, init_xavier
from fastnce.systems import options
from fastnce.systems.adversarial import at_least_fp32
from fastnce.systems.system import TrainConfig


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig(TrainConfig):
    """Options of the systems that train a generator of images with Adam, at a rate that falls at the end."""

    epochs: int = 200
    """Epochs at the full learning rate."""
    decay_epochs: int = 200
    """Further epochs in which the learning rate falls linearly towards 0."""
    steps: int | None = None
    """Stop after this many steps; by default after epochs + decay_epochs."""
    load_size: int = 286
    """Images are scaled to this size before the crop."""
    crop_size: int = 256
    """Size of the random crop."""
    base_channels: int = 64
    """Generator: channels after the first layer."""
    disc_channels: int = 64
    """Discriminator: channels of the first layer."""
    lr: float = 2e-4
    """Adam: learning rate of generators and discriminators."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 0, "epochs", "decay_epochs")
        options.at_least(self, 1, "load_size", "crop_size", "base_channels", "disc_channels")
        options.above_zero(self, "lr")
        options.in_unit_interval(self, "beta1", "beta2")
        if self.epochs + self.decay_epochs == 0:
            raise UserError("epochs=0 and decay_epochs=0 leave nothing to train. Use epochs >= 1.")


@dataclass(frozen=True, kw_only=True)
class TranslationConfig(GeneratorConfig):
    """Options of the systems that translate images."""

    data: Path | None = None
    """Folder with trainA and trainB, and testA and testB for the sample grids; required, or data_a and data_b."""
    data_a: Path | None = None
    """Instead of data, with data_b: folder of the training images of A, wherever it is."""
    data_b: Path | None = None
    """Folder of the training images of B."""
    test_a: Path | None = None
    """With data_a and data_b: folder of the test images of A; without it, sample grids show training images."""
    test_b: Path | None = None
    """Folder of the test images of B, to go with test_a."""
    batch_size: int = 1
    """Images of each domain per step."""
    load_size: int = 286
    """Images are scaled to this size before the crop; in the decay epochs to crop_size."""
    preprocess: str = "resize_and_crop"
    """Steps before the network, joined by _and_: resize, fixsize, scale_width, scale_shortside, zoom, crop, patch, trim or none."""
    bits: Literal[8, 16] = 8
    """Bits of a channel that are read and written; 16 for greyscale images only."""
    value_range: tuple[float, float] | None = None
    """LOW HIGH: the files' numbers that stand for black and white, where they are not of 8 bits or use all of 16; results are
    written in these numbers."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    augment_a: Literal["none", "affine"] = "none"
    """affine: turn, scale and shift the images of A slightly."""
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    """Which domain is translated to which."""
    serial: bool = False
    """Read both folders in order instead of shuffling A and drawing from B."""
    cache_gb: float = 2.0
    """Memory for decoded images in GiB, shared out among the workers."""
    extractor: Path | None = None
    """TorchScript file, or torch-fidelity, whose features measure the translations (FID and others); a digits-photos set has
    its own."""

    in_channels: int = 3
    """Channels of the images of A: 3 for RGB, 1 for grey."""
    out_channels: int = 3
    """Channels of the images of B and of the translations."""
    disc_antialias: bool = True
    """Discriminator: blur before downsampling; with it off, strided convolutions (patch)."""
    disc_layers: int = 3
    """Discriminator: downsampling layers (patch)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_range is not None:
            from fastnce.data.images import check_value_range

            check_value_range(self.value_range)
        options.at_least(self, 0, "cache_gb")
        options.at_least(self, 1, "in_channels", "out_channels", "disc_layers")
        self._check_folders()

    def _check_folders(self) -> None:
        names = ("data_a", "data_b", "test_a", "test_b")
        apart = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.data is not None and apart:
            name, folder = next(iter(apart.items()))
            raise UserError(
                f"data={self.data} holds all folders, and {name}={folder} names one of them. Give data, or data_a and data_b."
            )
        needed = ["data_a", "data_b"] if apart else []
        if {"test_a", "test_b"} & apart.keys():
            needed += ["test_a", "test_b"]
        for name in needed:
            if name not in apart:
                raise UserError(f"{name} is missing beside {', '.join(apart)}. Give both folders.")

    @property
    def folders(self) -> Path | dict[str, Path]:
        """Where the images are: the folder with trainA and the like, or these by name where each was named."""
        if self.data is not None:
            return self.data
        named = {
            "trainA": self.data_a,
            "trainB": self.data_b,
            "testA": self.test_a,
            "testB": self.test_b,
        }
        found = {name: folder for name, folder in named.items() if folder is not None}
        if not found:
            raise UserError("data is missing. Give data, or data_a and data_b.")
        return found


@dataclass(frozen=True, kw_only=True)
class UnpairedConfig(TranslationConfig):
    """The options of CUT's networks, which CycleGAN and DCLGAN have once for each direction."""

    generator: Literal["resnet", "stylegan2"] = "resnet"
    """Generator: resnet, or stylegan2 as in SinCUT."""
    num_blocks: int = 9
    """Generator: residual blocks."""
    antialias: bool = True
    """Generator: blur before downsampling (resnet)."""
    antialias_up: bool = True
    """Generator: upsample with a filter; with it off, transposed convolutions (resnet)."""
    discriminator: Literal["patch", "stylegan2"] = "patch"
    """Discriminator: patch, or stylegan2 as in SinCUT."""
    disc_norm: Literal["instance", "none"] = "instance"
    """Discriminator: normalisation (patch)."""
    init_gain: float | None = 0.02
    """Gain of the Xavier initialisation of all networks but stylegan2; None: PyTorch's own, with which short runs start faster."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "num_blocks")
        options.above_zero(self, "init_gain")
        if self.generator == "stylegan2" and self.num_blocks % 2:
            raise UserError(
                f"num_blocks={self.num_blocks} are shared by encoder and decoder of generator=stylegan2. Use an even number."
            )


def build_generator(config: UnpairedConfig) -> nn.Module:
    """The generator that `config` describes, freshly initialised."""
    channels = (config.in_channels, config.out_channels, config.base_channels, config.num_blocks)
    if config.generator == "stylegan2":
        from fastnce.networks import StyleGAN2Generator

        return StyleGAN2Generator(*channels)
    return ResnetGenerator(*channels, config.antialias, config.antialias_up)


def build_discriminator(config: UnpairedConfig, image_size: tuple[int, int] | None) -> nn.Module:
    """The discriminator that `config` describes, freshly initialised, for images of `image_size` (height, width)."""
    if config.discriminator == "stylegan2":
        from fastnce.networks import StyleGAN2Discriminator

        height, width = image_size or (0, 0)
        if height != width or height < 8 or height & (height - 1):
            raise UserError(
                f"discriminator=stylegan2 judges squares of a power of two from 8 on, but the images are {height}x{width}. "
                "Use crop_size=64, or discriminator=patch."
            )
        return StyleGAN2Discriminator(config.out_channels, config.disc_channels, image_size=height)
    return PatchDiscriminator(
        config.out_channels,
        config.disc_channels,
        config.disc_layers,
        antialias=config.disc_antialias,
        norm=config.disc_norm,
    )


def initialise(network: nn.Module, gain: float | None) -> None:
    """Xavier-normal weights with `gain` in every plain convolution and linear layer, or PyTorch's own for None.

    The layers of the stylegan2 networks are of classes of their own and keep their initialisation.
    """
    if gain is None:
        init_default(network)
    else:
        init_xavier(network, gain)


def adam(config: GeneratorConfig, *networks: nn.Module, **how: Any) -> torch.optim.Adam:
    """The optimiser of generators or discriminators; `how` are values of its parameters' group that differ.

    `decays=False` keeps the learning rate where those of others fall.
    """
    parameters = [parameter for network in networks for parameter in network.parameters()]
    values = {"lr": config.lr, "betas": (config.beta1, config.beta2)} | how
    return torch.optim.Adam([{"params": parameters, **values}], fused=True)


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of the optimisers down the gradient of `loss`."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def together(
    network: Callable[[Tensor], Tensor], one: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """`network` of both batches: of images of one size in one pass, as instance norm keeps images apart, else in two."""
    if one.shape[1:] == other.shape[1:]:
        first, second = network(torch.cat([one, other])).split([len(one), len(other)])
        return first, second
    return network(one), network(other)


def images_of_one_size(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The images "A" and "B" of a batch; raises `UserError` if they differ in number, height or width."""
    a, b = batch["A"], batch["B"]
    if (len(a), *a.shape[2:]) != (len(b), *b.shape[2:]):
        raise UserError(
            f"the images of A and B differ in shape, {tuple(a.shape)} and {tuple(b.shape)}. "
            "Use preprocess=resize_and_crop, or another that makes them the same size."
        )
    return a, b


def l1(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference, in fp32 or more."""
    return F.l1_loss(at_least_fp32(one), at_least_fp32(other))


# Luma of ITU-R BT.601. It keeps the range [-1, 1], because the weights add up to 1.
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114


def can_convert(source: int, target: int) -> bool:
    """Whether `convert_channels` turns images of `source` channels into images of `target` channels."""
    return source == target or {source, target} == {1, 3}


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """RGB as grey, grey as RGB, or the images themselves; differentiable.

    Grey is the luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), RGB the same grey three times.

    Args:
        images: (N, C, H, W), C = 1 or 3, or already `channels`.
        channels: 1 or 3.

    Returns:
        (N, channels, H, W).

    Raises:
        ValueError: any other pair of numbers.

    Examples:
        >>> import torch
        >>> convert_channels(torch.zeros(2, 3, 8, 8), 1).shape
        torch.Size([2, 1, 8, 8])
    """
    given = images.shape[1]
    if given == channels:
        return images
    if not can_convert(given, channels):
        raise ValueError(
            f"convert_channels: images have {given} channels, expected {channels}; only 1 and 3 turn into each other. "
            "Use the same number of channels for both."
        )
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.split(1, dim=1)
    return _RED * red + _GREEN * green + _BLUE * blue


def input_channels(network: nn.Module) -> int | None:
    """The channels that a network's first convolution sees; None for a module of one's own without any."""
    return next((p.shape[1] for p in network.parameters() if p.ndim == 4), None)


def in_direction(
    generator: nn.Module, config: TranslationConfig, direction: str | None
) -> tuple[nn.Module, int]:
    """The part of a generator that translates from one domain to the other, and the channels of its input.

    `direction` is "AtoB" or "BtoA", the names of the data's folders; None: as in the run, whose configuration is `config`.
    """
    if direction is None or direction == config.direction:
        return getattr(generator, "a_to_b", generator), config.in_channels
    if not hasattr(generator, "b_to_a"):
        raise UserError(
            f"direction={direction}: this generator translates {config.direction} alone. Leave direction out, name a run "
            "of a system of both directions, or the weights file of the other generator."
        )
    return generator.b_to_a, config.out_channels
