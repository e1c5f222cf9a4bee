"""The published step of ReStyle, on pSp and e4e, in plain eager PyTorch: what ``fastnce.models.ReStyle`` is timed against.

Written from the equations and the published step's order, with all that it computes and does not use: gradients of the generator's
weights and of the detached inputs, the average image in each batch, features of the images in each step; weights of the generator
for each image; styles one after the other. The layers and their weights are copies of the package's, run by PyTorch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce
from fastnce.models import ReStyle
from fastnce.systems.ranger import Ranger


def modulated(conv: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """A modulated convolution with a weight for each image, as one convolution of as many groups."""
    count, channels, height, width = x.shape
    weight = conv.scale * conv.weight * conv.modulation(w).view(count, 1, channels, 1, 1)
    if conv.demodulate:
        norms = weight.square().sum((2, 3, 4)) + 1e-8
        weight = weight * norms.rsqrt()[:, :, None, None, None]
    x = x.reshape(1, count * channels, height, width)
    if conv.blur is None:
        padding = weight.shape[-1] // 2
        x = F.conv2d(x, weight.flatten(0, 1), padding=padding, groups=count)
        return x.view(count, -1, height, width)
    weight = weight.transpose(1, 2).flatten(0, 1)
    x = F.conv_transpose2d(x, weight, stride=2, groups=count)
    return conv.blur(x.view(count, -1, *x.shape[2:]))


def synthesis(generator: nn.Module, w: Tensor, noise: str) -> Tensor:
    """Images of latents (B, k, D)."""
    x, image = generator.input.input.repeat(len(w), 1, 1, 1), None
    rgb = [generator.to_rgb1, *generator.to_rgbs]
    for j, layer in enumerate([generator.conv1, *generator.convs]):
        x = modulated(layer.conv, x, w[:, j])
        fixed = generator.noises.get_buffer(f"noise_{j}")
        drawn = torch.randn(len(x), 1, *x.shape[2:], dtype=x.dtype) if noise == "random" else fixed
        x = layer.activate(x + layer.noise.weight * drawn)
        if j % 2 == 0:
            to_rgb = rgb[j // 2]
            own = modulated(to_rgb.conv, x, w[:, j + 1]) + to_rgb.bias
            image = own if image is None else own + to_rgb.upsample(image)
    return image


class PublishedReStyle:
    """Copies of a model's networks, E, G, the latent discriminator D and those of the losses, and the published step."""

    def __init__(self, model: ReStyle) -> None:
        self.config, self.e, self.g = model.config, *copy.deepcopy((model.encoder, model.generator))
        self.g.requires_grad_(True)
        self.losses = copy.deepcopy(model.losses)
        self.critic = nn.ModuleList(loss for _, loss in self.losses.values())
        kind = torch.optim.Adam if self.config.optimizer == "adam" else Ranger
        self.optimizer = kind(self.e.parameters(), lr=self.config.lr)
        self.pools: dict[str, list[Tensor]] = {"fake": [], "real": []}
        self.d = copy.deepcopy(model.latent_discriminator)
        if self.d is not None:
            self.d_optimizer = torch.optim.Adam(self.d.parameters(), lr=self.config.lr_adv)
        self.steps = 0

    def encode(self, x: Tensor) -> Tensor:
        last = self.e.maps(x)[-1]
        if self.e.kind == "small":
            last = F.adaptive_avg_pool2d(last, 4)
        styles = [self.e.styles[0](last)]
        for i in range(1, self.e.num_styles):
            if self.e.head == "psp":
                styles.append(self.e.styles[i](last))
            else:
                learned = i <= self.e.stage
                styles.append(styles[0] + self.e.styles[i](last) if learned else styles[0])
        return torch.stack(styles, dim=1)

    def pooled(self, name: str, rows: Tensor) -> Tensor:
        pool, size, found = self.pools[name], self.config.w_pool, []
        for row in rows:
            if len(pool) < size:
                pool.append(row.clone())
                found.append(row)
            elif torch.rand(()).item() < 0.5:
                found.append(row)
            else:
                place = int(torch.randint(size, ()))
                found.append(pool[place])
                pool[place] = row.clone()
        return torch.stack(found)

    def judge(self, x: Tensor, y: Tensor, z: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The step of the latent discriminator."""
        with torch.no_grad():
            fake = self.encode(torch.cat([x, y], dim=1))[torch.arange(len(x)), rows]
            fake, real = self.pooled("fake", fake), self.pooled("real", self.g.mapping(z))
        self.d_optimizer.zero_grad()
        on_real, on_fake = F.softplus(-self.d(real)).mean(), F.softplus(self.d(fake)).mean()
        (on_real + on_fake).backward()
        self.d_optimizer.step()
        if self.steps % self.config.r1_every == 0:
            real = real.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.d(real).sum(), real, create_graph=True)
            self.d_optimizer.zero_grad()
            self.r1 = self.config.lambda_r1 / 2 * grad.square().sum(1).mean()
            (self.r1 * self.config.r1_every).backward()
            self.d_optimizer.step()
        return {"D_real": on_real, "D_fake": on_fake, "D_r1": self.r1}

    @fastnce.use_backend("torch")
    def training_step(
        self, batch: Mapping[str, Tensor], *, z: Tensor | None = None, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As that of `fastnce.models.ReStyle`."""
        config, k, x = self.config, self.g.num_styles, batch["image"]
        w_avg = self.g.latent_avg.repeat(len(x), k, 1)
        w, y = w_avg, F.adaptive_avg_pool2d(synthesis(self.g, w_avg, "fixed"), config.size).detach()
        stage, found = min(self.e.stage, k - 1), {}
        if self.d is not None:
            found = self.judge(x, y, z, rows)
        self.optimizer.zero_grad()
        for number in range(1, config.steps_per_batch + 1):
            w, y = w.detach().requires_grad_(), y.detach().requires_grad_()
            w = w + self.encode(torch.cat([x, y], dim=1))
            y = F.adaptive_avg_pool2d(synthesis(self.g, w, config.noise), config.size)
            terms = {"L2": (y - x).square().mean()}
            loss = config.lambda_l2 * terms["L2"]
            for name, (weight, compare) in self.losses.items():
                terms[name] = compare(y, compare.features(x))
                loss = loss + weight * terms[name]
            if config.lambda_w_norm > 0:
                terms["w_norm"] = (w - w_avg).flatten(1).norm(dim=1).mean()
                loss = loss + config.lambda_w_norm * terms["w_norm"]
            if config.lambda_delta > 0:
                terms["delta"] = torch.zeros(())
                for i in range(1, stage + 1):
                    terms["delta"] = terms["delta"] + (w[:, i] - w[:, 0]).norm(dim=1).mean()
                loss = loss + config.lambda_delta * terms["delta"]
            if self.d is not None:
                each = [F.softplus(-self.d(w[:, i])).mean() for i in range(stage + 1)]
                terms["E_adv"] = sum(each) / len(each)
                loss = loss + config.lambda_adv * terms["E_adv"]
            loss.backward()
            found[f"loss_{number}"] = loss
        self.optimizer.step()
        self.steps += 1
        return {name: value.detach() for name, value in (found | terms).items()}
