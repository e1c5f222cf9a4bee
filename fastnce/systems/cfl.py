"""CFL: a photograph from a label map, with a patchwise contrastive loss in the place of L1."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnce
from fastnce.errors import UserError
from fastnce.files import expect_apart
from fastnce.networks import CriticProjector, MultiscaleDiscriminator, SPADEGenerator
from fastnce.networks.layers import init_default
from fastnce.systems import options
from fastnce.systems.adversarial import (
    MeansOrGANMode,
    at_least_fp32,
    discriminator_losses,
    generator_loss,
)
from fastnce.systems.patch_contrast import PatchConfig, projected, sample
from fastnce.systems.schedule import LateDecay
from fastnce.systems.system import Ablation, Measure, Rows, System, autocast, random_images
from fastnce.systems.translation import GeneratorConfig, adam, descend, l1

if TYPE_CHECKING:
    from fastnce.data.label_maps import LabelMaps


@dataclass(frozen=True, kw_only=True)
class CFLConfig(PatchConfig, GeneratorConfig):
    """The options of CFL's networks, losses and optimisers. The defaults are the published ones."""

    system: ClassVar[str] = "cfl"

    data: Path = Path()
    """Folder of the label maps and the photographs."""
    layout: Literal["folders", "cityscapes", "ade20k", "coco", "facades"] = "folders"
    """How the data's folder is made up; folders: train_label and train_img, test_label and test_img with equal names."""
    label_classes: int = 35
    """Classes of the label maps: 0 to label_classes - 1."""
    dont_care: bool = False
    """Label maps have pixels of no class, 255, which get a channel of their own."""
    instances: bool = False
    """There are maps of instances too, whose edges become a channel."""
    preprocess: str = "resize_and_crop"
    """How pairs are scaled: resize_and_crop, fixed (crop_size and aspect_ratio), scale_width, scale_shortside, these _and_crop,
    crop, or none."""
    aspect_ratio: float = 1.0
    """Width over height, where preprocess=fixed."""
    flip: bool = True
    """Mirror each pair with probability 1/2."""
    cache_gb: float = 2.0
    """Memory for decoded images in GiB, shared out among the workers."""

    upsampling: Literal["normal", "more", "most"] = "normal"
    """Generator: doublings from its first map to the image: normal 5, more 6, most 7."""
    base_channels: int = 64
    """Generator: channels of its last map, a sixteenth of its first."""
    hidden_channels: int = 128
    """Generator: channels inside each of its norms."""
    disc_layers: int = 4
    """Discriminator: layers before the last one."""
    disc_scales: int = 2
    """Discriminator: scales at which the image is judged."""
    init: Literal["published", "xavier", "default"] = "published"
    """Initialisation. xavier: of gain 0.02; published: the same, but weights under a spectral norm are PyTorch's, as it was on
    a GPU; default: PyTorch's own."""

    critic: Literal[
        "vgg19", "pixel", "resnet18", "resnet34", "resnet50", "convencoder", "scripted"
    ] = "vgg19"
    """Whose features are compared. vgg19 needs vgg_weights, scripted critic_file; pixel: patches of the image itself; the others
    have random weights."""
    vgg_weights: Path | None = None
    """Weights of VGG19: torchvision's vgg19-dcbb9e9d.pth, or a published F_q file."""
    vgg_normalize: Literal["none", "imagenet", "published"] = "none"
    """VGG19 sees images in [-1, 1] as published, or (imagenet) as its weights were trained, or as with the published option, which
    normalises without bringing them to [0, 1] before."""
    vgg_resize: bool = False
    """VGG19 sees images of 224x224."""
    critic_file: Path | None = None
    """TorchScript file of a network from images in [-1, 1] to a list of feature maps; by default critic.pt of the data."""
    extractor: Path | None = None
    """TorchScript file, or torch-fidelity, whose features measure the images (FID), never the critic; by default judge.pt of the
    data."""
    projector: Literal["mlp", "linear", "identity"] = "mlp"
    """The step of patches before they are compared: a small trained MLP per layer, a linear layer, or nothing."""
    nce_layers: tuple[str, ...] = ("1", "2", "3", "4", "5")
    """Maps that are compared: numbers as published, where 1 2 3 4 5 of vgg19 is relu2_1 to relu5_1, or names such as relu3_1."""
    layer_multiplier: float = 1.0
    """Each map counts by this factor more than the one before it."""
    map_weights: tuple[float, ...] = ()
    """Instead: the weights of the maps, relative to their sum."""
    layer_weighting: Literal["published", "once"] = "published"
    """once: the weights of the maps add up to 1. published: those of all nce_layers do, whatever maps there are, and the sum is
    divided by their number again."""
    nce_directions: Literal["both", "one"] = "both"
    """both: the sum of the losses of predicted patches among real ones and of real among predicted ones; one: the first alone."""
    fake_negatives: bool = True
    """The other patches of the same image are negatives too."""
    detach_keys: bool = True
    """As published: no gradient flows to keys, so that the generator learns from the first direction alone."""

    lambda_nce: float = 10.0
    """Weight of the contrastive loss; 0 turns it off, as it does each of the others."""
    lambda_gan: float = 1.0
    """Weight of the generator's adversarial loss."""
    lambda_l1: float = 0.0
    """Weight of the mean absolute difference to the photograph."""
    lambda_l2: float = 0.0
    """Weight of the mean squared difference."""
    lambda_vgg: float = 0.0
    """Weight of the L1 distance of feature maps: those of the critic, or of vgg_weights (or critic_file) beside critic=pixel."""
    vgg_weighting: Literal["published", "spade", "crn", "even"] = "published"
    """Weights of the five maps of that loss: published with CFL, those of SPADE, which are 2.47 times as large, or of CRN; even:
    the mean, for any number of maps."""
    vgg_input: bool = False
    """The image itself is the first of these maps."""
    lambda_feat: float = 0.0
    """Weight of feature matching: the L1 distance of the discriminator's maps."""
    gan_mode: MeansOrGANMode = "hinge"
    """Adversarial objective; w: means without a bound."""
    ttur: bool = False
    """Half the learning rate for generator and projector, twice for the discriminator, and betas 0 and 0.9."""
    reuse_fakes: bool = False
    """A change of the published order: the discriminator learns from the images that the generator was trained with, instead of
    those that it makes after its step. Saves a quarter of the generator's work."""

    epochs: int = 800
    """Epochs at the full learning rate."""
    decay_epochs: int = 0
    """Further epochs in which the learning rate of generator and discriminator falls linearly."""
    ema_decay: float = 0.0
    """Decay of the running average of the weights; 0, as published, keeps the last weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "label_classes", "hidden_channels", "disc_layers", "disc_scales")
        weights = ("lambda_nce", "lambda_gan", "lambda_l1", "lambda_l2", "lambda_vgg")
        options.at_least(self, 0, *weights, "lambda_feat", "cache_gb")
        options.above_zero(self, "aspect_ratio", "layer_multiplier")
        if not any(getattr(self, name) for name in weights):
            raise UserError(
                f"{'=0, '.join(weights)}=0 leave no loss. Set one of them, such as lambda_nce=10."
            )
        if self.lambda_feat > 0 and self.lambda_gan == 0:
            raise UserError(
                f"lambda_feat={self.lambda_feat} compares maps of the discriminator, and lambda_gan=0 leaves it out. "
                "Use lambda_gan=1, or lambda_feat=0."
            )

    @property
    def semantic_channels(self) -> int:
        """Channels of the generator's input: classes, "don't care", edges of instances."""
        return self.label_classes + self.dont_care + self.instances

    @property
    def critic_path(self) -> Path:
        """The file of critic=scripted."""
        return self.critic_file or self.data / "critic.pt"

    @property
    def distance_critic(self) -> str:
        """The critic of the VGG loss."""
        if self.critic != "pixel":
            return self.critic
        return "scripted" if self.vgg_weights is None and self.critic_path.is_file() else "vgg19"

    @property
    def layers(self) -> list[str]:
        """The entries of `nce_layers`, which may be joined by commas."""
        return [name for entry in self.nce_layers for name in entry.split(",") if name]

    @property
    def form(self) -> str:
        """Which form of the contrastive loss this is, in words for a result."""
        if self.lambda_nce == 0:
            return "none"
        named = {("both", True, True, "published"): "as published"}
        named["both", True, False, "once"] = "clean: gradients both ways, each map once"
        choices = (
            self.nce_directions,
            self.fake_negatives,
            self.detach_keys,
            self.layer_weighting,
        )
        words = [
            f"directions {self.nce_directions}",
            f"fake negatives {'on' if self.fake_negatives else 'off'}",
            f"keys {'detached' if self.detach_keys else 'with gradient'}",
            f"layers weighted {self.layer_weighting}",
        ]
        return named.get(choices, ", ".join(words))


def build_generator(config: CFLConfig) -> SPADEGenerator:
    """The generator that `config` describes, freshly initialised.

    Raises:
        UserError: a crop from which no first map is left.
    """
    try:
        return SPADEGenerator(
            config.semantic_channels,
            3,
            config.base_channels,
            config.upsampling,
            config.crop_size,
            config.aspect_ratio,
            config.hidden_channels,
            config.init,
        )
    except ValueError as error:
        raise UserError(str(error).removeprefix("SPADEGenerator: ")) from error


# Weights of the maps of VGG19 and, before them, of the image.
_VGG_WEIGHTS = {
    "spade": (1.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0),
    "crn": (1.0, 1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5),
}


def chosen_maps(config: CFLConfig, names: Sequence[str]) -> list[int]:
    """The places of the maps that `nce_layers` choose among the critic's, which have `names`.

    Raises:
        UserError: a name or a number that is none of the critic's.
    """
    layers, count = config.layers, len(names)
    if layers and all(name in names for name in layers):
        return [names.index(name) for name in layers]
    wrong = f"nce_layers={' '.join(layers)}: critic={config.critic}"
    if not layers or not all(name.isdecimal() for name in layers):
        raise UserError(
            f"{wrong} has the maps {', '.join(names)}. Use these names, or numbers as published."
        )
    numbers = [int(name) for name in layers]
    if config.critic == "vgg19":
        if numbers not in [list(range(first, 6)) for first in range(4)]:
            raise UserError(
                f"{wrong} takes the published 0 1 2 3 4 5, 1 2 3 4 5, 2 3 4 5 or 3 4 5. Use one of them, or names such as relu3_1."
            )
        return list(range(numbers[0], count))
    if config.critic.startswith("resnet") or config.critic == "convencoder":
        if max(numbers) >= count:
            raise UserError(f"{wrong} has {count} maps. Use numbers from 0 to {count - 1}.")
        return numbers
    if len(numbers) < count:
        raise UserError(f"{wrong} compares all of its {count} maps. Give {count} numbers or more.")
    return list(range(count))


def layer_weights(config: CFLConfig, count: int) -> list[float]:
    """The weight of each of the `count` maps that are compared: see `layer_weighting`."""
    entries = len(config.layers)
    weights = list(config.map_weights) or [config.layer_multiplier**i for i in range(entries)]
    if len(weights) < count or min(weights) <= 0:
        raise UserError(
            f"map_weights={config.map_weights} are for {count} maps. Give a positive number for each."
        )
    if config.layer_weighting == "once":
        return [weight / sum(weights[:count]) for weight in weights[:count]]
    return [weight / sum(weights) / entries for weight in weights[:count]]


def build_critic(config: CFLConfig, kind: str) -> nn.Module:
    """A frozen critic: from an image in [-1, 1] to a list of feature maps, whose channels are `channels`.

    Raises:
        UserError: its file is missing.
    """
    from fastnce.networks import critics

    _expect_file(config, kind)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "pixel": critics.PixelCritic,
        "vgg19": lambda: critics.VGG19Critic(
            config.vgg_weights, normalize=config.vgg_normalize, resize=config.vgg_resize
        ),
        "scripted": lambda: critics.ScriptedCritic(config.critic_path),
        "convencoder": critics.ConvEncoderCritic,
    }
    return kinds[kind]() if kind in kinds else critics.ResNetCritic(kind)


def _expect_file(config: CFLConfig, kind: str) -> None:
    """Raises `UserError` if a critic needs a file that was not named."""
    if kind == "vgg19" and config.vgg_weights is None:
        raise UserError(
            "vgg19 needs its weights. Give torchvision's vgg19-dcbb9e9d.pth with vgg_weights, or use critic=pixel."
        )
    if kind == "scripted" and not (config.critic_file or config.critic_path.is_file()):
        raise UserError(
            f"critic=scripted needs a network, and there is no {config.critic_path}. Give its TorchScript file with critic_file."
        )


def distance_weights(config: CFLConfig, count: int) -> list[float]:
    """The weights of the VGG loss: of the image itself, and of each of the `count` maps."""
    if config.vgg_weighting == "even":
        return [1 / (count + config.vgg_input)] * (count + 1)
    weights = _VGG_WEIGHTS["crn" if config.vgg_weighting == "crn" else "spade"]
    if len(weights) != count + 1:
        raise UserError(
            f"vgg_weighting={config.vgg_weighting} has weights of the five maps of VGG19, and the critic has {count}. "
            "Use vgg_weighting=even."
        )
    return [w if config.vgg_weighting == "spade" else w / sum(weights) for w in weights]


class CriticFeatures(nn.Module):
    """A critic, `encoder`, and what projects the patches of its maps, `projection`; published as F_q."""

    def __init__(self, config: CFLConfig) -> None:
        super().__init__()
        self.encoder = build_critic(config, config.critic)
        self.maps = chosen_maps(config, self.encoder.names)
        self.in_channels = [self.encoder.channels[place] for place in self.maps]
        width, kind = config.projection_dim, config.projector
        self.projection = CriticProjector(self.in_channels, width, kind)
        if config.init == "default":
            init_default(self.projection)


class CFL(nn.Module):
    """The networks `generator`, `discriminator` and `features`, their Adam `optimizers`, and one training step.

    With s the semantic map of the labels, y the photograph, G the generator, D the discriminator, which sees s beside an image, F
    the frozen critic and H the projector:

        G loss = lambda_nce sum_l w_l mean [NCE(q_l, k_l) + NCE(k_l, q_l)]     q = H(F(G(s))), k = H(F(y)) at the same places
                 + lambda_gan l(D(s, G(s)), real)
                 + lambda_l1 mean |G(s) - y| + lambda_l2 mean (G(s) - y)^2
                 + lambda_vgg sum_l v_l mean |F_l(G(s)) - F_l(y)|
                 + lambda_feat / scales sum over D's maps mean |D_m(s, G(s)) - D_m(s, y)|
        D loss = l(D(s, G(s)), fake) + l(D(s, y), real)                        of G(s) anew, after G's step

    NCE is `patch_nce` with `query_negatives`, and w, as published, 1 / L^2 of L `nce_layers`: see `layer_weights`. First G and H
    are updated, then D. D's losses are means over its scales.

    As published the rows are divided by their norm plus 1e-7, here by their norm.

    Source: Andonian et al., "Contrastive Feature Loss for Image Prediction", ICCV AIM workshop 2021
    (https://arxiv.org/abs/2111.06934).

    Args:
        config: see `CFLConfig`.

    Attributes:
        optimizers: "G", and "F" where a projector is trained, and "D" where there is an adversarial loss.
        features: critic and projector; None without the contrastive loss.
        vgg: the network of the VGG loss, where it is not the critic; else None.

    Raises:
        UserError: a critic without its weights, `nce_layers` that it does not have, weights for another number of maps, a crop that
            the generator cannot make, or a backend that is not there.
    """

    def __init__(self, config: CFLConfig) -> None:
        super().__init__()
        options.backend_is_there(config.backend)
        self.config = config
        self.generator = build_generator(config)
        slow, fast = {}, {}
        if config.ttur:
            slow = {"lr": config.lr / 2, "betas": (0.0, 0.9)}
            fast = {"lr": config.lr * 2, "betas": (0.0, 0.9)}
        self.optimizers = {"G": adam(config, self.generator, **slow)}
        self.features = self.discriminator = self.vgg = None
        if config.lambda_nce > 0:
            self.features = CriticFeatures(config)
            self.weights = layer_weights(config, len(self.features.maps))
            if config.projector != "identity":
                self.optimizers["F"] = adam(config, self.features.projection, decays=False, **slow)
        if config.lambda_vgg > 0:
            if self.features is None or config.distance_critic != config.critic:
                self.vgg = build_critic(config, config.distance_critic)
            network = self.vgg or self.features.encoder
            self.distance_weights = distance_weights(config, len(network.channels))
        if config.lambda_gan > 0:
            self.discriminator = MultiscaleDiscriminator(
                config.semantic_channels + 3,
                config.disc_channels,
                config.disc_layers,
                config.disc_scales,
                config.init,
            )
            self.optimizers["D"] = adam(config, self.discriminator, **fast)

    def training_step(
        self, batch: Mapping[str, Tensor], *, patch_ids: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One update of G and H, then one of D.

        Args:
            batch: "label" (N, H, W) int64, "B" (N, 3, H, W) photographs in [-1, 1], and with `instances` "edges" (N, 1, H, W), on
                the device of the networks.
            patch_ids: positions in each map that is compared, one (S,) int64 tensor per map; by default drawn.

        Returns:
            Detached scalars, weights included: "G", and of the losses that are on "NCE", "G_GAN", "G_L1", "G_L2", "G_VGG", "G_feat",
            "D_real", "D_fake".
        """
        real = batch["B"]
        semantics = semantic_map(self.config, batch).to(real.dtype)
        with autocast(self):
            fake = self.generator(semantics)
        losses = self._update_generator(semantics, fake, real, patch_ids)
        if self.discriminator is not None:
            losses |= self._update_discriminator(semantics, fake.detach(), real)
        return {name: loss.detach() for name, loss in losses.items()}

    def _update_generator(
        self, semantics: Tensor, fake: Tensor, real: Tensor, patch_ids: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        config = self.config
        losses = self._feature_losses(fake, real, patch_ids)
        if self.discriminator is not None:
            losses |= self._adversarial_losses(semantics, fake, real)
        if config.lambda_l1 > 0:
            losses["G_L1"] = config.lambda_l1 * l1(fake, real)
        if config.lambda_l2 > 0:
            losses["G_L2"] = config.lambda_l2 * F.mse_loss(at_least_fp32(fake), real)
        total = sum(losses.values())
        descend(total, *(o for letter, o in self.optimizers.items() if letter != "D"))
        return {"G": total, **losses}

    def _feature_losses(
        self, fake: Tensor, real: Tensor, patch_ids: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        """The losses in the features of the critic, and of VGG19."""
        config, losses, maps = self.config, {}, None
        if self.features is not None:
            # All of them if the VGG loss needs them too.
            depth = None if config.lambda_vgg > 0 else max(self.features.maps) + 1
            maps = self._maps(self.features.encoder, fake, real, depth)
            losses["NCE"] = config.lambda_nce * self._contrast(*maps, patch_ids)
        if config.lambda_vgg > 0:
            if self.vgg is not None:
                maps = self._maps(self.vgg, fake, real)
            pairs = zip((fake, *maps[0]), (real, *maps[1]), self.distance_weights, strict=True)
            first = 0 if config.vgg_input else 1
            distances = [w * l1(a, b) for a, b, w in list(pairs)[first:]]
            losses["G_VGG"] = config.lambda_vgg * sum(distances)
        return losses

    def _maps(
        self, critic: nn.Module, fake: Tensor, real: Tensor, depth: int | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        with autocast(self):
            of_fake = critic(fake, depth)
        with autocast(self), torch.no_grad():
            of_real = critic(real, depth)
        return of_fake, of_real

    def _contrast(
        self, fake: list[Tensor], real: list[Tensor], patch_ids: Sequence[Tensor] | None
    ) -> Tensor:
        config, chosen = self.config, self.features.maps
        keys, ids = sample(config, [real[place] for place in chosen], patch_ids)
        queries, _ = sample(config, [fake[place] for place in chosen], ids)
        with autocast(self):
            project = self.features.projection
            queries, keys = projected([(project, queries), (project, keys)])
        both = config.nce_directions == "both"
        loss = fastnce.patch_nce(
            queries,
            keys,
            temperature=config.temperature,
            symmetric=both,
            query_negatives=config.fake_negatives,
            detach_keys=config.detach_keys,
            layer_weights=self.weights,
            backend=config.backend,
        )
        return 2 * loss if both else loss  # the op halves the sum of the directions

    def _adversarial_losses(
        self, semantics: Tensor, fake: Tensor, real: Tensor
    ) -> dict[str, Tensor]:
        config = self.config
        self.discriminator.requires_grad_(False)
        images = [fake, real] if config.lambda_feat > 0 else [fake]
        scales = self._judge(semantics, *images)
        losses = [generator_loss(maps[-1][: len(fake)], config.gan_mode) for maps in scales]
        results = {"G_GAN": config.lambda_gan * sum(losses) / len(losses)}
        if config.lambda_feat > 0:
            distances = [l1(*x.chunk(2)) for maps in scales for x in maps[:-1]]
            results["G_feat"] = config.lambda_feat * sum(distances) / len(scales)
        return results

    def _update_discriminator(
        self, semantics: Tensor, fake: Tensor, real: Tensor
    ) -> dict[str, Tensor]:
        if not self.config.reuse_fakes:
            with autocast(self), torch.no_grad():
                fake = self.generator(semantics)
        self.discriminator.requires_grad_(True)
        losses = []
        for *_, logits in self._judge(semantics, fake, real):
            of_fake, of_real = logits.chunk(2)
            losses.append(discriminator_losses(of_real, of_fake, self.config.gan_mode))
        real_loss, fake_loss = (sum(terms) / len(terms) for terms in zip(*losses, strict=True))
        descend(real_loss + fake_loss, self.optimizers["D"])
        return {"D_real": real_loss, "D_fake": fake_loss}

    def _judge(self, semantics: Tensor, *images: Tensor) -> list[list[Tensor]]:
        """The discriminator's maps of the images, one after the other in the batch."""
        pairs = [torch.cat([semantics, image.to(semantics)], dim=1) for image in images]
        with autocast(self):
            return self.discriminator(torch.cat(pairs))


def semantic_map(config: CFLConfig, batch: Mapping[str, Tensor]) -> Tensor:
    """What the generator sees of a batch: one channel for each class, and the edges of instances."""
    from fastnce.data.label_maps import one_hot

    edges = batch["edges"] if config.instances else None
    return one_hot(batch["label"], config.label_classes + config.dont_care, edges)


def coloured(label: Tensor, classes: int) -> Tensor:
    """A label map (H, W) as an image (3, H, W) in [-1, 1]: a colour for each class, grey for "don't care"."""
    hues = torch.arange(classes) * 0.618034  # the golden ratio keeps neighbours apart
    phases = (hues[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3])) * 2 * torch.pi
    light = 0.75 - 0.35 * (torch.arange(classes)[:, None] % 2)
    colours = light * torch.cos(phases) + (light - 0.75)
    grey = torch.full((1, 3), -0.5)
    return torch.cat([colours.clamp(-1, 1), grey])[label.cpu()].permute(2, 0, 1)


def label_maps(config: CFLConfig, split: str, root: object = None, **how: Any) -> LabelMaps:
    """The pairs of a split, read as a configuration says; `how` are arguments of `LabelMaps` that differ."""
    from fastnce.data.label_maps import LabelMaps

    values = {
        "layout": config.layout,
        "label_classes": config.label_classes,
        "dont_care": config.dont_care,
        "instances": config.instances,
        "preprocess": config.preprocess,
        "load_size": config.load_size,
        "crop_size": config.crop_size,
        "aspect_ratio": config.aspect_ratio,
        "flip": config.flip,
        "seed": config.seed,
        "cache_bytes": int(config.cache_gb * 2**30),
        "broken_files": config.broken_files,
    }
    return LabelMaps(config.data if root is None else root, split, **(values | how))


def tested(config: CFLConfig) -> dict[str, object]:
    """How pairs are read where nothing is left to chance: scaled as in training, not mirrored, and without a random crop."""
    steps = config.preprocess
    if steps == "resize_and_crop":
        return {"load_size": config.crop_size, "flip": False, "serial": True}
    steps = "none" if steps == "crop" else steps.removesuffix("_and_crop")
    return {"preprocess": steps, "flip": False, "serial": True}


@torch.inference_mode()
def predictions(
    network: nn.Module, config: CFLConfig, dataset: LabelMaps, count: int | None = None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """A prediction (3, H, W) in [-1, 1] on the CPU for each sample of a dataset, or the first `count`, and the sample."""
    like = next(network.parameters())
    for index in range(len(dataset) if count is None else min(count, len(dataset))):
        sample_ = dataset[index]
        batch = {name: x[None] for name, x in sample_.items()}
        yield network(semantic_map(config, batch).to(like))[0].float().cpu(), sample_


def _expect_multiple(path: Path, width: int, height: int, multiple: int) -> None:
    """Raises `UserError` unless the generator makes images of this size."""
    if width % multiple or height % multiple:
        raise UserError(
            f"{path}: gives {width}x{height}, and the generator makes images whose sides are multiples of {multiple}. Use another "
            "crop_size, aspect_ratio or preprocess, or less upsampling."
        )


def translate_label_maps(
    generator: nn.Module,
    config: CFLConfig,
    input: Path,
    out: Path,
    batch_size: int = 16,
    *,
    instances: Path | None = None,
    preprocess: str | None = None,
    size: int | None = None,
    format: Literal["png", "jpg", "tiff", "webp"] | None = None,
    broken_files: Literal["error", "skip"] | None = None,
) -> int:
    """Makes images of all label maps of a folder, and of the folders in it, as files of the same names.

    Args:
        generator: a trained network.
        config: its run's configuration.
        input: folder of the label maps; or of Cityscapes as distributed, whose test maps are then translated.
        out: folder of the results; created.
        batch_size: Maps translated at a time, where they have the same size.
        instances: Of CFL: folder of the maps of instances, with the names of the label maps.
        preprocess: How maps are scaled, by default as in training, without a random crop; none keeps their size.
        size: Size to which they are scaled; by default the crop size of the training.
        format: Of the results; by default png.
        broken_files: What a file that cannot be read does: skip leaves it out, error stops; by default as in the training.

    Returns:
        The number of images made.

    Raises:
        UserError: no such folder, a broken file, a label beyond the classes, no instances, a size that the generator does not
            take, or `out` cannot be written.
    """
    from fastnce.data import save_image
    from fastnce.systems.translating import Picture, groups_of_one_size, targets

    for name, value in (("batch_size", batch_size), ("size", size)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if not input.is_dir():
        raise UserError(f"input={input}: no such folder. Name a folder of label maps.")
    expect_apart(out, [input])
    config = replace(config, crop_size=size or config.crop_size)
    how = tested(replace(config, preprocess=preprocess or config.preprocess)) | {"images": False}
    how |= {"broken_files": broken_files or config.broken_files}
    if (input / "gtFine").is_dir():
        dataset = label_maps(config, "test", input, **(how | {"layout": "cityscapes"}))
    elif config.instances and instances is None:
        raise UserError(
            f"input={input}: the run sees the edges of instances too. Give the folder of their maps: --instances DIR."
        )
    else:
        folders = {"test_label": input, **({"test_inst": instances} if config.instances else {})}
        dataset = label_maps(config, "test", folders, **(how | {"layout": "folders"}))
    labels = dataset.parts["label"]
    written = targets(labels.paths, labels.folder, out, format)

    def maps() -> Iterator[tuple[Path, Picture]]:
        for index, path in enumerate(labels.paths):
            sample_ = dataset[index]
            if index not in labels.broken:  # else it is another one, in its place
                batch = {name: x[None] for name, x in sample_.items()}
                yield path, Picture(semantic_map(config, batch)[0], None)

    count, like = 0, next(generator.parameters())
    for group in groups_of_one_size(maps(), batch_size, None):
        batch = torch.stack([picture.pixels for _, picture in group])
        _expect_multiple(group[0][0], *batch.shape[:1:-1], generator.size_multiple)
        with torch.inference_mode():
            images = generator(batch.to(like))
        for (path, _), image in zip(group, images.float().cpu(), strict=True):
            save_image(image, written[path])
        count += len(group)
    return count


# What `fastnce ablate cfl` compares, each without and with the GAN; the stand-in is the critic.pt of a built-in set.
_NO_NCE: dict[str, object] = {"lambda_nce": 0.0, "lambda_gan": 0.0}
_NCE: dict[str, object] = {"lambda_nce": 10.0, "lambda_gan": 0.0, "critic": "pixel"}
_CHOICES: dict[str, dict[str, object]] = {
    "L1": _NO_NCE | {"lambda_l1": 10.0},
    "L2": _NO_NCE | {"lambda_l2": 10.0},
    "PatchNCE": _NCE,
    "one direction": _NCE | {"nce_directions": "one"},
    "gradients both ways": _NCE | {"detach_keys": False},
    "no query negatives": _NCE | {"fake_negatives": False},
    "64 patches": _NCE | {"num_patches": 64},
    "16 patches": _NCE | {"num_patches": 16},
    "L1 of stand-in features": _NO_NCE
    | {"critic": "scripted", "lambda_vgg": 10.0, "vgg_weighting": "even"},
    "PatchNCE of stand-in features": _NCE | {"critic": "scripted"},
    "L1 of VGG19's features": _NO_NCE | {"critic": "vgg19", "lambda_vgg": 10.0},
    "PatchNCE of VGG19's features": _NCE | {"critic": "vgg19"},
}
_AGAINST = dict.fromkeys(
    ("L2", "PatchNCE", "L1 of stand-in features", "L1 of VGG19's features"), "L1"
)
_AGAINST |= dict.fromkeys(list(_CHOICES)[3:8], "PatchNCE")
for _critic in ("stand-in", "VGG19's"):
    _AGAINST[f"PatchNCE of {_critic} features"] = f"L1 of {_critic} features"


class CFLSystem(System):
    """CFL in the training loop."""

    config_class = CFLConfig
    model_class = CFL
    network = staticmethod(build_generator)
    variants = {
        "cfl": {},
        # The loss as the paper writes it.
        "cfl-clean": {"detach_keys": False, "layer_weighting": "once"},
    }
    ablations = {
        "cfl": Ablation(
            choices=_CHOICES
            | {f"{name}, GAN": own | {"lambda_gan": 1.0} for name, own in _CHOICES.items()},
            measures={
                "laplacian_variance": ("Laplacian variance", ".3f"),
                "saturation": ("saturation", ".3f"),
                "l1": ("L1", ".3f"),
                "swd_fine": ("SWD fine", ".1f"),
                "swd_coarse": ("SWD coarse", ".1f"),
                "fid": ("FID", ".1f"),
                "pixel_accuracy": ("pixel accuracy", ".3f"),
            },
            row="predicted",
            against=_AGAINST
            | {f"{name}, GAN": f"{other}, GAN" for name, other in _AGAINST.items()},
            beside=("real", "other real images", "a grey image"),
            preset="photos",
            needs={
                f"{loss} of VGG19's features{gan}": "vgg_weights"
                for loss in ("L1", "PatchNCE")
                for gan in ("", ", GAN")
            },
        )
    }
    presets = {
        "cityscapes": {
            "layout": "cityscapes",
            "label_classes": 35,
            "instances": True,
            "preprocess": "fixed",
            "crop_size": 512,
            "aspect_ratio": 2.0,
            "upsampling": "more",
            "batch_size": 16,
        },
        "ade20k": {"layout": "ade20k", "label_classes": 150, "dont_care": True},
        "coco": {
            "layout": "coco",
            "label_classes": 182,
            "dont_care": True,
            "instances": True,
        },
        # Cityscapes' class numbers and shape; no instances.
        "gta": {
            "label_classes": 35,
            "preprocess": "fixed",
            "crop_size": 512,
            "aspect_ratio": 2.0,
            "upsampling": "more",
            "batch_size": 16,
        },
        # The 40 classes of NYU depth v2, and 0.
        "nyu-depth": {"label_classes": 41, "dont_care": True},
        "custom": {"label_classes": 13},
        # The demo, on the sets of `fastnce data texture-mosaics` and `posterised-photos`: minutes on a CPU.
        "photos": {
            "label_classes": 8,
            "load_size": 32,
            "crop_size": 32,
            "base_channels": 8,
            "hidden_channels": 24,
            "disc_channels": 16,
            "init": "default",
            "critic": "pixel",
            "projection_dim": 64,
            "lambda_gan": 0.0,
            "lr": 4e-4,
            "batch_size": 8,
            "workers": 0,
            "steps": 1500,
            "log_every": 50,
            "sample_every": 250,
            "checkpoint_every": 250,
        },
    }
    network_name = "generator"
    panels = (
        ("G_GAN", "D_real", "D_fake"),
        ("NCE",),
        ("G_L1", "G_L2", "G_VGG", "G_feat"),
        ("G",),
    )
    does = "translate images"
    next_command = "fastnce translate --run {run} --input DIR --out DIR"
    paired = True
    published = {"G": "generator", "D": "discriminator", "F_q": "features"}
    compares_best = True
    judged_by = frozenset({"extractor", "segmenter"})
    best = "swd"
    reported = ("form", "critic", "projector", "nce_layers", "num_patches", "reuse_fakes")
    reports_cost = True
    output = "image"
    any_size = True

    def dataset(self, config: CFLConfig) -> LabelMaps:
        # Before minutes of reading.
        if config.lambda_nce > 0:
            _expect_file(config, config.critic)
        if config.lambda_vgg > 0:
            _expect_file(config, config.distance_critic)
        dataset = label_maps(config, "train")
        if config.batch_size > 1:
            dataset.expect_one_size()
        return dataset

    def schedule(self, config: CFLConfig, epoch_samples: int) -> LateDecay:
        return LateDecay.of(
            epochs=config.epochs,
            decay_epochs=config.decay_epochs,
            steps=config.steps,
            samples_per_step=config.samples_per_step,
            epoch_samples=epoch_samples,
        )

    def model(self, config: CFLConfig, dataset: LabelMaps) -> nn.Module:
        model = CFL(config)
        multiple = model.generator.size_multiple
        sizes = dataset.output_sizes()[0]
        for (width, height), path in sizes.items():
            _expect_multiple(path, width, height, multiple)
            if config.batch_size * width * height == multiple**2:
                raise UserError(
                    f"batch_size={config.batch_size} of {width}x{height} leaves batch norm one position in the generator's first map. "
                    "Use a larger batch_size or crop_size, or less upsampling."
                )
        width, height = min(sizes, key=min)
        for critic in (model.vgg, model.features and model.features.encoder):
            if critic is not None:
                try:
                    critic(torch.zeros(1, 3, height, width))
                except (ValueError, RuntimeError) as error:
                    raise UserError(
                        f"{sizes[width, height]}: gives {width}x{height}, too small for critic={config.critic} ({error}). "
                        "Use a larger crop_size, or another critic."
                    ) from error
        return model

    def preview(self, config: CFLConfig, dataset: LabelMaps) -> Callable[[nn.Module], Rows]:
        try:
            shown = label_maps(config, "test", **tested(config))
        except UserError:  # no such folder
            shown = label_maps(config, "train", **tested(config))

        def rows(generator: nn.Module) -> Rows:
            found = list(predictions(generator, config, shown, config.sample_count))
            return {
                "label": [coloured(s["label"], config.label_classes) for _, s in found],
                "output": [image for image, _ in found],
                "truth": [s["B"] for _, s in found],
            }

        return rows

    def translate_folder(
        self, network: nn.Module, config: CFLConfig, input: Path, out: Path, **how: Any
    ) -> int:
        how = self.known_options(translate_label_maps, how)
        return translate_label_maps(network, config, Path(input), Path(out), **how)

    def in_direction(
        self, network: nn.Module, config: CFLConfig, direction: str | None
    ) -> tuple[nn.Module, int]:
        return super().in_direction(network, config, direction)[0], config.semantic_channels

    def graph_inputs(
        self, network: nn.Module, config: CFLConfig, channels: int, count: int
    ) -> dict[str, Tensor]:
        sides = network.size_multiple * (count - 1), network.size_multiple * 2
        return {"semantics": random_images(count, channels, *sides)}

    def measure(self, config: CFLConfig, dataset: LabelMaps) -> Measure | None:
        """Of the averaged network's images of the test maps. None, and a line that says why, if there are none."""
        try:
            label_maps(config, "test", **tested(config))
        except UserError as error:
            print(f"Nothing is measured. {error}", file=sys.stderr)
            return None

        def measure(_: nn.Module, network: nn.Module) -> dict[str, float]:
            was_training = network.training
            device = next(network.parameters()).device
            networks = {"run": network.eval()}
            result, _ = self._judged(config, networks, config.data, device, baselines=False)
            network.train(was_training)
            row = result["rows"][0]
            row["swd"] = (row["swd_fine"] + row["swd_coarse"]) / 2
            return {x: v for x, v in row.items() if v is not None and x not in ("name", "count")}

        return measure

    def evaluate(
        self,
        config: CFLConfig,
        networks: Mapping[str, nn.Module],
        data: Path | Mapping[str, Path],
        device: torch.device,
        *,
        extractor: Path | None = None,
        segmenter: Path | None = None,
    ) -> tuple[dict[str, Any], str]:
        """Sharpness, saturation, L1, sliced Wasserstein distance, FID and what a segmenter reads, beside the real images'.

        Of the test images, as `predictions` makes them; see `fastnce.metrics.prediction.evaluate_prediction`.

        Args:
            extractor: what gives the features of FID, never the critic; by default that of the run, or judge.pt of the data.
            segmenter: reads the classes of the labels, of Cityscapes its 19 train ids; by default segmenter.pt of the data.
        """
        judges = {"extractor": extractor, "segmenter": segmenter}
        result, table = self._judged(config, networks, data, device, **judges)
        return result, f"{table}\nContrastive loss: {config.form}; critic: {config.critic}.\n"

    def _judged(
        self,
        config: CFLConfig,
        networks: Mapping[str, nn.Module],
        data: Path | Mapping[str, Path],
        device: torch.device,
        *,
        extractor: Path | None = None,
        **how: Any,
    ) -> tuple[dict[str, Any], str]:
        from fastnce.systems.judging import judge_predictions

        extractor = extractor or config.extractor
        test = label_maps(config, "test", data, **tested(config))
        others: Sequence[Mapping[str, Tensor]] = []
        with contextlib.suppress(UserError):  # no such folder
            others = label_maps(config, "train", data, **tested(config))
        return judge_predictions(
            {name: predictions(network, config, test) for name, network in networks.items()},
            others,
            data,
            count=len(test),
            cityscapes=config.layout == "cityscapes",
            critic=config.critic_path if config.critic == "scripted" else None,
            extractor=extractor,
            device=device,
            **how,
        )
