"""Transforms against what Pillow and the equations say."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.data.images import to_array, to_tensor, to_uint8
from fastnce.data.stream import counter_rng
from fastnce.data.transforms import (
    Affine,
    Preprocess,
    draw_affine,
    multiple_size,
    resize_to_multiple,
    warp,
)
from fastnce.errors import UserError


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_resize_is_pillows_bicubic():
    array = noise(30, 50)
    expected = np.asarray(Image.fromarray(array).resize((40, 40), Image.Resampling.BICUBIC))
    prepared = Preprocess("resize", load_size=40).prepare(Image.fromarray(array))
    assert np.array_equal(prepared, expected)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("none", (60, 40)),
        ("crop", (60, 40)),
        ("resize_and_crop", (30, 30)),
        ("scale_width_and_crop", (30, 20)),
        ("scale_shortside", (45, 30)),
    ],
)
def test_prepared_sizes(steps, expected):
    preprocess = Preprocess(steps, load_size=30, crop_size=20)
    assert preprocess.prepared_size(60, 40) == expected
    array = preprocess.prepare(Image.fromarray(noise(40, 60)))
    assert array.shape == (expected[1], expected[0], 3)


@pytest.mark.parametrize("size", [(30, 21), (5, 7), (6, 10), (1, 64)])
def test_sides_become_the_nearest_multiple_of_four(size):
    image = Image.fromarray(noise(size[1], size[0]))
    resized = resize_to_multiple(image)
    for side, result in zip(size, resized.size, strict=True):
        assert result % 4 == 0
        # A side of 1 or 2 would round to nothing.
        assert abs(result - side) <= 2 or (side < 4 and result == 4)
    assert resized.size == multiple_size(*size)
    expected = image.resize(resized.size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resized), np.asarray(expected))


def test_a_size_that_is_right_is_left_alone():
    image = Image.fromarray(noise(8, 12))
    assert resize_to_multiple(image) is image


def test_the_crop_is_a_window_of_the_image_and_reaches_every_corner():
    array = np.arange(6 * 7, dtype=np.uint8).reshape(6, 7, 1)
    preprocess = Preprocess("crop", crop_size=4, flip=False)
    corners = set()
    for index in range(200):
        crop = preprocess.augment(array, counter_rng(0, 1, index))
        y, x = divmod(int(crop[0, 0, 0]), 7)
        assert np.array_equal(crop, array[y : y + 4, x : x + 4])
        corners.add((y, x))
    assert corners == {(y, x) for y in range(3) for x in range(4)}


def test_a_crop_that_is_no_multiple_of_four_is_resized():
    preprocess = Preprocess("crop", crop_size=30, flip=False)
    array = noise(30, 30)
    expected = Image.fromarray(array).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(preprocess.augment(array, counter_rng(0, 1, 0)), np.asarray(expected))
    assert preprocess.output_size(100, 70) == (32, 32)


def windows(preprocess: Preprocess, height: int, width: int, count: int = 300) -> set[tuple]:
    """(top, left, height, width) of the windows that `augment` cuts out of an image of this size."""
    array = np.arange(height * width, dtype=np.uint16).reshape(height, width, 1)
    found = set()
    for index in range(count):
        piece = preprocess.augment(array, counter_rng(0, 1, index))
        top, left = divmod(int(piece[0, 0, 0]), width)
        assert np.array_equal(
            piece, array[top : top + piece.shape[0], left : left + piece.shape[1]]
        )
        found.add((top, left, *piece.shape[:2]))
    return found


def test_a_patch_is_a_cell_of_a_shifted_grid():
    preprocess = Preprocess("patch", crop_size=4, flip=False)
    # 3 cells and room for 1 pixel downwards, 2 cells and room for 2 to the right.
    assert windows(preprocess, 13, 10) == {
        (top + offset_y, left + offset_x, 4, 4)
        for top in (0, 4, 8)
        for offset_y in range(2)
        for left in (0, 4)
        for offset_x in range(3)
    }
    assert preprocess.output_size(10, 13) == (4, 4)


def test_trim_cuts_only_what_is_too_long():
    preprocess = Preprocess("trim", crop_size=8, flip=False)
    assert windows(preprocess, 4, 10) == {(0, left, 4, 8) for left in range(3)}
    assert preprocess.output_size(10, 4) == (8, 4)
    assert windows(preprocess, 4, 8, 20) == {(0, 0, 4, 8)}


def test_zoom_shrinks_each_side_by_up_to_a_fifth_but_not_below_the_crop():
    array = noise(200, 100)
    preprocess = Preprocess("zoom", crop_size=88, flip=False)
    sizes = np.array(
        [preprocess.augment(array, counter_rng(0, 1, index)).shape[:2] for index in range(200)]
    )
    assert (sizes[:, 0] >= 160).all() and (sizes[:, 0] <= 200).all()
    assert (sizes[:, 1] >= 88).all() and (sizes[:, 1] <= 100).all()
    assert sizes[:, 0].min() < 170 and sizes[:, 0].max() > 190
    assert sizes[:, 1].min() == 88
    assert preprocess.output_size(100, 200) is None
    cropped = Preprocess("zoom_and_crop", crop_size=88)
    assert cropped.output_size(100, 200) == (88, 88)
    # What is too small for the crop is enlarged to it.
    cropped.check("x.png", 40, 40)
    assert cropped.augment(noise(40, 40), counter_rng(0, 1, 0)).shape == (88, 88, 3)


def test_fixsize_scales_to_the_given_size():
    preprocess = Preprocess("fixsize", fixed_size=(12, 8), flip=False)
    assert preprocess.prepare(Image.fromarray(noise(30, 50))).shape == (8, 12, 3)
    assert preprocess.output_size(50, 30) == (12, 8)
    with pytest.raises(ValueError, match="fixed_size"):
        Preprocess("fixsize")


def test_sixteen_bits_are_resized_in_float_and_stay_sixteen():
    ramp = np.linspace(100, 60000, 64 * 64).reshape(64, 64).astype(np.uint16)
    resized = Preprocess("resize", load_size=32).prepare(Image.fromarray(ramp))
    assert resized.dtype == np.uint16 and resized.shape == (32, 32, 1)
    expected = np.asarray(
        Image.fromarray(ramp.astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    )
    assert np.abs(resized[:, :, 0] - expected).max() <= 0.5
    # An edge overshoots beyond what 16 bits hold, and must not wrap around.
    edge = np.zeros((16, 16), dtype=np.uint16)
    edge[:, 8:] = 65535
    enlarged = Preprocess("resize", load_size=40).prepare(Image.fromarray(edge))[:, :, 0]
    assert (enlarged[:, :12] < 10000).all() and (enlarged[:, -12:] > 55000).all()


def test_flip_mirrors_half_of_the_images_and_only_left_to_right():
    array = noise(8, 8)
    preprocess = Preprocess("none", flip=True)
    flipped = 0
    for index in range(400):
        result = preprocess.augment(array, counter_rng(3, 1, index))
        if np.array_equal(result, array[:, ::-1]):
            flipped += 1
        else:
            assert np.array_equal(result, array)
    # Five standard deviations of a fair coin.
    assert abs(flipped - 200) < 50


def test_tensors_hold_the_normalised_values():
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    tensor = to_tensor(array)
    expected = (torch.arange(256, dtype=torch.float32).view(1, 16, 16) / 255 - 0.5) / 0.5
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(tensor, expected)


def test_bytes_are_clamped_and_truncated():
    values = torch.tensor([-3.0, -1.0, -0.9999, 0.0, 1 / 255, 0.99, 1.0, 7.0])
    # (x + 1) / 2 * 255 is 0, 0, 0.013, 127.5, 128, 253.7, 255, 255
    expected = [0, 0, 0, 127, 128, 253, 255, 255]
    assert to_uint8(values).tolist() == expected


def test_loading_and_saving_again_changes_nothing():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert to_uint8(to_tensor(levels)).flatten().tolist() == list(range(256))


def test_warp_by_nothing_changes_nothing():
    array = noise(9, 12)
    assert np.array_equal(warp(array, Affine(0.0, 1.0, 0.0, 0.0)), array)


def test_warp_shifts_by_whole_pixels_and_mirrors_at_the_border():
    array = np.arange(8, dtype=np.uint8)[None, :, None].repeat(4, 0)
    shifted = warp(array, Affine(0.0, 1.0, 0.0, 2 / 8))
    assert shifted[0, :, 0].tolist() == [2, 1, 0, 1, 2, 3, 4, 5]
    array = array.transpose(1, 0, 2)
    shifted = warp(array, Affine(0.0, 1.0, -1 / 8, 0.0))
    assert shifted[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 6]


def test_warp_by_a_quarter_turn_is_rot90():
    array = noise(8, 8)
    turned = warp(array, Affine(math.pi / 2, 1.0, 0.0, 0.0))
    quarters = [np.rot90(array, 1), np.rot90(array, 3)]
    assert any(np.array_equal(turned, quarter) for quarter in quarters)


def test_warp_enlarges_about_the_centre():
    array = np.zeros((9, 9, 1), dtype=np.uint8)
    array[4, 4] = 1
    large = warp(array, Affine(0.0, 3.0, 0.0, 0.0))
    assert large.sum() == 9 and large[3:6, 3:6].all()


def test_warp_keeps_the_strength_of_noise():
    rng = np.random.default_rng(1)
    array = rng.normal(128, 30, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    for index in range(10):
        result = warp(array, draw_affine(counter_rng(0, 1, index)))
        assert result.std() == pytest.approx(array.std(), rel=0.05)
        assert result[:4].std() == pytest.approx(array.std(), rel=0.2)


def test_affine_draws_stay_in_their_ranges_and_use_them():
    draws = np.array([draw_affine(counter_rng(0, 1, index)) for index in range(500)])
    limits = np.array([math.radians(10), 0.08, 0.05, 0.05])
    deviation = np.abs(draws - [0, 1, 0, 0])
    assert (deviation <= limits).all()
    assert (deviation.max(0) > 0.95 * limits).all()


def test_counter_generators_depend_on_each_of_their_numbers():
    def draws(*numbers):
        return tuple(counter_rng(*numbers).integers(0, 2**32, 4).tolist())

    same = draws(1, 2, 3)
    assert draws(1, 2, 3) == same
    assert len({same, draws(2, 2, 3), draws(1, 3, 3), draws(1, 2, 4)}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": "resize_and_corp"}, "resize_and_corp.*resize, fixsize, scale_width"),
        ({"load_size": 100, "crop_size": 128}, "load_size=100.*crop_size=128"),
        ({"crop_size": 0}, "crop_size=0"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocess(**arguments)


def test_an_image_smaller_than_the_crop_is_named_with_the_fix():
    with pytest.raises(
        UserError, match=r"x\.png: 40x30 is smaller than the crop of 32x32.*at most 30"
    ):
        Preprocess("crop", crop_size=32).check("x.png", 40, 30)
    with pytest.raises(
        UserError, match=r"x\.png: 80x40 \(40x20 after scaling\) is smaller.*scale_shortside"
    ):
        Preprocess("scale_width_and_crop", load_size=40, crop_size=32).check("x.png", 80, 40)
    Preprocess("resize_and_crop", load_size=32, crop_size=32).check("x.png", 40, 30)


def test_greyscale_keeps_a_channel():
    assert to_array(Image.fromarray(noise(4, 5)).convert("L")).shape == (4, 5, 1)
