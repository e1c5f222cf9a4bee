"""The built-in sets, of real digits and photographs that ship inside scikit-learn and scikit-image: no download.

They are written whole or not at all, with the recipe that they were made from.
"""

import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastnce.data.images import read_image, to_array, to_image
from fastnce.data.stream import counter_rng
from fastnce.errors import UserError, known
from fastnce.files import write_json

# Photograph -> the package it ships in, and where.
PHOTOS = {
    "coffee": ("skimage", "data/coffee.png"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}

DIGIT_SIZE = 32
DIGIT_MARGIN = 4
NOISE_SIGMA = 0.2
# At full size a crop of 32 pixels shows little more than one colour; at this shorter side it shows part of the scene.
BACKGROUND_SIDE = 128

LABELS_FILE = "labels.json"
TEST_EVERY = 3
CROP_SIZE = 32

# Other looks of the digits, of strokes (S, S) in [0, 1]; each pixel changes by itself, so that no loop is closed.
LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda x: x,
    "thin": lambda x: (1.8 * x - 0.8).clip(0, 1),
    "bold": lambda x: 1 - (1 - x) ** 2,
    "fading": lambda x: x * np.linspace(1, 0.3, len(x), dtype=np.float32)[:, None],
}

# Images of a set, one after the other: name below the set's folder, pixels, label.
Images = Iterator[tuple[str, np.ndarray, dict[str, Any]]]

_HALVES_STREAM, _NOISE_STREAM, _CROP_STREAM, _PHOTOS_STREAM, _PHOTO_STREAM = 10, 11, 12, 13, 14
_DIGITS_STREAM, _CROPS_STREAM = 20, 21


def write_digits_photos(
    out: Path | str, seed: int = 0, photo: str | Sequence[str] = "coffee"
) -> Path:
    """Writes the digits-photos set: handwritten digits (A), and digits on a photograph (B).

    A is one half of the 1,797 digits, each as a `noisy_digit`; B is the other half, each as a `composite` with a random crop of
    the photograph, scaled to a shorter side of 128 pixels. No sample is in both, a third of each is for testing, all have the
    same share of every digit, and the order tells nothing about which belong together. `out/labels.json` holds the recipe and,
    for each image, its digit, its number in scikit-learn's set and, for B, the photograph and the corner of the crop.

    Args:
        out: Folder to write: trainA, trainB, testA, testB of 32x32 PNG files. As all these sets, it is left as it is if it
            holds this set already, and returned.
        seed: Seed of the halves, the noise and the crops.
        photo: One of `PHOTOS`; or several, one of which is drawn for each image of B.

    Raises:
        UserError: If `out` holds something else, cannot be written, a photograph is unknown, or a package is missing.
    """
    photos = [photo] if isinstance(photo, str) else list(photo)
    if not photos or len(set(photos)) < len(photos):
        raise UserError(
            f"photo={photo}: expected at least one photograph, none of them twice. Use some of {', '.join(PHOTOS)}."
        )
    settings = {
        "seed": seed,
        # A single name, as in the sets from before there could be several.
        "photo": photos[0] if len(photos) == 1 else photos,
        "background_side": BACKGROUND_SIDE,
        "size": DIGIT_SIZE,
        "margin": DIGIT_MARGIN,
        "noise_sigma": NOISE_SIGMA,
        "test_every": TEST_EVERY,
    }
    return write_once(Path(out), "digits-photos", settings, lambda: _digits_photos(seed, photos))


def write_photos(
    out: Path | str,
    size: int = 128,
    *,
    photo_a: str = "coffee",
    photo_b: str = "motorcycle",
    train_count: int = 200,
    test_count: int = 20,
    seed: int = 0,
) -> Path:
    """Writes random crops of two photographs as A and B, for training at real sizes.

    The test crops come from the right of each photograph (a quarter of its width, or one crop's width if that is more), the
    training crops from the rest: they share no pixel.

    Args:
        out: Folder to write: trainA, trainB, testA, testB of PNG files.
        size: Side of the crops in pixels: 128, 256, or another that the photographs allow.
        photo_a, photo_b: Two of `PHOTOS`, which scikit-learn and scikit-image carry.
        train_count, test_count: Images in trainA and in trainB, and in testA and in testB.
        seed: Seed of the crops.

    Raises:
        UserError: As `write_digits_photos`, and if a photograph is too small.
    """
    photos = _two_photos(photo_a, photo_b)
    counts = {"train": train_count, "test": test_count}
    settings = {
        "seed": seed,
        "size": size,
        "photo_a": photo_a,
        "photo_b": photo_b,
        "train_count": train_count,
        "test_count": test_count,
    }
    return write_once(Path(out), "photos", settings, lambda: _photos(photos, size, counts, seed))


def write_single_photos(
    out: Path | str, size: int = 192, *, photo_a: str = "china", photo_b: str = "rocket"
) -> Path:
    """Writes one photograph as A and one as B, for SinCUT; by default a temple by day and a rocket at dusk.

    Args:
        out: Folder to write: trainA and trainB, each of one PNG file.
        size: Shorter side, in pixels, to which both photographs are scaled (bicubic).
        photo_a, photo_b: Two of `PHOTOS`, which scikit-learn and scikit-image carry.

    Raises:
        UserError: As `write_digits_photos`, and if `size` is below 8 or above that of a photograph.
    """
    photos = _two_photos(photo_a, photo_b)
    settings = {"size": size, "photo_a": photo_a, "photo_b": photo_b}
    return write_once(Path(out), "single-photos", settings, lambda: _single_photos(photos, size))


def write_digits(
    out: Path | str, size: int = 16, seed: int = 0, look: str = "plain"
) -> Path:
    """Writes the digits set: scikit-learn's 1,797 handwritten digits in 10 classes, greyscale.

    Each 8x8 original is enlarged (bicubic), white on black. A third of each class, drawn at random, is for testing; the same
    people wrote both parts. `out/labels.json` holds the recipe and, for each image, its digit and its number in scikit-learn's set.

    Args:
        out: Folder to write: train/0/0000.png to test/9/0058.png.
        size: Side of the images in pixels, 16 or 32.
        seed: Seed of the split.
        look: The same digits as another domain: plain, thin strokes, bold ones, or fading towards the bottom.

    Raises:
        UserError: As `write_digits_photos`, and if `size` or `look` is another one.
    """
    if size not in (16, 32):
        raise UserError(f"size={size}: the digits are written at 16 or 32 pixels. Use one of them.")
    known(look, LOOKS, "look")
    settings = {"seed": seed, "size": size, "test_every": TEST_EVERY}
    settings |= {} if look == "plain" else {"look": look}  # sets from before there were looks
    return write_once(Path(out), "digits", settings, lambda: _digits(size, seed, LOOKS[look]))


def write_photo_crops(
    out: Path | str, *, train_count: int = 300, test_count: int = 100, seed: int = 0
) -> Path:
    """Writes 32x32 crops of the seven photographs; the class is the photograph.

    Each photograph is scaled (bicubic) to a shorter side of 128 pixels, so that a crop shows part of the scene. The test crops
    come from its right quarter, the training crops from the rest: they share no pixel. `out/labels.json` holds the recipe and,
    for each image, its photograph and the corner of the crop.

    Args:
        out: Folder to write: train/astronaut/0000.png and so on.
        train_count, test_count: Crops of each photograph.
        seed: Seed of the crops.

    Raises:
        UserError: As `write_digits_photos`, and if a count is below 1.
    """
    counts = {"train": train_count, "test": test_count}
    for split, count in counts.items():
        if count < 1:
            raise UserError(f"{split}_count={count}: expected at least 1 crop of each photograph.")
    settings = {
        "seed": seed,
        "size": CROP_SIZE,
        "shorter_side": BACKGROUND_SIDE,
        "photos": list(PHOTOS),
        **{f"{split}_count": count for split, count in counts.items()},
    }
    return write_once(Path(out), "photo-crops", settings, lambda: _photo_crops(counts, seed))


def read_labels(root: Path | str) -> dict[str, Any]:
    """The `labels.json` of a set written here: {"recipe": {...}, "images": {name: {...}, ...}}.

    Names are like "testA/0000.png".

    Raises:
        UserError: If `root` holds none, or one that cannot be read.
    """
    path = Path(root) / LABELS_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        if not {"recipe", "images"} <= labels.keys():
            raise ValueError("no recipe or no images in it")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{root}: holds no {LABELS_FILE}, so it is not a set that `fastnce data` wrote. "
            "Write one with `fastnce data digits-photos --out FOLDER`."
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Delete {root} and write the set again."
        ) from error
    return labels


def kind_of(root: Path | str | Mapping[str, Path]) -> str | None:
    """The kind of the set that `fastnce data` wrote into a folder; None for other folders, and for folders by name."""
    if isinstance(root, Mapping) or not Path(root, LABELS_FILE).is_file():
        return None
    return read_labels(root)["recipe"].get("kind")


def load_photo(name: str) -> np.ndarray:
    """One of `PHOTOS`: (H, W, 3) uint8. UserError if there is no such photograph, or its package is not installed."""
    if name not in PHOTOS:
        raise UserError(f'photo="{name}": no such photograph. Use one of {", ".join(PHOTOS)}.')
    return load_packaged(*PHOTOS[name], f'The photograph "{name}"')


def load_packaged(package: str, path: str, what: str) -> np.ndarray:
    """An image that ships in a package: (H, W, 3) uint8. UserError, which names `what` it is, if the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, what)
    return to_array(read_image(Path(spec.submodule_search_locations[0], path), 3))


def scaled_photo(name: str, size: int = BACKGROUND_SIDE) -> np.ndarray:
    """One of `PHOTOS`, scaled down (bicubic) to a shorter side of `size` pixels: (H, W, 3) uint8."""
    image = to_image(load_photo(name))
    if not 8 <= size <= min(image.size):
        raise UserError(
            f'size={size}: the photograph "{name}" has {image.width}x{image.height} pixels. '
            f"Use a size of 8 to {min(image.size)}, or another photograph."
        )
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    return to_array(image.resize(scaled, Image.Resampling.BICUBIC))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits of `load_enlarged_digits` at 24 pixels, with a margin of 4: (1797, 32, 32) and their labels."""
    strokes, labels = load_enlarged_digits(DIGIT_SIZE - 2 * DIGIT_MARGIN)
    margin = (DIGIT_MARGIN, DIGIT_MARGIN)
    return np.pad(strokes, ((0, 0), margin, margin)), labels


def load_enlarged_digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, each scaled (bicubic) from its 8x8 pixels to `size` x `size`.

    Returns the strokes (1797, size, size) float32 in [0, 1], 1 for ink, and their digits (1797,) int64.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise _missing("sklearn", "The set of handwritten digits") from error
    bunch = load()
    small = (Image.fromarray((image / 16).astype(np.float32)) for image in bunch.images)
    large = np.stack([x.resize((size, size), Image.Resampling.BICUBIC) for x in small])
    return large.clip(0, 1), bunch.target.astype(np.int64)


def noisy_digit(stroke: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White on black, with sensor noise of sigma 0.2 drawn for each pixel and channel.

    (..., H, W) float32 in [0, 1] to (..., H, W, 3) uint8.
    """
    noise = rng.standard_normal((*stroke.shape, 3), dtype=np.float32)
    return to_bytes(stroke[..., None] + np.float32(NOISE_SIGMA) * noise)


def composite(stroke: np.ndarray, background: np.ndarray) -> np.ndarray:
    """|photo - digit|: the photograph, with its colours inverted where there is ink.

    (..., H, W) float32 in [0, 1] and (..., H, W, 3) uint8 to (..., H, W, 3) uint8.
    """
    return to_bytes(np.abs(background.astype(np.float32) / 255 - stroke[..., None]))


def split_photo(name: str, image: np.ndarray, size: int) -> dict[str, tuple[np.ndarray, int]]:
    """Divides a photograph (H, W, C) into a left part for training and a right one for testing, with the columns where they start.

    The right part is a quarter of the width, or `size`, the side of the crops to come, if that is more. UserError if a crop does
    not fit into both.
    """
    height, width = image.shape[:2]
    test_width = max(size, width // 4)
    if size < 4 or width - test_width < size or height < size:
        raise UserError(
            f'size={size}: does not fit the photograph "{name}" ({width}x{height}), which is '
            "divided into a part for training and one for testing. "
            f"Use a size of 4 to {min(width // 2, height)}, or another photograph."
        )
    start = width - test_width
    return {"train": (image[:, :start], 0), "test": (image[:, start:], start)}


def random_crop(
    image: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """A random square of `size` pixels of (H, W, C), and its upper left corner (y, x)."""
    y = int(rng.integers(image.shape[0] - size + 1))
    x = int(rng.integers(image.shape[1] - size + 1))
    return image[y : y + size, x : x + size], (y, x)


def random_crops(photo: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 32, 32, 3) uint8 from random places of a photograph (H, W, 3)."""
    window = np.arange(DIGIT_SIZE)
    y, x = (rng.integers(side - DIGIT_SIZE + 1, size=count) for side in photo.shape[:2])
    return photo[(y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :]]


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, rounded; values beyond are clipped."""
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def write_once(
    out: Path,
    kind: str,
    settings: dict[str, Any],
    images: Callable[[], Images],
    more: Callable[[Path], dict[str, Any]] | None = None,
) -> Path:
    """Writes a set into a folder beside `out` and renames it when complete; skips what is there.

    Args:
        out: Folder to write.
        kind, settings: The recipe.
        images: Makes the images.
        more: Writes further files into the folder that it gets, and returns what `labels.json` says of them.

    Raises:
        UserError: If `out` holds something else, or cannot be written.
    """
    recipe = {"kind": kind, "version": 1} | settings
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if (out / LABELS_FILE).is_file() and read_labels(out)["recipe"] == recipe:
            return out
        raise UserError(
            f"{out}: holds something else already, not the {kind} set with these "
            "settings. Choose another folder, or delete this one first."
        )
    # Absolute, so that "." has a name; beside `out`, so that the renaming is one step.
    target = out.absolute()
    partial = target.parent / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        labels = {}
        for name, array, label in images():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            to_image(array).save(path)
            labels[name] = label
        notes = {} if more is None else more(partial)
        write_json({"recipe": recipe, "images": labels} | notes, partial / LABELS_FILE)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}). "
            "Free some space or choose a folder that you can write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _missing(package: str, what: str) -> UserError:
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
    return UserError(
        f"{what} comes with {distribution}, which is not installed. Run: pip install 'fastnce[demo]'"
    )


def _two_photos(photo_a: str, photo_b: str) -> dict[str, str]:
    if photo_a == photo_b:
        raise UserError(
            f'photo_a and photo_b are both "{photo_a}". '
            f"Use two different ones of {', '.join(PHOTOS)}."
        )
    return {"A": photo_a, "B": photo_b}


def _digits_photos(seed: int, photos: list[str]) -> Images:
    backgrounds = {photo: scaled_photo(photo) for photo in photos}
    strokes, digits = load_digits()
    order = counter_rng(seed, _HALVES_STREAM, 0).permutation(len(strokes))
    seen, written = Counter(), Counter()
    for source in order.tolist():
        # Each digit's samples are dealt out in turn, so that all four folders have the same share of
        # every digit; with shares left to chance, two folders would differ before any translation.
        turn = seen[digits[source]]
        seen[digits[source]] += 1
        domain = "AB"[turn % 2]
        folder = ("test" if turn // 2 % TEST_EVERY == 0 else "train") + domain
        name = f"{folder}/{written[folder]:04d}.png"
        written[folder] += 1
        label = {"digit": int(digits[source]), "source": source}
        if domain == "A":
            image = noisy_digit(strokes[source], counter_rng(seed, _NOISE_STREAM, source))
        else:
            photo = photos[counter_rng(seed, _PHOTO_STREAM, source).integers(len(photos))]
            crop, corner = random_crop(
                backgrounds[photo], DIGIT_SIZE, counter_rng(seed, _CROP_STREAM, source)
            )
            label |= {"photo": photo, "corner": corner}
            image = composite(strokes[source], crop)
        yield name, image, label


def _photos(photos: dict[str, str], size: int, counts: dict[str, int], seed: int) -> Images:
    for domain, photo in photos.items():
        parts = split_photo(photo, load_photo(photo), size)
        for split, (part, start) in parts.items():
            for number in range(counts[split]):
                rng = counter_rng(seed, _PHOTOS_STREAM, 2 * number + (split == "test"))
                crop, (y, x) = random_crop(part, size, rng)
                label = {"photo": photo, "corner": (y, x + start)}
                yield f"{split}{domain}/{number:04d}.png", crop, label


def _single_photos(photos: dict[str, str], size: int) -> Images:
    for domain, photo in photos.items():
        yield f"train{domain}/{photo}.png", scaled_photo(photo, size), {"photo": photo}


def _digits(size: int, seed: int, look: Callable[[np.ndarray], np.ndarray]) -> Images:
    strokes, digits = load_enlarged_digits(size)
    seen, written = Counter(), Counter()
    for source in counter_rng(seed, _DIGITS_STREAM, 0).permutation(len(strokes)).tolist():
        digit = int(digits[source])
        split = "test" if seen[digit] % TEST_EVERY == 0 else "train"
        seen[digit] += 1
        name = f"{split}/{digit}/{written[split, digit]:04d}.png"
        written[split, digit] += 1
        yield name, to_bytes(look(strokes[source]))[:, :, None], {"digit": digit, "source": source}


def _photo_crops(counts: dict[str, int], seed: int) -> Images:
    drawn = 0
    for photo in PHOTOS:
        parts = split_photo(photo, scaled_photo(photo), CROP_SIZE)
        for split, (part, start) in parts.items():
            for number in range(counts[split]):
                crop, (y, x) = random_crop(part, CROP_SIZE, counter_rng(seed, _CROPS_STREAM, drawn))
                drawn += 1
                label = {"photo": photo, "corner": (y, x + start)}
                yield f"{split}/{photo}/{number:04d}.png", crop, label
