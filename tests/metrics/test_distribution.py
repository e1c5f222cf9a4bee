"""FID and KID against closed forms."""

import math

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
)


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, count: int) -> torch.Tensor:
    """A sample whose mean and unbiased covariance are exactly these."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_fid_of_gaussians_whose_covariances_commute():
    # tr(C1 + C2 - 2 sqrt(C1 C2)) of diagonal covariances is sum (s1 - s2)^2.
    m1, m2 = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    s1, s2 = torch.tensor([[1.0, 2.0, 0.5], [3.0, 2.0, 1.5]], dtype=torch.float64)
    one = with_moments(m1, torch.diag(s1**2), 50)
    other = with_moments(m2, torch.diag(s2**2), 70)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()  # 5 + 5
    result = distance(one, other)
    assert result.fid == pytest.approx(expected.item(), rel=1e-9)
    assert result.counts == (50, 70)


def test_fid_of_gaussians_whose_covariances_do_not_commute():
    # For 2 x 2 matrices tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)).
    c1 = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    c2 = torch.tensor([[5.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    product = c1 @ c2
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (c1.trace() + c2.trace()).item() - 2 * root
    zero = torch.zeros(2, dtype=torch.float64)
    assert distance(with_moments(zero, c1, 40), with_moments(zero, c2, 40)).fid == pytest.approx(
        expected, rel=1e-9
    )


def test_fid_is_that_of_torchmetrics(generator):
    from torchmetrics.image.fid import _compute_fid

    x = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    y = torch.rand(60, 12, generator=generator, dtype=torch.float64) * torch.arange(12)
    expected = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_fid_of_fewer_images_than_features_is_exact(generator):
    # Covariances of rank 4 in 30 dimensions: C and s^2 C commute.
    x = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    trace = x.var(0).sum().item()
    moved = (x - x.mean(0)) * 3 + x.mean(0) + 2
    assert frechet_distance(moved, x) == pytest.approx(30 * 2**2 + (3 - 1) ** 2 * trace, rel=1e-12)
    # Equal features have a covariance of 0, and only its trace on the other side is left.
    same = x.mean(0).expand(3, 30)
    assert frechet_distance(same, x) == pytest.approx(trace, rel=1e-12)


def test_equal_sets_have_no_fid_and_it_is_symmetric():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, 8, generator=generator)
    assert 0 <= distance(x, x).fid < 1e-6
    assert distance(x, y).fid == pytest.approx(distance(y, x).fid, rel=1e-9)


def test_kid_of_all_images_is_the_unbiased_estimate():
    # Fewer than 100 images: each subset is the whole set, so the estimate is exact.
    generator = torch.Generator().manual_seed(0)
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


def test_kid_is_the_same_each_time_and_leaves_the_global_generator_alone():
    x, y = torch.randn(2, 150, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = distance(x, y)
    assert torch.rand(1) == expected
    assert one == distance(x, y)
    assert one != distance(x, y, seed=1)
    assert one.kid_subset_size == 100 and one.kid_std > 0


def test_values_that_are_not_finite_give_no_number():
    x = torch.randn(10, 3)
    x[4, 1] = math.nan
    result = distance(x, torch.randn(10, 3))
    assert math.isnan(result.fid) and math.isnan(result.kid)


@pytest.mark.parametrize(("one", "other"), [((1, 3), (5, 3)), ((5, 3), (5, 4))])
def test_sets_that_cannot_be_compared_are_refused(one, other):
    with pytest.raises(ValueError, match="at least two images each, got"):
        distance(torch.zeros(one), torch.zeros(other))


class Channels(nn.Module):
    name = "mean-colour"

    def forward(self, images):
        return images.mean((2, 3))


def test_any_module_serves_as_extractor_and_its_name_is_recorded():
    images = torch.rand(20, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = compare_images(images, images + 0.1, Channels())
    assert result.extractor == "mean-colour"
    assert result.fid == pytest.approx(3 * 0.1**2, rel=1e-4)
    assert compare_images(images, images, nn.Flatten()).extractor == "Flatten"


def test_features_do_not_depend_on_the_batch_size_and_are_float64():
    images = torch.randn(7, 3, 4, 4)
    one = extract_features(images, Channels(), batch_size=3)
    assert one.dtype == torch.float64
    assert torch.equal(one, extract_features(images, Channels()))


def test_an_extractor_that_gives_maps_is_refused():
    with pytest.raises(
        ValueError, match=r"expected features \(N, F\) for 7 images, got \(7, 3, 4, 4\)"
    ):
        extract_features(torch.zeros(7, 3, 4, 4), nn.Identity())


def test_folders_of_any_images_with_an_extractor_of_ones_own(tmp_path):
    class Colour(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        colour = torch.rand(3, 1, 1, generator=generator).expand(3, 8, 12) - 0.5
        save_image(colour, tmp_path / "one" / f"{number}.png")
        save_image(colour + 0.2, tmp_path / "other" / f"{number}.png")
    result = compare_folders(tmp_path / "one", tmp_path / "other", Colour())
    assert result.fid == pytest.approx(3 * 0.2**2, rel=0.1)  # up to the rounding to bytes
    assert result.extractor == "Colour" and result.counts == (6, 6)
    save_image(torch.zeros(3, 8, 8), tmp_path / "one" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: is 8x8, but .*0\.png is 12x8"):
        compare_folders(tmp_path / "one", tmp_path / "other", Colour())
