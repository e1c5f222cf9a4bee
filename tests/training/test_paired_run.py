"""Runs of pix2pix on pairs: what they leave, resuming, and that it learns from the pairs."""

import numpy as np
import pytest
import torch
from PIL import Image
from same_run import assert_same_run

from fastnce.data import AlignedImages
from fastnce.errors import UserError
from fastnce.training import build_config, load_generator, train, translate
from fastnce.training.log import read_metrics

TINY = {
    "base_channels": 8,
    "num_downs": 3,
    "dropout": False,
    "disc_channels": 4,
    "disc_layers": 1,
    "batch_size": 4,
    "load_size": 16,
    "crop_size": 16,
    "workers": 0,
    "device": "cpu",
    "steps": 4,
    "log_every": 2,
    "sample_every": 4,
    "sample_count": 2,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Smooth images and their negatives, side by side."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        (root / split).mkdir()
        for index in range(count):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            a = np.asarray(small.resize((16, 16), Image.Resampling.BICUBIC))
            both = np.concatenate([a, 255 - a], axis=1)
            Image.fromarray(both).save(root / split / f"{index}.png")
    return root


def tiny(pairs, out, **changes):
    return build_config("pix2pix", overrides={"data": pairs, "out": out} | TINY | changes)


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    return train(tiny(pairs, tmp_path_factory.mktemp("whole") / "run"))


def test_what_a_run_leaves(whole):
    lines = read_metrics(whole / "metrics.jsonl")
    losses = {"G", "G_GAN", "G_L1", "D_real", "D_fake"}
    assert set(lines[0]) == losses | {"step", "epoch", "lr_factor", "seconds"}
    assert Image.open(whole / "samples" / "step_000004.png").height > 3 * 96


def test_a_stopped_run_continues_bit_for_bit(whole, pairs, tmp_path):
    out = tmp_path / "run"
    train(tiny(pairs, out, steps=2, sample_every=4))
    torch.rand(3)
    train(tiny(pairs, out))
    (out / "samples" / "step_000002.png").unlink()
    assert_same_run(out, whole)


def test_it_learns_the_pairs(pairs, tmp_path):
    rarely = dict.fromkeys(("log_every", "sample_every", "checkpoint_every"), 150)
    config = tiny(pairs, tmp_path / "run", steps=150, lr=2e-3, ema_decay=0.9, **rarely)
    run = train(config)
    generator, config = load_generator(run)
    test = list(AlignedImages(pairs, "test", load_size=16, crop_size=16, flip=False))
    images = torch.stack([pair["A"] for pair in test])
    truth = torch.stack([pair["B"] for pair in test])
    error = (translate(generator, images) - truth).abs().mean()
    assert error < 0.25 * (images - truth).abs().mean()
    # One by one or together: nothing depends on the rest of the batch.
    torch.testing.assert_close(
        translate(generator, images), translate(generator, images, batch_size=1), rtol=0, atol=1e-5
    )
    assert config.system == "pix2pix"
    # 13x16 is no size that the U-Net can halve.
    assert translate(generator, images[:, :, :13]).shape == (4, 3, 13, 16)


def test_mistakes(pairs, tmp_path):
    with pytest.raises(UserError, match="images of 16x16 cannot be halved num_downs=8 times"):
        train(tiny(pairs, tmp_path / "run", num_downs=8))
    with pytest.raises(UserError, match="augment_a=affine is unknown. Use one of: none"):
        tiny(pairs, tmp_path / "run", augment_a="affine")
