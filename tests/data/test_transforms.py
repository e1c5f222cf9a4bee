"""Transforms against what Pillow and the equations say."""

import math

import numpy as np
import pytest
import torch
from pictures import levels
from PIL import Image

from fastnce.data.images import to_tensor, to_uint8
from fastnce.data.stream import counter_rng
from fastnce.data.transforms import Affine, Preprocess, draw_affine, resize_to_multiple, warp
from fastnce.errors import UserError


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("none", (60, 40)),
        ("crop", (60, 40)),
        ("resize_and_crop", (30, 30)),
        ("scale_width_and_crop", (30, 20)),
        ("scale_shortside", (45, 30)),
        ("fixsize", (12, 8)),
    ],
)
def test_scaling_is_pillows_bicubic(steps, expected):
    preprocess = Preprocess(steps, load_size=30, crop_size=20, fixed_size=(12, 8))
    image = Image.fromarray(levels(40, 60, 3))
    assert preprocess.prepared_size(60, 40) == expected
    scaled = image.resize(expected, Image.Resampling.BICUBIC)
    assert np.array_equal(preprocess.prepare(image), np.asarray(scaled))
    assert preprocess.prepare(image.convert("L")).shape == (*expected[::-1], 1)


@pytest.mark.parametrize("size", [(30, 21), (5, 7), (6, 10), (1, 64), (8, 12)])
def test_sides_become_the_nearest_multiple_of_four(size):
    image = Image.fromarray(levels(size[1], size[0], 3))
    resized = resize_to_multiple(image)
    for side, result in zip(size, resized.size, strict=True):
        assert result % 4 == 0
        # A side of 1 or 2 would round to nothing.
        assert abs(result - side) <= 2 or (side < 4 and result == 4)
    expected = image.resize(resized.size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resized), np.asarray(expected))
    assert (resized is image) == (resized.size == size)
    cropped = Preprocess("crop", crop_size=30, flip=False).augment(
        levels(30, 30, 3), counter_rng(0, 1, 0)
    )
    assert cropped.shape == (32, 32, 3)


def windows(preprocess: Preprocess, height: int, width: int, count: int = 300) -> set[tuple]:
    """(top, left, height, width) of the windows that `augment` cuts out of an image of this size."""
    array = np.arange(height * width, dtype=np.uint16).reshape(height, width, 1)
    found = set()
    for index in range(count):
        piece = preprocess.augment(array, counter_rng(0, 1, index))
        top, left = divmod(int(piece[0, 0, 0]), width)
        window = array[top : top + piece.shape[0], left : left + piece.shape[1]]
        assert np.array_equal(piece, window)
        found.add((top, left, *piece.shape[:2]))
    return found


# Of a grid of 3 cells and room for 1 pixel downwards, 2 cells and room for 2 to the right.
CELLS = {
    (top + down, left + right, 4, 4)
    for top in (0, 4, 8)
    for down in range(2)
    for left in (0, 4)
    for right in range(3)
}


@pytest.mark.parametrize(
    "steps, crop_size, size, expected",
    [
        ("crop", 4, (6, 7), {(top, left, 4, 4) for top in range(3) for left in range(4)}),
        ("patch", 4, (13, 10), CELLS),
        ("trim", 8, (4, 10), {(0, left, 4, 8) for left in range(3)}),
        ("trim", 8, (4, 8), {(0, 0, 4, 8)}),
    ],
)
def test_windows_are_cut_everywhere(steps, crop_size, size, expected):
    preprocess = Preprocess(steps, crop_size=crop_size, flip=False)
    assert windows(preprocess, *size) == expected
    assert {preprocess.output_size(*size[::-1])[::-1]} == {window[2:] for window in expected}


def test_zoom_shrinks_each_side_by_up_to_a_fifth_but_not_below_the_crop():
    preprocess, array = Preprocess("zoom", crop_size=88, flip=False), levels(200, 100, 3)
    sizes = np.array(
        [preprocess.augment(array, counter_rng(0, 1, index)).shape[:2] for index in range(200)]
    )
    assert 160 <= sizes[:, 0].min() < 170 and 190 < sizes[:, 0].max() <= 200
    assert sizes[:, 1].min() == 88 and sizes[:, 1].max() <= 100
    assert preprocess.output_size(100, 200) is None
    cropped = Preprocess("zoom_and_crop", crop_size=88)
    assert cropped.output_size(100, 200) == (88, 88)
    # What is too small for the crop is enlarged to it.
    cropped.check("x.png", 40, 40)
    assert cropped.augment(levels(40, 40, 3), counter_rng(0, 1, 0)).shape == (88, 88, 3)


def test_sixteen_bits_do_not_wrap_around():
    """An edge overshoots beyond what they hold. That they are scaled in float: see test_reading."""
    edge = np.zeros((16, 16), dtype=np.uint16)
    edge[:, 8:] = 65535
    enlarged = Preprocess("resize", load_size=40).prepare(Image.fromarray(edge))
    assert enlarged.dtype == np.uint16 and enlarged.shape == (40, 40, 1)
    assert (enlarged[:, :12] < 10000).all() and (enlarged[:, -12:] > 55000).all()


def test_bytes_are_clamped_and_truncated_and_come_back():
    values = torch.tensor([-3.0, -1.0, -0.9999, 0.0, 1 / 255, 0.99, 1.0, 7.0])
    # (x + 1) / 2 * 255 is 0, 0, 0.013, 127.5, 128, 253.7, 255, 255
    assert to_uint8(values).tolist() == [0, 0, 0, 127, 128, 253, 255, 255]
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    tensor = to_tensor(levels)
    expected = (torch.arange(256, dtype=torch.float32).view(1, 16, 16) / 255 - 0.5) / 0.5
    assert torch.equal(tensor, expected) and tensor.is_contiguous()
    assert to_uint8(tensor).flatten().tolist() == list(range(256))


def test_warp_shifts_by_whole_pixels_and_mirrors_at_the_border():
    array = np.arange(8, dtype=np.uint8)[None, :, None].repeat(4, 0)
    assert np.array_equal(warp(array, Affine(0.0, 1.0, 0.0, 0.0)), array)
    shifted = warp(array, Affine(0.0, 1.0, 0.0, 2 / 8))
    assert shifted[0, :, 0].tolist() == [2, 1, 0, 1, 2, 3, 4, 5]
    shifted = warp(array.transpose(1, 0, 2), Affine(0.0, 1.0, -1 / 8, 0.0))
    assert shifted[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 6]


def test_warp_turns_and_enlarges_about_the_centre():
    array = levels(8, 8, 3)
    turned = warp(array, Affine(math.pi / 2, 1.0, 0.0, 0.0))
    assert any(np.array_equal(turned, np.rot90(array, quarters)) for quarters in (1, 3))
    dot = np.zeros((9, 9, 1), dtype=np.uint8)
    dot[4, 4] = 1
    large = warp(dot, Affine(0.0, 3.0, 0.0, 0.0))
    assert large.sum() == 9 and large[3:6, 3:6].all()


def test_affine_draws_use_their_ranges_and_keep_the_strength_of_noise():
    draws = [draw_affine(counter_rng(0, 1, index)) for index in range(500)]
    limits = np.array([math.radians(10), 0.08, 0.05, 0.05])
    deviation = np.abs(np.array(draws) - [0, 1, 0, 0])
    assert (deviation <= limits).all()
    assert (deviation.max(0) > 0.95 * limits).all()
    rng = np.random.default_rng(1)
    array = rng.normal(128, 30, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    for affine in draws[:10]:
        result = warp(array, affine)
        assert result.std() == pytest.approx(array.std(), rel=0.05)
        assert result[:4].std() == pytest.approx(array.std(), rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "size", "message"),
    [
        ({"steps": "resize_and_corp"}, None, "resize_and_corp.*resize, fixsize, scale_width"),
        ({"load_size": 100, "crop_size": 128}, None, "load_size=100.*crop_size=128"),
        ({"crop_size": 0}, None, "crop_size=0"),
        ({"steps": "crop", "crop_size": 32}, (40, 30), r"x\.png: 40x30 .*32x32.*at most 30"),
        (
            {"steps": "scale_width_and_crop", "load_size": 40, "crop_size": 32},
            (80, 40),
            r"x\.png: 80x40 \(40x20 after scaling\) is smaller.*scale_shortside",
        ),
    ],
)
def test_mistakes_are_explained(arguments, size, message):
    with pytest.raises(UserError, match=message):
        Preprocess(**arguments).check("x.png", *size)
    Preprocess("resize_and_crop", load_size=32, crop_size=32).check("x.png", 40, 30)
    with pytest.raises(ValueError, match="fixed_size"):
        Preprocess("fixsize")
