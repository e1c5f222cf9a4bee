"""The training steps of CycleGAN, DCLGAN, SimDCL and pix2pix against plain transcriptions of their equations, and options."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transcriptions import TINY, Transcription, batches, check_steps, draw_ids, make

from benchmarks.published_translation import cyclegan_step, pix2pix_step
from fastnce.errors import UserError
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
from fastnce.systems.cyclegan import ImagePool

SMALL = {"base_channels": 4, "disc_channels": 4, "disc_layers": 2, "lr": 1e-3}
CYCLEGAN = CycleGANConfig(**SMALL, num_blocks=2, pool_size=3, lambda_a=7.0, lambda_b=11.0)
DUAL = DCLGANConfig(
    **SMALL,
    num_blocks=3,
    nce_layers=(4, 8, 12, 14),
    num_patches=12,
    projection_dim=8,
    lambda_gan=1.5,
)
SIM = replace(DUAL, lambda_sim=10.0, lr_f=1e-3, beta1_f=0.5)
PIX2PIX = Pix2PixConfig(**SMALL, in_channels=1, num_downs=4, lambda_gan=2.0, lambda_l1=30.0)


class CycleSteps(Transcription):
    def __init__(self, model: CycleGAN) -> None:
        discriminators = ["discriminator_a", "discriminator_b"]
        super().__init__(model, {"G": ["generators"], "D": discriminators})
        self.pools = [ImagePool(self.config.pool_size) for _ in "AB"]

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        networks = self.networks
        generators = networks.generators.a_to_b, networks.generators.b_to_a
        discriminators = networks.discriminator_a, networks.discriminator_b
        return cyclegan_step(
            batch, generators, discriminators, self.config, self.pools, self.descend
        )


class DualSteps(Transcription):
    def __init__(self, model: DCLGAN) -> None:
        names = {"G": ["generators"], "D": ["discriminator_a", "discriminator_b"]}
        names["F"] = ["projector_a", "projector_b", "heads"]
        betas = {"lr": model.config.lr_f, "betas": (model.config.beta1_f, model.config.beta2_f)}
        super().__init__(model, names, F=betas)

    def patches(self, g, f, image: Tensor, ids: list[Tensor]) -> list[Tensor]:
        """Projected patches of each layer, (B, P, C)."""
        return [
            self.project(f, g.encode(image, [tap])[0], layer, ids[layer])
            for layer, tap in enumerate(self.config.nce_layers)
        ]

    def nce(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        total = 0
        for query, key in zip(queries, keys, strict=True):
            rows = self.row_losses(F.normalize(query, dim=2), F.normalize(key.detach(), dim=2))
            total = total + sum(rows) / len(rows)
        return total / len(queries) * self.config.lambda_nce

    def adversarial(self, logits: Tensor) -> Tensor:
        if self.config.generator_hinge == "linear":
            return -logits.mean() * self.config.lambda_gan
        return -torch.min(logits - 1, torch.zeros_like(logits)).mean() * self.config.lambda_gan

    def head(self, name: str, patches: list[Tensor]) -> Tensor:
        x = self.networks.heads[name].model(torch.stack(patches, 1))
        return x / x.square().sum(1, keepdim=True).sqrt()

    def step(
        self, batch: dict[str, Tensor], patch_ids: dict[str, list[Tensor]]
    ) -> dict[str, Tensor]:
        ids = patch_ids
        config, a, b, nets = self.config, batch["A"], batch["B"], self.networks
        g_a, g_b = nets.generators.a_to_b, nets.generators.b_to_a
        d_a, d_b, f_1, f_2 = (
            nets.discriminator_a,
            nets.discriminator_b,
            nets.projector_a,
            nets.projector_b,
        )
        fake_b, fake_a = g_a(a), g_b(b)
        losses = {}
        for name, d, real, fake in (("D_A", d_a, b, fake_b), ("D_B", d_b, a, fake_a)):
            losses[name] = (F.relu(1 - d(real)).mean() + F.relu(1 + d(fake.detach())).mean()) / 2
        self.descend(losses["D_A"] + losses["D_B"], "D")
        losses["G_A"], losses["G_B"] = self.adversarial(d_a(fake_b)), self.adversarial(d_b(fake_a))
        losses["idt_A"] = (g_a(b) - b).abs().mean() * config.lambda_idt
        losses["idt_B"] = (g_b(a) - a).abs().mean() * config.lambda_idt
        k_a = self.patches(g_a, f_1, a, ids["NCE1"])
        k_b = self.patches(g_b, f_2, b, ids["NCE2"])
        losses["NCE1"] = self.nce(self.patches(g_b, f_2, fake_b, ids["NCE1"]), k_a)
        losses["NCE2"] = self.nce(self.patches(g_a, f_1, fake_a, ids["NCE2"]), k_b)
        total = 0.5 * sum(v for k, v in losses.items() if not k.startswith("D_"))
        if nets.heads is not None:
            new_a = self.patches(g_a, f_1, fake_a, ids["fake_A"])
            new_b = self.patches(g_b, f_2, fake_b, ids["fake_B"])
            for name, real, new in (("a", k_a, new_a), ("b", k_b, new_b)):
                difference = self.head(f"real_{name}", real) - self.head(f"fake_{name}", new)
                losses[f"sim_{name.upper()}"] = config.lambda_sim * difference.abs().mean()
                total = total + losses[f"sim_{name.upper()}"]
        losses["G"] = total
        self.descend(total, "G", "F")
        return losses


class PairSteps(Transcription):
    def __init__(self, model: Pix2Pix) -> None:
        super().__init__(model, {"G": ["generator"], "D": ["discriminator"]})

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        networks = self.networks.generator, self.networks.discriminator
        return pix2pix_step(batch, *networks, self.config, self.descend)


CASES = {
    "cyclegan": (CYCLEGAN, CycleSteps),
    "cyclegan without identity": (
        replace(CYCLEGAN, lambda_identity=0.0, in_channels=1),
        CycleSteps,
    ),
    "dclgan": (DUAL, DualSteps),
    "dclgan, torch": (replace(DUAL, backend="torch"), DualSteps),
    "dclgan, linear hinge": (replace(DUAL, generator_hinge="linear"), DualSteps),
    "simdcl": (SIM, DualSteps),
    "simdcl, torch": (replace(SIM, backend="torch"), DualSteps),
    "pix2pix": (PIX2PIX, PairSteps),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_follow_the_equations(case):
    config, transcription = CASES[case]
    model = make(config)
    truth = transcription(model)
    steps = [
        (batch, {"patch_ids": draw_ids(model, seed)} if isinstance(config, DCLGANConfig) else {})
        for seed, batch in enumerate(batches(3, config))
    ]
    check_steps(model, truth, steps)
    for pool in getattr(truth, "pools", ()):
        assert len(pool.images) == 3


def test_cyclegan_takes_a_and_b_of_any_sizes():
    """Others in each step, too: the pool gives images of earlier sizes."""
    model = make(replace(CYCLEGAN, pool_size=1))
    truth = CycleSteps(model)
    (batch,) = batches(1, CYCLEGAN, size=1)
    steps = [
        ({"A": batch["A"][..., :a], "B": batch["B"][..., :b]}, {})
        for a, b in ((20, 16), (12, 20), (16, 16))
    ]
    check_steps(model, truth, steps)


def test_a_state_dict_and_the_random_state_continue_exactly():
    """Of the pools, too."""
    model, steps = make(CYCLEGAN), batches(6, CYCLEGAN)
    for batch in steps[:3]:
        model.training_step(batch)
    state = copy.deepcopy(model.state_dict())
    optimizers = {n: copy.deepcopy(o.state_dict()) for n, o in model.optimizers.items()}
    rng = torch.get_rng_state()
    expected = [model.training_step(batch) for batch in steps[3:]]
    other = make(CYCLEGAN)
    other.load_state_dict(state)
    for name, optimizer in other.optimizers.items():
        optimizer.load_state_dict(optimizers[name])
    torch.set_rng_state(rng)
    assert [other.training_step(batch) for batch in steps[3:]] == expected


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, lambda_r1=1.0, lambda_identity=1.0, gan_mode="nonsaturating"),
        replace(TINY, gan_mode="wgangp"),
        replace(TINY, in_channels=1),
        replace(TINY, out_channels=1, negatives="image+queue", queue_size=40),
        replace(TINY, projector="none", negatives="queue", queue_size=40),
        CYCLEGAN,
        DUAL,
        SIM,
        replace(PIX2PIX, dropout=False),
    ],
    ids=lambda config: type(config).__name__,
)
def test_bf16_trains_every_network(config):
    (batch,) = batches(1, config, torch.float32)
    truth, results = make(config, torch.float32), []
    given = {"patch_ids": draw_ids(truth, 0)} if hasattr(config, "num_patches") else {}
    atol = 0.0
    if (
        config.gan_mode == "wgangp"
    ):  # a critic's mean is small beside the logits that it is the mean of
        atol = 0.05 * truth.discriminator(batch["B"]).abs().mean().item()
    model = make(replace(config, precision="bf16"), torch.float32)
    for each in (model, truth):
        torch.manual_seed(0)
        losses = each.training_step(batch, **given)
        if "D_gp" in losses:  # about slopes: the distance from 1 magnifies their rounding
            losses["D_gp"] = 1 + (2 * losses["D_gp"] / config.lambda_gp).sqrt()
        results.append(losses)
    rtol = 0.05 if isinstance(config, CUTConfig) else 0.1
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=rtol, atol=atol, msg=name)
    # A weight whose low-precision copy was cached without gradient would have a wrong or no gradient here. The bound is
    # loose because bf16 rounds the gradient of this random generator by a third of its length.
    for one, other in zip(model.parameters(), truth.parameters(), strict=True):
        if one.dim() > 1:
            assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.5
            assert one.grad.norm().item() == pytest.approx(other.grad.norm().item(), rel=0.3)


def test_dclgan_encodes_nothing_twice():
    model, calls = make(DUAL), []
    for generator in model.generators.children():
        encode = generator.encode
        generator.encode = lambda *args, encode=encode: calls.append(1) or encode(*args)
    model.training_step(batches(1, DUAL)[0])
    assert len(calls) == 2


def test_dclgans_terms_that_are_off():
    model = make(replace(DUAL, lambda_nce=0.0, lambda_idt=0.0))
    assert model.projector_a is None and set(model.optimizers) == {"G", "D"}
    assert set(model.training_step(batches(1, DUAL)[0])) == {"D_A", "D_B", "G_A", "G_B", "G"}
    bare = make(replace(DUAL, projector="none"))
    assert set(bare.optimizers) == {"G", "D"}
    assert {"NCE1", "NCE2"} < set(bare.training_step(batches(1, DUAL)[0]))
    grey = replace(DUAL, in_channels=1, lambda_idt=0.0, nce_layers=(0, 4, 12))
    assert {"NCE1", "NCE2"} < set(make(grey).training_step(batches(1, grey)[0]))


@pytest.mark.parametrize("size", [1, 3])
def test_simdcl_takes_any_batch(size):
    losses = make(SIM).training_step(batches(1, SIM, size=size)[0])
    assert losses["sim_A"] > 0 and losses["sim_B"] > 0


def test_defaults_are_the_published_ones():
    published = {
        CUTConfig: {"gan_mode": "lsgan", "nce_idt": True, "lambda_nce": 1, "temperature": 0.07},
        CycleGANConfig: {"lambda_a": 10, "lambda_b": 10, "lambda_identity": 0.5, "pool_size": 50},
        Pix2PixConfig: {"lambda_l1": 100, "gan_mode": "vanilla", "num_downs": 8, "dropout": True},
        DCLGANConfig: {"gan_mode": "hinge", "generator_hinge": "margin", "lambda_nce": 2},
    }
    published[DCLGANConfig] |= {"lambda_idt": 1, "lambda_sim": 0, "lr_f": 1e-3, "pool_size": 0}
    published[DCLGANConfig] |= {"negatives": "batch", "nce_layers": (4, 8, 12, 16)}
    for config_class, values in published.items():
        values |= {"lr": 2e-4, "beta1": 0.5, "beta2": 0.999}
        config = config_class()
        assert {name: getattr(config, name) for name in values} == values


GREY = {"in_channels": 1}
MISTAKES = [
    (CUTConfig, {"num_patches": -1}, "num_patches=-1"),
    (CUTConfig, {"temperature": float("nan")}, "temperature=nan"),
    (CUTConfig, {"beta1": 1.0}, "beta1=1.0"),
    (CUTConfig, {"gan_mode": "wgan"}, "gan_mode=wgan .*lsgan"),
    (CUTConfig, {"negatives": "all"}, "negatives=all .*image"),
    (CUTConfig, {"queue_size": 0}, "queue_size=0"),
    (CUTConfig, {"lambda_gp": 0.0}, "lambda_gp=0.0"),
    (CUTConfig, GREY | {"lambda_identity": 1.0}, "lambda_identity=1.0 .*in_channels=1"),
    (CUTConfig, {"in_channels": 4}, "in_channels=4 .*lambda_nce=0"),
    (CUTConfig, {"generator": "stylegan2", "num_blocks": 5}, "num_blocks=5 .*even"),
    (CUTConfig, {"norm_floor": 1e-7, "negatives": "queue"}, "norm_floor=1e-07 .*queue"),
    (CycleGANConfig, {"lambda_a": -1.0}, "lambda_a=-1.0"),
    (CycleGANConfig, {"pool_size": -1}, "pool_size=-1"),
    (CycleGANConfig, {"lr": 0.0}, "lr=0.0"),
    (CycleGANConfig, GREY, "in_channels=1 .*lambda_identity=0"),
    (DCLGANConfig, {"lr_f": 0.0}, "lr_f=0.0"),
    (DCLGANConfig, {"generator_hinge": "big"}, "generator_hinge=big .*margin, linear"),
    (DCLGANConfig, {"lambda_sim": 1.0, "lambda_nce": 0.0}, "lambda_nce=0.0"),
    (DCLGANConfig, {"lambda_sim": 1.0, "num_patches": 0}, "0x256.*num_patches >= 3"),
    (DCLGANConfig, GREY, "lambda_idt=1.0 .*lambda_idt=0"),
    (DCLGANConfig, GREY | {"lambda_idt": 0.0, "projector": "none", "nce_layers": (0,)}, "layer 0"),
    (Pix2PixConfig, {"num_downs": 1}, "num_downs=1"),
    (Pix2PixConfig, {"disc_norm": "layer"}, "disc_norm=layer"),
]


@pytest.mark.parametrize(("config_class", "changes", "message"), MISTAKES)
def test_mistakes_are_named(config_class, changes, message):
    with pytest.raises(UserError, match=message):
        config_class(**changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(replace(DUAL, num_patches=33)), "num_patches=33 exceeds the 4x8 = 32"),
        (lambda: CUT(CUTConfig(num_patches=17), (16, 16)), "num_patches=17 .*4x4 = 16"),
        (lambda: CUT(CUTConfig(nce_layers=(0, 99))), "layers of the generator, from 0 to"),
        (lambda: CUT(CUTConfig(nce_layers=(8, 4))), "ascending"),
        (lambda: CUT(CUTConfig(backend="cudnn")), "backend=cudnn is unknown"),
        (lambda: Pix2Pix(PIX2PIX, (24, 32)), "32x24 cannot be halved num_downs=4"),
        (lambda: CUT(CUTConfig(discriminator="stylegan2"), (16, 20)), "stylegan2 .*16x20"),
    ],
)
def test_what_does_not_fit_the_images_is_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


def numbers(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].int().tolist()


def test_the_pool_gives_half_of_its_images_back_from_every_place():
    torch.manual_seed(0)
    pool, kept, places, from_pool = ImagePool(4), [0, 1, 2, 3], set(), 0
    assert numbers(pool(torch.arange(4.0).view(4, 1, 1, 1))) == kept  # until it is full
    for number in range(4, 504):
        image = torch.full((1, 3, 2, 2), float(number)).requires_grad_()
        given = pool(image)
        assert not given.requires_grad
        with torch.no_grad():
            image += 1000  # what the pool keeps is its own
        if numbers(given) != [number]:
            from_pool += 1
            places.add(kept.index(*numbers(given)))
            kept[kept.index(*numbers(given))] = number
        assert [int(x.flatten()[0]) for x in pool.images] == kept
    assert 200 < from_pool < 300 and places == {0, 1, 2, 3}
    assert torch.equal(ImagePool(0)(image), image)
