"""Runs of pix2pix on pairs: that it learns from the pairs; translating and judging pairs."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from pictures import cut_short
from PIL import Image
from skimage.metrics import structural_similarity

from fastnce.data import AlignedImages, list_images
from fastnce.errors import UserError
from fastnce.metrics.distribution import frechet_distance
from fastnce.systems.judging import evaluate_images
from fastnce.training import evaluate_run, load_generator, train, translate, translate_folder
from fastnce.training.log import read_metrics

TINY = {"base_channels": 8, "dropout": False, "disc_channels": 4, "batch_size": 4}


@pytest.fixture
def trained(whole):
    return whole("pix2pix", **TINY)


def test_it_learns_the_pairs(tiny, pairs):
    rarely = dict.fromkeys(("log_every", "sample_every", "checkpoint_every"), 150)
    config = tiny("pix2pix", steps=150, lr=2e-3, ema_decay=0.9, **TINY, **rarely)
    generator, _ = load_generator(train(config))
    test = list(AlignedImages(pairs, "test", load_size=16, crop_size=16, flip=False))
    images, truth = (torch.stack([pair[domain] for pair in test]) for domain in "AB")
    translated = translate(generator, images)
    assert (translated - truth).abs().mean() < 0.25 * (images - truth).abs().mean()
    # One by one or together: nothing depends on the rest of the batch.
    one_by_one = translate(generator, images, batch_size=1)
    torch.testing.assert_close(translated, one_by_one, rtol=0, atol=1e-5)
    # 13x16 is no size that the U-Net can halve.
    assert translate(generator, images[:, :, :13]).shape == (4, 3, 13, 16)


def levels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def halves(folder) -> list[tuple[np.ndarray, np.ndarray]]:
    return [tuple(np.split(levels(path), 2, axis=1)) for path in list_images(folder)]


def by_hand(generator, image: np.ndarray) -> np.ndarray:
    return translate(generator, torch.tensor(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("direction", "which"), [("AtoB", 0), ("BtoA", 1)])
def test_the_inputs_half_of_side_by_side_files_is_translated(
    whole, pairs, tmp_path, direction, which, capsys
):
    run = whole("pix2pix", direction=direction, steps=2, **TINY)
    generator, config = load_generator(run)
    translate_folder(generator, config, pairs / "test", tmp_path / "out")
    half = ("left", "right")[which]
    assert f"the {half} half of each file is translated" in capsys.readouterr().err
    for number, pair in enumerate(halves(pairs / "test")):
        expected = by_hand(generator, pair[which])
        assert np.array_equal(levels(tmp_path / "out" / f"{number}.png"), expected)
    # A copy elsewhere has the shape of the training's files.
    shutil.copytree(pairs / "test", tmp_path / "copy")
    translate_folder(generator, config, tmp_path / "copy", tmp_path / "again")
    assert np.array_equal(levels(tmp_path / "again" / "3.png"), levels(tmp_path / "out" / "3.png"))
    # Asked for, whole files.
    asked = {"preprocess": "none", "part": "whole"}
    translate_folder(generator, config, pairs / "test", tmp_path / "whole", **asked)
    assert levels(tmp_path / "whole" / "0.png").shape == (16, 32, 3)


def test_inputs_alone_and_pairs_whose_training_data_are_gone(trained, pairs, tmp_path, capsys):
    generator, config = load_generator(trained)
    left = halves(pairs / "test")[0][0]
    (tmp_path / "in").mkdir()
    Image.fromarray(left).save(tmp_path / "in" / "a.png")
    moved = dataclasses.replace(config, data=tmp_path / "gone")
    for known in (config, moved):
        translate_folder(generator, known, tmp_path / "in", tmp_path / "out")
        assert np.array_equal(levels(tmp_path / "out" / "a.png"), by_hand(generator, left))
    assert "whole files are translated" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"0\.png: may be a pair .*--part left, or --part whole"):
        translate_folder(generator, moved, pairs / "test", tmp_path / "out")
    assert translate_folder(generator, moved, pairs / "test", tmp_path / "out", part="left") == 4


def numbers(image: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    one, other = image / 255, truth / 255
    # Which leaves out a border as wide as half the window: here that is the mirrored one.
    ssim = structural_similarity(
        *(np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (one, other)),
        channel_axis=2,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return np.abs(one - other).mean(), -10 * math.log10(((one - other) ** 2).mean()), ssim


def test_evaluation_compares_with_the_other_half(trained, pairs, tmp_path):
    result, table = evaluate_run(trained)
    assert json.loads((trained / "metrics.json").read_text()) == result
    assert (trained / "metrics.md").read_text() == table
    generator, _ = load_generator(trained)
    both = halves(pairs / "test")
    expected = {
        "translated": [numbers(by_hand(generator, a), b) for a, b in both],
        "untranslated A": [numbers(a, b) for a, b in both],
    }
    assert [row["name"] for row in result["pairs"]["rows"]] == list(expected)
    for row in result["pairs"]["rows"]:
        assert row["count"] == 4 and row["size"] == "16x16"
        values = (row["l1"], row["psnr"], row["ssim"])
        assert values == pytest.approx(np.mean(expected[row["name"]], axis=0), rel=1e-4)
    assert "| images         | L1" in table and "the right halves of test" in table
    assert "not measured without --extractor" in table and "rows" not in result
    # The same pairs, A and B in folders of their own.
    for split in ("train", "test"):
        for which, domain in enumerate("AB"):
            (tmp_path / f"{split}{domain}").mkdir()
            for path, pair in zip(list_images(pairs / split), halves(pairs / split), strict=True):
                Image.fromarray(pair[which]).save(tmp_path / f"{split}{domain}" / path.name)
    other, _ = evaluate_run(trained, tmp_path)
    assert other["pairs"] == result["pairs"] | {"reference": "testB"}


def test_fid_of_pairs_and_images_of_another_program(trained, pairs, extractor, tmp_path):
    result, table = evaluate_run(trained, extractor=extractor)
    rows = {row["name"]: row for row in result["rows"]}
    colours = [
        torch.tensor(np.stack([pair[which].mean((0, 1)) for pair in halves(pairs / "test")])) / 255
        for which in (0, 1)
    ]
    expected = frechet_distance(*(torch.cat([c, c * c.roll(1, 1)], 1) for c in colours))
    assert rows["untranslated A"]["fid"] == pytest.approx(expected, rel=1e-4)
    assert rows["B against other images of B"]["count"] == 4
    assert "PSNR" in table and "| FID" in table
    # The truth itself, from anywhere, in another format.
    made = tmp_path / "made"
    made.mkdir()
    for path, (_, truth) in zip(list_images(pairs / "test"), halves(pairs / "test"), strict=True):
        Image.fromarray(truth).save(made / f"{path.stem}.bmp")
    result, _ = evaluate_images(made, pairs, out=tmp_path)
    row = result["pairs"]["rows"][0]
    assert (row["l1"], row["psnr"], row["ssim"]) == (0, None, pytest.approx(1))
    Image.new("RGB", (8, 8)).save(made / "2.bmp")
    with pytest.raises(UserError, match=r"2\.bmp: is 8x8, but .*2\.png, 16x16"):
        evaluate_images(made, pairs, out=tmp_path)


def test_measuring_pairs_during_the_training(tiny, pairs, tmp_path, capsys):
    run = train(tiny("pix2pix", measure_every=2, steps=4, **TINY))
    lines = read_metrics(run / "measurements.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]) == {"step", "l1", "psnr", "ssim"}
    result, _ = evaluate_run(run)
    rows = {row["name"]: row for row in result["pairs"]["rows"]}
    assert rows["translated"]["l1"] == pytest.approx(lines[-1]["l1"])
    best = min(line["l1"] for line in lines)
    assert rows["translated, best checkpoint"]["l1"] == pytest.approx(best)
    capsys.readouterr()
    (tmp_path / "train").symlink_to(pairs / "train")
    train(tiny("pix2pix", data=tmp_path, out=tmp_path / "other", measure_every=2, steps=2))
    assert "Nothing is measured." in capsys.readouterr().err


def test_a_broken_pair_is_left_out_of_the_evaluation(trained, pairs, tmp_path):
    data = shutil.copytree(pairs, tmp_path / "data")
    cut_short(data / "test" / "1.png", 100)
    with pytest.raises(UserError, match=r"1\.png: cannot be read .*--broken-files skip"):
        evaluate_run(trained, data)
    result, _ = evaluate_run(trained, data, broken_files="skip")
    assert [row["count"] for row in result["pairs"]["rows"]] == [3, 3]
