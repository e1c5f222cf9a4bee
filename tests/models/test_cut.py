"""CUT's options, and what its training step promises beside the equations (see test_cut_parity)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transcriptions import FAST, TINY, batches, draw_ids, make

import fastnce
from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.training import build_config


@pytest.mark.parametrize("config", [TINY, FAST], ids=["cut", "fastcut"])
def test_reused_features_change_nothing(config):
    reused, encoded = make(config), make(replace(config, reuse_features=False))
    for step, batch in enumerate(batches(3)):
        ids, flip = draw_ids(reused, step), step == 1
        one = reused.training_step(batch, flip=flip, patch_ids=ids)
        other = encoded.training_step(batch, flip=flip, patch_ids=ids)
        assert one == other
    for a, b in zip(reused.parameters(), encoded.parameters(), strict=True):
        assert torch.equal(a, b)


def test_reuse_makes_no_second_encoder_pass():
    """The encoder runs once per unmirrored step (for the queries) and twice in a mirrored one."""
    calls = []
    torch.manual_seed(0)
    model = make(replace(FAST, base_channels=1, num_blocks=1, nce_layers=(12,), num_patches=1))
    encode = model.generator.encode
    model.generator.encode = lambda *args: calls.append(1) or encode(*args)
    batch = batches(1)[0]
    model.training_step(batch, flip=False)
    assert len(calls) == 1
    model.training_step(batch, flip=True)
    assert len(calls) == 3
    for _ in range(60):  # mirrored in half of the steps
        model.training_step(batch)
    assert 60 + 15 < len(calls) - 3 < 60 + 45


def test_without_contrastive_loss():
    assert set(make(replace(TINY, projector="none")).optimizers) == {"G", "D"}
    model = make(replace(TINY, lambda_nce=0.0))
    assert model.projector is None
    assert set(model.optimizers) == {"G", "D"}
    model.generator.encode = None  # would raise when called
    before = [parameter.clone() for parameter in model.generator.parameters()]
    losses = model.training_step(batches(1)[0])
    assert set(losses) == {"G_GAN", "D_real", "D_fake", "G"}
    assert losses["G"] == losses["G_GAN"]
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.generator.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lambda_r1": 1.0, "lambda_identity": 1.0, "gan_mode": "nonsaturating"},
        {"gan_mode": "wgangp"},
        {"in_channels": 1},
        {"out_channels": 1, "negatives": "image+queue", "queue_size": 40},
        {"projector": "none", "negatives": "queue", "queue_size": 40},
    ],
    ids=["cut", "r1-identity", "wgangp", "from-grey", "to-grey-queue", "features-queue"],
)
def test_bf16_trains_every_network(changes):
    config = replace(TINY, **changes)
    model = make(replace(config, precision="bf16"), dtype=torch.float32)
    truth = make(config, dtype=torch.float32)
    batch = batches(1, config, torch.float32)[0]
    ids, results = draw_ids(truth, 0), []
    for each in (model, truth):
        torch.manual_seed(0)
        results.append(each.training_step(batch, patch_ids=ids))
    # A critic's mean is small beside the logits that it is the mean of.
    logits = make(config, dtype=torch.float32).discriminator(batch["B"]).abs().mean().item()
    atol = 0.05 * logits if config.gan_mode == "wgangp" else 0
    if "D_gp" in results[1]:  # about slopes: the distance from 1 magnifies their rounding
        for losses in results:
            losses["D_gp"] = 1 + (2 * losses["D_gp"] / config.lambda_gp).sqrt()
    for name, value in results[1].items():
        torch.testing.assert_close(results[0][name], value, rtol=0.05, atol=atol, msg=name)
    # A weight whose low-precision copy was cached without gradient would have a wrong or no gradient here. The bound is
    # loose because bf16 rounds the gradient of this random generator by a third of its length.
    for one, other in zip(model.parameters(), truth.parameters(), strict=True):
        if one.dim() > 1:
            assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.5
            assert one.grad.norm().item() == pytest.approx(other.grad.norm().item(), rel=0.3)


def test_a_and_b_of_different_sizes():
    batch = batches(1, dtype=torch.float32)[0]
    batch = {"A": batch["A"], "B": batch["B"][..., :16]}
    with pytest.raises(UserError, match="A and B differ in shape"):
        CUT(TINY).training_step(batch)
    # FastCUT translates A alone.
    model = CUT(replace(TINY, nce_idt=False))
    real = model.discriminator(batch["B"])
    assert model.training_step(batch)["D_real"] == (real - 1).square().mean()


def test_initialisation_gain():
    torch.manual_seed(0)
    weight = CUT(replace(TINY, base_channels=32, init_gain=0.5)).generator.model[8].weight
    fan = (64 + 128) * 9
    assert weight.std().item() == pytest.approx(0.5 * (2 / fan) ** 0.5, rel=0.02)


def test_any_channels_without_contrastive_loss():
    config = replace(TINY, in_channels=4, out_channels=2, lambda_nce=0.0)
    batch = batches(1, config, torch.float32)[0]
    assert CUT(config).training_step(batch)["G"].isfinite()


def test_the_demos_first_step_is_the_same_on_native_and_torch():
    """In fp32 and at the demo's size, to 1e-5 relative."""
    if fastnce.backends.available()["native"] != "ok":
        pytest.skip(fastnce.backends.available()["native"])
    config = build_config("cut", preset="digits", overrides={"data": "data", "out": "run"})
    generator = torch.Generator().manual_seed(0)
    batch = {domain: torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1 for domain in "AB"}
    losses = {}
    for backend in ("native", "torch"):
        torch.manual_seed(0)
        model = CUT(replace(config, backend=backend), (32, 32))
        losses[backend] = model.training_step(batch)
    assert set(losses["native"]) == {"G_GAN", "D_real", "D_fake", "G", "NCE", "NCE_Y"}
    for name, value in losses["native"].items():
        torch.testing.assert_close(value, losses["torch"][name], rtol=1e-5, atol=0, msg=name)
