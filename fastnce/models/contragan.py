"""ContraGAN and its baselines: class-conditional generation with an adversarial and a class loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.models import options, regularisers
from fastnce.models.augment import diff_augment, flip_and_translate
from fastnce.models.class_losses import auxiliary_classifier, contrastive_2c, d2d_ce
from fastnce.models.contragan_config import (
    ContraGANConfig,
    build_discriminator,
    build_generator,
)
from fastnce.models.gan import at_least_fp32, discriminator_losses, generator_loss
from fastnce.models.updates import LossMeans, one_power_iteration, statistics_untracked
from fastnce.networks import DiscriminatorOutput
from fastnce.networks.layers import to_channels_last


class ContraGAN(nn.Module):
    """The networks `generator` and `discriminator`, their Adam `optimizers` ("G" and "D"), and one training step.

    With x and y real images and labels, z noise, c labels drawn uniformly, l the adversarial terms and `class` the class loss
    of the conditioning (2C, D2D-CE, the auxiliary classifier's cross-entropy; nothing for projection and none):

        D loss = l(D(x, y), real) + l(D(G(z, c), c), fake) + lambda_cond class(x, y) + regularisers     `d_steps` times
        G loss = l(D(G(z, c), c), real) + lambda_cond class(G(z, c), c) - lambda_zcr_g |G(z) - G(z')|^2     once

    Real and generated images pass D apart, so that its spectral norms take a power iteration for each, as published. While D
    learns, G uses the batch's statistics but leaves its running ones alone.

    With `micro_batches` > 1 the batch passes the networks in parts. The class loss needs all of it at once: a first pass
    without gradient collects the embeddings, the loss's gradient with respect to them is computed once, and the second pass
    feeds it back part by part. The gradients are those of the whole batch, except that G's batch norms see one part at a time
    and that the power iteration is made once per update instead of for every pass.

    Source: Kang and Park, "ContraGAN: Contrastive Learning for Conditional Image Generation", NeurIPS 2020.

    Args:
        config: see `ContraGANConfig`.

    Raises:
        UserError: a backend that is not there, or sizes that the networks do not have.
    """

    def __init__(self, config: ContraGANConfig) -> None:
        super().__init__()
        options.backend_is_there(config.backend)
        self.config = config
        try:
            self.generator = build_generator(config)
            self.discriminator = build_discriminator(config)
        except ValueError as error:
            raise UserError(str(error)) from error
        # Convolutions of a few channels are faster this way on a GPU and not slower on a CPU.
        to_channels_last(self)
        self.optimizers = {
            letter: torch.optim.Adam(
                network.parameters(),
                lr=lr,
                betas=(config.beta1, config.beta2),
                eps=config.adam_eps,
                fused=True,
            )
            for letter, network, lr in (
                ("G", self.generator, config.lr_g),
                ("D", self.discriminator, config.lr_d),
            )
        }
        self._last_real: ClassSample | None = None

    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        draws: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """`d_steps` updates of D, then one of G.

        Args:
            batch: "image" (d_steps * N, C, H, W) in [-1, 1] and "label" (d_steps * N,) int64, on the networks' device.
            draws: z (N, latent_dim) and labels (N,) of each update, D's first; by default drawn.

        Returns:
            Detached scalars, those of D the means over its updates: "D_real", "D_fake" and "G_GAN", and where they are part of
            the losses "D_class", "G_class", "D_cr", "D_bcr", "D_zcr", "D_r1" and "G_zcr", their weights included.
        """
        config = self.config
        images, labels = batch["image"], batch["label"]
        images = images.contiguous(memory_format=torch.channels_last)
        if draws is None:
            count = len(images) // config.d_steps
            draws = [self.draw(count, images.device) for _ in range(config.d_steps + 1)]
        losses = LossMeans()
        parts = zip(images.chunk(config.d_steps), labels.chunk(config.d_steps), strict=True)
        for (real, real_labels), (z, fake_labels) in zip(parts, draws[:-1], strict=True):
            self._update_discriminator(real, real_labels, z, fake_labels, losses)
        self._update_generator(*draws[-1], losses)
        return losses.means()

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Noise (count, latent_dim) and uniform labels (count,), from torch's generator of the device."""
        z = torch.randn(count, self.config.latent_dim, device=device)
        return z, torch.randint(self.config.num_classes, (count,), device=device)

    def _update_discriminator(
        self, real: Tensor, labels: Tensor, z: Tensor, fake_labels: Tensor, losses: LossMeans
    ) -> None:
        config = self.config
        self.discriminator.requires_grad_(True)
        self.optimizers["D"].zero_grad(set_to_none=True)
        seen = diff_augment(real) if config.diff_augment else real
        parts = self._parts(seen, labels, z, fake_labels)
        with self._spectral_norms(self.discriminator, self.generator):
            class_terms = self._class_terms(self._judge, [part[:2] for part in parts])
            for part, class_term in zip(parts, class_terms, strict=True):
                terms, real_output = self._discriminator_terms(*part)
                share = len(part[0]) / len(real)
                loss = share * sum(terms.values())
                if class_term is not None:
                    terms["D_class"], term = class_term(real_output)
                    loss = loss + term
                loss.backward()
                losses.add(terms, share)
        self.optimizers["D"].step()
        if config.conditioning == "2C" and config.contrast_set == "real":
            self._last_real = ClassSample.of(real_output, parts[-1][1]).detach()

    def _discriminator_terms(
        self, real: Tensor, labels: Tensor, z: Tensor, fake_labels: Tensor
    ) -> tuple[dict[str, Tensor], DiscriminatorOutput]:
        """The terms of D's loss that are means over images, and what D says of the real ones."""
        config = self.config
        real.requires_grad_(config.lambda_r1 > 0)
        fake = self._generate_for_discriminator(z, fake_labels)
        real_output, fake_output = self._judge(real, labels), self._judge(fake, fake_labels)
        terms = dict(
            zip(
                ("D_real", "D_fake"),
                discriminator_losses(
                    real_output.adversarial, fake_output.adversarial, config.gan_mode
                ),
                strict=True,
            )
        )

        def change(output: DiscriminatorOutput, images: Tensor, classes: Tensor) -> Tensor:
            return regularisers.consistency(output, self._judge(images, classes))

        if config.lambda_cr > 0:
            moved = flip_and_translate(real.detach())
            terms["D_cr"] = config.lambda_cr * change(real_output, moved, labels)
        if config.lambda_bcr > 0:
            moved, moved_fake = flip_and_translate(real.detach()), flip_and_translate(fake)
            both = change(real_output, moved, labels) + change(fake_output, moved_fake, fake_labels)
            terms["D_bcr"] = config.lambda_bcr * both
        if config.lambda_zcr_d > 0:
            near = self._generate_for_discriminator(self._near(z), fake_labels)
            terms["D_zcr"] = config.lambda_zcr_d * change(fake_output, near, fake_labels)
        if config.lambda_r1 > 0:
            terms["D_r1"] = 0.5 * config.lambda_r1 * regularisers.r1(real_output.adversarial, real)
        return terms, real_output

    def _generate_for_discriminator(self, z: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast(), statistics_untracked(self.generator):
            fake = self.generator(z, labels)
        return diff_augment(fake) if self.config.diff_augment else fake

    def _update_generator(self, z: Tensor, labels: Tensor, losses: LossMeans) -> None:
        config = self.config
        self.discriminator.requires_grad_(False)
        self.optimizers["G"].zero_grad(set_to_none=True)
        parts = self._parts(z, labels)
        # Where a part passes twice, both passes must draw the same augmentation.
        seeds = torch.randint(2**62, (len(parts),)).tolist()
        parts = [(*part, seed) for part, seed in zip(parts, seeds, strict=True)]

        def judge(z: Tensor, labels: Tensor, seed: int) -> DiscriminatorOutput:
            with statistics_untracked(self.generator):
                return self._judge_generated(z, labels, seed)[1]

        with self._spectral_norms(self.discriminator, self.generator):
            class_terms = self._class_terms(judge, parts, self._last_real)
            for part, class_term in zip(parts, class_terms, strict=True):
                fake, output = self._judge_generated(*part)
                terms = {"G_GAN": generator_loss(output.adversarial, config.gan_mode)}
                if config.lambda_zcr_g > 0:
                    with self._autocast():
                        near = self.generator(self._near(part[0]), part[1])
                    distance = F.mse_loss(at_least_fp32(fake), at_least_fp32(near))
                    terms["G_zcr"] = -config.lambda_zcr_g * distance
                share = len(part[0]) / len(z)
                loss = share * sum(terms.values())
                if class_term is not None:
                    terms["G_class"], term = class_term(output)
                    loss = loss + term
                loss.backward()
                losses.add(terms, share)
        self.optimizers["G"].step()

    def _judge_generated(
        self, z: Tensor, labels: Tensor, seed: int
    ) -> tuple[Tensor, DiscriminatorOutput]:
        with self._autocast():
            fake = self.generator(z, labels)
        seen = fake
        if self.config.diff_augment:
            seen = diff_augment(fake, torch.Generator(fake.device).manual_seed(seed))
        return fake, self._judge(seen, labels)

    def _judge(self, images: Tensor, labels: Tensor) -> DiscriminatorOutput:
        with self._autocast():
            return self.discriminator(images, labels)

    def _class_terms(
        self,
        judge: Callable[..., DiscriminatorOutput],
        parts: Sequence[tuple],
        extra: ClassSample | None = None,
    ) -> list[Callable[[DiscriminatorOutput], tuple[Tensor, Tensor]] | None]:
        """For each part of a batch, a function from what D says of it to (the loss's value, a term with its gradient).

        Args:
            judge: D's output for a part.
            parts: the parts of the batch; the labels stand second.
            extra: samples that 2C contrasts with, too.
        """
        config = self.config
        weight, count = config.lambda_cond, sum(len(part[1]) for part in parts)
        if weight == 0 or config.conditioning in ("PD", "none"):
            return [None] * len(parts)

        if config.conditioning == "AC":  # a mean over samples: the parts can be taken one by one

            def classify(labels: Tensor, output: DiscriminatorOutput) -> tuple[Tensor, Tensor]:
                loss = weight * auxiliary_classifier(output.class_logits, labels)
                return loss.detach(), loss * (len(labels) / count)

            return [partial(classify, part[1]) for part in parts]

        if len(parts) == 1:

            def contrast(output: DiscriminatorOutput) -> tuple[Tensor, Tensor]:
                loss = weight * self._contrast(ClassSample.of(output, parts[0][1]), extra)
                return loss.detach(), loss

            return [contrast]

        with torch.no_grad():
            samples = [ClassSample.of(judge(*part), part[1]) for part in parts]
        whole = ClassSample(*(torch.cat(tensors) for tensors in zip(*samples, strict=True)))
        inputs = [whole.embeddings.requires_grad_(), whole.proxies.requires_grad_()]
        value = weight * self._contrast(whole, extra)
        sizes = [len(part[1]) for part in parts]
        gradients = [g.split(sizes) for g in torch.autograd.grad(value, inputs)]

        def feed_back(
            embeddings: Tensor, proxies: Tensor, output: DiscriminatorOutput
        ) -> tuple[Tensor, Tensor]:
            term = (output.embedding * embeddings).sum() + (output.proxy * proxies).sum()
            return value.detach(), term

        return [partial(feed_back, *pair) for pair in zip(*gradients, strict=True)]

    def _contrast(self, sample: ClassSample, extra: ClassSample | None) -> Tensor:
        config = self.config
        if config.conditioning == "D2DCE":
            return d2d_ce(*sample, temperature=config.temperature, margin=config.margin)
        return contrastive_2c(
            *sample,
            temperature=config.temperature,
            group_size=config.group_size if config.contrast_set == "groups" else None,
            extra=extra,
            gradient_scale=config.rank_gradients,
            backend=config.backend,
        )

    def _parts(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        return list(zip(*(x.chunk(self.config.micro_batches) for x in tensors), strict=True))

    def _near(self, z: Tensor) -> Tensor:
        return z + self.config.zcr_radius * torch.randn_like(z)

    def _spectral_norms(self, *networks: nn.Module) -> AbstractContextManager:
        """Where parts pass one after the other, all must see the same weights."""
        if self.config.micro_batches == 1:
            return contextlib.nullcontext()
        return one_power_iteration(*networks)

    def _autocast(self) -> AbstractContextManager:
        device = next(self.generator.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")


class ClassSample(NamedTuple):
    """What the contrastive class losses are about: embeddings (N, E), proxies (N, E) and labels (N,)."""

    embeddings: Tensor
    proxies: Tensor
    labels: Tensor

    @classmethod
    def of(cls, output: DiscriminatorOutput, labels: Tensor) -> Self:
        # Under autocast the embeddings come in half precision, the proxies as stored.
        return cls(output.embedding.to(output.proxy.dtype), output.proxy, labels)

    def detach(self) -> Self:
        return type(self)(*(x.detach() for x in self))
