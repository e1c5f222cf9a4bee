"""ReStyle: an encoder that inverts images into the latent space of a StyleGAN2 by small steps; and pSp and e4e, of one step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.files import atomic_path
from fastnce.networks import perceptual
from fastnce.networks.restyle_encoder import LatentDiscriminator, build_encoder
from fastnce.networks.style_generator import (
    StyleGenerator,
    generator_of,
    load_rosinality,
    style_options,
)
from fastnce.networks.weights import difference, load_strictly, read_plain
from fastnce.systems import options
from fastnce.systems.adversarial import discriminator_losses, generator_loss, r1
from fastnce.systems.cyclegan import ImagePool
from fastnce.systems.inverting import Inversion, Inverter, Step, average_image, iterate
from fastnce.systems.ranger import Ranger
from fastnce.systems.system import (
    Ablation,
    LabelledConfig,
    LabelledSystem,
    Measure,
    Rows,
    autocast,
    images_with_labels,
)
from fastnce.systems.translation import descend

if TYPE_CHECKING:
    from fastnce.data import LabelledImages


@dataclass(frozen=True, kw_only=True)
class ReStyleConfig(LabelledConfig):
    """The options of the networks, losses and optimisers. The defaults are the published ReStyle on pSp, for faces."""

    system: ClassVar[str] = "restyle"

    generator: Path | None = None
    """Generator to invert into: the folder of a run of stylegan2, or a file of rosinality's layout, {g_ema, latent_avg}. The run
    keeps its weights."""
    generator_shape: tuple[int, ...] = ()
    """Read from the generator; leave it out. Side of its images, length of w, layers of the mapping, channels of the images,
    widths."""
    encoder: Literal["ir-se50", "resnet34", "small"] = "ir-se50"
    """Encoder: ir-se50 as published for faces, resnet34 for everything else, small (ours) for the digits."""
    pyramid: bool = False
    """Encoder: styles from three of its maps, as in pSp and e4e, instead of the last alone."""
    head: Literal["psp", "e4e"] = "psp"
    """psp: a style of its own for each layer of the generator; e4e: one style, and what the layers differ from it."""
    feedback: bool = True
    """The encoder sees the reconstruction beside the image. Off, with steps_per_batch=1: it sees the image alone, as in pSp and
    e4e."""
    steps_per_batch: int = 5
    """Steps of each inversion, each with losses of its own."""
    image_size: int = 256
    """Width of the images that the encoder and the losses see."""
    image_height: int | None = None
    """Their height, where it is less than the width: the generator's images are cut above and below (cars: 192)."""
    other_shapes: Literal["error", "crop", "stretch"] = "error"
    """What becomes of images of another shape: error; crop takes the central part; stretch, as published, scales all of it."""

    lambda_l2: float = 1.0
    """Weight of the mean squared difference; 0 turns it off, as it does each of the others."""
    lambda_lpips: float = 0.8
    """Weight of LPIPS; needs lpips_backbone and lpips_weights."""
    lambda_id: float = 0.1
    """Weight of the similarity of faces; needs face_weights."""
    lambda_moco: float = 0.0
    """Weight of the similarity of MoCo's features, for everything but faces; needs moco_weights."""
    lambda_similarity: float = 0.0
    """Weight of the similarity of the features of another network; needs similarity."""
    lambda_w_norm: float = 0.0
    """Weight of the distance of w from the mean latent."""
    lambda_delta: float = 0.0
    """Weight of the distances of all styles from the first (e4e), as far as they are learned."""
    lambda_adv: float = 0.0
    """Weight of the latent discriminator (e4e), to which w shall look like mapped noise."""
    face_weights: Path | None = None
    """ArcFace's IR-SE50: what ir-se50 starts from, and the network of lambda_id."""
    backbone_weights: Path | None = None
    """torchvision's ResNet-34, what resnet34 starts from."""
    moco_weights: Path | None = None
    """ResNet-50 of MoCo v2, or the folder of a run of `fastnce train moco`."""
    lpips_backbone: Path | None = None
    """torchvision's AlexNet."""
    lpips_weights: Path | None = None
    """LPIPS' linear layers, v0.1 of alex, which the lpips package ships."""
    similarity: Path | None = None
    """TorchScript file of the network of lambda_similarity, for images in [-1, 1]."""
    further_channels: Literal["normal", "zeros"] = "normal"
    """The first weights of the reconstruction's channels, where the encoder starts from a file: N(0, 1), as published, or 0."""

    progressive_start: int | None = None
    """e4e: first step in which a second style is learned, published 20000; until then all are the first. None: all at once."""
    progressive_every: int = 2000
    """e4e: steps from one further style to the next."""
    adv_fakes: Literal["raw", "latents"] = "raw"
    """What the latent discriminator learns to tell from mapped noise: raw, as published, the encoder's output alone, without the
    mean latent; latents: w itself."""
    w_pool: int = 50
    """Latents of earlier batches, half of which the latent discriminator learns from; 0: of this batch alone."""
    lr_adv: float = 2e-5
    """Adam: learning rate of the latent discriminator."""
    lambda_r1: float = 10.0
    """R1 of the latent discriminator: weight of half the squared gradient at mapped noise; 0 turns it off."""
    r1_every: int = 16
    """R1 is taken every so many steps, so many times as strong, in an update of its own."""
    noise: Literal["random", "fixed"] = "random"
    """The generator's noise in training."""
    generator_gradients: Literal["none", "published", "train"] = "none"
    """none: the generator is frozen. published: as in pSp's code its gradients are computed, added up and never used. train: it
    learns with the encoder."""
    optimizer: Literal["ranger", "adam"] = "ranger"
    """Optimiser of the encoder."""
    lr: float = 1e-4
    """Learning rate of the encoder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast; parameters, latents and losses stay fp32."""

    data: Path = Path()
    """Folder of images: train/*.png and test/*.png, or a folder of images; labels are not used."""
    batch_size: int = 8
    """Images per step."""
    steps: int = 500_000
    """Optimiser steps."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    ema_decay: float = 0.0
    """Decay of the running average of the encoder's weights; 0, as published, keeps the last weights."""
    measure_count: int = 200
    """Test images in a measurement; all if there are fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "steps_per_batch", "image_size", "image_height", "r1_every")
        options.at_least(self, 1, "progressive_start", "progressive_every", "measure_count")
        options.at_least(self, 0, *_WEIGHTS, "lambda_r1", "w_pool")
        options.above_zero(self, "lr", "lr_adv")
        if not self.feedback and self.steps_per_batch > 1:
            raise UserError(
                f"steps_per_batch={self.steps_per_batch}, but without feedback the encoder does not see what it made, and every step "
                "would start again from the average. Use feedback, or steps_per_batch=1."
            )
        if self.image_height and self.image_height > self.image_size:
            raise UserError(
                f"image_height={self.image_height} is more than the width image_size={self.image_size}. Use at most that."
            )
        if self.pyramid and self.encoder == "small":
            raise UserError("pyramid: encoder=small has none. Use resnet34, or leave it out.")
        if self.lambda_id > 0 and self.lambda_moco > 0:
            raise UserError(
                f"lambda_id={self.lambda_id} is for faces and lambda_moco={self.lambda_moco} for everything else. Set one of them to 0."
            )
        if not any(getattr(self, name) for name in _WEIGHTS[:5]):
            raise UserError(
                f"{'=0, '.join(_WEIGHTS[:5])}=0 compare no images. Set one of them, such as lambda_l2=1."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that the encoder sees."""
        return self.image_height or self.image_size, self.image_size

    @property
    def image_channels(self) -> int:
        """3 for RGB, 1 for grey: those of the generator."""
        return self.generator_shape[3] if self.generator_shape else 3

    @property
    def in_channels(self) -> int:
        """Channels that the encoder sees: of the image, and with `feedback` of its reconstruction."""
        return self.image_channels * (2 if self.feedback else 1)

    def stage(self, step: int, num_styles: int) -> int:
        """How many styles an e4e head learns in the 0-based `step` beside the first; `num_styles`: all."""
        if self.head == "psp" or self.progressive_start is None:
            return num_styles
        if step < self.progressive_start:
            return 0
        return min(num_styles, (step - self.progressive_start) // self.progressive_every + 1)


# Those of the images first.
_WEIGHTS = ("lambda_l2", "lambda_lpips", "lambda_id", "lambda_moco", "lambda_similarity")
_WEIGHTS += ("lambda_w_norm", "lambda_delta", "lambda_adv")


def shape_of(generator: StyleGenerator) -> tuple[int, ...]:
    """What `ReStyleConfig.generator_shape` holds of a generator."""
    return (
        generator.image_size,
        generator.latent_dim,
        len(generator.style) - 1,
        generator.image_channels,
        *generator.channels,
    )


def build_inverter(config: ReStyleConfig) -> Inverter:
    """The encoder and the generator that `config` describes, freshly initialised.

    Raises:
        UserError: no generator, or sizes that the networks do not have.
    """
    if not config.generator_shape:
        raise UserError(
            "generator is missing. Name the folder of a `fastnce train stylegan2`, or a file of rosinality's layout."
        )
    side, latent_dim, layers, channels, *widths = config.generator_shape
    try:
        generator = StyleGenerator(side, latent_dim, layers, widths, channels)
        kind = f"fpn-{config.encoder}" if config.pyramid else config.encoder
        encoder = build_encoder(
            kind, generator.num_styles, config.in_channels, config.head, latent_dim
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return Inverter(encoder, generator)


# The frozen networks whose features of two images are compared, by the loss's name, with their weights.
Losses = Mapping[str, tuple[float, perceptual.PerceptualLoss]]


def build_losses(config: ReStyleConfig) -> Losses:
    """Those that `config` names.

    Raises:
        UserError: a loss without the files of its network.
    """
    networks = {  # the loss's name -> its weight, its class, and its files
        "LPIPS": ("lambda_lpips", perceptual.LPIPS, ("lpips_backbone", "lpips_weights")),
        "ID": ("lambda_id", perceptual.IdentityLoss, ("face_weights",)),
        "MoCo": ("lambda_moco", perceptual.MoCoLoss, ("moco_weights",)),
        "similarity": ("lambda_similarity", perceptual.ScriptedSimilarity, ("similarity",)),
    }
    built = {}
    for name, (option, make, files) in networks.items():
        if weight := getattr(config, option):
            paths = [getattr(config, file) for file in files]
            if None in paths:
                file = files[paths.index(None)]
                raise UserError(
                    f"{option}={weight} compares features of a network, and {file} is missing. Name its file, or use {option}=0."
                )
            built[name] = weight, make(*paths)
    return built


class ReStyle(nn.Module):
    """The networks `encoder` E and `generator` G, with lambda_adv a latent discriminator D, their optimisers, and one training step.

    From w_0, the mean latent, and y_0, its image, N = `steps_per_batch` times

        w_t = w_{t-1} + E(cat(x, y_{t-1})),   y_t = G(w_t) at the encoder's size

        loss_t = lambda_l2 mean (y_t - x)^2 + lambda_lpips LPIPS(y_t, x) + lambda_id (1 - cos(F(y_t), F(x))) + ...
                 + lambda_w_norm mean |w_t - w_0| + lambda_delta sum_{1 <= i <= stage} mean |w_t,i - w_t,0|
                 + lambda_adv mean_{i <= stage} softplus(-D(w_t,i))

    Each loss_t is differentiated by itself, as w_{t-1} and y_{t-1} are detached; the N gradients add up to one step of the optimiser.
    Before it D has made one of its own, from mapped noise and E(cat(x, y_0)).

    The numbers are those of the published step. What it computes besides and does not use is left out: gradients of G's weights, of
    w_{t-1} and of y_{t-1}, y_0 in each batch, the features of x in each of the N steps.

    Source: Alaluf et al., "ReStyle: A Residual-Based StyleGAN Encoder via Iterative Refinement", ICCV 2021
    (https://arxiv.org/abs/2104.02699); pSp, Richardson et al., CVPR 2021; e4e, Tov et al., SIGGRAPH 2021.

    Args:
        config: see `ReStyleConfig`; with its `generator_shape`.
        losses: by default those of its files.

    Attributes:
        inverter: E and G, an `Inverter`.
        optimizers: "E", and with lambda_adv "D".
        steps: the optimiser steps made.

    Raises:
        UserError: no generator, sizes that the networks do not have, or a loss without the files of its network.
    """

    def __init__(self, config: ReStyleConfig, losses: Losses | None = None) -> None:
        super().__init__()
        self.config, self.steps = config, 0
        self.inverter = build_inverter(config)
        self.generator.requires_grad_(config.generator_gradients != "none")
        # In a dict, which is not registered: they follow to a device but are no part of a checkpoint.
        self.losses = dict(build_losses(config) if losses is None else losses)
        # y_0, which the first step sets.
        self.register_buffer("start", torch.zeros(1, config.image_channels, *config.size))
        learning = [*self.encoder.parameters()]
        if config.generator_gradients == "train":
            learning += self.generator.parameters()
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "E": Ranger(learning, config.lr)
            if config.optimizer == "ranger"
            else torch.optim.Adam(learning, config.lr, fused=True)
        }
        self.latent_discriminator: LatentDiscriminator | None = None
        if config.lambda_adv > 0:
            self.latent_discriminator = LatentDiscriminator(self.generator.latent_dim)
            self.pools = nn.ModuleDict(
                {name: ImagePool(config.w_pool) for name in ("real", "fake")}
            )
            self.register_buffer("last_r1", torch.zeros(()))  # of the step that took it last
            self.optimizers["D"] = torch.optim.Adam(
                self.latent_discriminator.parameters(), config.lr_adv, fused=True
            )

    @property
    def encoder(self) -> nn.Module:
        return self.inverter.encoder

    @property
    def generator(self) -> StyleGenerator:
        return self.inverter.generator

    def get_extra_state(self) -> int:
        """The steps made, on which the stage of e4e and R1 depend."""
        return self.steps

    def set_extra_state(self, state: int) -> None:
        """Takes the steps from a state dict."""
        self.steps = state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReStyle:
        for _, network in self.losses.values():
            network._apply(fn)
        return super()._apply(fn, recurse)

    def training_step(
        self,
        batch: Mapping[str, Tensor],
        *,
        z: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One update of D, if there is one, then one of E.

        Args:
            batch: "image" (B, C, H, W) in [-1, 1] at the encoder's size, on the networks' device.
            z: noise (B, D) for D's real latents; by default drawn.
            rows: (B,) int64, which style of each image D sees where there are pools; by default drawn.

        Returns:
            Detached scalars: "loss_1" to "loss_N", the sums of all terms in each step; of the last step each term without its weight,
            "L2", "LPIPS", "ID", "MoCo", "similarity", "w_norm", "delta" and "E_adv"; "D_real", "D_fake", and "D_r1" as it was last, with its
            weight but not its interval.
        """
        x, config = batch["image"], self.config
        if self.steps == 0:  # as published for all of the training, even where G learns
            self.start.copy_(average_image(self.generator, config.size))
        if config.head == "e4e":
            self.inverter.set_stage(config.stage(self.steps, self.generator.num_styles))
        losses: dict[str, Tensor] = {}
        if self.latent_discriminator is not None:
            losses |= self._update_discriminator(x, z, rows)
            self.latent_discriminator.requires_grad_(False)
        with autocast(self), torch.no_grad():
            features = {name: loss.features(x) for name, (_, loss) in self.losses.items()}
        optimizer = self.optimizers["E"]
        optimizer.zero_grad(set_to_none=True)
        mean = self.generator.latent_avg.expand(1, self.generator.num_styles, -1)
        steps = iterate(
            self.encoder,
            self.generator,
            x,
            steps=config.steps_per_batch,
            start=(mean, self.start),
            noise=config.noise,
        )
        for number in range(1, config.steps_per_batch + 1):
            with autocast(self):
                step = next(steps)
                weighted = self._terms(step, x, features)
            loss = sum(weight * term for weight, term in weighted.values())
            loss.backward()
            losses[f"loss_{number}"] = loss.detach()
        optimizer.step()
        self.steps += 1
        return losses | {name: term.detach() for name, (_, term) in weighted.items()}

    @torch.no_grad()
    def try_out(self) -> None:
        """Raises `UserError` if a network does not take images of the encoder's size."""
        config = self.config
        x = torch.zeros(1, config.image_channels, *config.size)
        try:
            for loss in self.losses.values():
                loss[1].features(x)
            self.encoder.eval()(x.repeat(1, 2 if config.feedback else 1, 1, 1))
        except (ValueError, RuntimeError) as error:
            height, width = config.size
            raise UserError(
                f"images of {width}x{height}: {error} Use another image_size."
            ) from error
        self.encoder.train()

    def _terms(
        self, step: Step, x: Tensor, features: Mapping[str, Any]
    ) -> dict[str, tuple[float, Tensor]]:
        """The terms of a step's loss, with their weights."""
        config, w = self.config, step.latent
        terms = {}
        if config.lambda_l2 > 0:
            terms["L2"] = config.lambda_l2, F.mse_loss(step.seen.to(x.dtype), x)
        for name, (weight, loss) in self.losses.items():
            terms[name] = weight, loss(step.seen, features[name])
        if config.lambda_w_norm > 0:
            distance = perceptual.w_norm(w, self.generator.latent_avg)
            terms["w_norm"] = config.lambda_w_norm, distance
        learned = self._learned(w)
        if config.lambda_delta > 0:
            deltas = (learned[:, 1:] - w[:, :1]).norm(dim=2)  # (B, stage)
            terms["delta"] = config.lambda_delta, deltas.mean(0).sum()
        if self.latent_discriminator is not None:
            logits = self.latent_discriminator(learned)
            terms["E_adv"] = config.lambda_adv, generator_loss(logits, "nonsaturating")
        return terms

    def _learned(self, w: Tensor) -> Tensor:
        """The styles (B, stage + 1, D) that the stage has, of all, (B, k, D)."""
        return w[:, : self.encoder.stage + 1]

    def _update_discriminator(
        self, x: Tensor, z: Tensor | None, rows: Tensor | None
    ) -> dict[str, Tensor]:
        """One update of D from mapped noise and the encoder's first latents; every `r1_every` steps one more, of R1."""
        config, judge = self.config, self.latent_discriminator
        judge.requires_grad_(True)
        if z is None:
            z = torch.randn(len(x), self.generator.latent_dim, dtype=x.dtype, device=x.device)
        with torch.no_grad(), autocast(self):
            real = self.generator.mapping(z).to(x.dtype)
            seen = self.start.expand(len(x), -1, -1, -1)
            inputs = torch.cat([x, seen], dim=1) if config.feedback else x
            fake = self._learned(self.encoder(inputs).to(x.dtype))  # (B, stage + 1, D)
        if config.adv_fakes == "latents":
            fake = fake + self.generator.latent_avg
        if config.w_pool > 0:
            if rows is None:
                rows = torch.randint(fake.shape[1], (len(fake),)).to(x.device)
            fake = self.pools["fake"](fake[torch.arange(len(fake), device=x.device), rows])
            real = self.pools["real"](real)
        terms = discriminator_losses(judge(real), judge(fake), "nonsaturating")
        descend(sum(terms), self.optimizers["D"])
        losses = dict(zip(("D_real", "D_fake"), (term.detach() for term in terms), strict=True))
        if config.lambda_r1 > 0 and self.steps % config.r1_every == 0:
            real.requires_grad_()
            penalty = 0.5 * config.lambda_r1 * r1(judge(real), real)
            descend(config.r1_every * penalty, self.optimizers["D"])
            self.last_r1.copy_(penalty.detach())
        return losses | {"D_r1": self.last_r1.clone()}


def read_generator(path: Path) -> StyleGenerator:
    """The generator, with its mean latent, of a run of stylegan2 or restyle, or of a file of one of the published programs.

    Raises:
        UserError: no such run or file, or one that holds something else.
    """
    instead = "Name a run of stylegan2, or a file of a generator."
    if not path.is_dir():
        content = read_plain(path, instead, allowed=[argparse.Namespace])
        if isinstance(content, Mapping) and content.keys() >= _KEYS:
            return _published_inverter(content, path)[1].generator
        return load_rosinality(path)[0]
    path = path / "checkpoints" / "last.pt"
    checkpoint = read_plain(path, instead)
    system, state = checkpoint["config"]["system"], checkpoint["average"]["module"]
    if system not in ("stylegan2", "restyle"):
        raise UserError(f"generator={path}: is of a run of {system}. {instead}")
    if system == "restyle":
        state = _below(state, "generator.")
    generator = StyleGenerator(**style_options(state))
    load_strictly(generator, state, path)
    return generator


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}


# Entries by which the published programs' checkpoints are known.
_KEYS = frozenset({"state_dict", "opts"})


def _published_inverter(content: Mapping[str, Any], path: Path) -> tuple[ReStyleConfig, Inverter]:
    """The networks in a checkpoint of ReStyle, pSp or e4e, and their configuration, which has defaults where it tells nothing.

    Names, shapes and the options that are in it tell the kind of the encoder. The stage of an unfinished e4e is that of its step.
    """
    opts = content["opts"]
    opts = vars(opts) if isinstance(opts, argparse.Namespace) else opts
    if not isinstance(opts, Mapping) or not isinstance(content["state_dict"], Mapping):
        raise UserError(f"{path}: has no state_dict and opts as ReStyle, pSp and e4e write them.")
    encoder = _below(content["state_dict"], "encoder.")
    decoder = _below(content["state_dict"], "decoder.")
    generator = generator_of(decoder, content.get("latent_avg"), path, "state_dict")
    named = {"body.0.res_layer.0.weight": "ir-se50", "conv1.weight": "resnet34"}
    kind = next((kind for name, kind in named.items() if name in encoder), "small")
    first = encoder.get("conv1.weight" if kind == "resnet34" else "input_layer.0.weight")
    if first is None:
        raise UserError(f"{path}: has no encoder of ReStyle, pSp or e4e. Name another file.")
    feedback = first.shape[1] != generator.image_channels
    style = str(opts.get("encoder_type", "")).lower()
    side, cars = int(opts.get("image_size", 256)), "cars" in str(opts.get("dataset_type"))
    config = ReStyleConfig(
        data=path.parent,
        out=path.parent,
        generator=path,
        generator_shape=shape_of(generator),
        encoder=kind,
        pyramid="latlayer1.weight" in encoder,
        head="e4e" if "progressive" in style or "editing" in style else "psp",
        feedback=feedback,
        steps_per_batch=int(opts.get("n_iters_per_batch", 5)) if feedback else 1,
        image_size=side,
        image_height=side * 3 // 4 if cars else None,
    )
    inverter, have = (
        build_inverter(config),
        len({k.split(".")[1] for k in encoder if "styles." in k}),
    )
    if have != generator.num_styles:
        raise UserError(
            f"{path}: its encoder makes {have} styles, and its generator of {generator.image_size} pixels takes "
            f"{generator.num_styles}. Name a file whose networks belong together."
        )
    load_strictly(inverter.encoder, encoder, path)
    inverter.generator = generator
    starts = opts.get("progressive_steps")
    if config.head == "e4e" and starts and "global_step" in content:
        inverter.set_stage(max(0, sum(s <= content["global_step"] for s in starts) - 1))
    return config, inverter.eval()


_E4E = {"head": "e4e", "lambda_adv": 0.1, "lambda_delta": 2e-4, "progressive_start": 20_000}
_ONE_STEP = {"pyramid": True, "feedback": False, "steps_per_batch": 1}
_OTHERS = {"encoder": "resnet34", "lambda_id": 0.0, "lambda_moco": 0.5}


class ReStyleSystem(LabelledSystem):
    """ReStyle, pSp and e4e in the training loop."""

    config_class = ReStyleConfig
    model_class = ReStyle
    network = staticmethod(build_inverter)
    variants = {
        "restyle": {},
        "restyle-e4e": _E4E,
        "psp": _ONE_STEP,
        "e4e": _E4E | _ONE_STEP,
    }
    presets = {
        # As published. The defaults are those of faces.
        "ffhq": {},
        "cars": _OTHERS | {"image_height": 192},
        "church": _OTHERS,
        "horse": _OTHERS,
        "afhq-wild": _OTHERS,
        # Of photographs, with a generator that was fine-tuned to drawings.
        "toonify": {"lambda_id": 1.0, "lambda_w_norm": 0.025, "steps": 6000},
        # The built-in digits, 16x16: minutes on a CPU.
        "digits": {
            "encoder": "small",
            "pyramid": False,
            "image_size": 16,
            "lambda_lpips": 0.0,
            "lambda_id": 0.0,
            "progressive_start": 100,
            "progressive_every": 40,
            "optimizer": "adam",
            "lr": 1e-3,
            "batch_size": 16,
            "ema_decay": 0.98,
            "flip": False,
            "workers": 0,
            "steps": 600,
            "log_every": 50,
            "sample_every": 200,
            "measure_every": 200,
            "checkpoint_every": 200,
        },
    }
    # The built-in crops of photographs.
    presets["photo-crops"] = presets["digits"] | {"image_size": 32, "steps": 800}
    ablations = {
        "restyle": Ablation(
            choices={
                "ReStyle": {},
                "one step, as many updates": {"steps_per_batch": 1},
                "one step, as much time": {"steps_per_batch": 1},
                "ReStyle, 3 steps": {"steps_per_batch": 3},
                "ReStyle on e4e": {"head": "e4e", "lambda_adv": 0.1, "lambda_delta": 2e-4},
                "ReStyle and MoCo": {"lambda_moco": 0.5, "lambda_id": 0.0},
            },
            measures={
                "l2": ("L2", ".4f"),
                "similarity": ("similarity", ".3f"),
                "kept": ("digit kept", ".3f"),
                "distance": ("distance of w", ".1f"),
                "lec": ("LEC", ".2f"),
            },
            row="inverted",
            needs={"ReStyle and MoCo": "moco_weights"},
            # Five steps take 4.5 times as long as one, with the digits' networks.
            longer={"one step, as much time": 4.5},
        )
    }
    network_name = "inverter"
    parts = ("inverter.encoder", "latent_discriminator")
    published_keys = _KEYS
    panels = (
        tuple(f"loss_{step}" for step in range(1, 11)),
        ("L2", "LPIPS", "ID", "MoCo", "similarity"),
        ("w_norm",),
        ("delta",),
        ("E_adv", "D_real", "D_fake"),
        ("D_r1",),
    )
    best = "l2"
    does = "invert images"
    next_command = "fastnce invert --run {run} --input DIR --out DIR"
    output = "latents"
    judged_by = frozenset(
        {"steps", "first", "first_steps", "extractor", "lpips_backbone", "lpips_weights"}
        | {"face_weights", "edit", "targets"}
    )
    reported = ("encoder", "head", "pyramid", "feedback", "steps_per_batch")
    reports_cost = True

    def settled(self, config: ReStyleConfig, before: ReStyleConfig | None) -> ReStyleConfig:
        config = super().settled(config, before)
        if before is not None:
            return replace(config, generator_shape=before.generator_shape)
        if config.generator is None:
            return config
        return replace(config, generator_shape=shape_of(read_generator(config.generator)))

    def dataset(self, config: ReStyleConfig) -> LabelledImages:
        return images(config, "train")

    def model(self, config: ReStyleConfig, dataset: LabelledImages) -> ReStyle:
        model = ReStyle(config)
        if config.generator.exists():  # else a run that goes on, whose checkpoint has it
            model.generator.load_state_dict(read_generator(config.generator).state_dict())
        faces = config.encoder == "ir-se50"
        if body := config.face_weights if faces else config.backbone_weights:
            model.encoder.load_body(body, config.further_channels)
        model.try_out()
        return model

    def read_published(self, path: Path) -> tuple[ReStyleConfig, dict[str, Tensor]]:
        content = read_plain(path, "Name a checkpoint.", allowed=[argparse.Namespace])
        config, inverter = _published_inverter(content, path)
        return config, inverter.state_dict()

    def start_from_published(self, model: ReStyle, path: Path) -> list[str]:
        """The encoder, and the latent discriminator where there is one; the generator is that of the option."""
        config, state = self.read_published(path)
        names = ("encoder", "pyramid", "head", "feedback")
        theirs, ours = ({n: getattr(c, n) for n in names} for c in (config, model.config))
        if theirs != ours:
            named = ", ".join(f"{n}={value}" for n, value in theirs.items() if value != ours[n])
            raise UserError(f"init_from={path}: has {named}. Give the same values.")
        encoder = _below(state, "encoder.")
        why_not = difference(model.encoder.state_dict(), encoder)
        if why_not is not None:
            sides = (c.generator_shape[0] for c in (config, model.config))
            raise UserError(
                "init_from={}: is for a generator of {} pixels, and the run's has {}: {}. Name another.".format(
                    path, *sides, why_not
                )
            )
        model.encoder.load_state_dict(encoder)
        lines = [f"encoder: from {path}"]
        if model.latent_discriminator is not None:
            content = read_plain(path, "", allowed=[argparse.Namespace])
            judge = content.get("discriminator_state_dict")
            lines.append(f"latent discriminator: {f'from {path}' if judge else 'starts anew'}")
            if judge:
                load_strictly(model.latent_discriminator, judge, path)
        return lines

    def save_published(self, network: Inverter, config: ReStyleConfig, path: Path) -> None:
        encoder, generator = network.encoder, network.generator
        state = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
        state |= {f"decoder.{name}": x for name, x in generator.published_state().items()}
        backbone = "ResNet" if config.encoder == "resnet34" else ""
        body = "GradualStyle" if config.pyramid else "Backbone"
        opts: dict[str, Any] = {
            "encoder_type": f"{backbone}{'Progressive' * (config.head == 'e4e')}{body}Encoder",
            "output_size": generator.image_size,
            "dataset_type": "cars" if config.image_height else "images",
            "input_nc": config.in_channels,
            "n_iters_per_batch": config.steps_per_batch,
            "image_size": config.image_size,
            "device": "cpu",
        }
        k = generator.num_styles
        content = {
            "state_dict": {name: x.cpu() for name, x in state.items()},
            "latent_avg": generator.latent_avg.cpu().repeat(k, 1),
            "opts": opts,
        }
        if config.head == "e4e":
            # The first step of the stage.
            opts["progressive_steps"] = [
                0
                if i == 0
                else (config.progressive_start or 0) + (i - 1) * config.progressive_every
                for i in range(k)
            ]
            content["global_step"] = opts["progressive_steps"][min(encoder.stage, k - 1)]
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    def preview(
        self, config: ReStyleConfig, dataset: LabelledImages
    ) -> Callable[[nn.Module], Rows]:
        """The images, and what each step makes of them."""
        x = some_of(test_images(config), config.sample_count)

        def rows(network: Inverter) -> Rows:
            steps = inversions(network, x, config.steps_per_batch)
            return {"image": list(x)} | {
                f"step {number}": list(seen) for number, seen in enumerate(steps, 1)
            }

        return rows

    def measure(self, config: ReStyleConfig, dataset: LabelledImages) -> Measure:
        """Mean squared differences of test images and their reconstructions after each step, and "l2", that of the last one."""
        x = some_of(test_images(config), config.measure_count)

        def measure(_: nn.Module, network: Inverter) -> dict[str, float]:
            errors = [
                F.mse_loss(seen, x).item()
                for seen in inversions(network, x, config.steps_per_batch)
            ]
            steps = {f"l2/step {number}": error for number, error in enumerate(errors, 1)}
            return steps | {"l2": errors[-1]}

        return measure

    def evaluate(
        self,
        config: ReStyleConfig,
        networks: Mapping[str, nn.Module],
        data: Path,
        device: torch.device,
        *,
        steps: int | None = None,
        first: Any = None,
        first_steps: int | None = None,
        targets: Path | None = None,
        **settings: Any,
    ) -> tuple[dict[str, Any], str]:
        """What is left of test images after each step: see `evaluate_inversion` and `Inversion`."""
        from fastnce.systems.inversion_quality import evaluate_inversion

        shown, wanted = (
            folder
            and test_images(
                config
                if folder.resolve() == config.data.resolve()
                else replace(config, data=folder, class_names=())
            )
            for folder in (data, targets)
        )
        inversion = Inversion(networks["run"], config, steps, first, first_steps)
        return evaluate_inversion(inversion, shown, data, targets=wanted, **settings)


def images(
    config: ReStyleConfig, split: str, root: Path | None = None, **how: Any
) -> LabelledImages:
    """The images of a split of `root`, by default `config.data`, as the encoder of `config` takes them."""
    return images_with_labels(
        config,
        split,
        root or config.data,
        flip=config.flip and split == "train",
        needs_labels=False,
        image_size=config.size,
        shapes=config.other_shapes,
        **how,
    )


def test_images(config: ReStyleConfig) -> LabelledImages:
    """The test images, or where there are none the training images."""
    from fastnce.data.labelled import has_split

    return images(config, "test" if has_split(config.data, "test") else "train")


def some_of(images: LabelledImages, count: int) -> Tensor:
    """`count` of the images, or all, spread evenly: (N, C, H, W)."""
    places = torch.linspace(0, len(images) - 1, min(count, len(images)), dtype=torch.float64)
    return torch.stack([images.image(i) for i in places.long().tolist()])


@torch.inference_mode()
def inversions(network: Inverter, x: Tensor, steps: int, batch_size: int = 32) -> list[Tensor]:
    """The reconstructions (B, C, H, W) of `x` at its size after each step, on the CPU."""
    network.set_stage()
    device = next(network.parameters()).device
    parts = [
        [step.seen.float().cpu() for step in network(part.to(device), steps)]
        for part in x.split(batch_size)
    ]
    return [torch.cat(seen) for seen in zip(*parts, strict=True)]
