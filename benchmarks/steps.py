"""One training step of a system against the published step in plain eager PyTorch: ``python -m benchmarks steps``.

Both in the same process, in turns. Before any timing both are checked on a smaller image. In float64 losses and all gradients agree.
In float32 ours are at most three times as far from those as the eager step's, for Winograd's convolutions round a little more.
Memory is the most that a process of its own needs: networks, Adam, and two steps.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import fastnce
from benchmarks import machine, memory, report
from benchmarks.published_cfl import PublishedCFL
from benchmarks.published_cut import PublishedCUT
from benchmarks.published_gan import PublishedGAN
from benchmarks.published_representation import (
    PublishedRepresentation,
    ResNet18,
    projection_head,
)
from benchmarks.published_restyle import PublishedReStyle
from benchmarks.published_translation import (
    PublishedCycleGAN,
    PublishedDCLGAN,
    PublishedPix2Pix,
    PublishedSinCUT,
)
from benchmarks.timing import in_turns, seconds_of
from fastnce.models import (
    CFL,
    CUT,
    DCLGAN,
    CFLConfig,
    ContraGAN,
    ContraGANConfig,
    CUTConfig,
    CycleGAN,
    CycleGANConfig,
    DCLGANConfig,
    Pix2Pix,
    Pix2PixConfig,
    Representation,
    RepresentationConfig,
    ReStyle,
    ReStyleConfig,
)
from fastnce.networks import perceptual
from fastnce.networks.stylegan2 import NoiseInjection
from fastnce.systems.contragan import ContraGANSystem
from fastnce.systems.cut import CUTSystem

_GROUPS = {
    "3x3 convolutions (Winograd)": ("fastnce::conv3x3",),
    "other convolutions (oneDNN)": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "instance and batch norms, ReLU, sums": (
        "fastnce::instance_norm",
        "aten::native_batch_norm",
        "aten::native_batch_norm_backward",
    ),
    "blurs": ("fastnce::blur_resample",),
    "patches and contrastive loss": (
        "fastnce::sample_patches",
        "fastnce::patch_nce",
        "fastnce::info_nce",
        "fastnce::masked_info_nce",
        "fastnce::conditional_contrastive",
    ),
    "Adam, SGD": ("aten::_fused_adam_", "aten::_fused_sgd_"),
}


def providers() -> tuple[str, ...]:
    """What is timed; of bfloat16 only where the processor multiplies it."""
    of_bfloat16 = ("fastnce bf16",) if machine.multiplies_bfloat16() else ()
    return ("eager fp32", "fastnce fp32", *of_bfloat16)


class Step:
    """A system's step, ours and the published one, with the same weights and on the same images."""

    name: str
    about: str  # of what a step is
    size = 256  # height of the images that are timed
    check_size = 64  # of those on which both are checked

    def ours(self, size: int, precision: str = "fp32") -> nn.Module:
        raise NotImplementedError

    def published(self, ours: Any) -> Any:
        raise NotImplementedError

    def pairs(self, ours: Any, published: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Networks that learn, ours and published."""
        raise NotImplementedError

    def batch(self, size: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def draws(self, size: int) -> dict[str, Any]:
        """What a step would draw, for the check."""
        return {}

    def run(self, training_step: Callable[..., object], batch: dict[str, Tensor]) -> None:
        """What is timed."""
        training_step(batch)

    def counted(self) -> str:
        """A sentence, or several, on what was counted and not measured."""
        return ""


class CUTStep(Step):
    """The published CUT: 9 blocks, 64 channels, identity loss."""

    name = "cut"
    about = "CUT, one pair of images"

    def ours(self, size: int, precision: str = "fp32") -> CUT:
        # PyTorch's own initialisation: with the published one, patches are so short that the published 1e-7 in their norm shows.
        torch.manual_seed(0)
        return CUT(CUTConfig(init_gain=None, precision=precision), (size, size))

    def published(self, ours: CUT) -> PublishedCUT:
        return _with_weights(self, ours, PublishedCUT())

    def pairs(self, ours: CUT, published: PublishedCUT) -> list[tuple[nn.Module, nn.Module]]:
        networks = ours.generator, ours.discriminator, ours.projector
        return list(zip(networks, (published.g, published.d, published.f), strict=True))

    def batch(self, size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.rand(1, 3, size, size, generator=generator) * 2 - 1 for name in "AB"}

    def draws(self, size: int) -> dict[str, Any]:
        sides = (size + 6, size, size // 2, size // 4, size // 4)
        generator = torch.Generator().manual_seed(2)
        ids = {
            name: [torch.randperm(side**2, generator=generator)[:256] for side in sides]
            for name in ("NCE", "NCE_Y")
        }
        return {"patch_ids": ids}

    def counted(self) -> str:
        return (
            "Of two 256 x 256 images the published step has 711.6 GMAC, ours 642.7 without the second pass for the keys, "
            "before Winograd's saving of 4 in the 3x3 convolutions."
        )


class FastCUTStep(CUTStep):
    """The published FastCUT. Half of its steps are mirrored, and these are dearer for ours."""

    name = "fastcut"
    about = "FastCUT, one pair of images; two steps, the second one mirrored"
    options: ClassVar = {"nce_idt": False, "lambda_nce": 10.0}

    def ours(self, size: int, precision: str = "fp32") -> CUT:
        torch.manual_seed(0)
        how = {"flip_equivariance": True, "init_gain": None, "precision": precision}
        return CUT(CUTConfig(**self.options, **how), (size, size))

    def published(self, ours: CUT) -> PublishedCUT:
        return _with_weights(self, ours, PublishedCUT(**self.options))

    def draws(self, size: int) -> dict[str, Any]:
        return super().draws(size) | {"flip": True}

    def run(self, training_step: Callable[..., object], batch: dict[str, Tensor]) -> None:
        training_step(batch, flip=False)
        training_step(batch, flip=True)

    def counted(self) -> str:
        return ""


class SinCUTStep(CUTStep):
    """The published SinCUT: StyleGAN2's layers and the penalty on D's slopes, which is differentiated twice."""

    name = "sincut"
    about = "SinCUT, 16 crops of 64 x 64 of each image"
    size, check_size = 64, 16

    def ours(self, size: int, precision: str = "fp32") -> CUT:
        torch.manual_seed(0)
        options = CUTSystem.variants["sincut"] | {"precision": precision, "init_gain": None}
        if size != self.size:
            options |= {
                "base_channels": 16,
                "num_blocks": 2,
                "disc_channels": 16,
                "crop_size": size,
            }
            options |= {"nce_layers": (0, 2, 3)}
        model = CUT(CUTConfig(**options), (size, size))
        for layer in model.modules() if size != self.size else ():
            if isinstance(layer, NoiseInjection):
                layer.eval()  # the noise that is drawn in float32 is not that of float64
        return model

    def published(self, ours: CUT) -> PublishedSinCUT:
        return PublishedSinCUT(ours)

    def batch(self, size: int) -> dict[str, Tensor]:
        count = 16 if size == self.size else 4
        generator = torch.Generator().manual_seed(1)
        shape = (count, 3, size, size)
        return {name: torch.rand(shape, generator=generator) * 2 - 1 for name in "AB"}

    def draws(self, size: int) -> dict[str, Any]:
        sides = (size, size // 2, size // 2)
        ids = [torch.tensor([side * side // 3]) for side in sides]
        return {"patch_ids": {"NCE": ids, "NCE_Y": ids}}

    def counted(self) -> str:
        return ""


class TwoWayStep(CUTStep):
    """Of both directions, with CUT's networks."""

    model: type[nn.Module]
    config: type
    transcription: type

    def ours(self, size: int, precision: str = "fp32") -> nn.Module:
        torch.manual_seed(0)
        return self.model(self.config(init_gain=None, precision=precision), (size, size))

    def published(self, ours: Any) -> Any:
        return _with_weights(self, ours, self.transcription(ours.config))

    def pairs(self, ours: Any, published: Any) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (ours.generators.a_to_b, published.g_a),
            (ours.generators.b_to_a, published.g_b),
            (ours.discriminator_a, published.d_a),
            (ours.discriminator_b, published.d_b),
        ]

    def draws(self, size: int) -> dict[str, Any]:
        return {}

    def counted(self) -> str:
        return ""


class CycleGANStep(TwoWayStep):
    """Its objective with CUT's networks."""

    name = "cyclegan"
    about = "CycleGAN with CUT's networks, one pair of images, identity loss"
    model, config, transcription = CycleGAN, CycleGANConfig, PublishedCycleGAN


class DCLGANStep(TwoWayStep):
    """The published DCLGAN."""

    name = "dclgan"
    about = "DCLGAN, one pair of images"
    model, config, transcription = DCLGAN, DCLGANConfig, PublishedDCLGAN

    def pairs(self, ours: Any, published: Any) -> list[tuple[nn.Module, nn.Module]]:
        projectors = [(ours.projector_a, published.f_1), (ours.projector_b, published.f_2)]
        return super().pairs(ours, published) + projectors

    def draws(self, size: int) -> dict[str, Any]:
        ids = CUTStep.draws(self, size)["patch_ids"]
        return {"patch_ids": {"NCE1": ids["NCE"][1:], "NCE2": ids["NCE_Y"][1:]}}


class Pix2PixStep(TwoWayStep):
    """The published pix2pix; the check leaves dropout out."""

    name = "pix2pix"
    about = "pix2pix, one pair of images"
    transcription = PublishedPix2Pix

    def ours(self, size: int, precision: str = "fp32") -> Pix2Pix:
        torch.manual_seed(0)
        whole = size == self.size
        config = Pix2PixConfig(
            init_gain=None, num_downs=8 if whole else 6, dropout=whole, precision=precision
        )
        return Pix2Pix(config, (size, size))

    def pairs(self, ours: Any, published: Any) -> list[tuple[nn.Module, nn.Module]]:
        return [(ours.generator, published.g), (ours.discriminator, published.d)]


class SimCLRStep(Step):
    """ResNet-18 with the stem for small images."""

    name = "simclr"
    about = "SimCLR, ResNet-18 on images of 32 pixels, batch 256"
    size, check_size = 32, 16
    method = "simclr"

    def ours(self, size: int, precision: str = "fp32") -> Representation:
        torch.manual_seed(0)
        how = {"encoder": "resnet18", "batch_size": 256, "precision": precision}
        return Representation(RepresentationConfig(method=self.method, **how))

    def published(self, ours: Representation) -> PublishedRepresentation:
        encoder, head = ResNet18(), projection_head()
        encoder.load_state_dict(ours.encoder.state_dict())
        head.load_state_dict(ours.head.state_dict())
        queue = ours.queue.keys if self.method == "moco" else None
        return PublishedRepresentation(encoder, head, ours.config, queue)

    def pairs(self, ours: Any, published: Any) -> list[tuple[nn.Module, nn.Module]]:
        return [(ours.encoder, published.encoder), (ours.head, published.head)]

    def batch(self, size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (2, 256 if size == self.size else 16, 3, size, size)
        return dict(zip(("view1", "view2"), torch.randn(shape, generator=generator), strict=True))


class MoCoStep(SimCLRStep):
    """MoCo v2 with a queue of 4096 and batch norm in 8 parts."""

    name = "moco"
    about = "MoCo v2, ResNet-18 on images of 32 pixels, batch 256, 4096 keys in the queue"
    method = "moco"


class ContraGANStep(Step):
    """One update of D and one of G, in a published setting and with as many images as take less than 20 s."""

    def __init__(self, preset: str, size: int, count: int, data: str) -> None:
        self.name, self.preset, self.count = f"contragan-{preset}", preset, count
        self.size, self.check_size = size, size // 2
        self.about = f"ContraGAN in its setting for {data}, one update of D and of G, batch {count}"

    def ours(self, size: int, precision: str = "fp32") -> ContraGAN:
        torch.manual_seed(0)
        options = ContraGANSystem.presets[self.preset] | {"precision": precision, "d_steps": 1}
        if size != self.size:
            options |= {"image_size": size, "embed_dim": 16, "latent_dim": 24}
            options |= {"gen_channels": 16, "disc_channels": 16, "shared_dim": 4}
            options |= {"gen_attention": 0, "disc_attention": 0}
        return ContraGAN(ContraGANConfig(**options))

    def published(self, ours: ContraGAN) -> PublishedGAN:
        return PublishedGAN(ours)

    def pairs(self, ours: Any, published: Any) -> list[tuple[nn.Module, nn.Module]]:
        return [(ours.generator, published.g), (ours.discriminator, published.d)]

    def batch(self, size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        count = self.count if size == self.size else 4
        image = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
        return {"image": image, "label": torch.randint(4, (count,), generator=generator)}

    def draws(self, size: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        classes = [torch.randint(4, (4,), generator=generator) for _ in "DG"]
        return {"draws": [(torch.randn(4, 24, generator=generator), c) for c in classes]}


def _with_weights(step: Step, ours: Any, published: Any) -> Any:
    for one, other in step.pairs(ours, published):
        other.load_state_dict(one.state_dict())
    return published


class CFLStep(Step):
    """Contrastive Feature Loss with its Cityscapes settings: 256 x 512, VGG19, hinge; 1024 patches of each map, or all."""

    name = "cfl"
    about = (
        "Contrastive Feature Loss, one image of 256 x 512, VGG19 with random weights, 1024 patches"
    )
    check_size = 128
    classes, patches = 35, 1024

    def ours(self, size: int, precision: str = "fp32") -> CFL:
        torch.manual_seed(0)
        width = 64 if size == self.size else 8
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "vgg19.pth"
            critic = PublishedCFL(1, 1).critic
            torch.save({f"encoder.{k}": x for k, x in critic.state_dict().items()}, weights)
            config = CFLConfig(
                label_classes=self.classes,
                instances=True,
                upsampling="more",
                base_channels=width,
                disc_channels=width,
                crop_size=2 * size,
                aspect_ratio=2.0,
                init="default",
                vgg_weights=weights,
                num_patches=self.patches,
                precision=precision,
            )
            return CFL(config)

    def published(self, ours: CFL) -> PublishedCFL:
        published = PublishedCFL(self.classes, self.patches, ours.config.base_channels)
        for one, other in self.pairs(ours, published):
            other.load_state_dict(one.state_dict())
        published.critic.load_state_dict(ours.features.encoder.state_dict(), strict=False)
        return published

    def pairs(self, ours: CFL, published: PublishedCFL) -> list[tuple[nn.Module, nn.Module]]:
        networks = ours.generator, ours.discriminator, ours.features.projection
        return list(zip(networks, (published.g, published.d, published.f), strict=True))

    def batch(self, size: int, count: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (count, size, 2 * size)
        image = torch.rand(count, 3, *shape[1:], generator=generator) * 2 - 1
        label = torch.randint(self.classes, shape, generator=generator)
        edges = (torch.rand(count, 1, *shape[1:], generator=generator) < 0.1).float()
        return {"label": label, "edges": edges, "B": image}

    def draws(self, size: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        maps = [2 * (size // stride) ** 2 for stride in (2, 4, 8, 16)]
        ids = [torch.randperm(n, generator=generator)[: self.patches] for n in maps]
        return {"patch_ids": ids}

    def counted(self) -> str:
        """Of 16 images on tensors without data: the published step's multiply-adds, and what its loss keeps for the gradients."""
        count = 16
        with FakeTensorMode(allow_non_fake_inputs=True):
            published, batch = PublishedCFL(self.classes, self.patches), self.batch(256, count)
            with FlopCounterMode(display=False) as whole:
                published.training_step(batch)
            published.critic(batch["B"])
            sides = [(128 * 256, 128), (64 * 128, 256), (32 * 64, 512), (16 * 32, 512)]
            rows = [
                torch.empty(count, min(self.patches, n), 256, requires_grad=True) for n, _ in sides
            ]
            keys = [torch.empty_like(x, requires_grad=True) for x in rows]
            form = {"symmetric": True, "query_negatives": True, "detach_keys": True}
            with FlopCounterMode(display=False) as products, _Kept() as eager:
                published.f.forward = lambda maps, ids: maps
                published.contrastive_loss(rows, keys).backward()
            with _Kept() as fused:
                fastnce.patch_nce(rows, keys, **form, backend="native")
            given = sum(x.untyped_storage().nbytes() for x in (*rows, *keys))
        share = products.get_total_flops() / whole.get_total_flops()
        return (
            f"At the published size, {count} images, counted on tensors without data: the published step has "
            f"{whole.get_total_flops() / 2e12:.1f} TMAC, of which the loss has {100 * share:.2f} %. For its gradients it keeps "
            f"{(eager.bytes - given) / 1e6:.0f} MB beside its rows of {given / 1e6:.0f} MB, ours {(fused.bytes - given) / 1e6:.1f} MB."
        )


class ReStyleStep(Step):
    """ReStyle on pSp for faces: IR-SE50, a generator of 256 pixels, L2, LPIPS and the similarity of faces, five steps."""

    name = "restyle"
    about = (
        "ReStyle on pSp with five steps, one image of 256 pixels, all networks with random weights"
    )
    check_size = 32

    def ours(self, size: int, precision: str = "fp32") -> ReStyle:
        torch.manual_seed(0)
        shape, encoder = (256, 512, 8, 3, 512, 512, 512, 512, 512, 256, 128), "ir-se50"
        losses = {"LPIPS": (0.8, perceptual.LPIPS(None, None))}
        if size == self.size:
            losses["ID"] = (0.1, perceptual.IdentityLoss(None))
        else:
            shape, encoder = (32, 8, 2, 3, 8, 8, 8, 8), "small"
        config = ReStyleConfig(
            generator_shape=shape,
            encoder=encoder,
            image_size=size,
            noise="fixed",
            precision=precision,
        )
        model = ReStyle(config, losses)
        model.generator.latent_avg.normal_()
        return model

    def published(self, ours: ReStyle) -> PublishedReStyle:
        return PublishedReStyle(ours)

    def pairs(self, ours: ReStyle, published: PublishedReStyle) -> list:
        return [(ours.encoder, published.e)]

    def batch(self, size: int) -> dict[str, Tensor]:
        count = 1 if size == self.size else 2
        generator = torch.Generator().manual_seed(1)
        return {"image": torch.rand(count, 3, size, size, generator=generator) * 2 - 1}


class _Kept(saved_tensors_hooks):
    """Counts the bytes of what is saved for gradients, shared storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, Any] = {}
        super().__init__(self._keep, lambda x: x)

    def __enter__(self) -> _Kept:
        super().__enter__()
        return self

    def _keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.storages[storage._cdata] = storage
        return x

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


STEPS = {
    step.name: step
    for step in (
        CUTStep(),
        FastCUTStep(),
        SinCUTStep(),
        DCLGANStep(),
        CycleGANStep(),
        Pix2PixStep(),
        ContraGANStep("cifar10", 32, 64, "CIFAR-10"),
        ContraGANStep("tiny-imagenet", 64, 32, "Tiny ImageNet"),
        SimCLRStep(),
        MoCoStep(),
        CFLStep(),
        ReStyleStep(),
    )
}


def check(step: Step) -> dict[str, float]:
    """Relative differences of losses and of each network's gradients after one step at `check_size`.

    In float32 the smallest of up to 12 batches, of both steps: a ReLU that rounding moves across 0 is a jump of the gradient, in
    either step and by chance. In float64 of the last of them.

    Returns:
        the largest of: "float64", ours from the eager step's; "eager fp32" and "fastnce fp32", from the eager float64 step's.

    Raises:
        RuntimeError: they are not the same step.
    """
    least = {"eager fp32": math.inf, "fastnce fp32": math.inf}
    for attempt in range(12):
        found = _differences(step, attempt)
        least = {name: min(found[name], value) for name, value in least.items()}
        found |= least
        if not found["float64"] < 1e-4:
            break
        if found["fastnce fp32"] < 3 * found["eager fp32"]:
            return found
    raise RuntimeError(f"{step.name}: not the same step, relative differences {found}")


def _differences(step: Step, attempt: int) -> dict[str, float]:
    results = {}
    for dtype in (torch.float64, torch.float32):
        ours = step.ours(step.check_size)
        published = step.published(ours)
        pairs = step.pairs(ours, published)
        parts = [published, *vars(published).values()]
        for network in (ours, *(part for part in parts if isinstance(part, nn.Module))):
            network.to(dtype)
        for name, run, networks in (
            ("eager", published.training_step, [other for _, other in pairs]),
            ("fastnce", ours.training_step, [one for one, _ in pairs]),
        ):
            batch = _as(step.batch(step.check_size), dtype, attempt)
            torch.manual_seed(3)  # of what a step draws itself
            losses = run(batch, **_as(step.draws(step.check_size), dtype, attempt))
            gradients = [
                torch.cat([p.grad.double().flatten() for p in network.parameters()])
                for network in networks
            ]
            values = torch.stack([losses[key].double() for key in sorted(losses)])
            results[name, dtype] = [values, *gradients]
    truth = results["eager", torch.float64]
    return {
        "float64": _difference(results["fastnce", torch.float64], truth),
        "eager fp32": _difference(results["eager", torch.float32], truth),
        "fastnce fp32": _difference(results["fastnce", torch.float32], truth),
    }


def _as(given: Any, dtype: torch.dtype, shift: int) -> Any:
    """The same with all tensors of numbers that are not whole in `dtype`, columns moved by `shift`."""

    def converted(x: Any) -> Any:
        is_float = isinstance(x, Tensor) and x.is_floating_point()
        return x.roll(shift, -1).to(dtype) if is_float else x

    return tree_map(converted, given)


def _difference(got: list[Tensor], truth: list[Tensor]) -> float:
    pairs = zip(got, truth, strict=True)
    return max(((one - other).norm() / other.norm()).item() for one, other in pairs)


def make(step: Step, provider: str, size: int) -> Callable[[], object]:
    """One step of `provider` on the same images each time."""
    kind, precision = provider.split()
    model = step.ours(size, precision)
    run = step.published(model).training_step if kind == "eager" else model.training_step
    batch = step.batch(size)
    return lambda: step.run(run, batch)


def time_steps(step: Step, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, the providers in turns, after one step each that is not counted; of long ones 3 rounds at most."""
    steps = {provider: make(step, provider, size) for provider in providers()}
    first = in_turns(steps, 1, {}, torch.device("cpu"))
    is_long = sum(map(sum, first.values())) > 10
    return in_turns(steps, min(rounds, 3) if is_long else rounds, {}, torch.device("cpu"))


def breakdown(step: Step, provider: str, size: int) -> dict[str, float]:
    """Seconds of one profiled step by group of operators; "other" is the rest of the step."""
    run = make(step, provider, size)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (total,) = seconds_of(run, 1, torch.device("cpu"))
    events = profile.key_averages()
    found = {
        group: sum(e.self_cpu_time_total for e in events if e.key.startswith(names)) / 1e6
        for group, names in _GROUPS.items()
    }
    return {**found, "other": total - sum(found.values())}


def peak_bytes(step: Step, provider: str, size: int) -> int:
    """By how much the resident memory of a process of its own rises: networks, Adam and two steps."""
    return machine.in_fresh_process(os.environ | memory.GLIBC, _own_peak, step.name, provider, size)


def _own_peak(name: str, provider: str, size: int) -> int:
    make(STEPS[name], provider, STEPS[name].check_size)()  # loads the code
    before = memory.reset_peak()
    run = make(STEPS[name], provider, size)
    run()
    run()
    return memory.status_bytes("VmHWM") - before


def markdown(step: Step, facts: Mapping, results: Mapping) -> str:
    """The report."""
    found, times = results["check"], results["seconds"]
    eager, eager_peak = statistics.median(times["eager fp32"]), results["peak_bytes"]["eager fp32"]
    steps = []
    for provider, seconds in times.items():
        median, peak = statistics.median(seconds), results["peak_bytes"][provider]
        row = {
            "step": provider,
            "seconds": f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            "eager / this": f"{eager / median:.2f}",
            "peak memory, MB": f"{peak / 1e6:.0f}",
            "share of eager's": f"{peak / eager_peak:.2f}",
        }
        steps.append(row)
    shares = [
        (group, *(f"{of[group]:.2f}" for of in results["breakdown"].values()))
        for group in (*_GROUPS, "other")
    ]
    return f"""\
# A training step on {facts["device"]}: {step.about}

Height {results["size"]}, {facts["threads"]} threads, median of {len(seconds)} steps in turns (smallest to largest).

{report.table_of(steps)}

Where the time of a profiled step goes, seconds:

{report.table(("", *results["breakdown"]), shares)}

Largest relative difference of a loss or a network's gradient at {step.check_size} pixels: ours in float64 from the eager
step's {found["float64"]:.0e}; in float32 from float64, eager {found["eager fp32"]:.0e}, ours {found["fastnce fp32"]:.0e}.
{results["counted"]}
"""


def summary(out: Path, facts: Mapping) -> None:
    """Writes `<device>-steps.md`: a line for each system of which the folder `out` has a report."""
    rows, device = [], machine.slug(facts["device"])
    for name in STEPS:
        path = out / f"{device}-{name}_step.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        times = {p: statistics.median(seconds) for p, seconds in found["seconds"].items()}
        peaks, eager = found["peak_bytes"], times["eager fp32"]
        row = {"system": name, "eager, s": f"{eager:.2f}"}
        for provider in [p for p in times if p != "eager fp32"]:
            row[f"{provider}, s"] = f"{times[provider]:.2f}, {eager / times[provider]:.2f}x"
        row["peak memory, MB"] = ", ".join(f"{peaks[p] / 1e6:.0f}" for p in times)
        shares = [_share_of_convolutions(found["breakdown"][p]) for p in times]
        row["convolutions of oneDNN"] = ", ".join(f"{share:.0%}" for share in shares)
        rows.append(row)
    if rows:
        text = (
            f"# Training steps on {facts['device']}\n\n"
            f"Medians; in the last two columns {', '.join(times)}. Each system's own report, "
            f"`{device}-SYSTEM_step.md`, says what its step is. Where most of our step is convolutions that oneDNN makes, "
            f"as in the eager one, PyTorch bounds it.\n\n{report.table_of(rows)}\n"
        )
        report.save(out, f"{device}-steps", {"steps": rows}, text)


def _share_of_convolutions(seconds: Mapping[str, float]) -> float:
    of_onednn = sum(of for group, of in seconds.items() if group.startswith("other convolutions"))
    return of_onednn / sum(seconds.values())


def main(out: Path | None, only: list[str] | None, size: str = "full") -> int:
    """Measures the steps of the systems `only`, by default all; reports in the folder `out`.

    Sizes other than "full" are those of the check, one round, for a look at whether everything runs; their reports are apart.
    """
    facts = machine.describe(torch.device("cpu"))
    for step in STEPS.values():
        if only and step.name not in only:
            continue
        pixels, rounds, kind = step.size, 5, "step"
        if size != "full":
            pixels, rounds, kind = step.check_size, 1, "quick_step"
        counted = step.counted() if size == "full" else ""
        results = {"size": pixels, "check": check(step), "counted": counted}
        results["seconds"] = time_steps(step, pixels, rounds)
        results["breakdown"] = {p: breakdown(step, p, pixels) for p in providers()}
        results["peak_bytes"] = {p: peak_bytes(step, p, pixels) for p in providers()}
        report.publish(out, f"{step.name}_{kind}", facts, results, markdown(step, facts, results))
    if out is not None:
        summary(out, facts)
    return 0
