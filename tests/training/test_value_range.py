"""Runs on images whose numbers are no levels of grey, and on images of other than one or three channels."""

import numpy as np
import pytest
from PIL import Image

from fastnce.data.images import load_image
from fastnce.errors import UserError
from fastnce.systems.judging import evaluate_images
from fastnce.systems.translating import translate
from fastnce.training import load_generator, train, translate_folder
from fastnce.training.evaluation import evaluate_run

RANGE = (-1024.0, 3071.0)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """trainA, trainB, testA and testB: three float32 TIFF of 20x20 each, of -1024 to 3071."""
    root = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    for folder in ("trainA", "trainB", "testA", "testB"):
        (root / folder).mkdir()
        for number in range(3):
            scan = rng.uniform(*RANGE, (20, 20)).astype(np.float32)
            Image.fromarray(scan).save(root / folder / f"{number}.tif")
    return root


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
    rng = np.random.default_rng(0)
    for folder in ("trainA", "trainB", "testA", "testB"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            pixels = rng.integers(0, 256, (20, 20, channels), dtype=np.uint8)
            path = tmp_path / folder / f"{number}{suffix}"
            Image.fromarray(pixels).save(path) if channels == 4 else np.save(path, pixels)
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
