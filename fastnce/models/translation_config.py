"""Options that the systems for image translation share: networks and optimisers, and the patchwise contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastnce.models import options

Negatives = Literal["image", "batch", "queue", "image+queue"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Generator, discriminator and their Adam optimisers. The defaults are the published CUT's.

    A system's configuration inherits from it and calls `NetworkConfig.__post_init__(self)` in its own.
    """

    in_channels: int = 3
    """Channels of the images of A: 3 for RGB, 1 for grey."""
    out_channels: int = 3
    """Channels of the images of B and of the translations."""
    generator: Literal["resnet", "stylegan2"] = "resnet"
    """Generator: resnet, or stylegan2 as in SinCUT."""
    base_channels: int = 64
    """Generator: channels after the first layer."""
    num_blocks: int = 9
    """Generator: residual blocks (resnet)."""
    antialias: bool = True
    """Generator: blur before downsampling (resnet)."""
    discriminator: Literal["patch", "stylegan2"] = "patch"
    """Discriminator: patch, or stylegan2 as in SinCUT."""
    disc_antialias: bool = True
    """Discriminator: blur before downsampling; with it off, strided convolutions (patch)."""
    disc_channels: int = 64
    """Discriminator: channels of the first layer."""
    disc_layers: int = 3
    """Discriminator: downsampling layers (patch)."""
    disc_norm: Literal["instance", "none"] = "instance"
    """Discriminator: normalisation (patch)."""
    init_gain: float | None = 0.02
    """Gain of the Xavier initialisation of all networks but stylegan2; None: PyTorch's own, with which short runs start faster."""
    lr: float = 2e-4
    """Adam: learning rate of all networks."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "in_channels", "out_channels", "base_channels", "num_blocks")
        options.at_least(self, 1, "disc_channels", "disc_layers")
        options.above_zero(self, "lr")
        if self.init_gain is not None:
            options.above_zero(self, "init_gain")
        options.in_unit_interval(self, "beta1", "beta2")
        options.one_of(self, "generator", ("resnet", "stylegan2"))
        options.one_of(self, "discriminator", ("patch", "stylegan2"))
        options.one_of(self, "disc_norm", ("instance", "none"))
        options.one_of(self, "precision", ("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class PatchContrastConfig:
    """The patchwise contrastive loss. The defaults are the published CUT's.

    A system's configuration inherits from it and calls `PatchContrastConfig.__post_init__(self)` in its own.
    """

    nce_layers: tuple[int, ...] = (0, 4, 8, 12, 16)
    """Generator layers whose features are compared; 0 is the padded image itself."""
    num_patches: int = 256
    """Patches per image and layer; 0: all positions."""
    projector: Literal["mlp", "none"] = "mlp"
    """What the patches pass before they are compared: a small trained MLP per layer, or nothing."""
    projection_dim: int = 256
    """Width of the MLPs."""
    temperature: float = 0.07
    """Temperature of the contrastive loss."""
    negatives: Negatives = "image"
    """Which patches are negatives. image: others of the same image; batch: others of all images of the batch; queue: those of
    earlier images only; image+queue: others of the same image and those of earlier images."""
    queue_size: int = 4096
    """Patches of earlier images that each layer keeps, with a queue among the negatives."""
    backend: str | None = None
    """Backend of the contrastive ops; by default the fastest that runs here."""

    def __post_init__(self) -> None:
        options.at_least(self, 1, "projection_dim", "queue_size")
        options.at_least(self, 0, "num_patches")
        options.above_zero(self, "temperature")
        options.one_of(self, "projector", ("mlp", "none"))
        options.one_of(self, "negatives", get_args(Negatives))
