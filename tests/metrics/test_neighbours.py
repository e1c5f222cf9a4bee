"""Precision, recall, density and coverage against loops over all pairs."""

import math
from dataclasses import astuple

import pytest
import torch

from fastnce.metrics import neighbours, precision_recall_density_coverage


def brute_force(real: list, fake: list, k: int) -> tuple[float, ...]:
    """The four definitions, one distance at a time."""

    def radii(points):
        others = (
            sorted(math.dist(x, y) for j, y in enumerate(points) if i != j)
            for i, x in enumerate(points)
        )
        return [distances[k - 1] for distances in others]

    real_radii, fake_radii = radii(real), radii(fake)
    inside_real = [
        [math.dist(x, y) <= r for x, r in zip(real, real_radii, strict=True)] for y in fake
    ]
    inside_fake = [
        [math.dist(x, y) <= r for y, r in zip(fake, fake_radii, strict=True)] for x in real
    ]
    return (
        sum(map(any, inside_real)) / len(fake),
        sum(map(any, inside_fake)) / len(real),
        sum(map(sum, inside_real)) / (k * len(fake)),
        sum(map(any, zip(*inside_real, strict=True))) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_definitions(k, rows, generator, monkeypatch):
    real = torch.randn(41, 3, generator=generator, dtype=torch.float64)
    fake = 0.7 * torch.randn(29, 3, generator=generator, dtype=torch.float64) + 1
    monkeypatch.setattr(neighbours, "_BLOCK_ENTRIES", 29 * rows)
    expected = brute_force(real.tolist(), fake.tolist(), k)
    result = precision_recall_density_coverage(real, fake, k)
    assert astuple(result) == pytest.approx(expected)
    assert len({0, 1, *astuple(result)}) == 6  # four numbers that tell apart what is right


def test_far_from_the_origin_nothing_changes(generator):
    real, fake = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    near = precision_recall_density_coverage(real, fake)
    assert precision_recall_density_coverage(real + 1e8, fake + 1e8) == near


def test_blocks_keep_to_their_size(generator, monkeypatch):
    sizes = []
    original = neighbours._squared_distances

    def spy(x, y):
        sizes.append(len(x) * len(y))
        return original(x, y)

    monkeypatch.setattr(neighbours, "_squared_distances", spy)
    monkeypatch.setattr(neighbours, "_BLOCK_ENTRIES", 1000)
    precision_recall_density_coverage(*torch.randn(2, 300, 8, generator=generator))
    assert max(sizes) <= 1000 and sum(sizes) == 3 * 300 * 300


def test_the_same_images_are_covered_and_far_ones_are_not(generator):
    x = torch.randn(40, 6, generator=generator)
    same = precision_recall_density_coverage(x, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx((5 + 1) / 5)  # k neighbours and the image itself
    assert astuple(precision_recall_density_coverage(x, x + 100)) == (0, 0, 0, 0)


def test_a_collapsed_generator_is_precise_and_covers_nothing(generator):
    real = torch.randn(60, 5, generator=generator)
    fake = real[:1].expand(20, 5)
    result = precision_recall_density_coverage(real, fake)
    assert result.precision == 1
    assert result.recall == 1 / 60  # the balls have radius 0, and one real image is on their centre
    assert result.coverage < 0.5


def test_points_that_coincide_are_at_distance_zero_whatever_the_rounding(generator):
    x = torch.randn(50, 200, generator=generator)
    twins = torch.cat([x, x])  # radius 0 for k = 1
    result = precision_recall_density_coverage(twins, x, k=1)
    assert astuple(result) == (1, 1, 2, 1)


def test_features_that_are_all_the_same_lie_in_one_another():
    x = torch.full((9, 64), 1 / 3)
    result = precision_recall_density_coverage(x, x)
    assert astuple(result) == (1, 1, 9 / 5, 1)


def test_features_that_are_not_finite_give_no_number(generator):
    x = torch.randn(10, 2, generator=generator)
    y = x.clone()
    y[3, 0] = math.nan
    for pair in ((x, y), (y, x)):
        assert all(math.isnan(value) for value in astuple(precision_recall_density_coverage(*pair)))


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        ((5, 2), (9, 2), 5, "more than k images in each set, got 5 real and 9 fake"),
        ((9, 2), (1, 2), 1, "got 9 real and 1 fake"),
        ((9, 2), (9, 2), 0, "k=0: expected 1 or more"),
        ((9, 2), (9, 3), 5, r"features \(N, F\) and \(M, F\), got \(9, 2\) and \(9, 3\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall_density_coverage(torch.zeros(real), torch.zeros(fake), k)
