"""Judging translations on any folders: of a run, of another program, while training; and what a training costs."""

import json
import shutil

import numpy as np
import psutil
import pytest
import torch
from pictures import cut_short, scripted
from PIL import Image
from torch import Tensor, nn

from fastnce.cli import main
from fastnce.data import list_images, save_image
from fastnce.demo import Evaluator, write_digits_photos
from fastnce.errors import UserError
from fastnce.metrics.distribution import frechet_distance, precision_recall_density_coverage
from fastnce.systems.judging import Segmentation, evaluate_images
from fastnce.training import build_config, load_generator, train, translate
from fastnce.training.cost import cost_lines, read_cost, seconds_per_step, write_cost
from fastnce.training.evaluation import evaluate_run
from fastnce.training.log import read_metrics


class AllRoad(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros_like(images[:, 0]).long()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images of 20x24: A is dark, B light; eight of each in testA, ten in testB and trainB, nine in trainA."""
    root = tmp_path_factory.mktemp("folders")
    random = np.random.default_rng(0)
    for name, count in {"trainA": 9, "trainB": 10, "testA": 8, "testB": 10}.items():
        (root / name).mkdir()
        for number in range(count):
            level = random.normal(60 if name.endswith("A") else 180, 20, 3)
            pixels = (level + random.normal(0, 20, (20, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def levels(folder, size=None) -> Tensor:
    """The images of a folder, (N, 3, H, W), scaled to (width, height)."""
    images = [Image.open(path) for path in list_images(folder)]
    scaled = [x.resize(size, Image.Resampling.BICUBIC) if size else x for x in images]
    return torch.tensor(np.stack(scaled)).permute(0, 3, 1, 2)


def features(images: Tensor) -> Tensor:
    """What the extractor makes of levels."""
    mean = images.double().mean((2, 3)) / 255
    return torch.cat([mean, mean * mean.roll(1, 1)], 1)


def rows_of(result):
    return {row["name"]: row for row in result["rows"]}


def test_a_folder_of_another_programs_images(folders, extractor, tmp_path):
    """The numbers are those of the features of the files, all of them."""
    for number in range(7):
        save_image(torch.full((3, 12, 12), number / 10 - 0.2), tmp_path / "made" / f"x{number}.png")
    result, table = evaluate_images(tmp_path / "made", folders, extractor=extractor)
    rows = rows_of(result)
    made, plain, real, others = (
        features(levels(folder))
        for folder in (tmp_path / "made", folders / "testA", folders / "testB", folders / "trainB")
    )
    for name, own in (
        ("translated", made),
        ("untranslated A", plain),
        ("B against other images of B", others[[0, 1, 2, 3, 5, 6, 7, 9]]),
    ):
        row = rows[name]
        assert row["count"] == len(own)
        assert row["fid"] == pytest.approx(frechet_distance(own, real), rel=1e-4)
        expected = precision_recall_density_coverage(real, own, 5)
        assert (row["precision"], row["recall"]) == (expected.precision, expected.recall)
        assert (row["density"], row["coverage"]) == (expected.density, expected.coverage)
        assert row["fid_share"] == pytest.approx(row["fid"] / rows["untranslated A"]["fid"])
    assert result["reference"] == "testB" and result["reference_count"] == 10
    assert result["extractor"].startswith("colours.pt-")
    assert "7 to 8 images of several sizes in each row, against 10 of 24x20" in table
    assert json.loads((tmp_path / "made" / "metrics.json").read_text()) == result
    assert (tmp_path / "made" / "metrics.md").read_text() == table


def test_the_other_direction_and_a_folder_for_the_report(folders, extractor, tmp_path):
    settings = {"extractor": extractor, "direction": "BtoA", "out": tmp_path / "report"}
    result, _ = evaluate_images(folders / "testA", folders, **settings)
    assert rows_of(result)["translated"]["fid"] == pytest.approx(0, abs=1e-6)
    assert set(rows_of(result)) == {"translated", "untranslated B", "A against other images of A"}
    assert (tmp_path / "report" / "metrics.md").is_file() and not list(folders.glob("*/metrics*"))


def test_a_run_with_its_best_checkpoint(tiny, folders, extractor):
    config = tiny(data=folders, extractor=extractor, measure_every=4, steps=8)
    run = train(config)
    lines = read_metrics(run / "measurements.jsonl")
    assert [line["step"] for line in lines] == [4, 8]
    assert set(lines[0]) == {"step", "fid", "kid", "precision", "recall", "density", "coverage"}
    result, table = evaluate_run(run)
    rows = rows_of(result)
    assert rows["translated"]["fid"] == lines[-1]["fid"]
    assert rows["translated, best checkpoint"]["fid"] == min(line["fid"] for line in lines)
    # As made here by hand; A is scaled to the training's crops first.
    generator, _ = load_generator(run)
    images = levels(folders / "testA", (16, 16)) / 127.5 - 1
    translated = ((translate(generator, images) + 1) * 127.5).floor()
    real = levels(folders / "testB", (16, 16))
    by_hand = frechet_distance(features(translated), features(real))
    assert rows["translated"]["fid"] == pytest.approx(by_hand, rel=1e-2)
    assert result["run"]["seconds_per_step"] > 0 and result["run"]["peak_memory_bytes"] > 2**20
    assert "s a step, at most" in table and "MiB resident, on CPU" in table


def test_a_set_that_nothing_can_judge(tiny, folders, capsys):
    run = train(tiny(data=folders, measure_every=2, steps=2))
    assert "Nothing is measured." in capsys.readouterr().err
    assert not (run / "measurements.jsonl").exists()
    with pytest.raises(UserError, match="Give --extractor FILE"):
        evaluate_run(run)
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        train(tiny(data=folders, measure_every=2, steps=3, extractor=folders / "none.pt"))


def test_broken_files_are_left_out_of_an_evaluation(whole, folders, extractor, tmp_path, capsys):
    run = whole("cut", data=folders, steps=1)
    data = shutil.copytree(folders, tmp_path / "data")
    for path in ("testA/3.png", "testB/5.png", "trainB/9.png"):
        cut_short(data / path)
    command = ["evaluate", "--run", str(run), "--data", str(data), "--device", "cpu"]
    command += ["--extractor", str(extractor)]
    assert main(command) == 2
    assert "3.png: cannot be read" in capsys.readouterr().err
    assert main([*command, "--broken-files", "skip"]) == 0
    result = json.loads((run / "metrics-data.json").read_text())
    assert result["reference_count"] == 9
    assert [row["count"] for row in result["rows"]] == [7, 7, 7]
    made, settings = data / "testA", {"extractor": extractor, "broken_files": "skip"}
    result, _ = evaluate_images(made, data, out=tmp_path, **settings)
    assert result["rows"][0]["count"] == 7 and result["reference_count"] == 9
    for path in list_images(made)[:-1]:
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="testA: holds one image, and FID needs at least two"):
        evaluate_images(made, data, **settings)


def test_folders_with_too_few_images(folders, extractor, tmp_path):
    save_image(torch.zeros(3, 8, 8), tmp_path / "one" / "0.png")
    with pytest.raises(UserError, match="one: holds one image, and FID needs at least two"):
        evaluate_images(tmp_path / "one", folders, extractor=extractor)
    with pytest.raises(UserError, match="nothing to be compared with"):
        evaluate_images(tmp_path / "one")


def test_the_other_real_images_may_be_missing(folders, extractor, tmp_path):
    for name in ("testA", "testB"):
        (tmp_path / name).symlink_to(folders / name)
    settings = {"extractor": extractor, "out": tmp_path / "report"}
    result, table = evaluate_images(folders / "testA", tmp_path, **settings)
    assert rows_of(result)["B against other images of B"] == {
        "name": "B against other images of B",
        "note": "not measured: there is no trainB",
    }
    assert "not measured: there is no trainB." in table


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A digits-photos set, judged by an untrained network."""
    torch.manual_seed(0)
    judge = Evaluator(7).eval()
    monkeypatch.setattr("fastnce.demo.report.load_evaluator", lambda *_, **__: judge)
    return write_digits_photos(tmp_path / "digits", photo=["coffee", "china"])


def test_digits_are_found_by_their_names(digits, extractor, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for path in list_images(digits / "testA"):
        Image.open(path).save(made / f"{path.stem}.bmp")
    result, _ = evaluate_images(made, digits)
    rows = rows_of(result)
    assert rows["translated"] | {"name": ""} == rows["untranslated A"] | {"name": ""}
    assert rows["translated"]["content_accuracy"] is not None
    scripted, _ = evaluate_images(made, digits, extractor=extractor)
    assert scripted["extractor"].startswith("colours.pt")
    accuracy = rows["translated"]["content_accuracy"]  # still read by the set's own network
    assert rows_of(scripted)["translated"]["content_accuracy"] == accuracy
    save_image(torch.zeros(3, 8, 8), made / "0003.bmp")
    with pytest.raises(UserError, match=r"0003\.bmp: is 8x8, but the digits are 32x32"):
        evaluate_images(made, digits)
    (made / "0003.bmp").unlink()
    with pytest.raises(UserError, match="holds no translation of 0003 and of 0 more"):
        evaluate_images(made, digits)


def test_segmentation_of_a_runs_translations(whole, folders, tmp_path):
    """Without an extractor, and without the rows that need one."""
    labels = np.zeros((16, 16), dtype=np.uint8)
    labels[:4] = 10
    (tmp_path / "labels").mkdir()
    for path in list_images(folders / "testA"):
        Image.fromarray(labels).save(tmp_path / "labels" / path.name)
    segmentation = Segmentation(scripted(AllRoad(), tmp_path / "road.pt"), tmp_path / "labels")
    run = whole("cut", data=folders, steps=1)
    result, table = evaluate_run(run, segmentation=segmentation)
    assert result["segmentation"]["pixel_accuracy"] == 0.75
    assert result["segmentation"]["mean_iou"] == pytest.approx(0.75 / 2)
    assert result["segmentation"]["count"] == 8 and "rows" not in result
    assert "| road          | 1.000" in table
    alone, _ = evaluate_images(folders / "testA", segmentation=segmentation, out=tmp_path / "r")
    assert alone["segmentation"] == result["segmentation"]


def test_what_a_training_costs(tmp_path):
    """Seconds are the median between lines, the peak of memory that of all sessions."""
    lines = [{"step": s, "seconds": t} for s, t in ((10, 9.0), (20, 10.0), (30, 11.0), (40, 99.0))]
    assert seconds_per_step(lines) == 0.1 and seconds_per_step(lines[:1]) is None
    resident = psutil.Process().memory_info().rss
    write_cost(tmp_path, torch.device("cpu"))
    now = read_cost(tmp_path)["peak_memory_bytes"]
    assert resident <= now < psutil.virtual_memory().total
    for before, expected in ((2**60, 2**60), (1, now)):
        (tmp_path / "cost.json").write_text(json.dumps({"peak_memory_bytes": before}))
        write_cost(tmp_path, torch.device("cpu"))
        assert read_cost(tmp_path)["peak_memory_bytes"] >= expected
    assert read_cost(tmp_path / "none") == {} and cost_lines({}) == []


def test_the_presets_data_brings_its_judge(tiny, digits):
    values = {"data": digits, "out": digits.parent / "run", "steps": 1, "measure_every": 1}
    run = train(build_config("cut", preset="digits", overrides=values))
    line = read_metrics(run / "measurements.jsonl")[0]
    assert 0 <= line["content_accuracy"] <= 1 and line["fid"] > 0
