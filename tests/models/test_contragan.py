"""ContraGAN's training step: against a plain transcription, in parts, its variants, and mistakes."""

import pytest
import torch
from torch import nn

import fastnce
from benchmarks.baselines import conditional_contrastive as published_2c
from benchmarks.published_gan import PublishedGAN
from fastnce.errors import UserError
from fastnce.models import ContraGAN, ContraGANConfig
from fastnce.systems.contragan import one_power_iteration, statistics_untracked

TINY = {
    "backbone": "biggan",
    "num_classes": 4,
    "image_size": 16,
    "image_channels": 1,
    "latent_dim": 6,
    "gen_channels": 4,
    "disc_channels": 4,
    "shared_dim": 4,
    "gen_attention": 0,
    "disc_attention": 0,
    "embed_dim": 8,
    "d_steps": 2,
}
BATCH = 6


def model(**changes) -> ContraGAN:
    torch.manual_seed(0)
    return ContraGAN(ContraGANConfig(**(TINY | changes)))


def batch(config: ContraGANConfig) -> dict:
    random = torch.Generator().manual_seed(1)
    count = BATCH * config.d_steps
    images = torch.rand(count, 1, 16, 16, generator=random) * 2 - 1
    return {"image": images, "label": torch.randint(4, (count,), generator=random)}


def draws(config: ContraGANConfig) -> list:
    random = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(BATCH, config.latent_dim, generator=random),
            torch.randint(4, (BATCH,), generator=random),
        )
        for _ in range(config.d_steps + 1)
    ]


@pytest.mark.parametrize("backbone", ["biggan", "sngan", "dcgan"])
@pytest.mark.parametrize("conditioning", ["2C", "AC", "PD"])
@pytest.mark.parametrize(
    ("dtype", "rtol", "steps"), [(torch.float32, 1e-4, 1), (torch.float64, 1e-9, 3)]
)
def test_step_against_the_published_one(conditioning, backbone, dtype, rtol, steps):
    """Over several steps only in fp64: Adam turns the rounding errors of gradients that are 0 into whole updates."""
    ours = model(conditioning=conditioning, backbone=backbone, lambda_cond=0.7).to(dtype)
    config = ours.config
    truth = PublishedGAN(ours)
    networks = truth.g, truth.d
    for _ in range(steps):
        data, noise = batch(config), [(z.to(dtype), c) for z, c in draws(config)]
        data["image"] = data["image"].to(dtype)
        losses = ours.training_step(data, draws=noise)
        expected = truth.training_step(data, draws=noise)
        for name, value in losses.items():
            assert value.item() == pytest.approx(expected[name].item(), rel=rtol, abs=rtol), name
        pairs = [
            (mine.grad, theirs.grad)
            for network, other in zip((ours.generator, ours.discriminator), networks, strict=True)
            for mine, theirs in zip(network.parameters(), other.parameters(), strict=True)
        ]
        scale = max(grad.abs().max().item() for _, grad in pairs)
        for mine, grad in pairs:
            torch.testing.assert_close(mine, grad, rtol=rtol, atol=0.01 * rtol * scale)
    if dtype == torch.float32:
        return
    for mine, theirs in zip((ours.generator, ours.discriminator), networks, strict=True):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("conditioning", ["2C", "D2DCE", "AC", "PD"])
def test_parts_give_the_gradients_of_the_whole_batch(conditioning):
    """With 3 parts; no spectral norm, whose iterations differ, and G's batch norms in eval mode."""

    def step(parts):
        ours = model(
            backbone="sngan", conditioning=conditioning, disc_norm="none", micro_batches=parts
        )
        ours.double()
        for module in ours.generator.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        data = batch(ours.config)
        data["image"] = data["image"].double()
        noise = [(z.double(), c) for z, c in draws(ours.config)]
        losses = ours.training_step(data, draws=noise)
        grads = [p.grad for n in (ours.discriminator, ours.generator) for p in n.parameters()]
        return losses, grads

    (losses, grads), (expected_losses, expected) = step(3), step(1)
    torch.testing.assert_close(losses, expected_losses)
    # Three updates of Adam lie before G's gradient, and the losses of 2C are summed in fp64 here, too.
    torch.testing.assert_close(grads, expected, rtol=1e-6, atol=1e-9)


def test_parts_see_one_spectral_norm():
    ours = model()
    normed = [m for m in ours.discriminator.modules() if hasattr(m, "weight_u")]
    before = [m.weight_u.clone() for m in normed]
    image, label = torch.randn(2, 1, 16, 16), torch.tensor([0, 1])
    with one_power_iteration(ours.discriminator):
        after = [m.weight_u.clone() for m in normed]
        first = ours.discriminator(image, label)
        second = ours.discriminator(image, label)
    assert torch.equal(first.adversarial, second.adversarial)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(m.weight_u, u) for m, u in zip(normed, after, strict=True))
    assert all(m.training for m in normed)
    ours.discriminator(image, label)
    assert any(not torch.equal(m.weight_u, u) for m, u in zip(normed, after, strict=True))


def test_contrast_sets():
    random = torch.Generator().manual_seed(0)
    from fastnce.systems.class_losses import contrastive_2c

    e, p = torch.randn(2, 10, 8, generator=random)
    y = torch.randint(4, (10,), generator=random)
    whole = contrastive_2c(e, p, y, temperature=0.5)
    torch.testing.assert_close(whole, published_2c(e, p, y, temperature=0.5))
    groups = contrastive_2c(e, p, y, temperature=0.5, group_size=4)
    parts = [
        published_2c(e[i], p[i], y[i], temperature=0.5)
        for i in (slice(0, 4), slice(4, 8), slice(8, 10))
    ]
    torch.testing.assert_close(groups, (4 * parts[0] + 4 * parts[1] + 2 * parts[2]) / 10)
    # The further samples take part in the sums of the 6 others, and have no loss of their own.
    extra = contrastive_2c(e[:6], p[:6], y[:6], temperature=0.5, extra=(e[6:], p[6:], y[6:]))
    rows = fastnce.conditional_contrastive(e, p, y, temperature=0.5, reduction="none")
    torch.testing.assert_close(extra, rows[:6].mean())


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"lambda_cr": 10.0}, "D_cr"),
        ({"lambda_bcr": 10.0}, "D_bcr"),
        ({"lambda_zcr_d": 20.0}, "D_zcr"),
        ({"lambda_zcr_g": 0.5}, "G_zcr"),
        ({"lambda_r1": 10.0}, "D_r1"),
    ],
)
def test_regularisers_change_their_networks_gradient(option, name):
    plain, regular = model(), model(**option)
    torch.manual_seed(3)
    without = plain.training_step(batch(plain.config), draws=draws(plain.config))
    torch.manual_seed(3)
    losses = regular.training_step(batch(plain.config), draws=draws(plain.config))
    assert set(losses) == set(without) | {name}
    assert (losses[name] > 0) == (name != "G_zcr")
    letter = "generator" if name[0] == "G" else "discriminator"
    pairs = zip(
        getattr(plain, letter).parameters(), getattr(regular, letter).parameters(), strict=True
    )
    assert any(not torch.allclose(a.grad, b.grad, rtol=1e-3) for a, b in pairs)
    assert all(p.grad.isfinite().all() for p in regular.parameters())


@pytest.mark.parametrize("conditioning", ["2C", "D2DCE", "AC", "PD", "none"])
def test_one_sample_and_missing_classes(conditioning):
    """One sample per batch, so that all classes but one are missing, has a defined and finite loss."""
    ours = model(conditioning=conditioning, d_steps=1)
    losses = ours.training_step({"image": torch.randn(1, 1, 16, 16), "label": torch.tensor([2])})
    assert all(value.isfinite() for value in losses.values())
    assert all(p.isfinite().all() for p in ours.parameters())
    if conditioning == "2C":  # nothing to tell it from
        assert losses["D_class"] == 0.0


@pytest.mark.parametrize("scale", ["mean", "published"])
def test_the_whole_batch_is_that_of_all_ranks(monkeypatch, scale):
    """Both updates ask for the loss over ranks, which the tests of `fastnce.distributed` show to be exact."""
    seen = []
    plain = fastnce.distributed.conditional_contrastive

    def recorded(*args, **kwargs):
        seen.append(kwargs["gradient_scale"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(fastnce.distributed, "conditional_contrastive", recorded)
    ours = model(rank_gradients=scale)
    ours.training_step(batch(ours.config))
    assert seen == [scale] * 3  # two updates of D, one of G


def test_real_samples_join_the_generators_contrast():
    """Those that D saw last, which have no loss of their own."""
    losses, theirs = (
        ours.training_step(batch(ours.config), draws=draws(ours.config))
        for ours in (model(contrast_set="real"), model(contrast_set="batch"))
    )
    assert torch.equal(losses["D_class"], theirs["D_class"])
    assert losses["G_class"] != theirs["G_class"]


def test_both_passes_of_a_part_draw_the_same_augmentation():
    ours = model(diff_augment=True, micro_batches=2)
    torch.manual_seed(0)
    z, labels = ours.draw(4, torch.device("cpu"))
    with statistics_untracked(ours.generator), one_power_iteration(ours.discriminator):
        ours.generator.eval()
        one, same, other = (ours._judge_generated(z, labels, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(one.embedding, same.embedding)
    assert not torch.allclose(one.embedding, other.embedding)


def test_bf16_step_is_near_the_fp32_one():
    one, other = model(), model(precision="bf16")
    exact = one.training_step(batch(one.config), draws=draws(one.config))
    rounded = other.training_step(batch(one.config), draws=draws(one.config))
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(value.item(), abs=0.05), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 leaves conditioning=2C"),
        ({"image_size": 48}, "image_size"),
        ({"backend": "cudnn"}, "backend=cudnn is unknown"),
        ({"contrast_set": "all"}, "contrast_set=all is unknown"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        model(**changes)
