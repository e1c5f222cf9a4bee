"""The step of ContraGAN in plain eager PyTorch: what ``fastnce.models.ContraGAN`` is timed and tested against.

The networks are copies of the package's, run by PyTorch alone. The loss is the published one, with all differences
of pairs, N x N x D.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce
from benchmarks.baselines import conditional_contrastive


class PublishedGAN:
    """Copies `g` and `d` of a ContraGAN's networks, their optimisers, and one training step of it, of ACGAN or of ProjGAN."""

    def __init__(self, ours: Any) -> None:
        self.config = config = ours.config
        self.g, self.d = copy.deepcopy((ours.generator, ours.discriminator))
        for network in (self.g, self.d):
            network.to(memory_format=torch.contiguous_format)
        how = {"betas": (config.beta1, 0.999), "eps": config.adam_eps}
        self.optimizers = {
            "G": torch.optim.Adam(self.g.parameters(), config.lr_g, **how),
            "D": torch.optim.Adam(self.d.parameters(), config.lr_d, **how),
        }

    @fastnce.use_backend("torch")
    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        draws: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Updates of D on equal parts of the batch, then one of G, on the noise and classes `draws`; the losses."""
        config = self.config
        count = len(batch["image"]) // config.d_steps
        draws = draws or [self._drawn(count) for _ in range(config.d_steps + 1)]
        parts = batch["image"].split(count), batch["label"].split(count), draws[:-1]
        norms = [m for m in self.g.modules() if isinstance(m, nn.BatchNorm2d)]
        losses = dict.fromkeys(("D_real", "D_fake", "D_class"), torch.zeros(()))
        self.d.requires_grad_(True)
        for x, y, (z, c) in zip(*parts, strict=True):
            for norm in norms:
                norm.track_running_stats = False
            with torch.no_grad():
                fake = self.g(z, c)
            for norm in norms:
                norm.track_running_stats = True
            on_real, on_fake = self.d(x, y), self.d(fake, c)
            terms = {
                "D_real": F.relu(1 - on_real.adversarial).mean(),
                "D_fake": F.relu(1 + on_fake.adversarial).mean(),
                "D_class": config.lambda_cond * self._class_loss(on_real, y),
            }
            self._descend(sum(terms.values()), "D")
            for name, value in terms.items():
                losses[name] = losses[name] + value.detach() / config.d_steps
        self.d.requires_grad_(False)
        z, c = draws[-1]
        output = self.d(self.g(z, c), c)
        losses["G_GAN"] = -output.adversarial.mean()
        losses["G_class"] = config.lambda_cond * self._class_loss(output, c)
        self._descend(losses["G_GAN"] + losses["G_class"], "G")
        return {name: value.detach() for name, value in losses.items()}

    def _drawn(self, count: int) -> tuple[Tensor, Tensor]:
        classes = torch.randint(self.config.num_classes, (count,))
        return torch.randn(count, self.config.latent_dim), classes

    def _class_loss(self, output: Any, y: Tensor) -> Tensor:
        temperature = self.config.temperature
        if self.config.conditioning == "2C":
            return conditional_contrastive(
                output.embedding, output.proxy, y, temperature=temperature
            )
        if self.config.conditioning == "AC":
            return F.cross_entropy(output.class_logits, y)
        return torch.zeros(())

    def _descend(self, loss: Tensor, letter: str) -> None:
        self.optimizers[letter].zero_grad()
        loss.backward()
        self.optimizers[letter].step()
