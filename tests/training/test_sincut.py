"""SinCUT: the published values, a run on two single images from its start to translated files, resuming, mistakes."""

import signal

import numpy as np
import pytest
from PIL import Image
from same_run import assert_same_run
from test_loop import stop_after  # noqa: F401  (stop_after is a fixture)

from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.networks import StyleGAN2Discriminator, StyleGAN2Generator
from fastnce.systems import SYSTEMS
from fastnce.training import Interrupted, build_config, load_generator, train, translate_folder
from fastnce.training.log import read_metrics

TINY = {
    "base_channels": 2,
    "num_blocks": 2,
    "nce_layers": [0, 2, 3],
    "disc_channels": 2,
    "projection_dim": 8,
    "crop_size": 16,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "steps": 6,
    "log_every": 2,
    "sample_every": 3,
    "checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """trainA: one image of 44x30; trainB: one of 25x50."""
    root = tmp_path_factory.mktemp("single")
    rng = np.random.default_rng(0)
    for domain, shape in (("A", (30, 44, 3)), ("B", (50, 25, 3))):
        (root / f"train{domain}").mkdir()
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"train{domain}" / "photo.png")
    return root


@pytest.fixture
def tiny(data, tmp_path):
    def make(**changes):
        paths = {"data": data, "out": tmp_path / "run"}
        return build_config("sincut", overrides=paths | TINY | changes)

    return make


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of 6 steps that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(build_config("sincut", overrides={"data": data, "out": out} | TINY))


def test_the_published_values(data):
    config = build_config("sincut", overrides={"data": data, "out": "run"})
    assert (config.generator, config.discriminator) == ("stylegan2", "stylegan2")
    assert config.gan_mode == "nonsaturating"
    assert (config.lambda_nce, config.nce_idt, config.nce_layers) == (4.0, True, (0, 2, 4))
    assert (config.num_patches, config.negatives) == (1, "batch")
    assert (config.lambda_r1, config.lambda_identity) == (1.0, 1.0)
    assert (config.lr, config.beta1, config.beta2) == (2e-3, 0.0, 0.99)
    assert (config.batch_size, config.crop_size, config.max_zoom_out) == (16, 64, 3.0)
    assert (config.epochs, config.decay_epochs, config.epoch_samples) == (8, 8, 100_000)
    generator, discriminator = StyleGAN2Generator(), StyleGAN2Discriminator()
    assert config.base_channels == generator.encoder.convs[1][0].weight.shape[0]
    assert config.num_blocks == 6
    assert config.disc_channels == discriminator.convs[0][0].weight.shape[0]


def test_the_schedule_is_1_600_000_samples(tiny):
    config = tiny(steps=None, batch_size=16)
    schedule = SYSTEMS["cut"].schedule(config, len(SYSTEMS["cut"].dataset(config)))
    assert schedule.total_steps == 100_000
    assert [schedule.lr_factor(step) for step in (0, 49_999, 50_000)] == [1.0, 1.0, 1 - 1 / 9]


def test_a_run(whole):
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for name in ("G_GAN", "D_real", "D_fake", "D_r1", "NCE", "NCE_Y", "idt"):
        assert np.isfinite(lines[-1][name]) and lines[-1][name] > 0, name
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        "step_000003.png", "step_000006.png",
    ]  # fmt: skip


def test_previews_and_translations_are_whole_images(whole, data, tmp_path):
    generator, config = load_generator(whole)
    rows = SYSTEMS["cut"].preview(config, SYSTEMS["cut"].dataset(config))(generator)
    # The previews' sides are rounded to multiples of 4; translated files keep their size.
    assert [image.shape for image in rows["input"]] == [(3, 32, 44)]
    assert [image.shape for image in rows["output"]] == [(3, 32, 44)]
    assert translate_folder(generator, config, data / "trainA", tmp_path / "out") == 1
    assert Image.open(tmp_path / "out" / "photo.png").size == (44, 30)


@pytest.mark.parametrize("step", [2, 3])
def test_a_stopped_run_continues_bit_for_bit(tiny, whole, stop_after, monkeypatch, step):  # noqa: F811
    stop_after(step, signal.SIGINT)
    with pytest.raises(Interrupted):
        train(tiny())
    monkeypatch.undo()
    train(tiny())
    assert_same_run(tiny().out, whole)


def test_workers_do_not_change_the_run(tiny, whole):
    train(tiny(workers=2))
    assert_same_run(tiny().out, whole)


def test_direction_and_grey(tiny, data):
    config = tiny(direction="BtoA", out_channels=1, nce_idt=False, lambda_identity=0.0)
    sample = SYSTEMS["cut"].dataset(config)[0]
    assert sample["A"].shape == (3, 16, 16) and sample["B"].shape == (1, 16, 16)
    assert isinstance(SYSTEMS["cut"].model(config, SYSTEMS["cut"].dataset(config)), CUT)
    assert np.asarray(Image.open(data / "trainA" / "photo.png")).shape == (30, 44, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 32}, r"trainA/photo\.png: 44x30 is smaller than the crop of 32x32"),
        ({"crop_size": 24}, "discriminator=stylegan2 judges squares of a power of two .* 24x24"),
        ({"nce_layers": [0, 4]}, r"nce_layers=\(0, 4\).*from 0 to 3"),
        ({"num_blocks": 3}, "num_blocks=3 .*even"),
        ({"max_zoom_out": 0.5}, "max_zoom_out=0.5 is too small"),
        ({"dataset": "movie"}, "dataset=movie is unknown. Use one of: folders, single-image"),
    ],
)
def test_mistakes_leave_no_run_behind(tiny, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(**changes))
    assert not (tmp_path / "run").exists()
