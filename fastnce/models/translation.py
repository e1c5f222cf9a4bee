"""The parts of a training step that CycleGAN, pix2pix and DCLGAN share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.models.gan import at_least_fp32
from fastnce.models.translation_config import TranslationConfig


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


def together(
    network: Callable[[Tensor], Tensor], one: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """`network` of both batches: of images of one size in one pass, as instance norm keeps images apart, else in two."""
    if one.shape[1:] == other.shape[1:]:
        first, second = network(torch.cat([one, other])).split([len(one), len(other)])
        return first, second
    return network(one), network(other)


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
