"""CUT's training step against a plain transcription of its equations, and its options."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cut_transcription import FAST, TINY, batches, draw_ids, make

import fastnce
from fastnce.errors import UserError
from fastnce.models import CUT, CUTConfig
from fastnce.models.cut import build_generator
from fastnce.models.gan import discriminator_losses, generator_loss
from fastnce.networks import PatchDiscriminator
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
    model = make(FAST)
    encode = model.generator.encode
    model.generator.encode = lambda *args: calls.append(1) or encode(*args)
    batch = batches(1)[0]
    model.training_step(batch, flip=False)
    assert len(calls) == 1
    model.training_step(batch, flip=True)
    assert len(calls) == 3


def test_first_step_is_the_same_on_every_backend():
    batch, ids = batches(1, dtype=torch.float32)[0], draw_ids(make(TINY), 0)
    results = [
        make(replace(TINY, backend=backend), dtype=torch.float32).training_step(
            batch, patch_ids=ids
        )
        for backend in ("torch", None)
    ]
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=0)


def test_without_contrastive_loss():
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


def test_mirroring_is_drawn_in_half_of_the_steps():
    torch.manual_seed(0)
    model = make(replace(FAST, base_channels=1, num_blocks=1, nce_layers=(12,), num_patches=1))
    flips = []
    translate = model._translate
    model._translate = lambda *args: flips.append(args[-1]) or translate(*args)
    batch = batches(1)[0]
    for _ in range(60):
        model.training_step(batch)
    assert 15 < sum(flips) < 45


def test_bf16_trains_every_network():
    model = make(replace(TINY, precision="bf16"), dtype=torch.float32)
    truth = make(TINY, dtype=torch.float32)
    batch, ids = batches(1, dtype=torch.float32)[0], draw_ids(make(TINY), 0)
    losses, expected = (m.training_step(batch, patch_ids=ids) for m in (model, truth))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=0.05, atol=0)
    # A weight whose low-precision copy was cached without gradient would have a wrong or no gradient here. The bound is
    # loose because bf16 rounds the gradient of this random generator by a third of its length.
    for one, other in zip(model.parameters(), truth.parameters(), strict=True):
        if one.dim() > 1:
            assert F.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0.5
            assert one.grad.norm().item() == pytest.approx(other.grad.norm().item(), rel=0.3)


def test_a_and_b_of_different_sizes():
    batch = batches(1, dtype=torch.float32)[0]
    with pytest.raises(UserError, match="A and B differ in shape"):
        CUT(TINY).training_step({"A": batch["A"], "B": batch["B"][..., :16]})


def test_backends_that_are_not_there():
    with pytest.raises(UserError, match="backend=cudnn is unknown. Use one of: "):
        CUT(replace(TINY, backend="cudnn"))


def test_initialisation_gain():
    torch.manual_seed(0)
    weight = CUT(replace(TINY, base_channels=32, init_gain=0.5)).generator.model[8].weight
    fan = (64 + 128) * 9
    assert weight.std().item() == pytest.approx(0.5 * (2 / fan) ** 0.5, rel=0.02)


def test_state_dict_keys():
    prefixes = {key.split(".")[0] for key in CUT(TINY).state_dict()}
    assert prefixes == {"generator", "discriminator", "projector"}


def test_more_patches_than_positions():
    with pytest.raises(UserError) as error:
        CUT(replace(TINY, num_patches=1024), (64, 64))
    assert str(error.value) == (
        "num_patches=1024 exceeds the 16x16 = 256 positions of feature map 3 (layer 12). "
        "Use num_patches <= 256, or drop that layer from nce_layers."
    )
    CUT(replace(TINY, num_patches=256), (64, 64))


@pytest.mark.parametrize("nce_layers", [(0, 99), (8, 4), ()])
def test_layers_that_do_not_exist(nce_layers):
    with pytest.raises(UserError, match="its 3 residual blocks are the layers 12 to 14"):
        CUT(replace(TINY, nce_layers=nce_layers))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_patches", -1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("lambda_nce", -1.0),
        ("beta1", 1.0),
        ("gan_mode", "wgan"),
        ("negatives", "all"),
        ("lr", 0.0),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(UserError, match=f"^{field}={value} .*Use "):
        CUTConfig(**{field: value})


def test_config_builds_the_generator_that_cut_trains():
    assert set(build_generator(TINY).state_dict()) == set(CUT(TINY).generator.state_dict())


def test_discriminator_on_one_batch_equals_two_calls():
    torch.manual_seed(0)
    d = PatchDiscriminator(base_channels=4).double()
    real, fake = torch.randn(2, 2, 3, 64, 64, dtype=torch.float64)
    together = d(torch.cat([real, fake]))
    torch.testing.assert_close(together, torch.cat([d(real), d(fake)]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["vanilla", "nonsaturating"])
def test_cross_entropy_objectives(mode):
    real, fake = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    real_loss, fake_loss = discriminator_losses(real, fake, mode)
    torch.testing.assert_close(real_loss, F.binary_cross_entropy_with_logits(real, ones))
    torch.testing.assert_close(fake_loss, F.binary_cross_entropy_with_logits(fake, zeros))
    expected = F.binary_cross_entropy_with_logits(fake, ones)
    torch.testing.assert_close(generator_loss(fake, mode), expected)


def test_hinge_and_least_squares_objectives():
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-2.0, 0.5])
    assert [x.item() for x in discriminator_losses(real, fake, "hinge")] == [0.25, 0.75]
    assert generator_loss(fake, "hinge").item() == 0.75
    assert [x.item() for x in discriminator_losses(real, fake, "lsgan")] == [2.125, 2.125]
    assert generator_loss(fake, "lsgan").item() == 4.625


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
