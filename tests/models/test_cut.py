"""CUT's options, and what its training step promises beside the equations (see test_cut_parity)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cut_transcription import FAST, TINY, batches, draw_ids, make

import fastnce
from fastnce.errors import UserError
from fastnce.models import CUT, CUTConfig
from fastnce.networks import PatchDiscriminator
from fastnce.systems.translation import build_generator
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
    channels = (config.in_channels, config.out_channels)
    batch = batches(1, dtype=torch.float32, channels=channels)[0]
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
        ("projector", "linear"),
        ("generator", "unet"),
        ("discriminator", "pixel"),
        ("queue_size", 0),
        ("in_channels", 0),
        ("lambda_r1", -1.0),
        ("lambda_gp", 0.0),
        ("lambda_identity", float("nan")),
        ("lr", 0.0),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(UserError, match=f"^{field}={value} .*Use "):
        CUTConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"in_channels": 1, "lambda_identity": 1.0},
            "lambda_identity=1.0 compares .* in_channels=1 and out_channels=3 .* Use lambda_identity=0",
        ),
        (
            {"in_channels": 4},
            "in_channels=4 and out_channels=3: the contrastive loss .* Use the same number of channels, or lambda_nce=0",
        ),
        (
            {"generator": "stylegan2", "num_blocks": 5},
            "num_blocks=5 are shared .* Use an even number",
        ),
    ],
)
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        CUTConfig(**changes)


def test_any_channels_without_contrastive_loss():
    config = replace(TINY, in_channels=4, out_channels=2, lambda_nce=0.0)
    batch = batches(1, dtype=torch.float32, channels=(4, 2))[0]
    assert CUT(config).training_step(batch)["G"].isfinite()


def test_without_projector_there_is_nothing_to_optimise_for_it():
    model = CUT(replace(TINY, projector="none"))
    assert model.projector is None
    assert set(model.optimizers) == {"G", "D"}
    assert {key.split(".")[0] for key in model.state_dict()} == {"generator", "discriminator"}


def test_config_builds_the_generator_that_cut_trains():
    assert set(build_generator(TINY).state_dict()) == set(CUT(TINY).generator.state_dict())


def test_discriminator_on_one_batch_equals_two_calls():
    torch.manual_seed(0)
    d = PatchDiscriminator(base_channels=4).double()
    real, fake = torch.randn(2, 2, 3, 64, 64, dtype=torch.float64)
    together = d(torch.cat([real, fake]))
    torch.testing.assert_close(together, torch.cat([d(real), d(fake)]), rtol=1e-12, atol=1e-12)


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
