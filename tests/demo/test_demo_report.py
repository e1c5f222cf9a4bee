"""The evaluation's table: what it compares, what it says, and what it refuses."""

import json
import math

import pytest
import torch

from fastnce.data import list_images, load_image, save_image
from fastnce.demo import (
    Evaluator,
    digits_to_translate,
    evaluate_digits,
    load_evaluator,
    recipe_for,
    write_digits_photos,
)
from fastnce.demo.sets import read_labels
from fastnce.errors import UserError
from fastnce.metrics import Row, evaluate, format_table, write_report


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits_photos(tmp_path_factory.mktemp("demo") / "digits")


@pytest.fixture(scope="module")
def evaluator(digits, tmp_path_factory) -> Evaluator:
    """Trained for a few seconds: enough to read digits and to tell the photographs from black."""
    recipe = recipe_for(digits, steps=150, base_channels=12, photos=("coffee", "china"))
    return load_evaluator(recipe, cache=tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="module")
def result(digits, evaluator):
    return evaluate_digits(digits_to_translate(digits), digits, evaluator=evaluator)


def rows_of(result) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def test_the_baselines_have_their_character(result):
    rows = rows_of(result)
    plain = rows["untranslated A"]
    halves, ideal = rows["B against other images of B"], rows["ideal: the same digits composited"]
    assert plain["fid_share"] == 1
    for row in (halves, ideal):
        assert row["fid_share"] < 0.1 and row["kid"] < 0.1 * plain["kid"]
    # Untranslated digits are legible: content alone does not show that anything was translated.
    assert plain["content_accuracy"] > 0.8 and ideal["content_accuracy"] > 0.7
    assert {row.get("count", 302) for row in result["rows"]} == {302}
    assert result["reference_count"] == 302 and result["reference"] == "testB"
    assert result["extractor"].startswith("fastnce-digits-photos")


def test_images_as_they_are_give_the_untranslated_row(result):
    rows = rows_of(result)
    same = {key: value for key, value in rows["translated"].items() if key != "name"}
    assert same == {k: v for k, v in rows["untranslated A"].items() if k != "name"}


def test_a_row_not_measured_says_how_to_get_it(result):
    row = rows_of(result)["translated, contrastive loss off"]
    assert set(row) == {"name", "note"} and "--lambda-nce 0" in row["note"]
    assert row["note"] in format_table(result)


def test_other_runs_and_checkpoints_are_measured_beside_it(digits, evaluator, result):
    images = digits_to_translate(digits)
    others = {"without_nce": -images, "best": images.flip(0)}
    rows = rows_of(evaluate_digits(images, digits, **others, evaluator=evaluator))
    row, best = rows["translated, contrastive loss off"], rows["translated, best checkpoint"]
    assert row["fid"] > 0 and row["fid"] != rows["translated"]["fid"]
    assert best["content_accuracy"] < 0.3 < rows["translated"]["content_accuracy"]


def test_what_is_evaluated_is_what_would_be_saved(digits, evaluator, tmp_path):
    images = digits_to_translate(digits)[:40] * 0.9
    labels = torch.zeros(40, dtype=torch.int64)
    for number, image in enumerate(images):
        save_image(image, tmp_path / f"{number:04d}.png")
    saved = torch.stack([load_image(path) for path in list_images(tmp_path)])
    one = evaluate({"x": Row(images, labels)}, saved, evaluator, reader=evaluator)["rows"][0]
    assert one["fid"] == pytest.approx(0, abs=1e-4)


def test_the_first_images_of_every_set_or_all_of_them(evaluator):
    images = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    some = evaluate({"x": Row(images[:10])}, images[10:20], evaluator)
    cut = evaluate({"x": Row(images), "y": Row(images[5:])}, images[10:], evaluator, count=10)
    assert cut["rows"][0] == some["rows"][0] and cut["rows"][0]["count"] == 10
    assert cut["rows"][1]["fid"] != some["rows"][0]["fid"]
    whole = evaluate({"x": Row(images), "y": Row(images[:4])}, images[10:], evaluator)
    assert [row["count"] for row in whole["rows"]] == [30, 4] and whole["reference_count"] == 20
    assert whole["rows"][0]["precision"] is not None and whole["rows"][1]["precision"] is None
    assert "4 to 30 images of 32x32 in each row, against 20, as 8-bit" in format_table(whole)


def test_content_accuracy_counts_the_digits_read(evaluator, digits):
    images = digits_to_translate(digits)[:50]
    read = evaluator.read_digits(images)
    wrong = torch.where(torch.arange(50) < 20, (read + 1) % 10, read)
    row = evaluate({"x": Row(images, wrong)}, images, evaluator, reader=evaluator)["rows"][0]
    assert row["content_accuracy"] == 0.6


def test_the_other_direction(digits, evaluator):
    images = digits_to_translate(digits, "BtoA")
    result = evaluate_digits(images, digits, direction="BtoA", evaluator=evaluator)
    rows = rows_of(result)
    assert result["reference"] == "testA" and len(images) == 302
    assert rows["translated"]["fid_share"] == rows["untranslated B"]["fid_share"] == 1
    for name in ("A against other images of A", "ideal: the same digits plain"):
        assert rows[name]["fid_share"] < 0.1 and rows[name]["coverage"] > 0.8
    # Their digits are the ones of testB.
    assert rows["ideal: the same digits plain"]["content_accuracy"] > 0.8


def test_a_set_on_several_photographs(tmp_path, evaluator):
    root = write_digits_photos(tmp_path / "digits", photo=["coffee", "china"])
    labels = read_labels(root)
    photos = {x["photo"] for name, x in labels["images"].items() if name.startswith("testB")}
    assert photos == {"coffee", "china"} and labels["recipe"]["photo"] == ["coffee", "china"]
    rows = rows_of(evaluate_digits(digits_to_translate(root), root, evaluator=evaluator))
    assert rows["ideal: the same digits composited"]["fid_share"] < 0.1


def test_images_that_are_not_finite_are_told(digits, evaluator, tmp_path):
    images = digits_to_translate(digits) * math.nan
    result = evaluate_digits(images, digits, evaluator=evaluator)
    row = rows_of(result)["translated"]
    assert row["content_accuracy"] == 0 and row["fid"] is None and row["fid_share"] is None
    assert "translated: its images hold values that are not finite" in format_table(result)
    write_report(result, tmp_path)
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_the_report_is_json_and_a_markdown_table(result, tmp_path):
    paths = write_report(result, tmp_path / "run")
    assert [path.name for path in paths] == ["metrics.json", "metrics.md"]
    assert json.loads(paths[0].read_text()) == result
    lines = paths[1].read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(result["rows"])
    assert len({len(line) for line in table}) == 1 and len({line.count("|") for line in table}) == 1
    assert any("302 images of 32x32 in each row, against 302," in line for line in lines)


def test_translated_images_of_another_shape_are_refused(digits, evaluator):
    with pytest.raises(
        ValueError, match=r"translated: expected \(304, 3, 32, 32\).*got \(5, 3, 32"
    ):
        evaluate_digits(torch.zeros(5, 3, 32, 32), digits, evaluator=evaluator)


def test_files_added_to_the_set_are_named(tmp_path):
    root = write_digits_photos(tmp_path / "digits")
    save_image(torch.zeros(3, 32, 32), root / "testA" / "new.png")
    with pytest.raises(UserError, match=r"testA/new\.png is not in labels\.json"):
        digits_to_translate(root)
