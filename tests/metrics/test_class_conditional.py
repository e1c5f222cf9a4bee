"""Conditional generators: the measurements against closed forms, and the table: what it tells apart, says and refuses."""

import math

import pytest
import torch
from torch import nn

from fastnce.data import to_uint8
from fastnce.metrics import (
    class_accuracy,
    evaluate_generation,
    evaluate_generators,
    format_generation_table,
    inception_score,
    intra_class_fid,
    relabelled_accuracy,
    spread_ratio,
)

HELD_OUT = "other real images"
NAN_ROW = torch.tensor([[math.nan, 0.5, 0.5]])


def one_hot(*labels: int) -> torch.Tensor:
    return torch.eye(3)[list(labels)]


TWO_TO_ONE = 3 / 2 ** (2 / 3)  # of one class twice as often as of the other


@pytest.mark.parametrize(
    "probabilities, splits, score, deviation",
    [
        (torch.full((6, 4), 0.25), 1, 1, 0),
        (one_hot(0, 0, 0), 1, 1, 0),  # sure, but of one class only
        (one_hot(0, 1, 2, 2, 1, 0), 1, 3, 0),
        # Mean (1/2, 1/2): log 2 less the entropy of (3/4, 1/4).
        (torch.tensor([[0.75, 0.25], [0.25, 0.75]]), 1, 2 * 0.75**0.75 * 0.25**0.25, 0),
        (one_hot(0, 0, 1, 1, 2, 2), 2, 3, 0),  # in the order of the classes: parts with all of them
        (one_hot(0, 0, 0, 1, 0, 1), 2, (1 + TWO_TO_ONE) / 2, (TWO_TO_ONE - 1) / 2),
        (torch.cat([one_hot(0), NAN_ROW]), 1, math.nan, math.nan),
    ],
)
def test_the_inception_score(probabilities, splits, score, deviation):
    expected = pytest.approx((score, deviation), abs=1e-6, nan_ok=True)
    assert inception_score(probabilities, splits) == expected


@pytest.mark.parametrize(
    ("probabilities", "splits", "message"),
    [
        (torch.randn(4, 3), 1, r"sum to 1, got one \(row \d\)"),
        (torch.full((2, 3), 0.5), 1, r"sum 1\.5\. Give .*softmax"),
        (torch.zeros(0, 3), 1, r"got \(0, 3\)"),
        (torch.ones(3), 1, r"expected \(N, K\).*got \(3,\)"),
        (one_hot(0, 1), 3, "splits=3: expected 1 to 2"),
        (one_hot(0, 1), 0, "splits=0: expected 1 to 2"),
    ],
)
def test_probabilities_that_are_none_are_refused(probabilities, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(probabilities, splits)


def test_class_accuracy_counts_what_is_read_and_misreads_what_is_not_finite():
    probabilities = torch.cat([one_hot(0, 1, 2), NAN_ROW])
    assert class_accuracy(probabilities, torch.tensor([0, 1, 1, 0])) == 0.5
    assert class_accuracy(NAN_ROW, torch.tensor([0])) == 0


def test_renaming_tells_permuted_classes_from_mixed_ones():
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    permuted = one_hot(*((labels + 1) % 3).tolist())
    assert class_accuracy(permuted, labels) == 0
    assert relabelled_accuracy(permuted, labels) == 1
    # Two labels that show the same class cannot both be renamed to it.
    collapsed = one_hot(1, 1, 2, 1, 1, 2)
    assert relabelled_accuracy(collapsed, labels) == pytest.approx(4 / 6)
    assert relabelled_accuracy(torch.cat([one_hot(1), NAN_ROW]), torch.tensor([0, 1])) == 0.5


@pytest.mark.parametrize("function", [class_accuracy, relabelled_accuracy])
def test_labels_that_do_not_fit_are_refused(function):
    with pytest.raises(ValueError, match=r"labels: expected \(2,\).*got \(3,\)"):
        function(one_hot(0, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="classes from 0 to 2.*got 0 to 3"):
        function(one_hot(0, 1), torch.tensor([0, 3]))


def test_intra_class_fid_is_the_distance_of_each_class(generator):
    reference = torch.randn(90, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(90) % 3
    shift = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)[labels, None]
    mean, distances = intra_class_fid(reference + shift, labels, reference, labels)
    # Four features, each moved by the shift of the class.
    assert distances == pytest.approx({0: 0, 1: 4, 2: 36}, abs=1e-9)
    assert mean == pytest.approx(40 / 3)
    broken = reference.clone()
    broken[1] = math.inf
    mean, distances = intra_class_fid(broken, labels, reference, labels)
    assert math.isnan(mean) and math.isnan(distances[1]) and distances[0] < 1e-6


def test_a_class_without_images_is_named(generator):
    features, labels = torch.randn(6, 2, generator=generator), torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="class 2 has 0 images to judge and 2 real ones"):
        intra_class_fid(features[:4], labels[:4], features, labels)
    with pytest.raises(ValueError, match="class 2 has 2 images to judge and 1 real ones"):
        intra_class_fid(features, labels, features[:5], labels[:5])
    with pytest.raises(ValueError, match=r"reference_labels: expected \(6,\).*got \(5,\)"):
        intra_class_fid(features, labels, features, labels[:5])


def test_the_spread_is_the_ratio_of_squared_distances(generator):
    real = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    assert spread_ratio(0.5 * real + 7, real) == pytest.approx(0.25)
    assert spread_ratio(torch.ones(3, 5), real) == 0
    assert math.isnan(spread_ratio(real * math.nan, real))
    pairs = torch.pdist(real).square().mean() / torch.pdist(real[:9]).square().mean()
    assert spread_ratio(real, real[:9]) == pytest.approx(pairs.item())
    with pytest.raises(ValueError, match="reference: all images have the same features"):
        spread_ratio(real, torch.ones(3, 5))
    with pytest.raises(ValueError, match="at least two images each"):
        spread_ratio(real[:1], real)


class Judge(nn.Module):
    """Reads the class off the brightness of the image: -1, 0 and 1; its features are the pixels."""

    reads_labels = True
    name = "brightness"

    def forward(self, images):
        return images.flatten(1)

    def class_probabilities(self, images):
        brightness = images.mean((1, 2, 3))[:, None]
        return (-20 * (brightness - torch.tensor([-0.8, 0.0, 0.8])).abs()).softmax(1)


def draw(labels: torch.Tensor, seed: int = 0, noise: float = 0.05) -> torch.Tensor:
    """Images of three classes, 2 x 2 pixels."""
    drawn = torch.randn(len(labels), 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return ((labels - 1) * 0.8)[:, None, None, None] + noise * drawn


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


def test_each_generator_has_its_character(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [HELD_OUT, "faithful", "permuted", "mixed", "collapsed", "broken"]
    assert result["count"] == 120 and result["extractor"] == "brightness"
    permuted, mixed, collapsed, broken = list(rows.values())[2:]
    for row in (rows[HELD_OUT], rows["faithful"]):
        assert row["class_accuracy"] == 1 and row["inception_score"] == pytest.approx(3, abs=0.01)
        assert row["coverage"] > 0.9 and row["precision"] > 0.8 and row["intra_class_fid"] < 0.01
    for row in (permuted, mixed):  # only the labels are wrong: what ignores them sees nothing
        assert row["fid"] < 0.01 and row["coverage"] > 0.9
        assert row["intra_class_fid"] > 1
    assert (permuted["class_accuracy"], permuted["relabelled_accuracy"]) == (0, 1)
    assert mixed["relabelled_accuracy"] < 0.5
    assert collapsed["class_accuracy"] == 1
    assert collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.5
    for row in list(rows.values())[:-1]:
        assert list(row["intra_class_fid_of"]) == ["0", "1", "2"]
        mean = sum(row["intra_class_fid_of"].values()) / 3
        assert row["intra_class_fid"] == pytest.approx(mean)
    assert broken["class_accuracy"] == 0 and broken["intra_class_fid_of"]["1"] is None
    for key in ("fid", "intra_class_fid", "inception_score", "precision", "coverage"):
        assert broken[key] is None
    text = format_generation_table(result)
    assert "broken: its images hold values that are not finite." in text
    assert "class accuracy" in text and "IS" in text


def test_every_row_has_the_labels_of_the_reference_cut_to_what_both_sets_have():
    asked = []

    def sample(labels):
        asked.append(labels)
        return draw(labels)

    fewer = torch.tensor([0] * 20 + [1] * 9 + [2] * 30)
    settings = {"held_out": (draw(fewer), fewer), "untrained": draw, "batch_size": 16}
    result = evaluate_generation(sample, REAL, LABELS, Judge(), **settings)
    assert [len(part) for part in asked] == [16, 16, 16, 11]
    assert all(len(part.unique()) == 3 for part in asked)  # not class by class, as files are
    assert torch.cat(asked).bincount().tolist() == [20, 9, 30] and result["count"] == 59
    names = [row["name"] for row in result["rows"]]
    assert names == [HELD_OUT, "generated", "untrained generator"]
    assert result["rows"][1]["fid"] != result["rows"][0]["fid"]


def test_the_numbers_are_those_of_the_images_in_files():
    values = (torch.arange(8.0) / 127.5 - 1).repeat(15)[:, None, None, None].expand(120, 1, 2, 2)
    between = evaluate_generation(lambda labels: values + 0.004, values, LABELS, Judge())
    assert between["rows"][0]["fid"] == pytest.approx(0, abs=1e-9)
    one, other = (
        evaluate_generation(draw, real, LABELS, Judge(), held_out=(real, LABELS))
        for real in (REAL, to_uint8(REAL))
    )
    assert one == other


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
        evaluate_generation(lambda x: draw(x, noise=0), REAL[c], LABELS[c], Judge())
        for c in (chosen, chosen[:5])
    )
    one, other = (result["rows"][0] for result in (with_all, without))
    assert list(one["intra_class_fid_of"]) == ["0", "1"]
    assert one["intra_class_fid_of"] == pytest.approx(other["intra_class_fid_of"])
    assert one["intra_class_fid"] == pytest.approx(other["intra_class_fid"])
    assert (with_all["k"], without["k"]) == (5, 4)
    row = evaluate_generation(draw, REAL[:3], LABELS[:3], Judge())["rows"][0]
    assert row["intra_class_fid"] is None and row["fid"] > 0


@pytest.mark.parametrize(
    "sample, count, images, held_out, message",
    [
        (lambda x: draw(x).expand(-1, 3, 2, 2), 120, REAL, None, r"\(120, 1, 2, 2\).*got \(120, 3"),
        (draw, 120, REAL, 2, "class 2 is missing from the labels of held_out"),
        (draw, 2, REAL[:2], 120, "class 2 is missing from real_labels"),
        (draw, 1, REAL[:1], None, "at least two images"),
        (draw, 3, REAL, None, r"real: expected images.*got \(120, 1, 2, 2\) and \(3,\)"),
        (draw, 120, REAL * math.inf, None, "real_images hold values that are not finite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(sample, count, images, held_out, message):
    others = None if held_out is None else (REAL[:held_out], LABELS[:held_out])
    with pytest.raises(ValueError, match=message):
        evaluate_generation(sample, images, LABELS[:count], Judge(), held_out=others)
