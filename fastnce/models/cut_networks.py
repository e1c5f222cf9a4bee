"""The networks that the options of CUT, CycleGAN and DCLGAN describe."""

from __future__ import annotations

import torch
from torch import nn

from fastnce.errors import UserError
from fastnce.models.cut_config import CUTConfig
from fastnce.models.dclgan_config import DCLGANConfig
from fastnce.models.translation_config import UnpairedConfig
from fastnce.networks import PatchDiscriminator, ResnetGenerator
from fastnce.networks.layers import init_default, init_xavier


def build_generator(config: UnpairedConfig) -> nn.Module:
    """The generator that `config` describes, freshly initialised."""
    channels = (config.in_channels, config.out_channels, config.base_channels, config.num_blocks)
    if config.generator == "stylegan2":
        from fastnce.networks import StyleGAN2Generator

        return StyleGAN2Generator(*channels)
    return ResnetGenerator(*channels, config.antialias, config.antialias_up)


def build_discriminator(config: UnpairedConfig, image_size: tuple[int, int] | None) -> nn.Module:
    """The discriminator that `config` describes, freshly initialised, for images of `image_size` (height, width).

    Raises:
        UserError: stylegan2, which is made for one size, does not fit `image_size`.
    """
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


def feature_shapes(
    config: CUTConfig | DCLGANConfig, image_size: tuple[int, int] | None
) -> list[tuple[int, int, int]]:
    """(C, H, W) of the feature maps that `nce_layers` name, found without computing anything.

    Raises:
        UserError: layers that the generator does not have.
    """
    with torch.device("meta"):
        generator = build_generator(config)
        image = torch.empty(1, config.in_channels, *(image_size or (256, 256)))
    try:
        return [tuple(feature.shape[1:]) for feature in generator.encode(image, config.nce_layers)]
    except ValueError as error:
        hint = str(error)
        if isinstance(generator, ResnetGenerator):
            first = generator.first_block
            hint = (
                f"must be ascending, distinct layers of the generator, from 0 to {len(generator.model) - 1}; its "
                f"{config.num_blocks} residual blocks are the layers {first} to {first + config.num_blocks - 1}."
            )
        raise UserError(f"nce_layers={config.nce_layers}: {hint}") from error
