"""CycleGAN's training step against a plain transcription of its equations, and its options."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastnce.errors import UserError
from fastnce.models import CycleGAN, CycleGANConfig
from fastnce.systems.two_way import ImagePool

TINY = CycleGANConfig(
    base_channels=4,
    num_blocks=2,
    disc_channels=4,
    disc_layers=2,
    pool_size=3,
    lambda_a=7.0,
    lambda_b=11.0,
    lr=1e-3,
)
SIZE = (16, 20)
LOSSES = {"G_A", "G_B", "cycle_A", "cycle_B", "idt_A", "idt_B", "G", "D_A", "D_B"}


def make(config: CycleGANConfig, dtype: torch.dtype = torch.float64) -> CycleGAN:
    torch.manual_seed(0)
    model = CycleGAN(config).to(dtype)
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


class Transcription:
    """CycleGAN written down step by step, one pass per term, with nothing shared or batched."""

    def __init__(self, model: CycleGAN) -> None:
        self.config = model.config
        generators = copy.deepcopy(model.generators)
        self.g_a, self.g_b = generators.a_to_b, generators.b_to_a
        self.d_a, self.d_b = copy.deepcopy((model.discriminator_a, model.discriminator_b))
        self.pool_a, self.pool_b = (
            ImagePool(self.config.pool_size),
            ImagePool(self.config.pool_size),
        )
        self.g = [*self.g_a.parameters(), *self.g_b.parameters()]
        self.d = [*self.d_a.parameters(), *self.d_b.parameters()]
        adam = {"lr": self.config.lr, "betas": (0.5, 0.999), "foreach": False}
        self.opt_g, self.opt_d = torch.optim.Adam(self.g, **adam), torch.optim.Adam(self.d, **adam)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        config, real_a, real_b = self.config, batch["A"], batch["B"]
        fake_b, fake_a = self.g_a(real_a), self.g_b(real_b)
        losses = {
            "G_A": (self.d_a(fake_b) - 1).square().mean(),
            "G_B": (self.d_b(fake_a) - 1).square().mean(),
            "cycle_A": (self.g_b(fake_b) - real_a).abs().mean() * config.lambda_a,
            "cycle_B": (self.g_a(fake_a) - real_b).abs().mean() * config.lambda_b,
        }
        if config.lambda_identity:
            idt_a, idt_b = self.g_a(real_b) - real_b, self.g_b(real_a) - real_a
            losses["idt_A"] = idt_a.abs().mean() * config.lambda_b * config.lambda_identity
            losses["idt_B"] = idt_b.abs().mean() * config.lambda_a * config.lambda_identity
        losses["G"] = sum(losses.values())
        self.opt_g.zero_grad()
        losses["G"].backward()
        self.g_grads = [parameter.grad.clone() for parameter in self.g]
        self.opt_g.step()

        self.opt_d.zero_grad()
        for name, d, real, fake in (
            ("D_A", self.d_a, real_b, self.pool_a(fake_b.detach())),
            ("D_B", self.d_b, real_a, self.pool_b(fake_a.detach())),
        ):
            losses[name] = ((d(real) - 1).square().mean() + d(fake).square().mean()) / 2
            losses[name].backward()
        self.opt_d.step()
        return losses


@pytest.mark.parametrize("lambda_identity", [0.0, 0.5])
def test_three_steps_follow_the_equations(lambda_identity):
    model = make(replace(TINY, lambda_identity=lambda_identity))
    truth = Transcription(model)
    for seed, batch in enumerate(batches(3)):
        results = []
        for step in (model.training_step, truth.step):
            torch.manual_seed(seed)  # of the pools
            results.append(step(batch))
        losses, expected = results
        assert set(losses) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value.detach(), rtol=1e-6, atol=1e-9)
        close = {"rtol": 1e-6, "atol": 1e-9}
        for ours, theirs in zip(model.generators.parameters(), truth.g_grads, strict=True):
            torch.testing.assert_close(ours.grad, theirs, **close)
        ours = [*model.discriminator_a.parameters(), *model.discriminator_b.parameters()]
        for one, other in zip(ours, truth.d, strict=True):
            torch.testing.assert_close(one.grad, other.grad, **close)
    # Otherwise the pools would not have been tested.
    assert len(model.pool_a.images) == len(model.pool_b.images) == 3


def test_gradients_are_not_trivially_small():
    """Guards the comparison above: every network's gradient is well above its absolute tolerance."""
    model = make(TINY)
    assert set(model.training_step(batches(1)[0])) == LOSSES
    for network in model.children():
        if not isinstance(network, ImagePool):
            assert max(p.grad.abs().max() for p in network.parameters()) > 1e-5


def test_a_state_dict_and_the_random_state_continue_exactly():
    model, steps = make(TINY), batches(6)
    for batch in steps[:3]:
        model.training_step(batch)
    state = copy.deepcopy(model.state_dict())
    optimizers = {n: copy.deepcopy(o.state_dict()) for n, o in model.optimizers.items()}
    rng = torch.get_rng_state()
    expected = [model.training_step(batch) for batch in steps[3:]]

    other = make(TINY)
    other.load_state_dict(state)
    for name, optimizer in other.optimizers.items():
        optimizer.load_state_dict(optimizers[name])
    torch.set_rng_state(rng)
    assert [other.training_step(batch) for batch in steps[3:]] == expected


def test_domains_of_different_channels():
    config = replace(TINY, lambda_identity=0.0, in_channels=1)
    model = make(config, torch.float32)
    losses = model.training_step(batches(1, (1, 3), torch.float32)[0])
    assert set(losses) == LOSSES - {"idt_A", "idt_B"}
    assert model.generators(torch.zeros(1, 1, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(
        UserError, match=r"in_channels=1 and out_channels=3\. Use lambda_identity=0"
    ):
        replace(TINY, in_channels=1)


def test_bf16_follows_fp32():
    batch = batches(1, dtype=torch.float32)[0]
    expected = make(TINY, torch.float32).training_step(batch)
    losses = make(replace(TINY, precision="bf16"), torch.float32).training_step(batch)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=0.05, atol=0)


def test_defaults_are_the_published_cyclegan():
    config = CycleGANConfig()
    assert (config.lambda_a, config.lambda_b, config.lambda_identity) == (10, 10, 0.5)
    assert (config.pool_size, config.gan_mode) == (50, "lsgan")
    assert (config.lr, config.beta1, config.beta2) == (2e-4, 0.5, 0.999)


@pytest.mark.parametrize(
    ("field", "value"), [("lambda_a", -1.0), ("pool_size", -1), ("num_blocks", 0), ("lr", 0.0)]
)
def test_bad_values_are_named(field, value):
    with pytest.raises(UserError, match=f"^{field}={value} .*Use "):
        CycleGANConfig(**{field: value})


def test_a_and_b_of_different_sizes():
    """Other sizes in each step, too: the pool gives images of earlier sizes."""
    model = make(replace(TINY, pool_size=1))
    truth = Transcription(model)
    for seed, (a, b) in enumerate([(20, 16), (12, 20), (16, 16)]):
        (batch,) = batches(1)
        batch = {"A": batch["A"][:1, ..., :a], "B": batch["B"][:1, ..., :b]}
        results = []
        for step in (model.training_step, truth.step):
            torch.manual_seed(seed)
            results.append(step(batch))
        for name, value in results[1].items():
            torch.testing.assert_close(results[0][name], value.detach(), rtol=1e-6, atol=1e-9)
