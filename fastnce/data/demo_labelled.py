"""Demo sets of real images with labels, in class folders: digits, and crops of photographs."""

from collections import Counter
from pathlib import Path

from fastnce.data.recipe import Images, write_once
from fastnce.data.samples import (
    BACKGROUND_SIDE,
    PHOTOS,
    load_background,
    load_enlarged_digits,
    random_crop,
    split_photo,
    to_bytes,
)
from fastnce.data.transforms import counter_rng
from fastnce.errors import UserError

SIZES = (16, 32)
CROP_SIZE = 32
TEST_EVERY = 3

_DIGITS_STREAM, _CROPS_STREAM = 20, 21


def write_digits(out: Path | str, size: int = 16, seed: int = 0) -> Path:
    """Writes the digits set: scikit-learn's 1,797 handwritten digits in 10 classes, greyscale.

    Each 8x8 original is enlarged (bicubic), white on black. A third of each class, drawn at random, is
    for testing; the same people wrote both parts. `out/labels.json` holds the recipe and, for each image,
    its digit and its number in scikit-learn's set.

    Args:
        out: Folder to write: train/0/0000.png to test/9/0058.png. Left as it is if it holds this set
            already.
        size: Side of the images in pixels, 16 or 32.
        seed: Seed of the split.

    Returns:
        `out`.

    Raises:
        UserError: If `size` is another one, `out` holds something else or cannot be written, or
            scikit-learn is missing.
    """
    if size not in SIZES:
        raise UserError(f"size={size}: the digits are written at 16 or 32 pixels. Use one of them.")
    recipe = {"kind": "digits", "version": 1, "seed": seed, "size": size, "test_every": TEST_EVERY}
    return write_once(Path(out), recipe, lambda: _digits(size, seed))


def write_photo_crops(
    out: Path | str, *, train_count: int = 300, test_count: int = 100, seed: int = 0
) -> Path:
    """Writes 32x32 crops of the seven photographs; the class is the photograph.

    Each photograph is scaled (bicubic) to a shorter side of 128 pixels, so that a crop shows part of the
    scene. The test crops come from its right quarter, the training crops from the rest: they share no
    pixel. `out/labels.json` holds the recipe and, for each image, its photograph and the corner of the
    crop.

    Args:
        out: Folder to write: train/astronaut/0000.png and so on. Left as it is if it holds this set
            already.
        train_count: Training crops of each photograph.
        test_count: Test crops of each photograph.
        seed: Seed of the crops.

    Returns:
        `out`.

    Raises:
        UserError: If `out` holds something else or cannot be written, or a package is missing.
    """
    counts = {"train": train_count, "test": test_count}
    for split, count in counts.items():
        if count < 1:
            raise UserError(f"{split}_count={count}: expected at least 1 crop of each photograph.")
    recipe = {
        "kind": "photo-crops",
        "version": 1,
        "seed": seed,
        "size": CROP_SIZE,
        "shorter_side": BACKGROUND_SIDE,
        "photos": list(PHOTOS),
        **{f"{split}_count": count for split, count in counts.items()},
    }
    return write_once(Path(out), recipe, lambda: _photo_crops(counts, seed))


def _digits(size: int, seed: int) -> Images:
    strokes, digits = load_enlarged_digits(size)
    seen, written = Counter(), Counter()
    for source in counter_rng(seed, _DIGITS_STREAM, 0).permutation(len(strokes)).tolist():
        digit = int(digits[source])
        split = "test" if seen[digit] % TEST_EVERY == 0 else "train"
        seen[digit] += 1
        name = f"{split}/{digit}/{written[split, digit]:04d}.png"
        written[split, digit] += 1
        yield name, to_bytes(strokes[source])[:, :, None], {"digit": digit, "source": source}


def _photo_crops(counts: dict[str, int], seed: int) -> Images:
    drawn = 0
    for photo in PHOTOS:
        parts = split_photo(photo, load_background(photo), CROP_SIZE)
        for split, (part, start) in parts.items():
            for number in range(counts[split]):
                crop, (y, x) = random_crop(part, CROP_SIZE, counter_rng(seed, _CROPS_STREAM, drawn))
                drawn += 1
                label = {"photo": photo, "corner": (y, x + start)}
                yield f"{split}/{photo}/{number:04d}.png", crop, label
