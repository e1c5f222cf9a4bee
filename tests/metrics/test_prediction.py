"""Predicted images against the real ones: sharpness, colour, patches, and the table of them."""

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor, nn

from fastnce.data.stream import counter_rng
from fastnce.metrics import evaluate_prediction, laplacian_variance, saturation, sliced_wasserstein

DIRECTION_STREAM = 71


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """(count, 3, side, side) in [-1, 1], smoothed a little, so that both levels hold something."""
    values = np.random.default_rng(seed).standard_normal((count, 3, side, side))
    return torch.from_numpy(np.tanh(2 * ndimage.gaussian_filter(values, (0, 0, 0.7, 0.7)))).float()


def blurred(images: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def levels(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().to(torch.uint8)


def test_sharpness_of_a_constant_image_is_0_and_of_a_chessboard_64():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1  # each Laplacian is 8 or -8
    images = torch.stack([torch.full((3, 8, 8), 0.3), board.expand(3, 8, 8)])
    assert laplacian_variance(images).tolist() == pytest.approx([0, 64], abs=1e-12)
    assert laplacian_variance(levels(images)).tolist() == pytest.approx([0, 64], abs=1e-12)


def test_saturation_is_that_of_hsv():
    colours = torch.tensor(
        [[90, 90, 90], [255, 0, 0], [0, 0, 0], [200, 100, 50]], dtype=torch.uint8
    )
    assert saturation(colours[:, :, None, None]).tolist() == pytest.approx([0, 1, 0, 0.75])


def transcribed(a: np.ndarray, b: np.ndarray, seed: int) -> list[float]:
    """The sliced Wasserstein distance from all patches, by scipy."""

    def smooth(x):
        taps = np.array([1, 4, 6, 4, 1]) / 16
        for axis in (2, 3):
            x = ndimage.correlate1d(x, taps, axis, mode="mirror")
        return x

    directions = counter_rng(seed, DIRECTION_STREAM, 0).standard_normal((75, 256))
    directions /= np.linalg.norm(directions, axis=0)
    distances = []
    for _ in range(2):
        sides = []
        halves = []
        for x in (a, b):
            half = smooth(x)[:, :, ::2, ::2]
            zeros = np.zeros_like(x)
            zeros[:, :, ::2, ::2] = half
            windows = np.lib.stride_tricks.sliding_window_view(
                x - 4 * smooth(zeros), (5, 5), (2, 3)
            )
            sides.append(windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 75) @ directions)
            halves.append(half)
        one, other = sides
        each = [stats.wasserstein_distance(one[:, i], other[:, i]) for i in range(256)]
        distances.append(1000 * np.mean(each))
        a, b = halves
    return distances


def test_sliced_wasserstein_is_that_of_scipy():
    a, b = noise(3, 14), 0.6 * noise(3, 14, seed=1)  # 100 patches and 9: all of them are taken
    expected = transcribed(a.double().numpy(), b.double().numpy(), seed=5)
    assert list(sliced_wasserstein(a, b, seed=5)) == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 10


def test_sliced_wasserstein_is_a_distance():
    x, other = noise(8), noise(8, seed=1)
    assert sliced_wasserstein(x, x) == (0, 0)
    assert sliced_wasserstein(x, other) == sliced_wasserstein(other, x)
    assert sliced_wasserstein(x, other) == sliced_wasserstein(x, other)
    assert sliced_wasserstein(x, other) != sliced_wasserstein(x, other, seed=1)
    near, far, floor = (sliced_wasserstein(x, y) for y in (blurred(x, 0.5), blurred(x, 2), other))
    assert floor.fine < near.fine < far.fine
    assert floor.coarse < near.coarse < far.coarse
    # A blur of one level's size costs there, and the brightness alone nothing.
    assert near.fine > 2 * near.coarse
    assert max(sliced_wasserstein(x * 0.5, x * 0.5 + 0.3)) < 1e-3
    small = noise(4, 9)
    assert sliced_wasserstein(small, torch.cat([small, small])) == (0, 0)


class Means(nn.Module):
    """Two features of an image: its mean red and green."""

    name = "means"

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))[:, :2]


class Bright:
    """Class 1 where red is bright, at the size of the image."""

    name, num_classes = "bright", 2

    def __call__(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        assert size == tuple(image.shape[1:])
        return (image[0] > 0).long()


def test_each_number_stands_beside_that_of_the_real_images():
    real = levels(noise(6))
    label = (real[:, 0] > 127).long()
    label[:, :4] = 7  # don't care
    dark = (real // 2).to(torch.uint8)
    rows = {
        "perfect": zip(real, real, label, strict=True),
        "dark": zip(dark, real, label, strict=True),
    }
    others = levels(noise(9, seed=1))
    result, table = evaluate_prediction(
        rows, others=others, extractor=Means(), segmenter=Bright(), seed=3
    )
    perfect, darker, truth, rest, grey = result["rows"]
    names = [row["name"] for row in result["rows"]]
    assert names == ["perfect", "dark", "real", "other real images", "a grey image"]
    assert [row["count"] for row in result["rows"]] == [6] * 5
    distances = ("l1", "swd_fine", "swd_coarse", "fid")
    assert [perfect[name] for name in distances] == pytest.approx([0, 0, 0, 0], abs=1e-9)
    assert [truth[name] for name in distances] == [None] * 4
    for name in ("laplacian_variance", "saturation", "mean_iou", "pixel_accuracy"):
        assert perfect[name] == truth[name]
    assert truth["pixel_accuracy"] == truth["mean_iou"] == 1
    assert darker["pixel_accuracy"] == pytest.approx((label[:, 4:] == 0).double().mean().item())
    assert darker["l1"] == pytest.approx(((real.int() - dark.int()) / 127.5).double().mean().item())
    assert darker["laplacian_variance"] == laplacian_variance(dark).mean().item()
    assert (rest["swd_fine"], rest["swd_coarse"]) == sliced_wasserstein(others[:6], real, seed=3)
    assert rest["swd_fine"] < darker["swd_fine"] < grey["swd_fine"]
    assert rest["fid"] < darker["fid"]
    assert grey["laplacian_variance"] == grey["saturation"] == 0
    lines = table.splitlines()
    assert len({len(line) for line in lines[:7]}) == 1
    assert lines[0].split("|")[-2].strip() == "class accuracy"
    assert [line.split("|")[1].strip() for line in lines[2:7]] == names
    assert "6 images of 32x32" in lines[8] and "means" in lines[8] and "bright" in lines[8]


def test_without_networks_and_other_images_the_table_has_what_needs_none():
    real = levels(noise(2))
    result, table = evaluate_prediction(zip(real, real, strict=True))
    assert [row["name"] for row in result["rows"]] == ["predicted", "real", "a grey image"]
    (alone,) = evaluate_prediction(zip(real, real, strict=True), baselines=False)[0]["rows"]
    assert alone == result["rows"][0]
    assert "SWD fine" in table and "FID" not in table and "IoU" not in table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saturation(torch.zeros(1, 1, 4, 4)), r"expected \(N, 3, H, W\) .* got \(1, 1, 4"),
        (lambda: laplacian_variance(torch.zeros(3, 8, 8)), r"expected \(N, C, H, W\)"),
        (lambda: sliced_wasserstein(noise(1, 8), noise(1, 8)), "sides of 9 pixels or more"),
        (lambda: sliced_wasserstein(noise(1), noise(1)[:, :1]), "images of 3 and of 1 channels"),
        (lambda: evaluate_prediction([]), "no pairs"),
        (lambda: evaluate_prediction([(noise(1)[0], noise(1)[0])]), "two uint8 images"),
        (
            lambda: evaluate_prediction([levels(noise(2))], segmenter=Bright()),
            "needs the label map",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
