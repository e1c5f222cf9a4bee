"""Training steps written down once more, one pass per term; those of CUT, and what the transcriptions share."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.models import (
    CUT,
    DCLGAN,
    CUTConfig,
    CycleGAN,
    CycleGANConfig,
    DCLGANConfig,
    Pix2Pix,
    Pix2PixConfig,
)

TINY = CUTConfig(
    base_channels=4,
    num_blocks=3,
    disc_channels=4,
    disc_layers=2,
    nce_layers=(0, 4, 8, 12, 14),
    num_patches=12,
    projection_dim=8,
    lr=1e-3,
)
FAST = replace(TINY, nce_idt=False, lambda_nce=10.0, flip_equivariance=True)
MODELS = {CUTConfig: CUT, CycleGANConfig: CycleGAN, DCLGANConfig: DCLGAN, Pix2PixConfig: Pix2Pix}
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def side_of(config) -> tuple[int, int]:
    return (16, 20) if isinstance(config, CUTConfig) else (16, 32)


def make(config, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[type(config)](config, side_of(config)).to(dtype)
    # The published initialisation makes all biases 0 and features tiny; the comparison should see every term.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 1 else parameter.mul_(20)
    return model


def batches(
    count: int,
    config=TINY,
    dtype: torch.dtype = torch.float64,
    size: int = 2,
    side: tuple[int, int] | None = None,
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    channels = {"A": config.in_channels, "B": config.out_channels}
    sides = side or side_of(config)
    return [
        {
            name: torch.rand(size, c, *sides, generator=generator, dtype=dtype) * 2 - 1
            for name, c in channels.items()
        }
        for _ in range(count)
    ]


def draw_ids(
    model: nn.Module, seed: int, side: tuple[int, int] | None = None
) -> dict[str, list[Tensor]] | None:
    """`num_patches` positions of each tapped map, for every loss; None for all of them."""
    config = model.config
    if not config.num_patches:
        return None
    generator = torch.Generator().manual_seed(seed)
    of_cut = isinstance(config, CUTConfig)
    network = model.generator if of_cut else model.generators.a_to_b
    with torch.no_grad():
        dtype = next(network.parameters()).dtype
        image = torch.zeros(1, config.in_channels, *(side or side_of(config)), dtype=dtype)
        maps = network.encode(image, config.nce_layers)
    return {
        name: [
            torch.randperm(x[0, 0].numel(), generator=generator)[: config.num_patches] for x in maps
        ]
        for name in (("NCE", "NCE_Y") if of_cut else ("NCE1", "NCE2", "fake_A", "fake_B"))
    }


class Transcription:
    """A step written down one pass per term, with nothing shared, batched or fused; keeps each update's gradients."""

    def __init__(self, model: nn.Module, parts: dict[str, list[str]], **adam: dict) -> None:
        """With the networks of each optimiser, and options of one that differ from the others'."""
        self.config, self.networks = model.config, copy.deepcopy(model)
        self.optimizers, self.gradients = {}, {}
        for letter, names in parts.items():
            networks = [getattr(self.networks, name) for name in names]
            parameters = [p for part in networks if part is not None for p in part.parameters()]
            parameters = [p for p in parameters if p.requires_grad]
            if parameters:
                how = {"lr": self.config.lr, "betas": (0.5, 0.999)} | adam.get(letter, {})
                self.optimizers[letter] = torch.optim.Adam(parameters, foreach=False, **how)

    def descend(self, loss: Tensor, *letters: str) -> None:
        for letter in letters:
            self.optimizers[letter].zero_grad()
        loss.backward()
        for letter in letters:
            for group in self.optimizers[letter].param_groups:
                self.gradients |= {p: p.grad.clone() for p in group["params"]}
            self.optimizers[letter].step()

    def gradient_pairs(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Every parameter's gradient in the model and here."""
        pairs = zip(model.named_parameters(), self.networks.parameters(), strict=True)
        return {
            name: (ours.grad, self.gradients[theirs])
            for (name, ours), theirs in pairs
            if ours.requires_grad
        }

    def project(self, f: nn.Module | None, feature: Tensor, layer: int, ids: Tensor | None):
        """Projected patches of a map, (B, P, C)."""
        ids = torch.arange(feature[0, 0].numel()) if ids is None else ids
        # Not feature.permute(0, 2, 3, 1).flatten(1, 2)[:, ids]: see the reference of sample_patches.
        picked = feature.flatten(2)[:, :, ids].mT
        return picked if f is None else getattr(f, f"mlp_{layer}")(picked)

    def row_losses(self, q: Tensor, k: Tensor, earlier: list[Tensor] | None = None) -> list[Tensor]:
        """The cross-entropies of the normalised patches of B images, q and k (B, P, C): one row after the other."""
        mode, losses = self.config.negatives, []
        for image, rows in enumerate(q):
            for place, row in enumerate(rows):
                keys = [k[image, place : place + 1]]  # the positive first
                if mode != "queue":
                    for i in range(len(k)) if mode == "batch" else [image]:
                        others = [k[i]] if i != image else [k[i, :place], k[i, place + 1 :]]
                        keys += others
                if earlier is not None:
                    keys.append(torch.stack(earlier))
                logits = torch.cat(keys) @ row
                if mode in ("image", "batch"):
                    # The published constant in the place of the positive.
                    logits = torch.cat([logits, logits.new_tensor([-10.0])])
                losses.append(-F.log_softmax(logits / self.config.temperature, dim=0)[0])
        return losses


def check_steps(
    model: nn.Module, truth: Transcription, steps, close=CLOSE, of_buffers=CLOSE
) -> None:
    """Losses, gradients and buffers of the steps, each a batch and further arguments, are those of the transcription."""
    for seed, (batch, how) in enumerate(steps):
        torch.manual_seed(seed)  # of pools, dropout and a penalty's places
        losses = model.training_step(batch, **how)
        torch.manual_seed(seed)
        expected = truth.step(batch, **how)
        assert set(losses) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value.detach(), **close, msg=name)
        for name, (ours, theirs) in truth.gradient_pairs(model).items():
            torch.testing.assert_close(ours, theirs, **close, msg=name)
        buffers = zip(model.named_buffers(), truth.networks.buffers(), strict=True)
        for (name, ours), theirs in buffers:
            if not name.startswith("contrast."):  # queues are transcribed as lists
                torch.testing.assert_close(ours, theirs, **of_buffers, msg=name)
    # Every network's gradient is well above the tolerance.
    for network in model.children():
        if gradients := [p.grad.abs().max() for p in network.parameters() if p.requires_grad]:
            assert max(gradients) > 1e-5


def as_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return torch.cat([images] * 3, dim=1)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype)
    return torch.einsum("bchw,c->bhw", images, weights).unsqueeze(1)


class CUTSteps(Transcription):
    """`norm_floor` is added to the norm of a patch before it is divided by it: 1e-7 in the published code."""

    def __init__(self, model: CUT, norm_floor: float = 0.0) -> None:
        parts = {"G": ["generator"], "D": ["discriminator"], "F": ["projector"]}
        super().__init__(model, parts)
        self.norm_floor = norm_floor
        self.earlier = {
            (name, layer): list(F.normalize(queue.keys))
            for name, queues in (model.contrast.queues.items() if model.nce_names else ())
            for layer, queue in enumerate(queues)
        }

    def copy_state(self, model: CUT) -> None:
        """Goes on from where the model is: weights and optimisers."""
        self.networks.load_state_dict(model.state_dict())
        for letter, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(model.optimizers[letter].state_dict()))

    def patches(self, feature: Tensor, layer: int, ids: Tensor | None) -> Tensor:
        projected = self.project(self.networks.projector, feature, layer, ids)
        return projected / (projected.square().sum(2, keepdim=True).sqrt() + self.norm_floor)

    def nce(
        self, name: str, source: Tensor, target: Tensor, ids: list[Tensor] | None, flip: bool
    ) -> Tensor:
        total = 0
        for layer, tap in enumerate(self.config.nce_layers):
            feature_k = self.networks.generator.encode(source, [tap])[0]
            feature_q = self.networks.generator.encode(target, [tap])[0]
            if flip:
                feature_q = feature_q.flip(3)
            places = None if ids is None else ids[layer]
            query = self.patches(feature_q, layer, places)
            key = self.patches(feature_k, layer, places).detach()
            rows = self.row_losses(query, key, self.earlier.get((name, layer)))
            if (name, layer) in self.earlier:
                kept = self.earlier[name, layer] + list(key.flatten(0, 1))
                self.earlier[name, layer] = kept[-self.config.queue_size :]
            total = total + sum(rows) / len(rows) * self.config.lambda_nce
        return total / len(self.config.nce_layers)

    def real_and_fake(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        mode, one = self.config.gan_mode, torch.ones_like
        if mode == "lsgan":
            return F.mse_loss(real, one(real)), F.mse_loss(fake, 0 * one(fake))
        if mode == "hinge":
            return (1 - real).clamp(min=0).mean(), (1 + fake).clamp(min=0).mean()
        if mode == "wgangp":
            return -real.mean(), fake.mean()
        entropy = F.binary_cross_entropy_with_logits
        return entropy(real, one(real)), entropy(fake, 0 * one(fake))

    def fooled(self, fake: Tensor) -> Tensor:
        if self.config.gan_mode in ("hinge", "wgangp"):
            return -fake.mean()
        return self.real_and_fake(fake, fake)[0]

    def squared_slopes(self, images: Tensor) -> list[Tensor]:
        """|d sum D(x) / dx|^2 of each image, one after the other."""
        slopes = []
        for image in images:
            x = image[None].clone().requires_grad_()
            (slope,) = torch.autograd.grad(
                self.networks.discriminator(x).sum(), x, create_graph=True
            )
            slopes.append(slope.square().sum())
        return slopes

    def d_loss(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        losses = dict(
            zip(
                ("D_real", "D_fake"),
                self.real_and_fake(
                    self.networks.discriminator(real), self.networks.discriminator(fake)
                ),
                strict=True,
            )
        )
        if self.config.lambda_r1:
            slopes = self.squared_slopes(real)
            losses["D_r1"] = self.config.lambda_r1 / 2 * sum(slopes) / len(slopes)
        if self.config.gan_mode == "wgangp":
            place = torch.rand(len(real), dtype=real.dtype).view(-1, 1, 1, 1)
            slopes = self.squared_slopes(place * real + (1 - place) * fake)
            excess = [(slope.sqrt() - 1) ** 2 for slope in slopes]
            losses["D_gp"] = self.config.lambda_gp / 2 * sum(excess) / len(excess)
        return losses

    def step(
        self,
        batch: dict[str, Tensor],
        patch_ids: dict[str, list[Tensor]] | None = None,
        flip: bool = False,
    ) -> dict[str, Tensor]:
        ids = patch_ids or {}
        real_a, real_b = batch["A"], batch["B"]
        seen_b = as_channels(real_b, self.config.in_channels)

        def mirrored(images: Tensor) -> Tensor:
            return images.flip(3) if flip else images

        fake_b = self.networks.generator(mirrored(real_a))

        losses = self.d_loss(real_b, fake_b.detach())
        d_total = (losses["D_real"] + losses["D_fake"]) / 2
        for name in ("D_r1", "D_gp"):
            d_total = d_total + losses.get(name, 0)
        self.descend(d_total, "D")

        losses["G_GAN"] = self.config.lambda_gan * self.fooled(self.networks.discriminator(fake_b))
        total = losses["G_GAN"]
        if self.config.lambda_nce:
            encoded = as_channels(fake_b, self.config.in_channels)
            losses["NCE"] = self.nce("NCE", real_a, encoded, ids.get("NCE"), flip)
            contrastive = losses["NCE"]
            if self.config.nce_idt:
                encoded = as_channels(
                    self.networks.generator(mirrored(seen_b)), self.config.in_channels
                )
                losses["NCE_Y"] = self.nce("NCE_Y", seen_b, encoded, ids.get("NCE_Y"), flip)
                contrastive = (losses["NCE"] + losses["NCE_Y"]) / 2
            total = total + contrastive
        if self.config.lambda_identity:
            idt_b = self.networks.generator(mirrored(real_b))
            losses["idt"] = self.config.lambda_identity * (idt_b - mirrored(real_b)).abs().mean()
            total = total + losses["idt"]
        losses["G"] = total
        self.descend(total, *(letter for letter in self.optimizers if letter != "D"))
        return losses
