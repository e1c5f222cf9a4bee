"""Views: pure in (seed, index), drawn from the recipe's distribution, and made as Pillow and the equations say."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pictures
import pytest
import torch
from pictures import equal
from PIL import Image

from fastnce.data import VIEW_RECIPES, LabelledImages, TwoViews, ViewRecipe
from fastnce.data.stream import counter_rng
from fastnce.data.views import View, draw_view, make_view
from fastnce.demo import write_photo_crops
from fastnce.errors import UserError

STILL = ViewRecipe((1.0, 1.0), (1.0, 1.0), flip=0, jitter=0, grayscale=0, blur=0)
AS_IT_IS = View((0, 0, 32, 32), 0, 1, (0, 0), False, (), False, 0)
DRAWS = 4000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("set") / "crops"
    return write_photo_crops(out, train_count=3, test_count=1)


def views(root, recipe="simclr", *, channels=3, seed=0, size=None) -> TwoViews:
    images = LabelledImages(root, image_size=32, channels=channels, seed=seed)
    return TwoViews(images, recipe, size=size)


def draws(recipe, image_size=(32, 32)) -> list[View]:
    return [draw_view(recipe, image_size, counter_rng(0, 5, index)) for index in range(DRAWS)]


def levels(mode="RGB") -> Image.Image:
    return Image.fromarray(pictures.levels(32, 32, 3)).convert(mode)


def made(image, size=32, **changes) -> np.ndarray:
    return np.asarray(make_view(image, dataclasses.replace(AS_IT_IS, **changes), size)).astype(int)


@pytest.mark.parametrize("recipe", VIEW_RECIPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_recipe_gives_two_different_views(root, recipe, channels):
    stream, again = (views(root, recipe, channels=channels, size=24) for _ in range(2))
    for index in (30, 7, 8):
        sample = stream[index]
        assert sample.keys() == {"view1", "view2", "label"} and equal(sample, again[index])
        assert sample["view1"].shape == sample["view2"].shape == (channels, 24, 24)
        assert not torch.equal(sample["view1"], sample["view2"])


def test_views_follow_the_order_and_the_labels_of_the_set(root):
    stream, plain = views(root, STILL), LabelledImages(root, image_size=32, flip=False)
    assert len(stream) == len(plain) == 21
    for index in (0, 5, 21, 100):
        sample = stream[index]
        assert sample["label"] == plain[index]["label"]
        assert torch.equal(sample["view1"], plain[index]["image"])
        assert torch.equal(sample["view2"], plain[index]["image"])


def test_no_batch_holds_an_image_twice(root):
    """21 images in batches of 8: two batches an epoch, 5 images left out, others each time."""
    images = LabelledImages(root, image_size=32)
    stream = TwoViews(images, STILL, batch_size=8)
    assert len(stream) == 16
    shown = [images.image_index(index, len(stream)) for index in range(160)]
    assert all(len(set(shown[k : k + 16])) == 16 for k in range(0, 160, 16))
    assert len(set(shown)) == 21
    for index in (3, 15, 16, 100):
        assert torch.equal(stream[index]["view1"], images.image(shown[index]))
    with pytest.raises(UserError, match="batch_size=22 is larger than the 21 images"):
        TwoViews(images, STILL, batch_size=22)


def test_crops_stay_in_range_and_inside_the_image():
    recipe = ViewRecipe((0.2, 1.0))
    boxes = np.array([view.box for view in draws(recipe)])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0 and boxes.max() <= 32
    width, height = right - left, bottom - top
    area, aspect = width * height / 32**2, width / height
    assert area.min() >= 0.2 - 1e-9 and area.min() < 0.21 and 0.98 < area.max() <= 1
    assert aspect.min() >= 3 / 4 - 1e-9 and aspect.min() < 0.76
    assert aspect.max() <= 4 / 3 + 1e-9 and aspect.max() > 1.32
    # Wide and high ones alike, anywhere.
    spread = math.log(4 / 3) / math.sqrt(3 * DRAWS)
    assert abs(np.log(aspect).mean()) < 5 * spread
    assert abs((left + right).mean() / 2 - 16) < 0.5 and abs((top + bottom).mean() / 2 - 16) < 0.5
    # Where every aspect fits, areas are uniform.
    small = np.array([view.box for view in draws(ViewRecipe((0.1, 0.5)))])
    area = (small[:, 2] - small[:, 0]) * (small[:, 3] - small[:, 1]) / 32**2
    counts = np.histogram(area, 10, (0.1, 0.5))[0]
    assert np.abs(counts - DRAWS / 10).max() < 5 * math.sqrt(DRAWS / 10)
    # A crop that cannot fit is the whole image; a digit is neither mirrored nor cropped.
    wide = draw_view(ViewRecipe((1.0, 1.0), (3.0, 3.0)), (20, 30), counter_rng(0, 5, 0))
    assert wide.box == (0, 0, 20, 30)
    for view in draws(VIEW_RECIPES["digits"], (16, 16))[:50]:
        assert not view.flip and np.allclose(view.box, (0, 0, 16, 16))


def test_every_step_has_its_probability():
    recipe = ViewRecipe(flip=0.5, jitter=0.8, grayscale=0.2, blur=0.3)
    drawn = draws(recipe)
    for probability, count in (
        (0.5, sum(view.flip for view in drawn)),
        (0.8, sum(bool(view.jitter) for view in drawn)),
        (0.2, sum(view.grayscale for view in drawn)),
        (0.3, sum(view.blur > 0 for view in drawn)),
        (0.5 * 0.3, sum(view.flip and view.blur > 0 for view in drawn)),  # independently
    ):
        deviation = math.sqrt(DRAWS * probability * (1 - probability))
        assert abs(count - DRAWS * probability) < 5 * deviation


def test_amounts_fill_their_ranges():
    recipe = ViewRecipe(
        brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2, rotation=15, zoom=0.1, shift=0.2
    )
    drawn = draws(recipe)
    amounts = {
        name: np.array([dict(view.jitter)[name] for view in drawn if view.jitter])
        for name in ("brightness", "contrast", "saturation", "hue")
    }
    amounts["sigma"] = np.array([view.blur for view in drawn if view.blur])
    amounts["rotation"] = np.array([view.rotation for view in drawn])
    amounts["zoom"] = np.array([view.zoom for view in drawn])
    amounts["right"], amounts["down"] = np.array([view.shift for view in drawn]).T
    ranges = {
        "brightness": (0.2, 1.8), "contrast": (0.6, 1.4), "saturation": (0, 2.5), "hue": (-0.2, 0.2),
        "sigma": (0.1, 2), "rotation": (-15, 15), "zoom": (0.9, 1.1), "right": (-0.2, 0.2), "down": (-0.2, 0.2),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        values, width = amounts[name], high - low
        assert low <= values.min() < low + 0.01 * width, name
        assert high - 0.01 * width < values.max() <= high, name
        assert abs(values.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * len(values)), name


def test_the_jitter_comes_in_every_order():
    orders = Counter(tuple(name for name, _ in view.jitter) for view in draws(ViewRecipe()))
    del orders[()]
    assert len(orders) == 24
    mean = sum(orders.values()) / 24
    assert max(abs(count - mean) for count in orders.values()) < 5 * math.sqrt(mean)


def test_crops_flips_and_grey_views():
    assert np.array_equal(made(levels()), np.asarray(levels()))
    crop = np.asarray(levels())[8:24, 4:20]
    assert np.array_equal(made(levels(), 16, box=(4, 8, 20, 24)), crop)
    assert np.array_equal(made(levels(), 16, box=(4, 8, 20, 24), flip=True), crop[:, ::-1])
    grey = made(levels(), grayscale=True)
    assert grey.shape == (32, 32, 3) and (grey == np.asarray(levels("L"))[:, :, None]).all()
    one = (("brightness", 1.8), ("contrast", 0.3))
    assert not np.array_equal(made(levels(), jitter=one), made(levels(), jitter=one[::-1]))


def test_brightness_contrast_and_saturation():
    image = np.asarray(levels()).astype(int)
    grey = np.asarray(levels("L")).astype(int)
    centres = {"brightness": 0, "contrast": round(grey.mean()), "saturation": grey[:, :, None]}
    for name, centre in centres.items():
        for factor in (0.0, 0.5, 1.0, 1.7):
            expected = (centre + factor * (image - centre)).clip(0, 255)
            result = made(levels(), jitter=((name, factor),))
            assert np.abs(result - expected).max() <= 1, (name, factor)


@pytest.mark.parametrize(
    ("share", "colour"),
    [(1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.5, (0, 255, 255)), (0, (255, 0, 0))],
)
def test_hue_turns_red_into_other_colours(share, colour):
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    assert np.abs(made(red, jitter=(("hue", share),)) - colour).max() <= 6  # one of 256 hues


def test_blur_has_its_standard_deviation():
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[16] = 255
    for sigma in (0.5, 1.0, 2.0):
        profile = made(Image.fromarray(pixels), blur=sigma)[:, 16]
        variance = (profile * (np.arange(32) - 16) ** 2).sum() / profile.sum()
        assert math.sqrt(variance) == pytest.approx(sigma, rel=0.1)


def test_rotation_shift_and_zoom():
    turned = levels("L").rotate(12, Image.Resampling.BILINEAR)
    difference = np.abs(made(levels("L"), rotation=12) - np.asarray(turned))
    assert np.percentile(difference, 99) <= 1  # but for rounding at the black border
    image, shifted = np.asarray(levels("L")), made(levels("L"), shift=(4 / 32, -2 / 32))
    assert np.array_equal(shifted[:30, 4:], image[2:, :28])
    assert not shifted[30:].any() and not shifted[:, :4].any()
    large = made(levels("L"), zoom=2.0)
    expected = levels("L").crop((8, 8, 24, 24)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(large - np.asarray(expected))[1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flip": 1.5}, "flip=1.5: expected a probability"),
        ({"hue": 0.6}, "hue=0.6: expected 0 to 0.5"),
        ({"brightness": -0.1}, "brightness=-0.1"),
        ({"crop_scale": (0.5, 1.2)}, r"crop_scale=\(0.5, 1.2\)"),
        ({"crop_aspect": (2, 1)}, "crop_aspect"),
        ({"zoom": 1}, "zoom=1: expected 0 to 0.99"),
    ],
)
def test_recipes_out_of_range_are_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        ViewRecipe(**arguments)


def test_other_mistakes_are_explained(root):
    with pytest.raises(UserError, match='recipe="simlcr": use one of simclr, moco-v2'):
        views(root, "simlcr")
    with pytest.raises(UserError, match="size=0"):
        views(root, size=0)
