"""CUT's options, and what its training step promises beside the equations (see test_cut_parity)."""

from dataclasses import replace

import pytest
import torch
from transcriptions import FAST, TINY, batches, draw_ids, make

from fastnce.errors import UserError
from fastnce.models import CUT


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


def test_a_and_b_of_different_sizes():
    batch = batches(1, dtype=torch.float32)[0]
    batch = {"A": batch["A"], "B": batch["B"][..., :16]}
    with pytest.raises(UserError, match="A and B differ in shape"):
        CUT(TINY).training_step(batch)
    # FastCUT translates A alone.
    model = CUT(replace(TINY, nce_idt=False))
    real = model.discriminator(batch["B"])
    assert model.training_step(batch)["D_real"] == (real - 1).square().mean()


@pytest.mark.parametrize(("changes", "gain"), [({}, 0.02), ({"init_gain": 0.5}, 0.5)])
def test_initialisation_gain(changes, gain):
    torch.manual_seed(0)
    conv = CUT(replace(TINY, base_channels=32, **changes)).generator.model[8]
    fan = (64 + 128) * 9
    assert conv.weight.std().item() == pytest.approx(gain * (2 / fan) ** 0.5, rel=0.02)
    assert not conv.bias.any()


def test_any_channels_without_contrastive_loss():
    config = replace(TINY, in_channels=4, out_channels=2, lambda_nce=0.0)
    batch = batches(1, config, torch.float32)[0]
    assert CUT(config).training_step(batch)["G"].isfinite()
