"""The published CUT step in plain eager PyTorch: what ``fastnce.models.CUT`` is timed against.

Written from the equations and the published step's order, and sharing nothing with the package. The keys and the queries of both
contrastive terms have an encoder pass each, and D is called on the fake and on the real image apart. Positions are drawn on the
host, patches taken by index, F and the loss called layer after layer. Each network has an Adam of its own. In-place ReLUs, as published. State-dict
keys are the published ones, so that weights go from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import baselines

TAPS = (0, 4, 8, 12, 16)
_TAP_CHANNELS = (3, 128, 256, 256, 256)
_NUM_PATCHES = 256


def _filter(*row: float) -> Tensor:
    kernel = torch.outer(torch.tensor(row), torch.tensor(row))
    return kernel / kernel.sum()


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", _filter(1.0, 2.0, 1.0).repeat(channels, 1, 1, 1))
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=len(self.filt))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        kernel = 4 * _filter(1.0, 3.0, 3.0, 1.0)
        self.register_buffer("filt", kernel.repeat(channels, 1, 1, 1))
        self.pad = nn.ReplicationPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        up = F.conv_transpose2d(self.pad(x), self.filt, stride=2, padding=2, groups=len(self.filt))
        return up[:, :, 1:, 1:][:, :, :-1, :-1]


class _ResnetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first = [nn.ReflectionPad2d(1), *_convolution(channels, channels, 3, 0)]
        second = [nn.ReflectionPad2d(1), *_convolution(channels, channels, 3, 0)[:-1]]
        self.conv_block = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    """ResNet generator, 9 blocks, 64 channels, anti-aliased."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), *_convolution(3, 64, 7, 0)]
        for width in (64, 128):
            layers += [*_convolution(width, 2 * width, 3, 1), _Downsample(2 * width)]
        layers += [_ResnetBlock(256) for _ in range(9)]
        for width in (256, 128):
            layers += [_Upsample(width), *_convolution(width, width // 2, 3, 1)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(64, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def encode(self, x: Tensor, taps: Sequence[int] = TAPS) -> list[Tensor]:
        features = []
        for index, layer in enumerate(self.model[: taps[-1] + 1]):
            x = layer(x)
            if index in taps:
                features.append(x)
                if x.requires_grad:
                    # Of the channels-last gradient of rows taken by index, the instance norm of PyTorch 2.13 makes a wrong
                    # one on the CPU if there is one image.
                    x.register_hook(torch.Tensor.contiguous)
        return features


def _convolution(in_channels: int, out_channels: int, size: int, padding: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, size, padding=padding)
    return [conv, nn.InstanceNorm2d(out_channels), nn.ReLU(inplace=True)]


class Discriminator(nn.Sequential):
    """70x70 PatchGAN, 64 channels, anti-aliased."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, padding=1), _leaky(), _Downsample(64)]
        for width in (64, 128, 256):
            layers += [nn.Conv2d(width, 2 * width, 4, padding=1), nn.InstanceNorm2d(2 * width)]
            layers += [_leaky(), *([_Downsample(2 * width)] if width < 256 else [])]
        super().__init__()
        self.model = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)


class Projector(nn.Module):
    """One two-layer MLP per tap, 256 wide."""

    def __init__(self, tap_channels: Sequence[int] = _TAP_CHANNELS) -> None:
        super().__init__()
        for index, channels in enumerate(tap_channels):
            mlp = nn.Sequential(nn.Linear(channels, 256), nn.ReLU(), nn.Linear(256, 256))
            self.add_module(f"mlp_{index}", mlp)

    def forward(
        self, features: Sequence[Tensor], ids: Sequence[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Projected patches (B, 256, 256) of each map, and their positions, drawn unless given."""
        projected, positions = [], []
        for index, feature in enumerate(features):
            rows = feature.permute(0, 2, 3, 1).flatten(1, 2)
            if ids is None:
                drawn = np.random.permutation(rows.shape[1])[:_NUM_PATCHES]
                chosen = torch.from_numpy(drawn)
            else:
                chosen = ids[index]
            positions.append(chosen)
            projected.append(self.get_submodule(f"mlp_{index}")(rows[:, chosen]))
        return projected, positions


class PublishedCUT:
    """Networks `g`, `d`, `f` with their optimisers, and one training step of CUT, or of FastCUT, without the identity loss."""

    def __init__(self, nce_idt: bool = True, lambda_nce: float = 1.0) -> None:
        self.nce_idt, self.lambda_nce = nce_idt, lambda_nce
        self.g, self.d, self.f = Generator(), Discriminator(), Projector()
        self.optimizers = {
            name: torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for name, net in (("G", self.g), ("D", self.d), ("F", self.f))
        }

    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        patch_ids: Mapping[str, Sequence[Tensor]] | None = None,
        flip: bool = False,
    ) -> dict[str, Tensor]:
        """One update of D, then one of G and F; the losses under their published names."""
        ids = patch_ids or {}
        real_a, real_b = batch["A"], batch["B"]
        source = torch.cat([real_a, real_b]) if self.nce_idt else real_a
        generated = self.g(source.flip(3) if flip else source)
        fake_b, identity_b = generated[: len(real_a)], generated[len(real_a) :]

        self.d.requires_grad_(True)
        self.optimizers["D"].zero_grad()
        d_fake = self.d(fake_b.detach()).square().mean()
        d_real = (self.d(real_b) - 1).square().mean()
        ((d_fake + d_real) * 0.5).backward()
        self.optimizers["D"].step()

        self.d.requires_grad_(False)
        self.optimizers["G"].zero_grad()
        self.optimizers["F"].zero_grad()
        g_gan = (self.d(fake_b) - 1).square().mean()
        contrastive = {"NCE": self._contrastive_loss(real_a, fake_b, ids.get("NCE"), flip)}
        if self.nce_idt:
            nce_y = self._contrastive_loss(real_b, identity_b, ids.get("NCE_Y"), flip)
            contrastive["NCE_Y"] = nce_y
        total = g_gan + sum(contrastive.values()) / len(contrastive)
        total.backward()
        self.optimizers["G"].step()
        self.optimizers["F"].step()
        losses = {"G_GAN": g_gan, "D_real": d_real, "D_fake": d_fake}
        losses |= {"G": total, **contrastive}
        return {name: loss.detach() for name, loss in losses.items()}

    def _contrastive_loss(
        self, source: Tensor, target: Tensor, ids: Sequence[Tensor] | None, flip: bool
    ) -> Tensor:
        queries = self.g.encode(target)
        if flip:
            queries = [query.flip(3) for query in queries]
        keys, ids = self.f(self.g.encode(source), ids)
        queries, _ = self.f(queries, ids)
        keys = [key.detach() for key in keys]
        return self.lambda_nce * baselines.patch_nce(queries, keys)
