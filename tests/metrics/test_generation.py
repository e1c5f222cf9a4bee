"""Measurements of generated images against closed forms."""

import math

import pytest
import torch

from fastnce.metrics import (
    class_accuracy,
    inception_score,
    intra_class_fid,
    relabelled_accuracy,
    spread_ratio,
)

NAN_ROW = torch.tensor([[math.nan, 0.5, 0.5]])


def one_hot(*labels: int, classes: int = 3) -> torch.Tensor:
    return torch.eye(classes)[list(labels)]


def test_the_inception_score_is_between_one_and_the_number_of_classes():
    assert inception_score(torch.full((6, 4), 0.25))[0] == pytest.approx(1)
    assert inception_score(one_hot(0, 0, 0))[0] == pytest.approx(1)  # sure, but of one class only
    assert inception_score(one_hot(0, 1, 2, 2, 1, 0))[0] == pytest.approx(3)


def test_the_inception_score_of_two_unsure_images():
    # Mean (1/2, 1/2): log 2 less the entropy of (3/4, 1/4).
    probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    expected = 2 * 0.75**0.75 * 0.25**0.25
    assert inception_score(probabilities) == (pytest.approx(expected), 0)


def test_every_part_of_the_inception_score_holds_images_in_class_order_fairly():
    in_order = one_hot(0, 0, 1, 1, 2, 2)
    assert inception_score(in_order, splits=2) == pytest.approx((3, 0))
    # Parts of 0, 0, 1 and 0, 1, 1 have the same score; of 0, 0, 0 and 0, 1, 1 not.
    mean, deviation = inception_score(one_hot(0, 0, 0, 1, 0, 1), splits=2)
    two_to_one = 3 / 2 ** (2 / 3)
    assert mean == pytest.approx((1 + two_to_one) / 2)
    assert deviation == pytest.approx((two_to_one - 1) / 2)


def test_the_inception_score_of_what_is_not_finite_is_nan():
    assert all(math.isnan(x) for x in inception_score(torch.cat([one_hot(0), NAN_ROW])))


@pytest.mark.parametrize(
    ("probabilities", "splits", "message"),
    [
        (torch.randn(4, 3), 1, r"rows of values from 0 that sum to 1, got one \(row \d\)"),
        (torch.full((2, 3), 0.5), 1, r"sum 1\.5\. Give .*softmax"),
        (torch.zeros(0, 3), 1, r"at least one image, got \(0, 3\)"),
        (torch.ones(3), 1, r"expected \(N, K\) of at least one image, got \(3,\)"),
        (one_hot(0, 1), 3, r"splits=3: expected 1 to 2"),
        (one_hot(0, 1), 0, r"splits=0: expected 1 to 2"),
    ],
)
def test_what_is_no_probability_is_refused(probabilities, splits, message):
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
    with pytest.raises(
        ValueError, match=r"labels: expected \(2,\), one for each image, got \(3,\)"
    ):
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


def test_intra_class_fid_sees_labels_that_are_not_bound_and_fid_does_not(generator):
    labels = torch.arange(60) % 2
    reference = torch.randn(60, 3, generator=generator) + 10 * labels[:, None]
    assert intra_class_fid(reference, 1 - labels, reference, labels)[0] > 250  # 3 * 10^2


def test_a_class_without_images_is_named(generator):
    features, labels = torch.randn(6, 2, generator=generator), torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="class 2 has 0 images to judge and 2 real ones"):
        intra_class_fid(features[:4], labels[:4], features, labels)
    with pytest.raises(ValueError, match="class 2 has 2 images to judge and 1 real ones"):
        intra_class_fid(features, labels, features[:5], labels[:5])
    with pytest.raises(ValueError, match=r"reference_labels: expected \(6,\).*got \(5,\)"):
        intra_class_fid(features, labels, features, labels[:5])


def test_a_class_that_is_not_finite_has_no_distance(generator):
    features, labels = torch.randn(8, 2, generator=generator), torch.arange(8) % 2
    broken = features.clone()
    broken[1] = math.inf
    mean, distances = intra_class_fid(broken, labels, features, labels)
    assert math.isnan(mean) and math.isnan(distances[1]) and distances[0] < 1e-6


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
