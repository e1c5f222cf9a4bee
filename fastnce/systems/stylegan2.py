"""StyleGAN2: an unconditional generator of images, trained with logistic losses and two penalties that are taken now and then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import StyleDiscriminator, StyleGenerator
from fastnce.networks.style_generator import load_rosinality, save_rosinality
from fastnce.systems import options
from fastnce.systems.adversarial import (
    at_least_fp32,
    discriminator_losses,
    generator_loss,
    r1,
)
from fastnce.systems.augment import diff_augment
from fastnce.systems.generating import (
    GRID_COLUMNS,
    SPLITS,
    check_amounts,
    evaluate_samples,
    interpolate,
    reference_and_training,
    sample_measure,
)
from fastnce.systems.system import (
    LabelledConfig,
    LabelledSystem,
    Measure,
    Rows,
    autocast,
    images_with_labels,
)

if TYPE_CHECKING:
    from fastnce.data import LabelledImages
    from fastnce.metrics.class_conditional import Sample

# Decays of the running means of the path length and of w; the share of a batch whose path lengths are measured.
_PATH_DECAY, _LATENT_DECAY, _PATH_SHARE = 0.99, 0.998, 2
_TRUNCATION = 0.7  # of a row of the sample grid


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Config(LabelledConfig):
    """The options of the networks, losses and optimisers. The defaults are the published StyleGAN2, config f, at 256 pixels."""

    system: ClassVar[str] = "stylegan2"

    image_size: int = 256
    """Height and width of the images, a power of two from 8."""
    image_channels: int = 3
    """3 for RGB, 1 for grey."""
    latent_dim: int = 512
    """Length of z and w."""
    mapping_layers: int = 8
    """Linear layers from z to w."""
    channels: tuple[int, ...] = ()
    """Widths of both networks at 4, 8, 16, ... pixels; empty: the published ones."""
    lambda_r1: float = 10.0
    """R1: weight of half the squared gradient of D at real images; 0 turns it off."""
    r1_every: int = 16
    """R1 is taken every so many steps, so many times as strong, in an update of its own."""
    lambda_path: float = 2.0
    """Weight of the path length penalty of G; 0 turns it off."""
    path_every: int = 4
    """The same for the path length penalty, on half a batch."""
    mixing: float = 0.9
    """Share of the batches whose images have the styles of two w, with one place where they change."""
    diff_augment: bool = False
    """DiffAugment: colour, translation and cutout on all images that D sees, for small data sets."""
    freeze: int = 0
    """Fine-tuning: G keeps its mapping and its convolutions of up to so many pixels as they are, such as 8; 1 keeps the mapping
    alone, 0 nothing. What G shares with the generator it began as is what the two understand of each other's w."""
    lr: float = 2e-3
    """Adam: learning rate of both networks."""
    beta2: float = 0.99
    """Adam: decay of the squared gradient; that of the mean gradient is 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the adversarial passes run under autocast; parameters, penalties and losses stay fp32."""

    data: Path = Path()
    """Folder of images: train/*.png and test/*.png, or a folder of images alone; or labelled ones, see `--class-names`."""
    batch_size: int = 16
    """Images per step."""
    steps: int = 800_000
    """Steps, each of one update of D and one of G."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    ema_decay: float = 0.5 ** (32 / 10_000)
    """Decay of the running average of the generator's weights; 0 keeps the last weights."""
    ema_start: int | None = 0
    """First step of the average, which copies the weights until then; None: it starts at once, corrected for its start."""
    measure_count: int = 10_000
    """Real test images, and as many samples, in a measurement; all if there are fewer."""
    extractor: Path | None = None
    """TorchScript file whose features measure the samples (FID and others); the digits set has its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "image_channels", "latent_dim", "mapping_layers")
        options.at_least(self, 1, "r1_every", "path_every")
        options.at_least(self, 0, "lambda_r1", "lambda_path")
        options.at_least(self, 2, "measure_count")
        options.above_zero(self, "lr")
        options.in_unit_interval(self, "beta2", "mixing")
        if self.freeze not in (0, 1) and not _is_power_of_two(self.freeze):
            raise UserError(
                f"freeze={self.freeze} is no size of a layer. Use 0 for none, 1 for the mapping, or 4, 8, 16, ..."
            )

    @property
    def widths(self) -> tuple[int, ...] | None:
        """`channels` as the networks take them."""
        return self.channels or None


def _is_power_of_two(number: int) -> bool:
    return number >= 4 and number & (number - 1) == 0


def build_generator(config: StyleGAN2Config) -> StyleGenerator:
    """The generator that `config` describes, freshly initialised."""
    return StyleGenerator(
        config.image_size,
        config.latent_dim,
        config.mapping_layers,
        config.widths,
        config.image_channels,
    )


def sizes_of(generator: StyleGenerator) -> dict[str, Any]:
    """The options of `StyleGAN2Config` that make a generator of the same sizes."""
    return {
        "image_size": generator.image_size,
        "image_channels": generator.image_channels,
        "latent_dim": generator.latent_dim,
        "mapping_layers": len(generator.style) - 1,
        "channels": generator.channels,
    }


class StyleGAN2(nn.Module):
    """The networks `generator` and `discriminator`, their Adam `optimizers` ("G" and "D"), and one training step.

    With x real images, z noise and w the mapped z, of two z in `mixing` of the batches:

        D loss = mean softplus(-D(x)) + mean softplus(D(G(w)))                              every step
        D loss = r1_every lambda_r1 / 2 mean |dD(x) / dx|^2                                 every `r1_every`-th step
        G loss = mean softplus(-D(G(w)))                                                    every step
        G loss = path_every lambda_path mean (|J^T y| - a)^2                                every `path_every`-th step

    each with an update of its own. |J^T y| is the path length: y is noise / sqrt(H W), J^T y the gradient of sum y G(w) with respect
    to the w of each of the k layers, and its length the root of the mean over layers of its squares' sums. a is its running mean.
    Adam's lr and betas are those of the published lazy penalties: lr r and beta^r with r = n / (n + 1) of the network's interval n.

    A parameter that a penalty does not depend on takes part in its update with a gradient of 0, as in the published code: Adam's
    mean squared gradient knows of it.

    The buffer `latent_avg` of the generator is the running mean of w.

    Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020 (https://arxiv.org/abs/1912.04958).

    Args:
        config: see `StyleGAN2Config`.

    Raises:
        UserError: sizes that the networks do not have, or frozen layers of a network that starts at random.
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        if config.freeze and config.init_from is None:
            raise UserError(
                f"freeze={config.freeze} would keep layers as they were drawn. Name trained ones with --init-from RUN."
            )
        try:
            self.generator = build_generator(config)
            self.discriminator = StyleDiscriminator(
                config.image_size, config.widths, config.image_channels
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        for parameter in frozen(self.generator, config.freeze):
            parameter.requires_grad_(False)
        self._learning = {
            letter: [p for p in network.parameters() if p.requires_grad]
            for letter, network in (("G", self.generator), ("D", self.discriminator))
        }
        intervals = {
            "G": config.path_every if config.lambda_path else None,
            "D": config.r1_every if config.lambda_r1 else None,
        }
        self.optimizers = {
            letter: lazy_adam(parameters, config.lr, config.beta2, intervals[letter])
            for letter, parameters in self._learning.items()
        }
        self.steps = 0
        for name in ("last_r1", "last_path", "path_length"):  # of the steps that took them last
            self.register_buffer(name, torch.zeros(()))

    def get_extra_state(self) -> int:
        """The steps made, which decide when the penalties are taken."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Takes the steps from a state dict."""
        self.steps = state

    def training_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update of D and one of G, and those of the penalties that are due.

        Args:
            batch: "image" (N, C, S, S) in [-1, 1], on the networks' device.

        Returns:
            Detached scalars: "D_real", "D_fake", "G_GAN"; the penalties "D_r1" and "G_path" as they were last, with their weights but
            not their intervals, and the mean "path_length", where they are in use.
        """
        config, real = self.config, batch["image"]
        self.discriminator.requires_grad_(True)
        losses = self._update_discriminator(real)
        if config.lambda_r1 and self.steps % config.r1_every == 0:
            self._penalise_discriminator(real)
        self.discriminator.requires_grad_(False)
        losses |= self._update_generator(len(real))
        if config.lambda_path and self.steps % config.path_every == 0:
            self._penalise_generator(max(1, len(real) // _PATH_SHARE))
        self.steps += 1
        if config.lambda_r1:
            losses["D_r1"] = self.last_r1.clone()
        if config.lambda_path:
            losses |= {"G_path": self.last_path.clone(), "path_length": self.path_length.clone()}
        return losses

    def _update_discriminator(self, real: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), autocast(self):
            fake = self.generator(self.styles(len(real)), noise="random")
        on_real, on_fake = self._judge(real), self._judge(fake)
        one, other = discriminator_losses(on_real, on_fake, "nonsaturating")
        self._descend("D", one + other)
        return {"D_real": one.detach(), "D_fake": other.detach()}

    def _penalise_discriminator(self, real: Tensor) -> None:
        config = self.config
        real = self._augmented(real).detach().requires_grad_()
        penalty = 0.5 * config.lambda_r1 * r1(self.discriminator(real), real)
        self._descend("D", config.r1_every * penalty)
        self.last_r1.copy_(penalty.detach())

    def _update_generator(self, count: int) -> dict[str, Tensor]:
        w = self.styles(count)
        with autocast(self):
            fake = self.generator(w, noise="random")
        loss = generator_loss(self._judge(fake), "nonsaturating")
        self._descend("G", loss)
        if not self.config.freeze:
            # A plain mean of the first steps.
            decay = min(_LATENT_DECAY, self.steps / (self.steps + 1))
            self.generator.latent_avg.lerp_(w.detach().mean((0, 1)), 1 - decay)
        return {"G_GAN": loss.detach()}

    def _penalise_generator(self, count: int) -> None:
        config = self.config
        w = self.styles(count)
        w = w if w.requires_grad else w.requires_grad_()
        lengths = path_lengths(self.generator(w, noise="random"), w)
        # The mean is part of what is differentiated.
        mean = torch.lerp(lengths.mean(), self.path_length, _PATH_DECAY)
        penalty = config.lambda_path * (lengths - mean).square().mean()
        self._descend("G", config.path_every * penalty)
        self.path_length.copy_(mean.detach())
        self.last_path.copy_(penalty.detach())

    def styles(self, count: int) -> Tensor:
        """w of each layer, (count, k, D), mapped from drawn z; in `mixing` of the calls of two z, with a drawn change of layer."""
        generator = self.generator
        device, k = generator.latent_avg.device, generator.num_styles
        mixed = torch.rand(()).item() < self.config.mixing
        z = torch.randn(2 if mixed else 1, count, self.config.latent_dim, device=device)
        w = [generator.mapping(part) for part in z.to(generator.latent_avg.dtype)]
        if not mixed:
            return w[0][:, None].expand(-1, k, -1)
        return generator.mix(*w, int(torch.randint(1, k, ())))

    def _judge(self, images: Tensor) -> Tensor:
        with autocast(self):
            return self.discriminator(self._augmented(images))

    def _augmented(self, images: Tensor) -> Tensor:
        return diff_augment(images) if self.config.diff_augment else images

    def _descend(self, letter: str, loss: Tensor) -> None:
        optimizer = self.optimizers[letter]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self._learning[letter]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def lazy_adam(
    parameters: list[nn.Parameter], lr: float, beta2: float, every: int | None
) -> torch.optim.Adam:
    """Adam, with beta1 = 0, of a network that has a penalty in an update of its own every `every` steps; None: that has none."""
    ratio = 1.0 if every is None else every / (every + 1)
    return torch.optim.Adam(parameters, lr=ratio * lr, betas=(0.0, beta2**ratio), fused=True)


def path_lengths(images: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
    """How far images move with w: (N,), sqrt(mean over layers of |d sum(images noise) / d w|^2), differentiable.

    Args:
        images: (N, C, H, W), made of `w`.
        w: (N, k, D), that requires gradients.
        noise: as `images`, of standard deviation 1 / sqrt(H W); by default drawn.
    """
    if noise is None:
        noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
    return at_least_fp32(gradient).square().sum(2).mean(1).sqrt()


def frozen(generator: StyleGenerator, size: int) -> list[nn.Parameter]:
    """The parameters that `StyleGAN2Config.freeze` = `size` keeps. The layers that turn a map into colours learn on."""
    kept: list[nn.Module] = [generator.style] if size else []
    if size >= 4:
        # Two convolutions for each doubling.
        doublings = size.bit_length() - 3
        kept += [generator.input, generator.conv1, *generator.convs[: 2 * doublings]]
    return [parameter for module in kept for parameter in module.parameters()]


class NoiseToImage(nn.Module):
    """z (N, D) to images (N, C, S, S) with the fixed noise: mapping and synthesis as one network."""

    def __init__(self, generator: StyleGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(self.generator.mapping(z))


class StyleGAN2System(LabelledSystem):
    """StyleGAN2 in the training loop."""

    config_class = StyleGAN2Config
    model_class = StyleGAN2
    network = staticmethod(build_generator)
    variants = {"stylegan2": {}}
    presets = {
        "ffhq": {"image_size": 1024},
        "cars": {"image_size": 512},
        "church": {"image_size": 256, "lambda_r1": 100.0},
        "horse": {"image_size": 256, "lambda_r1": 100.0},
        "afhq-wild": {"image_size": 512, "diff_augment": True},
        # The built-in digits, 16x16.
        "digits": {
            "image_size": 16,
            "image_channels": 1,
            "latent_dim": 64,
            "mapping_layers": 4,
            "channels": (48, 48, 24),
            "lambda_r1": 0.3,
            "mixing": 0.3,
            "lr": 8e-3,
            "batch_size": 24,
            "ema_decay": 0.995,
            "ema_start": None,
            "flip": False,
            "workers": 0,
            "steps": 2400,
            "log_every": 50,
            "sample_every": 500,
            "checkpoint_every": 500,
        },
        # The built-in crops of photographs, 32x32.
        "photo-crops": {
            "image_size": 32,
            "latent_dim": 128,
            "mapping_layers": 4,
            "channels": (64, 64, 48, 32),
            "lambda_r1": 0.1,
            "path_every": 8,
            "mixing": 0.3,
            "lr": 5e-3,
            "ema_decay": 0.998,
            "ema_start": None,
            "workers": 0,
            "steps": 6000,
            "log_every": 50,
            "sample_every": 500,
            "checkpoint_every": 500,
        },
    }
    published_keys = frozenset({"g_ema"})
    network_name = "generator"
    starts_averaged = True
    panels = (("D_real", "D_fake", "G_GAN"), ("D_r1", "G_path"), ("path_length",))
    best = "fid"
    does = "generate images"
    next_command = "fastnce generate --run {run} --out DIR"
    judged_by = frozenset({"extractor", "seed"})
    output = "image"

    def dataset(self, config: StyleGAN2Config) -> LabelledImages:
        return _images(config, "train")

    def read_published(self, path: Path) -> tuple[StyleGAN2Config, dict[str, Tensor]]:
        generator, _ = load_rosinality(path)
        config = StyleGAN2Config(data=path.parent, out=path.parent, **sizes_of(generator))
        return config, generator.state_dict()

    def start_from_published(self, model: StyleGAN2, path: Path) -> list[str]:
        generator, discriminator = load_rosinality(path)
        ours, theirs = (sizes_of(network) for network in (model.generator, generator))
        if ours != theirs:
            named = ", ".join(f"{k}={v}" for k, v in theirs.items() if ours[k] != v)
            raise UserError(f"init_from={path}: has {named}. Give the same values.")
        model.generator.load_state_dict(generator.state_dict())
        if discriminator is None:
            return [f"generator: from {path}", "discriminator: starts anew, the file has none"]
        model.discriminator.load_state_dict(discriminator.state_dict())
        return [f"generator and discriminator: from {path}"]

    def save_published(self, network: nn.Module, config: StyleGAN2Config, path: Path) -> None:
        save_rosinality(path, network)

    def preview(
        self, config: StyleGAN2Config, dataset: LabelledImages
    ) -> Callable[[nn.Module], Rows]:
        """Samples, the same truncated, and the same with the fine styles of their right neighbours."""
        random = torch.Generator().manual_seed(config.seed)
        z = torch.randn(config.sample_count, config.latent_dim, generator=random)

        def rows(generator: StyleGenerator) -> Rows:
            device = generator.latent_avg.device
            with torch.inference_mode():
                w = generator.mapping(z.to(device))
                mixed = generator.mix(w, w.roll(-1, 0), generator.num_styles // 2)
                shown = {
                    "samples": w,
                    f"truncated to {_TRUNCATION}": generator.truncate(w, _TRUNCATION),
                    "coarse of this, fine of the next": mixed,
                }
                return {name: list(images_of(generator, x)) for name, x in shown.items()}

        return rows

    def measure(self, config: StyleGAN2Config, dataset: LabelledImages) -> Measure:
        """Quality of the samples against the test images."""
        (images, labels), _ = _reference(config, config.data)
        quality = sample_measure(config, images, labels)
        return lambda model, average: quality(_sampler(average, config.seed))[0]

    def evaluate(
        self,
        config: StyleGAN2Config,
        networks: Mapping[str, nn.Module],
        data: Path,
        device: torch.device,
        *,
        extractor: Path | None = None,
        seed: int = 0,
    ) -> tuple[dict[str, Any], str]:
        """FID, precision, recall and more of samples without truncation, against the test images.

        Beside them stand training images (the best to hope for) and samples of the generator before its training. The extractor
        is by default that of the run, or a digits set's own classifier; `seed` is that of the noise.
        """
        reference = partial(_reference, config, data)
        of_run = (networks["run"], build_generator, _sampler, reference)
        return evaluate_samples(config, data, *of_run, extractor, seed, device)

    def generate_folder(
        self, network: nn.Module, config: StyleGAN2Config, out: Path, **how: Any
    ) -> int:
        return generate_folder(network, config, out, **self.known_options(generate_folder, how))

    def in_direction(
        self, network: nn.Module, config: StyleGAN2Config, direction: str | None
    ) -> tuple[nn.Module, int]:
        network, channels = super().in_direction(network, config, direction)
        return NoiseToImage(network).eval(), channels

    def graph_inputs(
        self, network: nn.Module, config: StyleGAN2Config, channels: int, count: int
    ) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(count)
        return {"z": torch.randn(count, config.latent_dim, generator=random)}


def _images(config: StyleGAN2Config, split: str, root: Path | None = None) -> LabelledImages:
    """The images of a split of `root`, by default `config.data`; of labelled ones those of the run's classes."""
    flip = config.flip and split == "train"
    return images_with_labels(config, split, root or config.data, flip=flip, needs_labels=False)


def _reference(
    config: StyleGAN2Config, data: Path
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """As `reference_and_training`, with one label for all images: the generator knows of no other."""
    parts = reference_and_training(data, config.measure_count, partial(_images, config, root=data))
    return tuple(part and (part[0], torch.zeros_like(part[1])) for part in parts)


def _sampler(generator: StyleGenerator, seed: int) -> Sample:
    """A function from labels, of which only the number counts, to images, with noise of its own from `seed` on."""
    random = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def sample(labels: Tensor) -> Tensor:
        z = torch.randn(len(labels), generator.latent_dim, generator=random)
        return images_of(generator, generator.mapping(z.to(generator.latent_avg.device)))

    return sample


@torch.inference_mode()
def images_of(generator: StyleGenerator, w: Tensor, batch_size: int = 64) -> Tensor:
    """Images (N, C, S, S) about in [-1, 1], on the CPU, of latents (N, D) or (N, k, D), with the fixed noise."""
    parts = [generator(part).float().cpu() for part in w.split(batch_size)]
    return torch.cat(parts).contiguous()


@torch.no_grad()
def sample_latents(generator: StyleGenerator, count: int, seed: int) -> Tensor:
    """Mapped samples (count, D), whose noise is drawn on the CPU."""
    random = torch.Generator().manual_seed(seed)
    # One after the other, so that a sample does not depend on how many there are.
    z = torch.stack([torch.randn(generator.latent_dim, generator=random) for _ in range(count)])
    return generator.mapping(z.to(generator.latent_avg))


def generate_folder(
    generator: StyleGenerator,
    config: StyleGAN2Config,
    out: Path,
    *,
    count: int = 16,
    truncation: float | None = None,
    interpolation: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> int:
    """Writes `out/images/NNNN.png`, `out/grid.png`, and `out/interpolation.png` if asked for.

    Args:
        generator: as `load_generator` gives it.
        config: the configuration of its run.
        out: folder; created.
        count: Images.
        truncation: How far from the mean latent the images are: 1 or None for all the way, less, such as 0.7, for more typical ones.
        interpolation: Also a picture with so many steps from the first image's w to the second's; 0 for none.
        seed: Seed of the noise.
        batch_size: Images generated at a time.

    Returns:
        The number of images.

    Raises:
        UserError: a value out of range, or truncation of a generator without a mean latent.
    """
    from fastnce.data import save_image
    from fastnce.files import expect_apart
    from fastnce.viz.plots import save_sample_grid

    check_amounts(count=count, batch_size=batch_size, interpolation=interpolation)
    expect_apart(out, [Path(config.data) / split for split in SPLITS])
    if truncation is not None and not truncation >= 0:
        raise UserError(f"truncation={truncation} is too small. Use truncation from 0 to 1.")
    if truncation is not None and not generator.latent_avg.any():
        raise UserError(
            f"truncation={truncation} needs a mean latent, and this generator has none. Leave it out."
        )
    w = sample_latents(generator, max(count, 2), seed)
    w = w if truncation is None else generator.truncate(w, truncation)
    images = images_of(generator, w[:count], batch_size)
    for number, image in enumerate(images):
        save_image(image, Path(out) / "images" / f"{number:04d}.png")
    shown = images[: GRID_COLUMNS**2].split(GRID_COLUMNS)
    grid = {f"{GRID_COLUMNS * row:04d}": list(part) for row, part in enumerate(shown)}
    save_sample_grid(grid, Path(out) / "grid.png")
    if interpolation:
        line = images_of(generator, interpolate(*w[:2], interpolation))
        save_sample_grid({"": list(line)}, Path(out) / "interpolation.png")
    return count
