"""The published step of Contrastive Feature Loss in plain eager PyTorch: what ``fastnce.models.CFL`` is timed against.

SPADE generator, two-scale discriminator, VGG19 up to relu5_1, hinge losses. Written from the equations and the published step's
order, and sharing nothing with the package. State-dict keys are the published ones, so that weights go from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from benchmarks import baselines

_LAMBDA = 10.0
_LAYERS = 5  # as the published option names them; four maps are compared
# VGG19 by slices: index in torchvision's `features` -> channels of the convolution, and the pools.
_SLICES = [{0: 64}, {2: 64, 5: 128}, {7: 128, 10: 256}, {12: 256, 14: 256, 16: 256, 19: 512}]
_SLICES.append({21: 512, 23: 512, 25: 512, 28: 512})
_POOLS = (4, 9, 18, 27)


class _SPADE(nn.Module):
    def __init__(self, channels: int, semantic_channels: int) -> None:
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(channels, affine=False)
        first = nn.Conv2d(semantic_channels, 128, 3, padding=1)
        self.mlp_shared = nn.Sequential(first, nn.ReLU())
        self.mlp_gamma = nn.Conv2d(128, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(128, channels, 3, padding=1)

    def forward(self, x: Tensor, semantics: Tensor) -> Tensor:
        normalized = self.param_free_norm(x)
        hidden = self.mlp_shared(F.interpolate(semantics, size=x.shape[2:]))
        return normalized * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, semantic_channels: int) -> None:
        super().__init__()
        middle = min(before, after)
        self.conv_0 = spectral_norm(nn.Conv2d(before, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, after, 3, padding=1))
        if before != after:
            self.conv_s = spectral_norm(nn.Conv2d(before, after, 1, bias=False))
        self.norm_0 = _SPADE(before, semantic_channels)
        self.norm_1 = _SPADE(middle, semantic_channels)
        if before != after:
            self.norm_s = _SPADE(before, semantic_channels)

    def forward(self, x: Tensor, semantics: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, semantics)) if hasattr(self, "conv_s") else x
        y = self.conv_0(F.leaky_relu(self.norm_0(x, semantics), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(y, semantics), 0.2))


class Generator(nn.Module):
    """SPADE with upsampling "more"."""

    def __init__(self, semantic_channels: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(semantic_channels, 16 * width, 3, padding=1)
        names = ("head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3")
        channels = 16 * width
        for name, factor in zip(names, (16, 16, 16, 8, 4, 2, 1), strict=True):
            self.add_module(name, _Block(channels, factor * width, semantic_channels))
            channels = factor * width
        self.conv_img = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, semantics: Tensor) -> Tensor:
        size = [side // 64 for side in semantics.shape[2:]]
        x = self.fc(F.interpolate(semantics, size=size))
        for name, block in self.named_children():
            if name in ("fc", "conv_img"):
                continue
            if name != "head_0":
                x = F.interpolate(x, scale_factor=2)
            x = block(x, semantics)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class Discriminator(nn.Module):
    """PatchGANs at two scales."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        for scale in range(2):
            self.add_module(f"discriminator_{scale}", self._layers(channels, width))

    def _layers(self, channels: int, width: int) -> nn.Sequential:
        first = nn.Conv2d(channels, width, 4, stride=2, padding=2)
        layers = nn.Sequential()
        layers.add_module("model0", nn.Sequential(first, nn.LeakyReLU(0.2)))
        for index, stride in ((1, 2), (2, 2), (3, 1)):
            conv = nn.Conv2d(width, 2 * width, 4, stride=stride, padding=2, bias=False)
            normed = nn.Sequential(spectral_norm(conv), nn.InstanceNorm2d(2 * width))
            layers.add_module(f"model{index}", nn.Sequential(normed, nn.LeakyReLU(0.2)))
            width *= 2
        layers.add_module("model4", nn.Sequential(nn.Conv2d(width, 1, 4, padding=2)))
        return layers

    def forward(self, x: Tensor) -> list[Tensor]:
        half = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        return [self.discriminator_0(x), self.discriminator_1(half)]


class VGG19(nn.Module):
    """The maps relu2_1 to relu5_1; frozen."""

    def __init__(self) -> None:
        super().__init__()
        before = 3
        for number, convolutions in enumerate(_SLICES, 1):
            layers = nn.Sequential()
            for index, channels in convolutions.items():
                if index - 1 in _POOLS:
                    layers.add_module(str(index - 1), nn.MaxPool2d(2))
                layers.add_module(str(index), nn.Conv2d(before, channels, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU(inplace=True))
                before = channels
            self.add_module(f"slice{number}", layers)
        for layer in self.modules():
            if isinstance(
                layer, nn.Conv2d
            ):  # random, so that maps are as large as those of trained weights
                nn.init.kaiming_normal_(layer.weight)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layers in self.children():
            x = layers(x)
            maps.append(x)
        return maps[1:]


class Projector(nn.Module):
    """A two-layer MLP for each map."""

    def __init__(self) -> None:
        super().__init__()
        widths = (128, 256, 512, 512)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256)) for width in widths
        )

    def forward(self, maps: Sequence[Tensor], ids: Sequence[Tensor]) -> list[Tensor]:
        rows = [x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps]
        return [mlp(x[:, i]) for mlp, x, i in zip(self.mlps, rows, ids, strict=True)]


class PublishedCFL:
    """Networks `g`, `d`, `f` and the critic with their optimisers, and one training step of the Cityscapes defaults."""

    def __init__(self, classes: int, num_patches: int, width: int = 64) -> None:
        self.classes, self.num_patches = classes, num_patches
        self.g, self.d = Generator(classes + 1, width), Discriminator(classes + 4, width)
        self.f, self.critic = Projector(), VGG19()
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (self.g, self.d, self.f)
        ]

    def training_step(
        self, batch: Mapping[str, Tensor], *, patch_ids: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One update of G and F, then one of D; the losses under their names here."""
        real = batch["B"]
        one_hot = F.one_hot(batch["label"], self.classes).movedim(3, 1).to(real)
        semantics = torch.cat([one_hot, batch["edges"]], dim=1)
        of_g, of_d, of_f = self.optimizers
        of_g.zero_grad()
        of_f.zero_grad()
        fake = self.g(semantics)
        gan = -self._mean(self._judged(semantics, fake, real)[0])
        nce = self.contrastive_loss(self.critic(fake), self.critic(real), patch_ids)
        (gan + nce).backward()
        of_g.step()
        of_f.step()

        with torch.no_grad():
            fake = self.g(semantics)
        of_d.zero_grad()
        of_fake, of_real = self._judged(semantics, fake, real)
        d_fake = self._mean([F.relu(1 + logits) for logits in of_fake])
        d_real = self._mean([F.relu(1 - logits) for logits in of_real])
        (d_fake + d_real).backward()
        of_d.step()
        losses = {"G": gan + nce, "G_GAN": gan, "NCE": nce, "D_fake": d_fake, "D_real": d_real}
        return {name: loss.detach() for name, loss in losses.items()}

    def contrastive_loss(
        self, fake: Sequence[Tensor], real: Sequence[Tensor], ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Both directions, keys detached, with fake negatives, map after map."""
        if ids is None:
            ids = [torch.randperm(x[0, 0].numel())[: self.num_patches] for x in real]
        form = {"symmetric": True, "query_negatives": True, "detach_keys": True}
        mean = baselines.patch_nce(self.f(fake, ids), self.f(real, ids), **form)
        return 2 * _LAMBDA * len(real) / _LAYERS**2 * mean

    def _judged(
        self, semantics: Tensor, fake: Tensor, real: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """D's logits of the fakes and of the real images, which it sees in one batch."""
        pairs = [torch.cat([semantics, image], dim=1) for image in (fake, real)]
        scales = self.d(torch.cat(pairs))
        halves = [logits.chunk(2) for logits in scales]
        return [half[0] for half in halves], [half[1] for half in halves]

    def _mean(self, scales: Sequence[Tensor]) -> Tensor:
        return sum(logits.mean() for logits in scales) / len(scales)
