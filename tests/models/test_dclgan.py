"""The training steps of DCLGAN and SimDCL against a plain transcription of their equations, and their options."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.errors import UserError
from fastnce.models import DCLGAN, DCLGANConfig

TINY = DCLGANConfig(
    base_channels=4,
    num_blocks=3,
    disc_channels=4,
    disc_layers=2,
    nce_layers=(4, 8, 12, 14),
    num_patches=12,
    projection_dim=8,
    lambda_gan=1.5,
    lr=1e-3,
)
SIM = replace(TINY, lambda_sim=10.0, lr_f=1e-3, beta1_f=0.5)
SIZE = (16, 20)
POSITIONS = [16 * 20, 8 * 10, 4 * 5, 4 * 5]


def make(config: DCLGANConfig, dtype: torch.dtype = torch.float64) -> DCLGAN:
    torch.manual_seed(0)
    model = DCLGAN(config, SIZE).to(dtype)
    # The published initialisation makes all biases 0 and features tiny; the comparison should see every term.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 1 else parameter.mul_(20)
    return model


def batches(
    count: int, channels: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.rand(2, number, *SIZE, generator=generator, dtype=dtype) * 2 - 1
            for name, number in zip("AB", channels, strict=True)
        }
        for _ in range(count)
    ]


def draw_ids(seed: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [torch.randperm(n, generator=generator)[:12] for n in POSITIONS]
        for name in ("NCE1", "NCE2", "fake_A", "fake_B")
    }


class Transcription:
    """DCLGAN written down step by step, one pass per term, with nothing shared, batched or fused."""

    def __init__(self, model: DCLGAN) -> None:
        self.config = config = model.config
        copied = copy.deepcopy(model)
        self.g_a, self.g_b = copied.generators.a_to_b, copied.generators.b_to_a
        self.d_a, self.d_b = copied.discriminator_a, copied.discriminator_b
        self.f_1, self.f_2, self.heads = copied.projector_a, copied.projector_b, copied.heads
        adam = {"lr": config.lr, "betas": (config.beta1, config.beta2), "foreach": False}
        self.g = [*self.g_a.parameters(), *self.g_b.parameters()]
        self.d = [*self.d_a.parameters(), *self.d_b.parameters()]
        self.f = [*self.f_1.parameters(), *self.f_2.parameters()]
        self.f += [] if self.heads is None else self.heads.parameters()
        self.opt_g = torch.optim.Adam(self.g, **adam)
        self.opt_d = torch.optim.Adam(self.d, **adam)
        betas = (config.beta1_f, config.beta2_f)
        self.opt_f = torch.optim.Adam(self.f, lr=config.lr_f, betas=betas, foreach=False)

    def patches(self, g, f, image: Tensor, ids: list[Tensor]) -> list[Tensor]:
        """Projected patches of each layer, (B, P, C)."""
        results = []
        for layer, tap in enumerate(self.config.nce_layers):
            feature = g.encode(image, [tap])[0]
            picked = feature.permute(0, 2, 3, 1).flatten(1, 2)[:, ids[layer]]
            results.append(getattr(f, f"mlp_{layer}")(picked))
        return results

    def nce(self, queries: list[Tensor], keys: list[Tensor]) -> Tensor:
        """All rows of the batch are negatives; the similarity is the cosine, spelled out."""
        total = 0
        for query, key in zip(queries, keys, strict=True):
            q, k = query.flatten(0, 1), key.flatten(0, 1).detach()
            similarity = F.cosine_similarity(q[:, None], k[None], dim=2)
            positive = similarity.diagonal()[:, None]
            negatives = similarity.masked_fill(torch.eye(len(q), dtype=torch.bool), -10.0)
            logits = torch.cat([positive, negatives], 1) / self.config.temperature
            total = total + F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        return total / len(queries) * self.config.lambda_nce

    def head(self, name: str, patches: list[Tensor]) -> Tensor:
        x = self.heads[name].model(torch.stack(patches, 1))
        return x / x.square().sum(1, keepdim=True).sqrt()

    def step(self, batch: dict[str, Tensor], ids: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        config, real_a, real_b = self.config, batch["A"], batch["B"]
        fake_b, fake_a = self.g_a(real_a), self.g_b(real_b)

        losses = {}
        self.opt_d.zero_grad()
        for name, d, real, fake in (
            ("D_A", self.d_a, real_b, fake_b.detach()),
            ("D_B", self.d_b, real_a, fake_a.detach()),
        ):
            losses[name] = (F.relu(1 - d(real)).mean() + F.relu(1 + d(fake)).mean()) / 2
            losses[name].backward()
        self.opt_d.step()
        self.d_grads = [parameter.grad.clone() for parameter in self.d]

        for optimizer in (self.opt_g, self.opt_f):
            optimizer.zero_grad()

        def adversarial(logits: Tensor) -> Tensor:
            if config.generator_hinge == "linear":
                return -logits.mean()
            return -torch.min(logits - 1, torch.zeros_like(logits)).mean()

        losses["G_A"] = config.lambda_gan * adversarial(self.d_a(fake_b))
        losses["G_B"] = config.lambda_gan * adversarial(self.d_b(fake_a))
        losses["idt_A"] = (self.g_a(real_b) - real_b).abs().mean()
        losses["idt_B"] = (self.g_b(real_a) - real_a).abs().mean()
        k_a = self.patches(self.g_a, self.f_1, real_a, ids["NCE1"])
        k_b = self.patches(self.g_b, self.f_2, real_b, ids["NCE2"])
        losses["NCE1"] = self.nce(self.patches(self.g_b, self.f_2, fake_b, ids["NCE1"]), k_a)
        losses["NCE2"] = self.nce(self.patches(self.g_a, self.f_1, fake_a, ids["NCE2"]), k_b)
        total = 0.5 * (
            losses["G_A"]
            + losses["G_B"]
            + losses["NCE1"]
            + losses["NCE2"]
            + config.lambda_idt * (losses["idt_A"] + losses["idt_B"])
        )
        if self.heads is not None:
            new_a = self.patches(self.g_a, self.f_1, fake_a, ids["fake_A"])
            new_b = self.patches(self.g_b, self.f_2, fake_b, ids["fake_B"])
            for name, pairs in (
                ("sim_A", (("real_a", k_a), ("fake_a", new_a))),
                ("sim_B", (("real_b", k_b), ("fake_b", new_b))),
            ):
                one, other = (self.head(*pair) for pair in pairs)
                losses[name] = config.lambda_sim * (one - other).abs().mean()
                total = total + losses[name]
        losses["G"] = total
        total.backward()
        self.opt_g.step()
        self.opt_f.step()
        return losses


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize(
    "config",
    [TINY, SIM, replace(TINY, generator_hinge="linear")],
    ids=["dclgan", "simdcl", "hinge"],
)
def test_three_steps_follow_the_equations(config, backend):
    model = make(replace(config, backend=backend))
    truth = Transcription(model)
    for seed, batch in enumerate(batches(3)):
        ids = draw_ids(seed)
        losses, expected = model.training_step(batch, patch_ids=ids), truth.step(batch, ids)
        assert set(losses) == set(expected)
        close = {"rtol": 1e-6, "atol": 1e-9}
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value.detach(), **close, msg=name)
        f = [*model.projector_a.parameters(), *model.projector_b.parameters()]
        f += [] if model.heads is None else model.heads.parameters()
        d = [*model.discriminator_a.parameters(), *model.discriminator_b.parameters()]
        for ours, theirs in ((model.generators.parameters(), truth.g), (f, truth.f)):
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one.grad, other.grad, **close)
        for one, other in zip(d, truth.d_grads, strict=True):
            torch.testing.assert_close(one.grad, other, **close)


@pytest.mark.parametrize("config", [TINY, SIM], ids=["dclgan", "simdcl"])
def test_gradients_are_not_trivially_small(config):
    """Guards the comparison above: every network's gradient is well above its absolute tolerance."""
    model = make(config)
    model.training_step(batches(1)[0], patch_ids=draw_ids(0))
    networks = [n for n in model.children() if list(n.parameters())]
    assert len(networks) == (6 if config is SIM else 5)
    for network in networks:
        assert max(p.grad.abs().max() for p in network.parameters()) > 1e-5


def test_no_second_encoder_pass_for_the_keys():
    model, calls = make(TINY), []
    for generator in model.generators.children():
        encode = generator.encode
        generator.encode = lambda *args, encode=encode: calls.append(1) or encode(*args)
    model.training_step(batches(1)[0])
    assert len(calls) == 2


def test_the_published_hinge_of_the_generators():
    logits = torch.tensor([-1.0, 0.5, 3.0])
    assert make(TINY)._adversarial(logits).item() == pytest.approx(1.5 * (2 + 0.5) / 3)
    usual = make(replace(TINY, generator_hinge="linear"))
    assert usual._adversarial(logits).item() == pytest.approx(-1.5 * 2.5 / 3)


def test_the_published_optimiser_of_the_projectors():
    model = make(TINY)
    options = {name: o.param_groups[0] for name, o in model.optimizers.items()}
    assert (options["F"]["lr"], options["F"]["betas"]) == (1e-3, (0.9, 0.999))
    assert options["G"]["betas"] == options["D"]["betas"] == (0.5, 0.999)
    counts = {
        n: sum(p.numel() for p in o.param_groups[0]["params"]) for n, o in model.optimizers.items()
    }
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert make(SIM).optimizers["F"].param_groups[0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("size", [1, 3])
def test_simdcl_takes_any_batch(size):
    model = make(SIM, torch.float32)
    batch = {name: torch.rand(size, 3, *SIZE) * 2 - 1 for name in "AB"}
    losses = model.training_step(batch)
    assert losses["sim_A"] > 0 and losses["sim_B"] > 0


def test_terms_that_are_off():
    base = replace(TINY, lambda_nce=0.0, lambda_idt=0.0)
    model = make(base)
    assert model.projector_a is None and set(model.optimizers) == {"G", "D"}
    assert set(model.training_step(batches(1)[0])) == {"D_A", "D_B", "G_A", "G_B", "G"}
    bare = make(replace(TINY, projector="none"))
    assert set(bare.optimizers) == {"G", "D"}
    assert {"NCE1", "NCE2"} < set(bare.training_step(batches(1)[0]))


def test_domains_of_different_channels():
    config = replace(TINY, in_channels=1, lambda_idt=0.0, nce_layers=(0, 4, 12))
    losses = make(config).training_step(batches(1, (1, 3))[0])
    assert {"NCE1", "NCE2", "G_A"} < set(losses)
    with pytest.raises(UserError, match=r"lambda_idt=1\.0 .* Use lambda_idt=0"):
        replace(config, lambda_idt=1.0)
    with pytest.raises(UserError, match="projector=none .*drop layer 0"):
        replace(config, projector="none")


@pytest.mark.parametrize("config", [TINY, SIM], ids=["dclgan", "simdcl"])
def test_bf16_trains_every_network(config):
    # In maps of 4 x 5 the direction of a bf16 gradient is mostly noise: with draw_ids(4) plain PyTorch itself is below.
    batch, ids = batches(1, dtype=torch.float32)[0], draw_ids(1)
    truth = make(config, torch.float32)
    model = make(replace(config, precision="bf16"), torch.float32)
    losses, expected = (m.training_step(batch, patch_ids=ids) for m in (model, truth))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=0.1, atol=0, msg=name)
    # A weight whose low-precision copy was cached without gradient would have a wrong or no gradient here.
    for one, other in zip(model.parameters(), truth.parameters(), strict=True):
        if one.dim() > 1:
            assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.5


def test_a_queue_of_earlier_images():
    model = make(replace(TINY, negatives="image+queue", queue_size=48))
    before = {k: v.clone() for k, v in model.state_dict().items() if "queue" in k}
    model.training_step(batches(1)[0])
    after = model.state_dict()
    assert before and any(not torch.equal(v, after[k]) for k, v in before.items())


def test_defaults_are_the_published_dclgan():
    config = DCLGANConfig()
    assert (config.gan_mode, config.generator_hinge, config.negatives) == (
        "hinge",
        "margin",
        "batch",
    )
    assert (config.lambda_nce, config.lambda_idt, config.lambda_gan, config.lambda_sim) == (
        2,
        1,
        1,
        0,
    )
    assert config.nce_layers == (4, 8, 12, 16)
    assert (config.lr, config.lr_f, config.pool_size) == (2e-4, 1e-3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_idt": -1.0}, "lambda_idt=-1.0 is too small. Use lambda_idt >= 0."),
        ({"lr_f": 0.0}, "lr_f=0.0 must be positive. Use lr_f > 0."),
        ({"generator_hinge": "big"}, "generator_hinge=big is unknown. Use one of: margin, linear."),
        ({"lambda_sim": 1.0, "lambda_nce": 0.0}, "but lambda_nce=0.0 and projector=mlp."),
        ({"lambda_sim": 1.0, "num_patches": 0}, "as images of 0x256. Use num_patches >= 3"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError) as error:
        DCLGANConfig(**changes)
    assert message in str(error.value)


def test_more_patches_than_positions():
    with pytest.raises(UserError, match="num_patches=21 exceeds the 4x5 = 20 positions"):
        make(replace(TINY, num_patches=21))
