"""pix2pix's training step against a plain transcription of its equations, and its options."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.errors import UserError
from fastnce.models import Pix2Pix, Pix2PixConfig

TINY = Pix2PixConfig(
    in_channels=1,
    base_channels=4,
    num_downs=4,
    disc_channels=4,
    disc_layers=2,
    lambda_gan=2.0,
    lambda_l1=30.0,
    lr=1e-3,
)


def make(config: Pix2PixConfig, dtype: torch.dtype = torch.float64) -> Pix2Pix:
    torch.manual_seed(0)
    model = Pix2Pix(config, (16, 32)).to(dtype)
    # The published initialisation makes all biases 0 and features tiny; the comparison should see every term.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 1 else parameter.mul_(20)
    return model


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.rand(2, channels, 16, 32, generator=generator, dtype=dtype) * 2 - 1
            for name, channels in (("A", 1), ("B", 3))
        }
        for _ in range(count)
    ]


class Transcription:
    """pix2pix written down step by step."""

    def __init__(self, model: Pix2Pix) -> None:
        self.config = model.config
        self.g, self.d = copy.deepcopy(model.generator), copy.deepcopy(model.discriminator)
        adam = {"lr": self.config.lr, "betas": (0.5, 0.999), "foreach": False}
        self.opt_g = torch.optim.Adam(self.g.parameters(), **adam)
        self.opt_d = torch.optim.Adam(self.d.parameters(), **adam)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = batch["A"], batch["B"]
        fake = self.g(a)

        def cross_entropy(image: Tensor, label: float) -> Tensor:
            logits = self.d(torch.cat([a, image], 1))
            return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

        losses = {"D_fake": cross_entropy(fake.detach(), 0), "D_real": cross_entropy(b, 1)}
        self.opt_d.zero_grad()
        ((losses["D_fake"] + losses["D_real"]) * 0.5).backward()
        self.opt_d.step()
        self.d_grads = [parameter.grad.clone() for parameter in self.d.parameters()]

        losses["G_GAN"] = cross_entropy(fake, 1) * self.config.lambda_gan
        losses["G_L1"] = (fake - b).abs().mean() * self.config.lambda_l1
        losses["G"] = losses["G_GAN"] + losses["G_L1"]
        self.opt_g.zero_grad()
        losses["G"].backward()
        self.opt_g.step()
        return losses


def test_three_steps_follow_the_equations():
    model = make(TINY)
    truth = Transcription(model)
    for seed, batch in enumerate(batches(3)):
        results = []
        for step in (model.training_step, truth.step):
            torch.manual_seed(seed)  # of the dropout
            results.append(step(batch))
        losses, expected = results
        assert set(losses) == set(expected) == {"G_GAN", "G_L1", "G", "D_real", "D_fake"}
        close = {"rtol": 1e-6, "atol": 1e-9}
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], value.detach(), **close)
        for one, other in zip(model.generator.parameters(), truth.g.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, **close)
        for one, other in zip(model.discriminator.parameters(), truth.d_grads, strict=True):
            torch.testing.assert_close(one.grad, other, **close)
        for one, other in zip(model.discriminator.buffers(), truth.d.buffers(), strict=True):
            torch.testing.assert_close(one, other, **close)
    for network in (model.generator, model.discriminator):
        assert max(p.grad.abs().max() for p in network.parameters()) > 1e-5


def test_the_discriminator_sees_the_input():
    """Its loss depends on which input a pair has."""
    batch, model = batches(1)[0], make(TINY)
    swapped = {"A": batch["A"].flip(0), "B": batch["B"]}
    results = []
    for one in (batch, swapped):
        results.append(copy.deepcopy(model).training_step(one)["D_real"])
    assert (results[0] - results[1]).abs() > 1e-4


def test_bf16_follows_fp32():
    batch, results = batches(1, torch.float32)[0], []
    for precision in ("fp32", "bf16"):
        config = replace(TINY, precision=precision, dropout=False)
        results.append(make(config, torch.float32).training_step(batch))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0.05, atol=0)


def test_defaults_are_the_published_pix2pix():
    config = Pix2PixConfig()
    assert (config.lambda_l1, config.lambda_gan, config.gan_mode) == (100, 1, "vanilla")
    assert (config.num_downs, config.dropout, config.disc_norm) == (8, True, "batch")
    assert (config.lr, config.beta1, config.beta2) == (2e-4, 0.5, 0.999)


def test_images_that_cannot_be_halved():
    with pytest.raises(UserError) as error:
        Pix2Pix(TINY, (24, 32))
    assert str(error.value) == (
        "images of 32x24 cannot be halved num_downs=4 times. "
        "Use a crop_size that is a multiple of 16, or a smaller num_downs."
    )


@pytest.mark.parametrize(
    ("field", "value"), [("lambda_l1", -1.0), ("num_downs", 1), ("disc_norm", "layer")]
)
def test_bad_values_are_named(field, value):
    with pytest.raises(UserError, match=f"^{field}={value} .*Use "):
        Pix2PixConfig(**{field: value})
