"""Runs on images whose numbers are no levels of grey, of 16 bits, and of other than one or three channels."""

import numpy as np
import pytest
import torch
from pictures import folders
from PIL import Image

from fastnce.data.images import load_image
from fastnce.errors import UserError
from fastnce.systems.judging import evaluate_images
from fastnce.systems.translating import translate
from fastnce.training import load_generator, train, translate_folder
from fastnce.training.evaluation import evaluate_run

RANGE = (-1024.0, 3071.0)
NAMES = ("trainA", "trainB", "testA", "testB")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """trainA, trainB, testA and testB: three float32 TIFF of 20x20 each, of -1024 to 3071."""
    levels = {"low": -1024, "high": 3072, "dtype": np.float32, "channels": 1}
    return folders(tmp_path_factory.mktemp("scans"), dict.fromkeys(NAMES, 3), ".tif", **levels)


def test_a_run_on_scans_reads_and_writes_their_numbers(tiny, scans, extractor, tmp_path, capsys):
    options = {"data": scans, "in_channels": 1, "out_channels": 1, "steps": 2}
    with pytest.raises(UserError, match=r"trainA/0\.tif: .*--value-range"):
        train(tiny(**options))
    config = tiny(value_range=RANGE, **options)
    train(config)
    said = "".join(capsys.readouterr())
    for domain in "AB":
        assert f"train{domain}: 3 images, 20x20, 32-bit floating-point numbers, values -10" in said
    generator, loaded = load_generator(config.out)
    assert loaded.value_range == RANGE
    out = tmp_path / "translated"
    assert translate_folder(generator, loaded, scans / "testA", out, preprocess="none") == 3
    scan = load_image(scans / "testA" / "1.tif", 1, value_range=RANGE)
    expected = (translate(generator, scan)[0].double().clamp(-1, 1) + 1) / 2 * 4095 - 1024
    with Image.open(out / "1.tif") as image:
        assert image.mode == "F"
        np.testing.assert_allclose(np.asarray(image), expected.numpy(), atol=0.5)

    result, _ = evaluate_run(config.out, extractor=extractor)
    rows = {row["name"]: row for row in result["rows"]}
    # A and B are alike.
    assert rows["untranslated A"]["fid"] < 0.01
    same, _ = evaluate_images(scans / "testB", scans, extractor=extractor, value_range=RANGE)
    assert same["rows"][0]["fid"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="--value-range"):
        evaluate_images(scans / "testB", scans, extractor=extractor)


def test_a_run_on_black_images_stops_at_once(tiny, tmp_path):
    for domain in "AB":
        (tmp_path / f"train{domain}").mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / f"train{domain}" / "1.png")
    with pytest.raises(UserError, match="trainA: each of its images is one plain colour"):
        train(tiny(data=tmp_path))


@pytest.mark.parametrize(("channels", "suffix"), [(4, ".png"), (7, ".npy")])
def test_a_run_with_more_channels(tiny, tmp_path, channels, suffix):
    folders(tmp_path, dict.fromkeys(NAMES, 2), suffix, channels=channels)
    channelled = {"in_channels": channels, "out_channels": channels}
    config = tiny(data=tmp_path, steps=1, sample_every=1, **channelled)
    train(config)
    assert (config.out / "samples" / "step_000001.png").is_file()
    generator, loaded = load_generator(config.out)
    out = tmp_path / "translated"
    translate_folder(generator, loaded, tmp_path / "testA", out, preprocess="none")
    expected = translate(generator, load_image(tmp_path / "testA" / f"0{suffix}", channels))
    written = load_image(out / f"0{suffix}", channels)
    assert written.shape == (channels, 20, 20)
    assert (written - expected).abs().max() < 2 / 255 + 1e-4


def test_sixteen_bits_end_to_end(tiny, tmp_path):
    """Read with all bits, trained on, and written with all bits."""
    levels = {"high": 65536, "dtype": np.uint16, "channels": 1}
    data = folders(tmp_path / "data", dict.fromkeys(NAMES, 2), size=(16, 16), **levels)
    gray = {"in_channels": 1, "out_channels": 1, "bits": 16, "load_size": 16}
    run = train(tiny(data=data, steps=2, **gray))
    generator, config = load_generator(run)
    assert config.bits == 16
    assert translate_folder(generator, config, data / "testA", tmp_path / "out") == 2
    image = load_image(data / "testA" / "0.png", channels=1, bits=16)
    expected = translate(generator, image[None])[0, 0].double()
    with Image.open(tmp_path / "out" / "0.png") as result:
        assert result.mode == "I;16"
        values = np.asarray(result).astype(np.float64) / 65535 * 2 - 1
    assert np.abs(values - expected.numpy()).max() <= 1.01 / 65535
    # The low byte makes a difference to the network.
    high = Image.fromarray(np.asarray(Image.open(data / "testA" / "0.png")) & np.uint16(0xFF00))
    high.save(tmp_path / "high.png")
    coarse = load_image(tmp_path / "high.png", channels=1, bits=16)
    assert not torch.equal(translate(generator, coarse[None])[0, 0].double(), expected)
    with pytest.raises(UserError, match="bits=16 is for greyscale, got channels=3"):
        train(tiny(data=data, out=tmp_path / "rgb", bits=16))
