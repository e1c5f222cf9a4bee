"""ContraGAN and its baselines: class-conditional generation with an adversarial and a class loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from fastnce.errors import UserError
from fastnce.networks import (
    BigGANDiscriminator,
    BigGANGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    DiscriminatorOutput,
    SNGANDiscriminator,
    SNGANGenerator,
)
from fastnce.networks.layers import to_channels_last
from fastnce.systems import options
from fastnce.systems.adversarial import (
    GANMode,
    at_least_fp32,
    consistency,
    discriminator_losses,
    generator_loss,
    r1,
)
from fastnce.systems.augment import diff_augment, flip_and_translate
from fastnce.systems.class_losses import auxiliary_classifier, contrastive_2c, d2d_ce
from fastnce.systems.generating import (
    GRID_COLUMNS,
    SPLITS,
    check_amounts,
    evaluate_samples,
    interpolate,
    reference_and_training,
    sample_measure,
    signed_unit,
)
from fastnce.systems.system import (
    Ablation,
    LabelledConfig,
    LabelledSystem,
    Measure,
    Rows,
    autocast,
    images_with_labels,
)

if TYPE_CHECKING:
    from fastnce.data import LabelledImages

# Of a data set with more classes, a sample grid shows the first ones.
_GRID_CLASSES = 20

_IMAGENET = {
    "image_size": 128,
    "num_classes": 1000,
    "latent_dim": 120,
    "gen_attention": 4,
    "embed_dim": 1536,
    "batch_size": 256,
    "d_steps": 2,
    "lr_g": 5e-5,
    "lr_d": 2e-4,
    "beta1": 0.0,
    "ema_start": 20_000,
    "steps": 200_000,
}

Backbone = Literal["biggan", "sngan", "dcgan"]
Conditioning = Literal["2C", "D2DCE", "AC", "PD", "none"]
ContrastSet = Literal["batch", "groups", "real"]


@dataclass(frozen=True, kw_only=True)
class ContraGANConfig(LabelledConfig):
    """The options of the networks, losses and optimisers. The defaults are the published ContraGAN on CIFAR-10."""

    system: ClassVar[str] = "contragan"

    backbone: Backbone = "biggan"
    """Networks: BigGAN's, SNGAN's residual ones, or SNDCGAN's small convolutional ones."""
    conditioning: Conditioning = "2C"
    """How D is told the class: 2C (ContraGAN), D2DCE (ReACGAN), AC (ACGAN), PD (projection), or none."""
    num_classes: int = 10
    """Classes of the data."""
    image_size: int = 32
    """Height and width of the images: 4, 5, 6 or 7 times a power of two, from 16 to 448."""
    image_channels: int = 3
    """3 for RGB, 1 for grey."""
    latent_dim: int = 80
    """Length of z."""
    gen_channels: int = 96
    """Generator: base number of channels."""
    disc_channels: int = 96
    """Discriminator: base number of channels."""
    shared_dim: int = 128
    """BigGAN generator: length of the class embedding that all its layers share."""
    gen_attention: int = 2
    """BigGAN generator: self-attention after this many blocks; 0: nowhere."""
    disc_attention: int = 1
    """BigGAN discriminator: self-attention after this many blocks; 0: nowhere."""
    gen_spectral_norm: bool = False
    """SNGAN generator: spectral norm on every layer; BigGAN's always has it, DCGAN's never."""
    disc_norm: Literal["spectral", "batch", "none"] = "spectral"
    """SNGAN and DCGAN discriminators: spectral norm, batch norm or none; BigGAN's always has spectral norm."""
    embed_dim: int = 512
    """Discriminator: length of the embeddings and proxies of 2C and D2DCE."""
    gan_mode: GANMode = "hinge"
    """Adversarial objective."""
    lambda_cond: float = 1.0
    """Weight of the class loss."""
    temperature: float = 1.0
    """Temperature of 2C and D2DCE."""
    margin: float = 0.98
    """Margin of D2DCE."""
    contrast_set: ContrastSet = "batch"
    """The samples that 2C contrasts a sample with. batch, the published form: with all samples of its batch. Ours, which bind labels where
    that does not: groups, with those of its group of `group_size`; real, in G's step also with D's last real samples."""
    group_size: int = 8
    """Samples in a group of `contrast_set=groups`."""
    rank_gradients: Literal["mean", "published"] = "mean"
    """2C over several processes. mean: exactly the loss of the whole batch in one process. published: as StudioGAN has it, with
    1 / processes of its weight."""
    lambda_cr: float = 0.0
    """Consistency regularisation of D between real images and augmented ones (published: 10); 0 turns it off."""
    lambda_bcr: float = 0.0
    """ICR: the same for real and for generated images (published: 10); 0 turns it off."""
    lambda_zcr_d: float = 0.0
    """ICR: D on z and on z moved a little (published: 20); 0 turns it off."""
    lambda_zcr_g: float = 0.0
    """ICR: how much G is rewarded for images that change with z (published: 0.5); 0 turns it off."""
    zcr_radius: float = 0.05
    """ICR: standard deviation of the move of z."""
    diff_augment: bool = False
    """DiffAugment: colour, translation and cutout on all images that D sees."""
    lambda_r1: float = 0.0
    """R1: weight of half the squared gradient of D at real images; 0 turns it off."""
    d_steps: int = 5
    """Updates of D before each update of G."""
    micro_batches: int = 1
    """Parts in which a batch goes through the networks, to save memory; the class loss still sees the whole batch."""
    lr_g: float = 2e-4
    """Adam: learning rate of G."""
    lr_d: float = 2e-4
    """Adam: learning rate of D."""
    beta1: float = 0.5
    """Adam: decay of the mean gradient."""
    beta2: float = 0.999
    """Adam: decay of the squared gradient."""
    adam_eps: float = 1e-6
    """Adam: what is added to the root of the squared gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters and losses stay fp32."""
    backend: str | None = None
    """Backend of the contrastive op; by default the fastest that runs here."""

    data: Path = Path()
    """Folder of labelled images: train/CLASS/*.png and test/CLASS/*.png, CIFAR or Tiny ImageNet as distributed. With
    conditioning=none also train/*.png, or a folder of images."""
    batch_size: int = 64
    """Images per update of a network."""
    steps: int = 100_000
    """Steps, each of `d_steps` updates of D and one of G."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    ema_decay: float = 0.9999
    """Decay of the running average of the generator's weights; 0 keeps the last weights."""
    ema_start: int | None = 1000
    """First step of the average, which copies the weights until then; None: it starts at once, corrected for its start."""
    sample_count: int = 10
    """Images of each class in a sample grid."""
    measure_count: int = 10_000
    """Real test images, and as many samples, in a measurement; all if there are fewer."""
    extractor: Path | None = None
    """TorchScript file whose features measure the samples (FID and others); the digits set has its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "num_classes", "image_channels", "latent_dim", "embed_dim")
        options.at_least(self, 1, "gen_channels", "disc_channels", "shared_dim", "group_size")
        options.at_least(self, 1, "d_steps", "micro_batches")
        options.at_least(self, 0, "gen_attention", "disc_attention")
        options.at_least(self, 0, "lambda_cond", "lambda_cr", "lambda_bcr", "lambda_zcr_d")
        options.at_least(self, 0, "lambda_zcr_g", "zcr_radius", "lambda_r1", "margin")
        options.above_zero(self, "temperature", "lr_g", "lr_d", "adam_eps")
        options.in_unit_interval(self, "beta1", "beta2")
        if self.conditioning in ("2C", "D2DCE", "AC") and self.num_classes < 2:
            raise UserError(
                f"num_classes={self.num_classes} leaves conditioning={self.conditioning} nothing to tell apart. "
                "Use conditioning=none."
            )
        options.at_least(self, 2, "measure_count")
        if self.micro_batches > self.batch_size:
            raise UserError(
                f"micro_batches={self.micro_batches} are more parts than batch_size={self.batch_size} has images. "
                f"Use micro_batches <= {self.batch_size}."
            )

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.d_steps

    def with_class_names(self, names: tuple[str, ...]) -> Self:
        from fastnce.data.labelled import NO_CLASSES

        return replace(
            self,
            class_names=names,
            num_classes=1 if names == NO_CLASSES else self.num_classes,
        )


def build_generator(config: ContraGANConfig) -> nn.Module:
    """The generator that `config` describes, freshly initialised."""
    common = (config.image_size, config.latent_dim, config.num_classes, config.gen_channels)
    channels = {"image_channels": config.image_channels}
    if config.backbone == "biggan":
        return BigGANGenerator(
            *common,
            shared_dim=config.shared_dim,
            attention_after=config.gen_attention,
            **channels,
        )
    if config.backbone == "sngan":
        return SNGANGenerator(*common, spectral_norm=config.gen_spectral_norm, **channels)
    return DCGANGenerator(*common, **channels)


def build_discriminator(config: ContraGANConfig) -> nn.Module:
    """The discriminator that `config` describes, freshly initialised."""
    common = (config.image_size, config.num_classes, config.disc_channels)
    heads = {
        "conditioning": config.conditioning,
        "embed_dim": config.embed_dim,
        "image_channels": config.image_channels,
    }
    if config.backbone == "biggan":
        return BigGANDiscriminator(*common, attention_after=config.disc_attention, **heads)
    family = SNGANDiscriminator if config.backbone == "sngan" else DCGANDiscriminator
    return family(*common, norm=config.disc_norm, **heads)


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
            return consistency(output, self._judge(images, classes))

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
            terms["D_r1"] = 0.5 * config.lambda_r1 * r1(real_output.adversarial, real)
        return terms, real_output

    def _generate_for_discriminator(self, z: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self), statistics_untracked(self.generator):
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
                    with autocast(self):
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
        with autocast(self):
            fake = self.generator(z, labels)
        seen = fake
        if self.config.diff_augment:
            seen = diff_augment(fake, torch.Generator(fake.device).manual_seed(seed))
        return fake, self._judge(seen, labels)

    def _judge(self, images: Tensor, labels: Tensor) -> DiscriminatorOutput:
        with autocast(self):
            return self.discriminator(images, labels)

    def _class_terms(
        self,
        judge: Callable[..., DiscriminatorOutput],
        parts: Sequence[tuple],
        extra: ClassSample | None = None,
    ) -> list[Callable[[DiscriminatorOutput], tuple[Tensor, Tensor]] | None]:
        """For each part of a batch, a function from what D says of it to (the loss's value, a term with its gradient).

        `judge` gives D's output for a part, in which the labels stand second; `extra` are samples that 2C contrasts with, too.
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


class ClassSample(NamedTuple):
    """The inputs of the contrastive class losses: embeddings (N, E), proxies (N, E) and labels (N,)."""

    embeddings: Tensor
    proxies: Tensor
    labels: Tensor

    @classmethod
    def of(cls, output: DiscriminatorOutput, labels: Tensor) -> Self:
        # Under autocast the embeddings come in half precision, the proxies as stored.
        return cls(output.embedding.to(output.proxy.dtype), output.proxy, labels)

    def detach(self) -> Self:
        return type(self)(*(x.detach() for x in self))


class LossMeans:
    """Means of named losses over the updates of a step, each update's parts weighted by their share of its batch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def add(self, losses: Mapping[str, Tensor], share: float) -> None:
        """Adds the losses of a part."""
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + share * loss.detach()
            self._weights[name] = self._weights.get(name, 0.0) + share

    def means(self) -> dict[str, Tensor]:
        """The means so far."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


@contextlib.contextmanager
def statistics_untracked(network: nn.Module) -> Iterator[None]:
    """Context in which batch norms in training mode leave their running statistics alone."""
    tracking = [m for m in network.modules() if getattr(m, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextlib.contextmanager
def one_power_iteration(*networks: nn.Module) -> Iterator[None]:
    """Context that begins with a power iteration of all spectral norms and then keeps them as they are."""
    normed = [
        (module, hook)
        for network in networks
        for module in network.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, SpectralNorm) and module.training
    ]
    with torch.no_grad():
        for module, hook in normed:
            hook.compute_weight(module, do_power_iteration=True)
            module.training = False
    try:
        yield
    finally:
        for module, _ in normed:
            module.training = True


class ContraGANSystem(LabelledSystem):
    """ContraGAN in the training loop."""

    config_class = ContraGANConfig
    model_class = ContraGAN
    network = staticmethod(build_generator)
    variants = {
        "contragan": {},
        "acgan": {"conditioning": "AC"},
        "projgan": {"conditioning": "PD"},
        "reacgan": {"conditioning": "D2DCE", "temperature": 0.5, "lambda_cond": 0.5},
    }
    presets = {
        # As published (StudioGAN). The defaults are those of CIFAR-10.
        "cifar10": {},
        "tiny-imagenet": {
            "image_size": 64,
            "num_classes": 200,
            "latent_dim": 100,
            "gen_channels": 80,
            "disc_channels": 80,
            "gen_attention": 3,
            "embed_dim": 768,
            "batch_size": 1024,
            "d_steps": 1,
            "lr_g": 1e-4,
            "lr_d": 4e-4,
            "beta1": 0.0,
            "ema_start": 20_000,
        },
        "imagenet": _IMAGENET,
        # The same with two time scales.
        "imagenet-ttur": _IMAGENET | {"d_steps": 1, "lr_g": 1e-4, "lr_d": 4e-4, "steps": 250_000},
        # The built-in digits, 16x16: about three minutes on two CPU cores.
        "digits": {
            "backbone": "sngan",
            "image_size": 16,
            "image_channels": 1,
            "latent_dim": 32,
            "gen_channels": 24,
            "disc_channels": 24,
            "embed_dim": 64,
            "contrast_set": "real",
            "temperature": 0.5,
            "d_steps": 2,
            "lr_g": 1e-3,
            "lr_d": 1e-3,
            "beta1": 0.0,
            "ema_decay": 0.998,
            "ema_start": None,
            "flip": False,
            "workers": 0,
            "steps": 1200,
            "log_every": 50,
            "sample_every": 400,
            "measure_every": 400,
            "checkpoint_every": 400,
        },
    }
    ablations = {
        "contragan": Ablation(
            choices={
                "2C, real samples in G's contrast": {"conditioning": "2C", "contrast_set": "real"},
                "2C in groups of 8": {"conditioning": "2C", "contrast_set": "groups"},
                "2C, published": {"conditioning": "2C", "contrast_set": "batch"},
                "2C, published, batch of 16": {
                    "conditioning": "2C",
                    "contrast_set": "batch",
                    "batch_size": 16,
                },
                "D2D-CE (ReACGAN)": {
                    "conditioning": "D2DCE",
                    "temperature": 0.5,
                    "lambda_cond": 0.5,
                },
                "auxiliary classifier (ACGAN)": {"conditioning": "AC"},
                "projection (ProjGAN)": {"conditioning": "PD"},
            },
            measures={
                "class_accuracy": ("class accuracy", ".3f"),
                "fid": ("FID", ".2f"),
                "intra_class_fid": ("intra-class FID", ".1f"),
                "recall": ("recall", ".3f"),
            },
            row="generated",
        )
    }
    network_name = "generator"
    panels = (
        ("D_real", "D_fake", "G_GAN"),
        ("D_class", "G_class"),
        ("D_cr", "D_bcr", "D_zcr", "G_zcr", "D_r1"),
    )
    best = "fid"
    does = "generate images"
    next_command = "fastnce generate --run {run} --out DIR"
    judged_by = frozenset({"extractor", "seed"})
    reported = ("conditioning",)
    output = "image"

    def dataset(self, config: ContraGANConfig) -> LabelledImages:
        return labelled_images(config, "train")

    def preview(
        self, config: ContraGANConfig, dataset: LabelledImages
    ) -> Callable[[nn.Module], Rows]:
        """A row for each class, with the same noise in all of them."""
        shown = min(config.num_classes, _GRID_CLASSES)
        random = torch.Generator().manual_seed(config.seed)
        z = torch.randn(config.sample_count, config.latent_dim, generator=random)
        labels = torch.arange(shown).repeat_interleave(config.sample_count)

        def rows(generator: nn.Module) -> Rows:
            images = sample_images(generator, z.repeat(shown, 1), labels)
            grouped = images.view(shown, config.sample_count, *images.shape[1:])
            return {
                name: list(row) for name, row in zip(dataset.class_names, grouped, strict=False)
            }

        return rows

    def measure(self, config: ContraGANConfig, dataset: LabelledImages) -> Measure:
        """Quality of the samples against the test images, and what D does: accuracies, and its layers' singular values."""
        from fastnce.metrics import authenticity_accuracy, largest_singular_values

        (images, labels), training = reference_and_training(
            config.data, config.measure_count, partial(labelled_images, config)
        )
        seen = {"real, trained on": training or (images, labels)}
        if training is not None:
            seen["real, held out"] = (images, labels)
        quality = sample_measure(config, images, labels)

        def measure(model: ContraGAN, average: nn.Module) -> dict[str, float]:
            values, generated = quality(sampler(average, config.seed))
            model.discriminator.eval()
            fake = _logits(model, generated, labels)
            cutoff = 0.5 if config.gan_mode == "lsgan" else 0.0
            for name, (part, classes) in seen.items():
                logits = _logits(model, signed_unit(part), classes)
                accuracies = authenticity_accuracy(logits, fake, cutoff)
                values[f"D accuracy/{name}"] = accuracies.real
            values["D accuracy/generated"] = accuracies.fake
            model.discriminator.train()
            norms = largest_singular_values(model.discriminator, raw=True)
            return values | {f"singular value/{name}": value for name, value in norms.items()}

        return measure

    def evaluate(
        self,
        config: ContraGANConfig,
        networks: Mapping[str, nn.Module],
        data: Path,
        device: torch.device,
        *,
        extractor: Path | None = None,
        seed: int = 0,
    ) -> tuple[dict[str, Any], str]:
        """FID, intra-class FID, precision, recall and more of samples, against the test images.

        Beside them stand training images (the best to hope for) and samples of the generator before its training. The extractor
        is by default that of the run, or a digits set's own classifier; `seed` is that of the noise.
        """
        split = partial(labelled_images, config, root=data)
        reference = partial(reference_and_training, data, config.measure_count, split)
        of_run = (networks["run"], build_generator, sampler, reference)
        return evaluate_samples(config, data, *of_run, extractor, seed, device)

    def generate_folder(
        self, network: nn.Module, config: ContraGANConfig, out: Path, **how: Any
    ) -> int:
        return generate_folder(network, config, out, **self.known_options(generate_folder, how))

    def graph_inputs(
        self, network: nn.Module, config: ContraGANConfig, channels: int, count: int
    ) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(count)
        z = torch.randn(count, config.latent_dim, generator=random)
        return {"z": z, "label": torch.arange(count) % config.num_classes}


def labelled_images(
    config: ContraGANConfig, split: str, root: Path | None = None
) -> LabelledImages:
    """The images of a split of `root`, by default `config.data`, as the networks of `config` take them; of the run's classes."""
    from fastnce.data.labelled import NO_CLASSES

    dataset = images_with_labels(
        config,
        split,
        root or config.data,
        flip=config.flip and split == "train",
        needs_labels=config.conditioning != "none",
    )
    if dataset.class_names != NO_CLASSES and dataset.num_classes != config.num_classes:
        raise UserError(
            f"num_classes={config.num_classes}, but data={root or config.data} has {dataset.num_classes} classes. "
            f"Use num_classes={dataset.num_classes}."
        )
    return dataset


def sampler(generator: nn.Module, seed: int) -> Callable[[Tensor], Tensor]:
    """A function from labels to images of a generator in eval mode, with noise of its own from `seed` on."""
    random = torch.Generator().manual_seed(seed)

    def sample(labels: Tensor) -> Tensor:
        z = torch.randn(len(labels), generator.latent_dim, generator=random)
        return sample_images(generator, z, labels)

    return sample


@torch.inference_mode()
def _logits(model: ContraGAN, images: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    device = next(model.parameters()).device
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    outputs = [model.discriminator(a.to(device), b.to(device)).adversarial.cpu() for a, b in parts]
    return torch.cat(outputs)


def latent(
    count: int, dim: int, *, truncation: float | None = None, generator: torch.Generator
) -> Tensor:
    """Noise (count, dim): normal, or normal cut off at +-truncation, which trades variety for fidelity (BigGAN)."""
    z = torch.empty(count, dim)
    if truncation is None:
        return z.normal_(generator=generator)
    return nn.init.trunc_normal_(z, a=-truncation, b=truncation, generator=generator)


def generate_folder(
    generator: nn.Module,
    config: LabelledConfig,
    out: Path,
    *,
    classes: Sequence[str] = (),
    count: int = 16,
    truncation: float | None = None,
    interpolation: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> int:
    """Writes `out/CLASS/NNNN.png` for each class, `out/grid.png`, and `out/interpolation.png` if asked for.

    All classes share their noise, so that a column of the grid shows what the class changes.

    Args:
        generator: as `load_generator` gives it.
        config: the configuration of its run.
        out: folder; created.
        classes: Numbers or names of the classes; by default all. Those of a run from before runs kept them are looked up in its
            data.
        count: Images of each class.
        truncation: Cut the noise off at this value, such as 0.8: less variety, more fidelity.
        interpolation: Also a picture with so many steps from one noise to another; 0 for none.
        seed: Seed of the noise.
        batch_size: Images generated at a time.

    Returns:
        The number of images.

    Raises:
        UserError: a value out of range.
    """
    from tqdm import tqdm

    from fastnce.data import save_image
    from fastnce.files import expect_apart
    from fastnce.viz.plots import save_sample_grid

    check_amounts(count=count, batch_size=batch_size, interpolation=interpolation)
    # Generated images among those that the run, or its evaluation, reads.
    expect_apart(out, [Path(config.data) / split for split in SPLITS])
    if truncation is not None and not truncation > 0:
        raise UserError(f"truncation={truncation} must be positive. Use about 0.5 to 2.")
    chosen = _labels(classes, _class_names(config, generator.num_classes))
    random = torch.Generator().manual_seed(seed)
    z = latent(count, generator.latent_dim, truncation=truncation, generator=random)
    ends = latent(2, generator.latent_dim, truncation=truncation, generator=random)

    rows, between = {}, {}
    for label, name in tqdm(chosen.items(), desc="generate", unit="class", disable=None):
        images = sample_images(generator, z, torch.full((count,), label), batch_size)
        for number, image in enumerate(images):
            save_image(image, Path(out) / name / f"{number:04d}.png")
        rows[name] = list(images[:GRID_COLUMNS])
        if interpolation:
            line = interpolate(*ends, interpolation)
            between[name] = list(
                sample_images(generator, line, torch.full((interpolation,), label))
            )
    save_sample_grid(rows, Path(out) / "grid.png")
    if interpolation:
        save_sample_grid(between, Path(out) / "interpolation.png")
    return count * len(chosen)


def _labels(classes: Sequence[str], names: Sequence[str]) -> dict[int, str]:
    """Label -> name of the chosen classes."""
    if not classes:
        return dict(enumerate(names))
    chosen = {}
    for text in classes:
        if text in names:
            label = names.index(text)
        elif text.isdecimal() and int(text) < len(names):
            label = int(text)
        else:
            raise UserError(
                f"class={text} is unknown. Use a number from 0 to {len(names) - 1}, or a name such as {names[0]}."
            )
        chosen[label] = names[label]
    return chosen


def _class_names(config: LabelledConfig, count: int) -> list[str]:
    """The run's; of an old run those of its data, or numbers if that is not there or has other classes by now."""
    if config.class_names:
        return list(config.class_names)
    from fastnce.data.labelled import open_labelled

    with contextlib.suppress(UserError):
        names = open_labelled(config.data, "train").class_names
        if len(names) == count:
            return list(names)
    return [str(label) for label in range(count)]


@torch.inference_mode()
def sample_images(generator: nn.Module, z: Tensor, labels: Tensor, batch_size: int = 256) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] of a generator in eval mode, on the CPU, for `z` (N, latent_dim) and `labels` (N,)."""
    device = next(generator.parameters()).device
    parts = zip(z.split(batch_size), labels.split(batch_size), strict=True)
    images = [generator(a.to(device), b.to(device)).float().cpu() for a, b in parts]
    return torch.cat(images).contiguous()
