"""SimCLR, MoCo v2 and SupCon: a training step against plain PyTorch, MoCo's momentum and queue, and mistakes."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.published_representation import PublishedRepresentation
from fastnce.errors import UserError
from fastnce.models import Representation, RepresentationConfig

TINY = {
    "encoder": "small",
    "encoder_channels": 2,
    "image_channels": 1,
    "head_dim": 5,
    "projection_dim": 3,
    "queue_size": 10,
    "norm_splits": 2,
    "lr": 0.1,
}


def build(**changes):
    torch.manual_seed(0)
    return Representation(RepresentationConfig(**(TINY | changes)))


def batch(seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    view1, view2 = torch.randn(2, count, 1, 8, 8, generator=generator)
    return {"view1": view1, "view2": view2, "label": torch.arange(count) % 3}


def published(model):
    """The same networks in plain PyTorch."""
    queue = model.queue.keys if model.config.method == "moco" else None
    return PublishedRepresentation(*copy.deepcopy((model.encoder, model.head)), model.config, queue)


def assert_same_networks(model, twin):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", ["simclr", "supcon"])
def test_a_step_is_its_transcription(method):
    model = build(method=method, weight_decay=0.01)
    twin = published(model)
    losses = model.training_step(batch())
    torch.testing.assert_close(losses, twin.training_step(batch()))
    for name in ("encoder", "head"):
        assert_same_networks(getattr(model, name), getattr(twin, name))


def test_moco_steps_are_their_transcription():
    """Three steps: the queue of 10 is written over its end, and the key networks follow."""
    model = build(method="moco", key_momentum=0.9, momentum=0.0)
    twin = published(model)
    for step in range(3):
        torch.manual_seed(step)
        losses = model.training_step(batch(step))
        torch.manual_seed(step)
        torch.testing.assert_close(losses, twin.training_step(batch(step)))
        torch.testing.assert_close(model.queue.keys, twin.queue)
        for name in ("encoder", "head", "key_encoder", "key_head"):
            assert_same_networks(getattr(model, name), getattr(twin, name))


def first_and_last_loss(model):
    first, *_, last = (model.training_step(batch())["loss"].item() for _ in range(16))
    return first, last


@pytest.mark.parametrize("loss", ["nt_xent", "info_nce", "n_pair", "triplet", "pair"])
def test_every_loss_learns(loss):
    first, last = first_and_last_loss(build(loss=loss, optimizer="adam", lr=0.01, temperature=0.2))
    assert last < 0.75 * first


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.01), ("lars", 0.3), ("adam", 0.01)])
def test_every_optimizer_learns(optimizer, lr):
    first, last = first_and_last_loss(build(loss="pair", optimizer=optimizer, lr=lr))
    assert last < 0.5 * first


def test_bf16():
    for method in ("simclr", "moco"):
        low, full = (build(method=method, precision=p) for p in ("bf16", "fp32"))
        losses = []
        for model in (low, full):
            torch.manual_seed(1)
            losses.append(model.training_step(batch())["loss"])
        assert losses[0] != losses[1]
        torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "byol"}, "method=byol is unknown. Use one of: simclr, moco, supcon"),
        ({"loss": "triple"}, "loss=triple is unknown"),
        ({"method": "moco", "loss": "pair"}, "loss=pair compares the views of a batch"),
        ({"queue_size": 0}, "queue_size=0 is too small"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"key_momentum": 1.0}, "key_momentum=1.0 is out of range"),
        ({"optimizer": "adamw"}, "optimizer=adamw is unknown"),
        ({"margin": 0.0}, "margin=0.0 must be positive"),
    ],
)
def test_mistakes_in_the_configuration(changes, message):
    with pytest.raises(UserError, match=message):
        RepresentationConfig(**changes)


def test_batches_that_are_too_small():
    with pytest.raises(ValueError, match="got 1 image, which has no negatives with method=simclr"):
        build().training_step(batch(count=1))
    with pytest.raises(ValueError, match="got 3 images, fewer than norm_splits=4"):
        build(method="moco", norm_splits=4).training_step(batch(count=3))


def test_a_state_dict_for_safetensors(tmp_path):
    """The weights are in channels_last, and MoCo's queue lies the other way round: neither is in the state dict."""
    model, other = build(method="moco"), build(method="moco")
    model.training_step(batch())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = batch(seed=1)["view1"]
    model.eval(), other.eval()
    assert torch.equal(model.encoder(x), other.encoder(x))
    assert torch.equal(model.queue.keys, other.queue.keys)
    assert any(not p.is_contiguous() for p in model.parameters())
