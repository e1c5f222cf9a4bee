"""Two random views of each image, as contrastive learning of representations trains on.

A view is drawn (`draw_view`: numbers only) and then made (`make_view`: Pillow). The steps and their order are those of
SimCLR (Chen et al. 2020, appendix A): crop, flip, colour jitter, greyscale, blur.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from fastnce.data.images import to_array, to_image, to_tensor
from fastnce.data.labelled import LabelledImages
from fastnce.data.stream import Stream, counter_rng
from fastnce.errors import UserError

_VIEW_STREAM = 5

# Crops whose aspect does not fit into the image are drawn again this often.
_TRIES = 10


@dataclass(frozen=True)
class ViewRecipe:
    """The distribution of views. The defaults are MoCo v2's (Chen et al. 2020, "Improved baselines").

    Attributes:
        crop_scale: smallest and largest share of the image's area that a crop shows.
        crop_aspect: smallest and largest ratio of the crop's width to its height.
        rotation: turns by up to this many degrees either way.
        zoom: scales by up to this share either way.
        shift: moves by up to this share of the side. What comes in from beyond the border is black.
        flip: probability of mirroring left to right.
        jitter: probability of changing the colours, by all four of these, in random order:
        brightness: factor within 1 +- this; 0 leaves it.
        contrast: the same.
        saturation: the same; greyscale images have none.
        hue: turned by up to this share of the circle either way; greyscale images have none.
        grayscale: probability of losing all colour.
        blur: probability of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels of the view.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise _out_of_range(name, getattr(self, name), "a probability, 0 to 1")
        for name, low, high in (
            ("brightness", 0, math.inf),
            ("contrast", 0, math.inf),
            ("saturation", 0, math.inf),
            ("hue", 0, 0.5),
            ("rotation", 0, 180),
            ("zoom", 0, 0.99),
            ("shift", 0, 1),
        ):
            if not low <= getattr(self, name) <= high:
                raise _out_of_range(name, getattr(self, name), f"{low} to {high}")
        for name, high in (("crop_scale", 1), ("crop_aspect", math.inf), ("blur_sigma", math.inf)):
            first, last = getattr(self, name)
            if not 0 < first <= last <= high:
                raise _out_of_range(name, (first, last), f"0 < first <= second <= {high}")


VIEW_RECIPES = {
    # At 224 pixels on ImageNet, as published.
    "simclr": ViewRecipe((0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    "moco-v2": ViewRecipe(),
    # At 32 pixels on CIFAR-10: half the jitter of ImageNet's and no blur (SimCLR, appendix B.9).
    "simclr-cifar": ViewRecipe((0.08, 1.0), blur=0.0),
    "supcon": ViewRecipe(blur=0.0),
    # Ours. A mirrored digit is none, and a crop would cut strokes off.
    "digits": ViewRecipe(
        (1.0, 1.0), (1.0, 1.0), rotation=15, zoom=0.15, shift=0.1, flip=0.0, grayscale=0.0, blur=0.0
    ),
    # Ours. Crops and stretching all the same: with SimCLR (600 steps) the 20 nearest neighbours then give the right digit for
    # 0.993 of the test images, against 0.982 with the recipe above.
    "digits-crops": ViewRecipe(
        (0.3, 1.0), (0.5, 2.0), rotation=20, flip=0.0, grayscale=0.0, blur_sigma=(0.1, 1.5)
    ),
}


@dataclass(frozen=True)
class View:
    """One view's random numbers.

    Attributes:
        box: the crop: left, top, right, bottom, in pixels of the image; need not be whole numbers.
        rotation: degrees, counter-clockwise.
        zoom: scaling factor.
        shift: to the right and downwards, as shares of the side.
        flip: whether to mirror.
        jitter: (what, by how much) in the order in which to apply them: a factor, or of the hue a share of the circle.
        grayscale: whether to lose all colour.
        blur: standard deviation in pixels, or 0.
    """

    box: tuple[float, float, float, float]
    rotation: float
    zoom: float
    shift: tuple[float, float]
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur: float


class TwoViews(Stream):
    """Two views of each image of a labelled set, as an endless stream.

    Sample i, for any i >= 0, is a pure function of (the set and its seed, the recipe, i), as in `LabelledImages`, whose
    order it follows; the set's own flip is not used.

    Args:
        dataset: The images; views are cut out of them at the size that they have there.
        recipe: What a view may look like: one of `VIEW_RECIPES`, by name, or one of your own.
        size: Side of the views in pixels; that of the images by default.
        batch_size: The images of an epoch that fill no batch of this size are left out, others in each epoch: no batch
            reaches over two epochs and holds an image twice (unless the set draws with `class_balance`). 1 leaves out none.

    Raises:
        UserError: If there is no recipe of that name, or `size` or `batch_size` is out of range.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        recipe: ViewRecipe | str,
        *,
        size: int | None = None,
        batch_size: int = 1,
    ) -> None:
        if isinstance(recipe, str):
            if recipe not in VIEW_RECIPES:
                raise UserError(f'recipe="{recipe}": use one of {", ".join(VIEW_RECIPES)}.')
            recipe = VIEW_RECIPES[recipe]
        if size is not None and size < 1:
            raise UserError(f"size={size}: expected a number of pixels, at least 1.")
        super().__init__(dataset.seed)
        self.dataset, self.recipe, self.size = dataset, recipe, size or dataset.size[0]
        if not 1 <= batch_size <= len(dataset):
            raise UserError(
                f"batch_size={batch_size} is larger than the {len(dataset)} images of an epoch, so that a batch would hold images "
                f"twice, as each other's negatives. Use batch_size <= {len(dataset)}, or last_batch=keep."
            )
        self._epoch_samples = len(dataset) // batch_size * batch_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of the images."""
        return self.dataset.class_names

    def files(self) -> dict[str, dict[str, int | None]]:
        """Those of the images."""
        return self.dataset.files()

    def describe(self) -> list[str]:
        """A line on the images: see `LabelledImages.describe`."""
        return self.dataset.describe()

    def __len__(self) -> int:
        """Samples in an epoch: the images that fill whole batches."""
        return self._epoch_samples

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """{"view1", "view2": (C, H, W) float32 in [-1, 1], "label": () int64}."""
        number = self.dataset.image_index(index, len(self))
        image = to_image(self.dataset.pixels(number))
        rng = counter_rng(self.seed, _VIEW_STREAM, index)
        views = [
            make_view(image, draw_view(self.recipe, image.size, rng), self.size) for _ in range(2)
        ]
        first, second = (to_tensor(to_array(view)) for view in views)
        label = torch.tensor(int(self.dataset.labels[number]))
        return {"view1": first, "view2": second, "label": label}


def draw_view(recipe: ViewRecipe, image_size: tuple[int, int], rng: np.random.Generator) -> View:
    """Draws one view of an image of this width and height."""
    flip, jitter, grayscale, blur = rng.random(4)
    tilt, zoom, right, down = rng.uniform(-1, 1, 4).tolist()
    return View(
        box=_draw_box(recipe, *image_size, rng),
        rotation=recipe.rotation * tilt,
        zoom=1 + recipe.zoom * zoom,
        shift=(recipe.shift * right, recipe.shift * down),
        flip=bool(flip < recipe.flip),
        jitter=_draw_jitter(recipe, rng) if jitter < recipe.jitter else (),
        grayscale=bool(grayscale < recipe.grayscale),
        blur=rng.uniform(*recipe.blur_sigma) if blur < recipe.blur else 0.0,
    )


def _draw_box(
    recipe: ViewRecipe, width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Area and logarithm of the aspect uniform, as published, but not rounded to whole pixels: at 32 that is coarse."""
    for _ in range(_TRIES):
        area = rng.uniform(*recipe.crop_scale) * width * height
        aspect = math.exp(rng.uniform(*map(math.log, recipe.crop_aspect)))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left = rng.uniform(0, width - crop_width)
            top = rng.uniform(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height


def _draw_jitter(recipe: ViewRecipe, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    steps = []
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(recipe, name)
        if strength:
            steps.append((name, rng.uniform(max(0, 1 - strength), 1 + strength)))
    if recipe.hue:
        steps.append(("hue", rng.uniform(-recipe.hue, recipe.hue)))
    return tuple(steps[k] for k in rng.permutation(len(steps)))


def make_view(image: Image.Image, view: View, size: int) -> Image.Image:
    """Cuts a view out of an image and scales it (bilinear) to `size` pixels."""
    result = image.resize((size, size), Image.Resampling.BILINEAR, box=view.box)
    if (view.rotation, view.zoom, view.shift) != (0, 1, (0, 0)):
        result = result.transform(
            result.size, Image.Transform.AFFINE, _inverse(view, size), Image.Resampling.BILINEAR
        )
    if view.flip:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, amount in view.jitter:
        result = _JITTER[name](result, amount)
    if view.grayscale and result.mode == "RGB":
        result = result.convert("L").convert("RGB")
    if view.blur:
        result = result.filter(ImageFilter.GaussianBlur(view.blur))
    return result


def _inverse(view: View, size: int) -> tuple[float, ...]:
    """Where each pixel comes from, as Pillow wants it: the inverse of turning and scaling about the centre, then shifting."""
    cos = math.cos(math.radians(view.rotation)) / view.zoom
    sin = math.sin(math.radians(view.rotation)) / view.zoom
    centre = size / 2
    x, y = (-centre - shift * size for shift in view.shift)
    return cos, -sin, cos * x - sin * y + centre, sin, cos, sin * x + cos * y + centre


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    if image.mode != "RGB":
        return image
    array = np.array(image.convert("HSV"))
    array[:, :, 0] += np.uint8(round(share * 256) % 256)  # wraps around, as the circle does
    return Image.frombytes("HSV", image.size, array.tobytes()).convert("RGB")


_JITTER = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _turn_hue,
}


def _out_of_range(name: str, value: object, expected: str) -> UserError:
    return UserError(f"{name}={value}: expected {expected}.")
