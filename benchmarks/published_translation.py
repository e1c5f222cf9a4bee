"""The steps of CycleGAN, DCLGAN, SinCUT and pix2pix in plain eager PyTorch: what ``fastnce.models`` are timed and tested against.

Written from the equations. Each step is over whatever networks it gets: the tests give it copies of the package's, the benchmark
those of ``published_cut`` and the U-Net here, which share nothing with the package; SinCUT's are copies, of StyleGAN2's layers.
Nothing is batched that is published apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce
from benchmarks import baselines
from benchmarks.published_cut import Discriminator, Generator, Projector

Losses = dict[str, Tensor]


def _learn(learns: bool, *networks: nn.Module) -> None:
    for network in networks:
        network.requires_grad_(learns)


def cyclegan_step(
    batch: Mapping[str, Tensor],
    generators: Sequence[nn.Module],
    discriminators: Sequence[nn.Module],
    config: Any,
    pools: Sequence[Callable[[Tensor], Tensor]],
    descend: Callable[..., None],
) -> Losses:
    """An update of both generators, then one of both discriminators, by `descend(loss, letter)`."""
    a, b = batch["A"], batch["B"]
    (g_a, g_b), (d_a, d_b) = generators, discriminators
    fake_b, fake_a = g_a(a), g_b(b)
    _learn(False, *discriminators)
    losses = {
        "G_A": (d_a(fake_b) - 1).square().mean(),
        "G_B": (d_b(fake_a) - 1).square().mean(),
        "cycle_A": (g_b(fake_b) - a).abs().mean() * config.lambda_a,
        "cycle_B": (g_a(fake_a) - b).abs().mean() * config.lambda_b,
    }
    if config.lambda_identity:
        weight = config.lambda_identity
        losses["idt_A"] = (g_a(b) - b).abs().mean() * config.lambda_b * weight
        losses["idt_B"] = (g_b(a) - a).abs().mean() * config.lambda_a * weight
    losses["G"] = sum(losses.values())
    descend(losses["G"], "G")
    _learn(True, *discriminators)
    shown = [pool(fake.detach()) for pool, fake in zip(pools, (fake_b, fake_a), strict=True)]
    for name, d, real, fake in (("D_A", d_a, b, shown[0]), ("D_B", d_b, a, shown[1])):
        losses[name] = ((d(real) - 1).square().mean() + d(fake).square().mean()) / 2
    descend(losses["D_A"] + losses["D_B"], "D")
    return losses


def pix2pix_step(
    batch: Mapping[str, Tensor],
    generator: nn.Module,
    discriminator: nn.Module,
    config: Any,
    descend: Callable[..., None],
) -> Losses:
    """An update of the discriminator, then one of the generator, by `descend(loss, letter)`."""
    a, b = batch["A"], batch["B"]
    fake = generator(a)

    def cross_entropy(image: Tensor, label: float) -> Tensor:
        logits = discriminator(torch.cat([a, image], 1))
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    _learn(True, discriminator)
    losses = {"D_fake": cross_entropy(fake.detach(), 0), "D_real": cross_entropy(b, 1)}
    descend((losses["D_fake"] + losses["D_real"]) * 0.5, "D")
    _learn(False, discriminator)
    losses["G_GAN"] = cross_entropy(fake, 1) * config.lambda_gan
    losses["G_L1"] = (fake - b).abs().mean() * config.lambda_l1
    losses["G"] = losses["G_GAN"] + losses["G_L1"]
    descend(losses["G"], "G")
    return losses


class Descent:
    """Optimisers by letter, and their updates."""

    optimizers: dict[str, torch.optim.Optimizer]

    def descend(self, loss: Tensor, *letters: str) -> None:
        """An update of the networks of these optimisers."""
        for letter in letters:
            self.optimizers[letter].zero_grad()
        loss.backward()
        for letter in letters:
            self.optimizers[letter].step()


def _adam(*networks: nn.Module, lr: float = 2e-4, beta1: float = 0.5) -> torch.optim.Adam:
    parameters = [p for network in networks for p in network.parameters()]
    return torch.optim.Adam(parameters, lr=lr, betas=(beta1, 0.999))


class PublishedTwoWay(Descent):
    """`g_a`, `g_b`, `d_a` and `d_b`: the networks of CUT, in both directions."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.g_a, self.g_b = Generator(), Generator()
        self.d_a, self.d_b = Discriminator(), Discriminator()
        self.optimizers = {"G": _adam(self.g_a, self.g_b), "D": _adam(self.d_a, self.d_b)}


class PublishedCycleGAN(PublishedTwoWay):
    """One training step; pools that are not full yet, which give every image back."""

    def training_step(self, batch: Mapping[str, Tensor]) -> Losses:
        """The losses under their published names."""
        networks = (self.g_a, self.g_b), (self.d_a, self.d_b)
        pools = [torch.clone, torch.clone]
        return cyclegan_step(batch, *networks, self.config, pools, self.descend)


class PublishedDCLGAN(PublishedTwoWay):
    """`f_1` and `f_2` project the features of `g_a` and of `g_b`, with Adam's defaults."""

    taps = (4, 8, 12, 16)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.f_1, self.f_2 = (Projector((128, 256, 256, 256)) for _ in "12")
        self.optimizers["F"] = _adam(self.f_1, self.f_2, lr=1e-3, beta1=0.9)

    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        patch_ids: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> Losses:
        """The losses under their published names."""
        config, ids, a, b = self.config, patch_ids or {}, batch["A"], batch["B"]
        fake_b, fake_a = self.g_a(a), self.g_b(b)
        losses = {}
        _learn(True, self.d_a, self.d_b)
        for name, d, real, fake in (("D_A", self.d_a, b, fake_b), ("D_B", self.d_b, a, fake_a)):
            losses[name] = (F.relu(1 - d(real)).mean() + F.relu(1 + d(fake.detach())).mean()) / 2
        self.descend(losses["D_A"] + losses["D_B"], "D")
        _learn(False, self.d_a, self.d_b)
        losses["G_A"] = F.relu(1 - self.d_a(fake_b)).mean()
        losses["G_B"] = F.relu(1 - self.d_b(fake_a)).mean()
        one, two = (self.g_a, self.f_1), (self.g_b, self.f_2)
        losses["NCE1"] = self._contrastive_loss(one, two, a, fake_b, ids.get("NCE1"))
        losses["NCE2"] = self._contrastive_loss(two, one, b, fake_a, ids.get("NCE2"))
        losses["idt_A"] = (self.g_a(b) - b).abs().mean() * config.lambda_idt
        losses["idt_B"] = (self.g_b(a) - a).abs().mean() * config.lambda_idt
        losses["G"] = 0.5 * sum(v for k, v in losses.items() if not k.startswith("D_"))
        self.descend(losses["G"], "G", "F")
        return {name: loss.detach() for name, loss in losses.items()}

    def _contrastive_loss(self, of_keys, of_queries, source, target, ids) -> Tensor:
        (g_k, f_k), (g_q, f_q) = of_keys, of_queries
        keys, ids = f_k(g_k.encode(source, self.taps), ids)
        queries, _ = f_q(g_q.encode(target, self.taps), ids)
        layers = [
            _cosine_loss(query.flatten(0, 1), key.detach().flatten(0, 1))
            for query, key in zip(queries, keys, strict=True)
        ]
        return self.config.lambda_nce * sum(layers) / len(layers)


def _cosine_loss(query: Tensor, key: Tensor) -> Tensor:
    """Of all rows of the batch (N, C); its products of all pairs are N x N x C, as published."""
    positive = F.cosine_similarity(query, key)[:, None]
    negative = F.cosine_similarity(query[:, None], key[None], dim=2)
    negative = negative.masked_fill(torch.eye(len(query), dtype=torch.bool), -10.0)
    logits = torch.cat([positive, negative], 1) / 0.07
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


class _Level(nn.Module):
    def __init__(self, outer: int, width: int, inner: nn.Module | None, dropout: bool) -> None:
        super().__init__()
        down = [nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(outer, width, 4, 2, 1, bias=False)]
        joined = width
        if inner is not None:
            down += [nn.BatchNorm2d(width), inner]
            joined = 2 * width
        up = [
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(joined, outer, 4, 2, 1, bias=False),
            nn.BatchNorm2d(outer),
        ]
        self.model = nn.Sequential(*down, *up, *([nn.Dropout(0.5)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


class UNet(nn.Module):
    """The generator of pix2pix, 64 channels, which halves the image `downs` times."""

    def __init__(self, downs: int, dropout: bool) -> None:
        super().__init__()
        block = None
        for level in reversed(range(1, downs)):
            outer, width = (64 * min(2**at, 8) for at in (level - 1, level))
            block = _Level(outer, width, block, dropout and 4 <= level < downs - 1)
        ends = [nn.ReLU(inplace=True), nn.ConvTranspose2d(128, 3, 4, 2, 1), nn.Tanh()]
        layers = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1, bias=False), block, *ends)
        self.model = nn.ModuleDict({"model": layers})

    def forward(self, x: Tensor) -> Tensor:
        return self.model["model"](x)


class PairDiscriminator(nn.Sequential):
    """The 70x70 PatchGAN of pix2pix, 64 channels, of an image beside its input."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(6, 64, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for width in (64, 128, 256):
            stride = 2 if width < 256 else 1
            conv = nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2, inplace=True)]
        super().__init__()
        self.model = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))


class PublishedPix2Pix(Descent):
    """`g` and `d`, and one training step."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.g, self.d = UNet(config.num_downs, config.dropout), PairDiscriminator()
        self.optimizers = {"G": _adam(self.g), "D": _adam(self.d)}

    def training_step(self, batch: Mapping[str, Tensor]) -> Losses:
        """The losses under their published names."""
        return pix2pix_step(batch, self.g, self.d, self.config, self.descend)


class PublishedSinCUT(Descent):
    """SinCUT's step with copies `g`, `d` and `f` of a model's networks, which are run by PyTorch alone."""

    def __init__(self, ours: Any) -> None:
        self.config = config = ours.config
        networks = ours.generator, ours.discriminator, ours.projector
        self.g, self.d, self.f = copy.deepcopy(networks)
        how = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
        self.optimizers = {
            letter: torch.optim.Adam(network.parameters(), **how)
            for letter, network in (("D", self.d), ("G", self.g), ("F", self.f))
        }

    @fastnce.use_backend("torch")
    def training_step(
        self, batch: Mapping[str, Tensor], *, patch_ids: Mapping[str, Any] | None = None
    ) -> Losses:
        """An update of D with its penalty, then one of G and F; the losses under their published names."""
        config, ids = self.config, patch_ids or {}
        real_a, real_b = batch["A"], batch["B"]
        fake_b, identity_b = self.g(torch.cat([real_a, real_b])).chunk(2)
        _learn(True, self.d)
        real = real_b.clone().requires_grad_()
        on_fake, on_real = self.d(fake_b.detach()), self.d(real)
        (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
        losses = {
            "D_fake": F.softplus(on_fake).mean(),
            "D_real": F.softplus(-on_real).mean(),
            "D_r1": config.lambda_r1 / 2 * slope.square().sum((1, 2, 3)).mean(),
        }
        self.descend((losses["D_fake"] + losses["D_real"]) * 0.5 + losses["D_r1"], "D")
        _learn(False, self.d)
        losses |= {
            "G_GAN": F.softplus(-self.d(fake_b)).mean(),
            "NCE": self._contrastive_loss(real_a, fake_b, ids.get("NCE")),
            "NCE_Y": self._contrastive_loss(real_b, identity_b, ids.get("NCE_Y")),
            "idt": config.lambda_identity * (identity_b - real_b).abs().mean(),
        }
        contrastive = (losses["NCE"] + losses["NCE_Y"]) * 0.5
        losses["G"] = losses["G_GAN"] + contrastive + losses["idt"]
        self.descend(losses["G"], "G", "F")
        return {name: loss.detach() for name, loss in losses.items()}

    def _contrastive_loss(self, source: Tensor, target: Tensor, ids: Any) -> Tensor:
        taps = self.config.nce_layers
        queries, keys = (self.g.encode(images, taps) for images in (target, source))
        sides = [x.shape[2] * x.shape[3] for x in keys]
        ids = ids or [torch.randperm(side)[: self.config.num_patches] for side in sides]
        projected = [
            self.f(
                [x.permute(0, 2, 3, 1).flatten(1, 2)[:, i] for x, i in zip(maps, ids, strict=True)]
            )
            for maps in (queries, keys)
        ]
        keys = [key.detach() for key in projected[1]]
        return self.config.lambda_nce * baselines.patch_nce(projected[0], keys, negatives="batch")
