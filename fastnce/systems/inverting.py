"""Inverting images into the latent space of a generator, by small steps: the loop of ReStyle, and encoder bootstrapping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.systems.translation import input_channels


class Step(NamedTuple):
    """One step of an inversion."""

    image: Tensor
    """(B, C, S, S): the reconstruction, as the generator makes it."""
    seen: Tensor
    """(B, C, H, W): the same at the encoder's size, for losses and for the next step."""
    latent: Tensor
    """(B, k, D): the generator's styles."""


def at_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (B, C, S, S) at the encoder's size (H, W): averaged to a square of the longer side, its middle kept.

    Average pooling repeats the pixels of a smaller image. Of 192 x 256 (cars) rows 32 to 223 of 256 are kept.
    """
    side = max(size)
    top, left = ((side - length) // 2 for length in size)
    pooled = F.adaptive_avg_pool2d(image, (side, side))
    return pooled[..., top : top + size[0], left : left + size[1]]


@torch.no_grad()
def average_image(generator: nn.Module, size: tuple[int, int]) -> Tensor:
    """The image of the mean latent with the fixed noise, (1, C, H, W), at the encoder's `size` (H, W)."""
    latent = generator.latent_avg.expand(1, generator.num_styles, -1)
    return at_size(generator(latent, noise="fixed"), size)


def average_start(generator: nn.Module, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where an inversion begins: w_0 (1, k, D), the mean latent, and y_0, its `average_image`."""
    latent = generator.latent_avg.detach().expand(1, generator.num_styles, -1)
    return latent, average_image(generator, size)


def iterate(
    encoder: nn.Module,
    generator: nn.Module,
    x: Tensor,
    *,
    steps: int,
    start: tuple[Tensor, Tensor] | None = None,
    noise: str = "fixed",
) -> Iterator[Step]:
    """The steps of an inversion, as many as are asked for:

        w_t = w_{t-1} + E(cat(x, y_{t-1})),   y_t = pool(G(w_t)),   t = 1..steps

    w_{t-1} and y_{t-1} are detached, so that the graph of a step ends where it began: a training calls `backward` on each step's
    loss before it asks for the next. An encoder of as many channels as x has does not see y, and makes one step.

    Source: Alaluf et al., "ReStyle: A Residual-Based StyleGAN Encoder via Iterative Refinement", ICCV 2021.

    Args:
        encoder: (B, 2 C, H, W) -> (B, k, D); see `fastnce.networks.restyle_encoder`.
        generator: see `fastnce.networks.style_generator`.
        x: images (B, C, H, W) in [-1, 1] at the encoder's size.
        steps: how many; also more or fewer than trained with.
        start: w_0 (1 or B, k, D) and y_0 (1 or B, C, H, W), by default `average_start`.
        noise: "fixed" or "random", of the generator.

    Raises:
        ValueError: images of other channels, a start of another shape, or several steps of an encoder that does not see y.
    """
    if start is None:
        start = average_start(generator, (x.shape[2], x.shape[3]))
    channels, seen = x.shape[1], input_channels(encoder)
    if start[1].shape[1:] != x.shape[1:]:
        raise ValueError(
            f"iterate: x: expected images of {tuple(start[1].shape[1:])} as the start has, got {tuple(x.shape[1:])}."
        )
    if seen not in (None, channels, 2 * channels):
        raise ValueError(
            f"iterate: the encoder takes {seen} channels, and images of {channels} need {2 * channels} with the reconstruction "
            f"beside them, or {channels} for one step. Use an encoder of {2 * channels}."
        )
    if seen == channels and steps > 1:
        raise ValueError(
            f"iterate: steps={steps}, but the encoder takes the {channels} channels of the image alone and would start again "
            "from the average each time. Use steps=1."
        )
    return _steps(encoder, generator, x, steps, start, noise, alone=seen == channels)


def _steps(
    encoder: nn.Module,
    generator: nn.Module,
    x: Tensor,
    steps: int,
    start: tuple[Tensor, Tensor],
    noise: str,
    alone: bool,
) -> Iterator[Step]:
    latent, seen = (tensor.expand(len(x), *tensor.shape[1:]) for tensor in start)
    for _ in range(steps):
        delta = encoder(x if alone else torch.cat([x, seen], dim=1))
        if delta.shape != latent.shape:
            raise ValueError(
                f"iterate: the encoder gives latents {tuple(delta.shape)}, and the generator's are {tuple(latent.shape)}. "
                "Use an encoder of the generator's number of styles."
            )
        latent = latent + delta
        image = generator(latent, noise=noise)
        seen = at_size(image, (x.shape[2], x.shape[3]))
        yield Step(image, seen, latent)
        latent, seen = latent.detach(), seen.detach()


class Inverter(nn.Module):
    """An encoder and the generator whose latents it finds: what a run of ReStyle leaves. x (B, C, H, W) -> the `Step`s.

    With an e4e head the state dict holds its stage, so that styles that were not learned yet are not used.
    """

    def __init__(self, encoder: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.encoder, self.generator = encoder, generator
        if getattr(encoder, "head", None) == "e4e":
            self.register_buffer("stage", torch.tensor(encoder.stage))
            self.register_load_state_dict_post_hook(lambda module, _: module.set_stage())

    def set_stage(self, stage: int | None = None) -> None:
        """The stage of an e4e head: this one, or None: that of the buffer `stage`, where it was copied from another network."""
        if hasattr(self, "stage"):
            if stage is not None:
                self.stage.fill_(stage)
            self.encoder.stage = int(self.stage)

    def forward(self, x: Tensor, steps: int = 5) -> list[Step]:
        return list(iterate(self.encoder, self.generator, x, steps=steps))


def bootstrap(
    first: nn.Module, second: nn.Module, x: Tensor, steps: int, *, first_steps: int = 1
) -> Iterator[Step]:
    """Encoder bootstrapping: `first_steps` of one model, then `steps` of another that start from the latent and the image reached.

    The second model's generator is a fine-tuned copy of the first's, with the same latent space; its mean latent is not used.
    More than one step tends back to the photograph.

    Args:
        first: an `Inverter`, or what has `encoder` and `generator`.
        second: likewise.
        x: images (B, C, H, W) in [-1, 1].
        steps: of the second model.
        first_steps: of the first.

    Yields:
        The `first_steps + steps` steps.

    Raises:
        ValueError: as `iterate`, and where the two models' latents or channels differ.
    """
    step = None
    for step in iterate(first.encoder, first.generator, x, steps=first_steps):
        yield step
    if step is None:
        raise ValueError(f"bootstrap: first_steps={first_steps} must be at least 1.")
    start = (step.latent.detach(), step.seen.detach())
    yield from iterate(second.encoder, second.generator, x, steps=steps, start=start)
