"""Differentiable augmentations: their ranges, their independence, their gradients."""

import pytest
import torch

from fastnce.systems.augment import diff_augment, flip_and_translate


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_translation_moves_whole_pixels_and_reflects():
    """A single bright pixel, far from the border, moves by at most 1/8 of 16, alone or mirrored."""
    images = torch.zeros(400, 1, 16, 16)
    images[:, 0, 6, 5] = 1.0
    moved = flip_and_translate(images)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(400))
    row, column = moved[:, 0].flatten(1).argmax(1).div(16, rounding_mode="floor"), None
    column = moved[:, 0].flatten(1).argmax(1) % 16
    assert set((row - 6).tolist()) == {-2, -1, 0, 1, 2}
    plain = (column - 5).abs() <= 2
    assert set((column[~plain] - (15 - 5)).tolist()) == {-2, -1, 0, 1, 2}
    assert 0.4 < plain.float().mean() < 0.6


def test_cutout_and_translation_of_diff_augment():
    """Of constant images colour keeps a constant; zeros are the square and what moved in."""
    out = diff_augment(torch.full((300, 3, 16, 16), 5.0))
    zero = (out == 0).all(1)  # (N, H, W)
    for image, hole in zip(out, zero, strict=True):
        kept = image[:, ~hole]
        assert kept.numel() == 0 or torch.allclose(kept, kept[:, :1], atol=1e-4)
    share = zero.float().mean((1, 2))
    # The square, 1/4 of the image when whole, and up to 2 rows and columns.
    assert share.min() > 0.01 and share.max() <= 0.25 + 2 * 2 / 16
    assert len(share.unique()) > 20


def test_colour_of_diff_augment_keeps_the_shape_of_an_image():
    """Brightness, saturation and contrast are affine in the pixels of an image: correlations stay."""
    images = torch.randn(64, 1, 8, 8)
    from fastnce.systems.augment import _colour

    out = _colour(images, None)
    for before, after in zip(images, out, strict=True):
        matrix = torch.stack([before.flatten(), after.flatten()])
        assert torch.corrcoef(matrix)[0, 1] > 0.999
    scale = out.flatten(1).std(1) / images.flatten(1).std(1)
    assert 0.45 < scale.min() < 0.7 and 1.3 < scale.max() < 1.55


def test_a_generator_makes_it_repeatable_and_leaves_the_default_alone():
    images = torch.randn(4, 3, 16, 16)
    state = torch.get_rng_state()
    one = diff_augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, diff_augment(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, diff_augment(images, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("augment", [diff_augment, flip_and_translate])
def test_gradient_goes_where_the_pixels_came_from(augment):
    images = torch.randn(8, 3, 16, 16, requires_grad=True)
    torch.manual_seed(1)
    out = augment(images)
    assert out.shape == images.shape
    out.square().sum().backward()
    assert images.grad.isfinite().all()
    # Each image's gradient is its own.
    torch.manual_seed(1)
    other = images.detach().clone()
    other[0] += 1
    changed = (augment(other) != out.detach()).flatten(1).any(1)
    assert changed.tolist() == [True] + [False] * 7
