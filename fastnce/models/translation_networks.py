"""The networks that a translation system's options describe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastnce.errors import UserError
from fastnce.models.translation_config import NetworkConfig
from fastnce.networks import PatchDiscriminator, ResnetGenerator
from fastnce.networks.layers import init_default, init_xavier


def build_generator(config: NetworkConfig, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The generator that `config` describes, from `in_channels` to `out_channels`, freshly initialised.

    Args:
        config: see `NetworkConfig`.
        image_size: (height, width) of the training images, on which the channels of stylegan2 depend; 256 by default.
    """
    if config.generator == "stylegan2":
        from fastnce.networks import StyleGAN2Generator

        return StyleGAN2Generator(
            config.in_channels,
            config.out_channels,
            config.base_channels,
            image_size=min(image_size or (256, 256)),
        )
    return ResnetGenerator(
        config.in_channels,
        config.out_channels,
        config.base_channels,
        config.num_blocks,
        config.antialias,
    )


def build_discriminator(
    config: NetworkConfig,
    image_size: tuple[int, int] | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """The discriminator that `config` describes, freshly initialised.

    Args:
        config: see `NetworkConfig`.
        image_size: (height, width) of the training images, for which stylegan2 is made; 256 by default.
        in_channels: channels of what it judges; by default `out_channels`.
    """
    channels = config.out_channels if in_channels is None else in_channels
    if config.discriminator == "stylegan2":
        from fastnce.networks import StyleGAN2Discriminator

        return StyleGAN2Discriminator(
            channels, config.disc_channels, image_size=min(image_size or (256, 256))
        )
    return PatchDiscriminator(
        channels,
        config.disc_channels,
        config.disc_layers,
        antialias=config.disc_antialias,
        norm=config.disc_norm,
    )


def initialise(network: nn.Module, gain: float | None) -> None:
    """Xavier-normal weights with `gain` in every plain convolution and linear layer, or PyTorch's own for None.

    Layers of the stylegan2 networks are of other classes and keep their unit-variance weights, which are scaled as they run.
    """
    if gain is None:
        init_default(network)
    else:
        init_xavier(network, gain)


def build_adam(config: NetworkConfig, network: nn.Module) -> torch.optim.Adam:
    """Adam on the weights of `network`."""
    return torch.optim.Adam(
        network.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )


def feature_shapes(
    config: NetworkConfig, layers: Sequence[int], image_size: tuple[int, int] | None = None
) -> list[tuple[int, int, int]]:
    """(C, H, W) of the generator's feature maps that `layers` name, found without computing anything.

    Raises:
        UserError: layers that the generator does not have.
    """
    with torch.device("meta"):
        generator = build_generator(config, image_size)
        image = torch.empty(1, config.in_channels, *(image_size or (256, 256)))
    try:
        return [tuple(feature.shape[1:]) for feature in generator.encode(image, layers)]
    except ValueError as error:
        raise UserError(f"nce_layers={tuple(layers)}: {_advice(config, generator)}") from error


def _advice(config: NetworkConfig, generator: nn.Module) -> str:
    if isinstance(generator, ResnetGenerator):
        first = generator.first_block
        return (
            f"must be ascending, distinct layers of the generator, from 0 to {len(generator.model) - 1}; its "
            f"{config.num_blocks} residual blocks are the layers {first} to {first + config.num_blocks - 1}."
        )
    return "must be ascending, distinct layers of the generator. Use such as 0,2,4."
