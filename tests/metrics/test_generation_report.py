"""The table of conditional generators: what it tells apart, what it says, what it refuses."""

import json
import math

import pytest
import torch
from torch import nn

from fastnce.data import to_uint8
from fastnce.metrics import (
    evaluate_generation,
    evaluate_generators,
    format_generation_table,
)
from fastnce.metrics.generation_report import HELD_OUT, UNTRAINED
from fastnce.metrics.tables import write_result


class Judge(nn.Module):
    """Reads the class off the brightness of the image: -1, 0 and 1; its features are the pixels."""

    reads_labels = True
    name = "brightness"

    def forward(self, images):
        return images.flatten(1)

    def class_probabilities(self, images):
        brightness = images.mean((1, 2, 3))[:, None]
        return (-20 * (brightness - torch.tensor([-0.8, 0.0, 0.8])).abs()).softmax(1)


def draw(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Images of three classes, 2 x 2 pixels."""
    noise = torch.randn(len(labels), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return ((labels - 1) * 0.8)[:, None, None, None] + 0.05 * noise


LABELS = torch.arange(120) % 3
REAL = draw(LABELS, seed=7)


@pytest.fixture(scope="module")
def result():
    samples = {
        "faithful": draw,
        "permuted": lambda labels: draw((labels + 1) % 3),
        "mixed": lambda labels: draw(torch.arange(len(labels)) % 3),
        "collapsed": lambda labels: draw(torch.arange(3))[labels],
        "broken": lambda labels: draw(labels) * math.nan,
    }
    held_out = (draw(LABELS, seed=8), LABELS)  # its order is class by class
    return evaluate_generators(samples, REAL, LABELS, Judge(), held_out=held_out)


def rows_of(result) -> dict[str, dict]:
    return {row["name"]: row for row in result["rows"]}


def test_each_generator_has_its_character(result):
    rows = rows_of(result)
    faithful, permuted, mixed, collapsed = (
        rows[name] for name in ("faithful", "permuted", "mixed", "collapsed")
    )
    for row in (rows[HELD_OUT], faithful):
        assert row["class_accuracy"] == 1 and row["inception_score"] == pytest.approx(3, abs=0.01)
        assert row["coverage"] > 0.9 and row["precision"] > 0.8 and row["intra_class_fid"] < 0.01
    for row in (permuted, mixed):  # only the labels are wrong: what ignores them sees nothing
        assert row["fid"] < 0.01 and row["coverage"] > 0.9
        assert row["intra_class_fid"] > 1
    assert (permuted["class_accuracy"], permuted["relabelled_accuracy"]) == (0, 1)
    assert mixed["relabelled_accuracy"] < 0.5
    assert collapsed["class_accuracy"] == 1
    assert collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.5


def test_the_best_to_hope_for_comes_first_and_the_classes_have_their_own_fid(result):
    assert [row["name"] for row in result["rows"]][:2] == [HELD_OUT, "faithful"]
    assert result["count"] == 120 and result["extractor"] == "brightness"
    for row in result["rows"][:-1]:
        assert list(row["intra_class_fid_of"]) == ["0", "1", "2"]
        mean = sum(row["intra_class_fid_of"].values()) / 3
        assert row["intra_class_fid"] == pytest.approx(mean)


def test_images_that_are_not_finite_are_told(result):
    broken = rows_of(result)["broken"]
    assert broken["class_accuracy"] == 0 and broken["intra_class_fid_of"]["1"] is None
    for key in ("fid", "intra_class_fid", "inception_score", "precision", "coverage"):
        assert broken[key] is None
    assert "broken: its images hold values that are not finite." in format_generation_table(result)


def test_the_report_is_json_and_a_markdown_table(result, tmp_path):
    paths = write_result(result, format_generation_table(result), tmp_path / "run")
    assert [path.name for path in paths] == ["metrics.json", "metrics.md"]
    assert json.loads(paths[0].read_text(), parse_constant=pytest.fail) == result
    table = [line for line in paths[1].read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result["rows"])
    assert len({len(line) for line in table}) == 1 and len({line.count("|") for line in table}) == 1
    assert "class accuracy" in table[0] and "FID" in table[0]


def test_every_row_has_the_labels_of_the_reference_cut_to_what_both_sets_have():
    asked = []

    def sample(labels):
        asked.append(labels)
        return draw(labels)

    def measure(images, labels):
        return evaluate_generation(
            sample, images, labels, Judge(), held_out=held_out, untrained=draw, batch_size=16
        )

    fewer = torch.tensor([0] * 20 + [1] * 9 + [2] * 30)
    held_out = (draw(fewer), fewer)
    result = measure(REAL, LABELS)
    assert [len(part) for part in asked] == [16, 16, 16, 11]
    assert all(len(part.unique()) == 3 for part in asked)  # not class by class, as files are
    assert torch.cat(asked).bincount().tolist() == [20, 9, 30] and result["count"] == 59
    assert [row["name"] for row in result["rows"]] == [HELD_OUT, "generated", UNTRAINED]
    assert result["rows"][1]["fid"] != result["rows"][0]["fid"]


def test_the_numbers_are_those_of_the_saved_images():
    def sample(labels):
        return REAL.clamp(-1, 1) + 1e-4  # within the quantisation, but for a few

    row = evaluate_generation(sample, REAL * 2, LABELS, Judge())["rows"][0]
    exact = evaluate_generation(lambda labels: REAL, REAL * 2, LABELS, Judge())["rows"][0]
    assert row["fid"] == pytest.approx(exact["fid"], rel=1e-3)
    values = (torch.arange(8.0) / 127.5 - 1).repeat(15)[:, None, None, None].expand(120, 1, 2, 2)
    between = evaluate_generation(lambda labels: values + 0.004, values, LABELS, Judge())
    assert between["rows"][0]["fid"] == pytest.approx(0, abs=1e-9)


def test_images_as_read_from_files_are_the_same_reference():
    from_files = to_uint8(REAL)
    one = evaluate_generation(draw, REAL, LABELS, Judge(), held_out=(REAL, LABELS))
    assert one == evaluate_generation(
        draw, from_files, LABELS, Judge(), held_out=(from_files, LABELS)
    )


def test_an_extractor_alone_gives_what_it_can():
    result = evaluate_generation(draw, REAL, LABELS, nn.Flatten())
    row = result["rows"][0]
    assert row["fid"] < 0.01 and row["precision"] > 0.5
    assert row["inception_score"] is None and row["class_accuracy"] is None
    head = format_generation_table(result).splitlines()[0]
    assert "class accuracy" not in head and "IS" not in head


def test_a_class_with_one_image_has_no_distance_of_its_own():
    """With it the others keep theirs; neighbours are as many as there are."""
    chosen = torch.tensor([0, 3, 6, 1, 4, 2])  # three, two and one of the classes
    with_all, without = (
        evaluate_generation(draw_plain, REAL[c], LABELS[c], Judge()) for c in (chosen, chosen[:5])
    )
    one, other = (result["rows"][0] for result in (with_all, without))
    assert list(one["intra_class_fid_of"]) == ["0", "1"]
    assert one["intra_class_fid_of"] == pytest.approx(other["intra_class_fid_of"])
    assert one["intra_class_fid"] == pytest.approx(other["intra_class_fid"])
    assert (with_all["k"], without["k"]) == (5, 4)
    row = evaluate_generation(draw, REAL[:3], LABELS[:3], Judge())["rows"][0]
    assert row["intra_class_fid"] is None and row["fid"] > 0


def draw_plain(labels: torch.Tensor) -> torch.Tensor:
    """Images of three classes without noise, as their order differs with the number of labels."""
    return ((labels - 1) * 0.8)[:, None, None, None].expand(-1, 1, 2, 2)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"wrong: expected images \(120, 1, 2, 2\).*got \(120, 3"):
        evaluate_generators(
            {"wrong": lambda labels: torch.zeros(len(labels), 3, 2, 2)}, REAL, LABELS, Judge()
        )
    with pytest.raises(ValueError, match="class 2 is missing from the labels of held_out"):
        evaluate_generation(draw, REAL, LABELS, Judge(), held_out=(REAL[:2], LABELS[:2]))
    with pytest.raises(ValueError, match="class 2 is missing from real_labels"):
        evaluate_generation(draw, REAL[:2], LABELS[:2], Judge(), held_out=(REAL, LABELS))
    with pytest.raises(ValueError, match="expected .*at least two images"):
        evaluate_generation(draw, REAL[:1], LABELS[:1], Judge())
    with pytest.raises(ValueError, match=r"real: expected images.*got \(120, 1, 2, 2\) and \(3,\)"):
        evaluate_generation(draw, REAL, LABELS[:3], Judge())
    with pytest.raises(ValueError, match="real_images hold values that are not finite"):
        evaluate_generation(draw, REAL * math.inf, LABELS, Judge())
