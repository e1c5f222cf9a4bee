"""SinCUT: the published values, a run on two single images from its start to translated files, resuming, mistakes."""

from PIL import Image

from fastnce.models import CUT
from fastnce.networks import StyleGAN2Discriminator, StyleGAN2Generator
from fastnce.systems import SYSTEMS
from fastnce.training import build_config, load_generator, translate_folder


def test_the_published_values():
    config = build_config("sincut", overrides={"data": "data", "out": "run"})
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
    config = tiny("sincut", steps=None, batch_size=16)
    schedule = SYSTEMS["cut"].schedule(config, len(SYSTEMS["cut"].dataset(config)))
    assert schedule.total_steps == 100_000
    assert [schedule.lr_factor(step) for step in (0, 49_999, 50_000)] == [1.0, 1.0, 1 - 1 / 9]


def test_previews_and_translations_are_whole_images(whole, single, tmp_path):
    generator, config = load_generator(whole("sincut"))
    rows = SYSTEMS["cut"].preview(config, SYSTEMS["cut"].dataset(config))(generator)
    # The previews' sides are rounded to multiples of 4; translated files keep their size.
    assert [image.shape for image in rows["input"]] == [(3, 32, 44)]
    assert [image.shape for image in rows["output"]] == [(3, 32, 44)]
    assert translate_folder(generator, config, single / "trainA", tmp_path / "out") == 1
    assert Image.open(tmp_path / "out" / "photo.png").size == (44, 30)


def test_direction_and_grey(tiny):
    config = tiny("sincut", direction="BtoA", out_channels=1, nce_idt=False, lambda_identity=0.0)
    sample = SYSTEMS["cut"].dataset(config)[0]
    assert sample["A"].shape == (3, 16, 16) and sample["B"].shape == (1, 16, 16)
    assert isinstance(SYSTEMS["cut"].model(config, SYSTEMS["cut"].dataset(config)), CUT)
