"""FID and KID against closed forms; precision, recall, density and coverage against loops over all pairs."""

import math
from dataclasses import astuple

import pytest
import torch
from torch import nn

from fastnce.data import save_image
from fastnce.errors import UserError
from fastnce.metrics import (
    compare_folders,
    compare_images,
    distance,
    extract_features,
    frechet_distance,
    precision_recall_density_coverage,
)


class Colours(nn.Module):
    name = "mean-colour"

    def forward(self, images):
        return images.mean((2, 3))


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, count: int) -> torch.Tensor:
    """A sample whose mean and unbiased covariance are exactly these."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_gaussians():
    # For 2 x 2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    c1 = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    c2 = torch.tensor([[5.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    m1, m2 = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)
    product = c1 @ c2
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (m1 - m2).square().sum().item() + (c1.trace() + c2.trace()).item() - 2 * root
    result = distance(with_moments(m1, c1, 50), with_moments(m2, c2, 70))
    assert result.fid == pytest.approx(expected, rel=1e-9)
    assert result.counts == (50, 70)


def test_fid_is_that_of_torchmetrics_symmetric_and_zero_of_equal_sets(generator):
    from torchmetrics.image.fid import _compute_fid

    x = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    y = torch.rand(60, 12, generator=generator, dtype=torch.float64) * torch.arange(12)
    expected = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-9)
    assert 0 <= frechet_distance(x, x) < 1e-6


def test_fid_of_fewer_images_than_features_is_exact(generator):
    # Covariances of rank 4 in 30 dimensions: C and s^2 C commute.
    x = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    trace = x.var(0).sum().item()
    moved = (x - x.mean(0)) * 3 + x.mean(0) + 2
    assert frechet_distance(moved, x) == pytest.approx(30 * 2**2 + (3 - 1) ** 2 * trace, rel=1e-12)
    # Equal features have a covariance of 0, and only its trace on the other side is left.
    same = x.mean(0).expand(3, 30)
    assert frechet_distance(same, x) == pytest.approx(trace, rel=1e-12)


def test_kid_of_all_images_is_the_unbiased_estimate(generator):
    # Fewer than 100 images: each subset is the whole set, so the estimate is exact.
    x, y = torch.randn(2, 30, 5, generator=generator, dtype=torch.float64)
    y = y + 0.5

    def kernel(a, b):
        return (a @ b.T / 5 + 1) ** 3

    def mean_of_pairs(k):
        return (k.sum() - k.trace()) / (30 * 29)

    expected = mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()
    result = distance(x, y)
    assert result.kid == pytest.approx(expected.item(), rel=1e-9)
    assert result.kid_std == pytest.approx(0, abs=1e-9)
    assert result.kid_subset_size == 30


def test_kid_is_the_same_each_time_and_leaves_the_global_generator_alone(generator):
    x, y = torch.randn(2, 150, 4, generator=generator)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = distance(x, y)
    assert torch.rand(1) == expected
    assert one == distance(x, y)
    assert one != distance(x, y, seed=1)
    assert one.kid_subset_size == 100 and one.kid_std > 0


def brute_force(real: list, fake: list, k: int) -> tuple[float, ...]:
    """The four definitions, one distance at a time."""

    def balls(points):
        """Each point, and the distance to its neighbour number k; the first is the point itself."""
        return [(x, sorted(math.dist(x, y) for y in points)[k]) for x in points]

    real_balls, fake_balls = balls(real), balls(fake)
    inside_real = [[math.dist(x, y) <= radius for x, radius in real_balls] for y in fake]
    inside_fake = [[math.dist(x, y) <= radius for x, radius in fake_balls] for y in real]
    return (
        sum(map(any, inside_real)) / len(fake),
        sum(map(any, inside_fake)) / len(real),
        sum(map(sum, inside_real)) / (k * len(fake)),
        sum(map(any, zip(*inside_real, strict=True))) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("origin", "rows"), [(0, 1000), (1e8, 1000), (0, 1), (0, 7)])
def test_the_definitions_of_precision_and_its_relatives(k, origin, rows, generator, monkeypatch):
    """Also where distances are made in blocks of few rows, as those of many images are."""
    monkeypatch.setattr("fastnce.metrics.distribution._BLOCK_ENTRIES", 29 * rows)
    real = torch.randn(41, 3, generator=generator, dtype=torch.float64)
    fake = 0.7 * torch.randn(29, 3, generator=generator, dtype=torch.float64) + 1
    result = astuple(precision_recall_density_coverage(real + origin, fake + origin, k))
    assert result == pytest.approx(brute_force(real.tolist(), fake.tolist(), k))
    assert len({0, 1, *result}) == 6  # four numbers that tell apart what is right


def collapsed(x):
    return x[:1].expand(20, 200)


@pytest.mark.parametrize(
    "fake, k, expected",
    [
        (lambda x: x, 5, (1, 1, 6 / 5, 1)),  # k neighbours and the image itself
        (lambda x: x + 100, 5, (0, 0, 0, 0)),
        (lambda x: x.repeat(2, 1), 1, (1, 1, None, 1)),  # radius 0 on the one side
        (collapsed, 5, (1, 1 / 40, None, None)),  # on the centre of its balls is one real image
    ],
)
def test_images_that_coincide(fake, k, expected, generator):
    x = torch.randn(40, 200, generator=generator)
    result = astuple(precision_recall_density_coverage(x, fake(x), k))
    for value, known in zip(result, expected, strict=True):
        assert known is None or value == pytest.approx(known)
    twins = precision_recall_density_coverage(x.repeat(2, 1), x, k=1)
    assert astuple(twins) == (1, 1, 2, 1)
    same = torch.full((9, 64), 1 / 3)
    assert astuple(precision_recall_density_coverage(same, same)) == (1, 1, 9 / 5, 1)


def test_values_that_are_not_finite_give_no_number(generator):
    x = torch.randn(10, 3, generator=generator)
    y = x.clone()
    y[4, 1] = math.nan
    for pair in ((x, y), (y, x)):
        values = astuple(precision_recall_density_coverage(*pair))
        result = distance(*pair)
        assert all(map(math.isnan, (*values, result.fid, result.kid, frechet_distance(*pair))))


@pytest.mark.parametrize(
    "function, shapes, message",
    [
        (distance, ((1, 3), (5, 3)), "at least two images each, got"),
        (frechet_distance, ((5, 3), (5, 4)), "at least two images each, got"),
        (precision_recall_density_coverage, ((5, 2), (9, 2), 5), "k=5.* got 5 real and 9 fake"),
        (precision_recall_density_coverage, ((9, 2), (1, 2), 1), "got 9 real and 1 fake"),
        (precision_recall_density_coverage, ((9, 2), (9, 2), 0), "k=0: expected 1 or more"),
        (precision_recall_density_coverage, ((9, 2), (9, 3)), r"got \(9, 2\) and \(9, 3\)"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(function, shapes, message):
    with pytest.raises(ValueError, match=message):
        function(*(torch.zeros(x) if isinstance(x, tuple) else x for x in shapes))


def test_any_module_serves_as_extractor_and_its_name_is_recorded(generator):
    images = torch.rand(20, 3, 6, 5, generator=generator) * 2 - 1
    result = compare_images(images, images + 0.1, Colours())
    assert result.extractor == "mean-colour"
    assert result.fid == pytest.approx(3 * 0.1**2, rel=1e-4)
    assert compare_images(images, images, nn.Flatten()).extractor == "Flatten"
    one = extract_features(images, Colours(), batch_size=3)
    assert one.dtype == torch.float64 and torch.equal(one, extract_features(images, Colours()))
    with pytest.raises(ValueError, match=r"for 20 images, got \(20, 3, 6, 5\)"):
        extract_features(images, nn.Identity())


def test_folders_of_any_images(tmp_path, generator):
    for number in range(6):
        colour = torch.rand(3, 1, 1, generator=generator).expand(3, 8, 12) - 0.5
        save_image(colour, tmp_path / "one" / f"{number}.png")
        save_image(colour + 0.2, tmp_path / "other" / f"{number}.png")
    result = compare_folders(tmp_path / "one", tmp_path / "other", Colours())
    assert result.fid == pytest.approx(3 * 0.2**2, rel=0.1)  # up to the rounding to bytes
    assert result.counts == (6, 6)
    save_image(torch.zeros(3, 8, 8), tmp_path / "one" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: is 8x8, but .*0\.png is 12x8"):
        compare_folders(tmp_path / "one", tmp_path / "other", Colours())
