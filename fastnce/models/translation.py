"""What CycleGAN, pix2pix and DCLGAN share: options, and the parts of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.models import options
from fastnce.models.gan import GANMode, at_least_fp32
from fastnce.networks.layers import init_default, init_xavier


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """The options of CycleGAN, pix2pix and DCLGAN that mean the same in each, named as in `CUTConfig`."""

    in_channels: int = 3
    """Channels of the images of A: 3 for RGB, 1 for grey."""
    out_channels: int = 3
    """Channels of the images of B."""
    base_channels: int = 64
    """Generator: channels after the first layer."""
    disc_antialias: bool = True
    """Discriminator: blur before downsampling; with it off, strided convolutions."""
    disc_channels: int = 64
    """Discriminator: channels of the first layer."""
    disc_layers: int = 3
    """Discriminator: downsampling layers."""
    gan_mode: GANMode = "lsgan"
    """Adversarial objective."""
    lr: float = 2e-4
    """Adam: learning rate of generators and discriminators."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "in_channels", "out_channels", "base_channels")
        options.at_least(self, 1, "disc_channels", "disc_layers")
        options.above_zero(self, "lr")
        options.in_unit_interval(self, "beta1", "beta2")
        options.one_of(self, "gan_mode", get_args(GANMode))
        options.one_of(self, "precision", ("fp32", "bf16"))


def initialise(gain: float | None, networks: Iterable[nn.Module]) -> None:
    """Xavier initialisation of that gain, or PyTorch's own for None."""
    for network in networks:
        if gain is None:
            init_default(network)
        else:
            init_xavier(network, gain)


def adam(config: TranslationConfig, *networks: nn.Module) -> torch.optim.Adam:
    """The optimiser of generators or discriminators."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.Adam(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), fused=True
    )


def autocast(config: TranslationConfig, device: torch.device) -> AbstractContextManager:
    """The precision in which networks run.

    A new context each time: autocast caches the weights it casts, and a copy that was made while a network was frozen must
    not serve a pass that needs gradients.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of the optimisers down the gradient of `loss`."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def images_of_one_size(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The images "A" and "B" of a batch.

    Raises:
        UserError: they differ in number, height or width.
    """
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
