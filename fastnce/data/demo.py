"""Demo sets of real images: digits on photographs, and crops of photographs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastnce.data.recipe import Images, write_once
from fastnce.data.samples import (
    BACKGROUND_SIDE,
    DIGIT_MARGIN,
    DIGIT_SIZE,
    NOISE_SIGMA,
    PHOTOS,
    composite,
    load_background,
    load_digits,
    load_photo,
    noisy_digit,
    random_crop,
    scaled_photo,
    split_photo,
)
from fastnce.data.transforms import counter_rng
from fastnce.errors import UserError

TEST_EVERY = 3

_HALVES_STREAM, _NOISE_STREAM, _CROP_STREAM, _PHOTOS_STREAM, _PHOTO_STREAM = 10, 11, 12, 13, 14


def write_digits_photos(
    out: Path | str, seed: int = 0, photo: str | Sequence[str] = "coffee"
) -> Path:
    """Writes the digits-photos set: handwritten digits (A), and digits on a photograph (B).

    A is one half of the 1,797 digits, each as a `noisy_digit`; B is the other half, each as a
    `composite` with a random crop of the photograph, scaled to a shorter side of 128 pixels. No sample is in both, a third of
    each is for testing, all have the same share of every digit, and the order tells nothing about which belong together. `out/labels.json` holds the
    recipe and, for each image, its digit, its number in scikit-learn's set and, for B, the
    photograph and the corner of the crop.

    Args:
        out: Folder to write: trainA, trainB, testA, testB of 32x32 PNG files. Left as it is if it
            holds this set already.
        seed: Seed of the halves, the noise and the crops.
        photo: One of `PHOTOS`; or several, one of which is drawn for each image of B.

    Returns:
        `out`.

    Raises:
        UserError: If `out` holds something else, cannot be written, a photograph is unknown, or a package is missing.
    """
    photos = [photo] if isinstance(photo, str) else list(photo)
    if not photos or len(set(photos)) < len(photos):
        raise UserError(
            f"photo={photo}: expected at least one photograph, none of them twice. Use some of {', '.join(PHOTOS)}."
        )
    recipe = {
        "kind": "digits-photos",
        "version": 1,
        "seed": seed,
        # A single name, as in the sets from before there could be several.
        "photo": photos[0] if len(photos) == 1 else photos,
        "background_side": BACKGROUND_SIDE,
        "size": DIGIT_SIZE,
        "margin": DIGIT_MARGIN,
        "noise_sigma": NOISE_SIGMA,
        "test_every": TEST_EVERY,
    }
    return write_once(Path(out), recipe, lambda: _digits_photos(seed, photos))


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

    The test crops come from the right of each photograph (a quarter of its width, or one crop's
    width if that is more), the training crops from the rest: they share no pixel.

    Args:
        out: Folder to write: trainA, trainB, testA, testB of PNG files. Left as it is if it holds
            this set already.
        size: Side of the crops in pixels: 128, 256, or another that the photographs allow.
        photo_a: One of `PHOTOS`.
        photo_b: Another one.
        train_count: Images in trainA and in trainB.
        test_count: Images in testA and in testB.
        seed: Seed of the crops.

    Returns:
        `out`.

    Raises:
        UserError: If a photograph is too small, `out` holds something else or cannot be written, or
            a package is missing.
    """
    _expect_two_photos(photo_a, photo_b)
    recipe = {
        "kind": "photos",
        "version": 1,
        "seed": seed,
        "size": size,
        "photo_a": photo_a,
        "photo_b": photo_b,
        "train_count": train_count,
        "test_count": test_count,
    }
    photos = {"A": photo_a, "B": photo_b}
    counts = {"train": train_count, "test": test_count}
    return write_once(Path(out), recipe, lambda: _photos(photos, size, counts, seed))


def write_single_photos(
    out: Path | str, size: int = 192, *, photo_a: str = "china", photo_b: str = "rocket"
) -> Path:
    """Writes one photograph as A and one as B, for SinCUT; by default a temple by day and a rocket at dusk.

    Args:
        out: Folder to write: trainA and trainB, each of one PNG file. Left as it is if it holds this set already.
        size: Shorter side, in pixels, to which both photographs are scaled (bicubic).
        photo_a: One of `PHOTOS`.
        photo_b: Another one.

    Returns:
        `out`.

    Raises:
        UserError: If `size` is below 8 or above that of a photograph, the photographs are the same or unknown, `out` holds
            something else or cannot be written, or a package is missing.
    """
    _expect_two_photos(photo_a, photo_b)
    recipe = {
        "kind": "single-photos",
        "version": 1,
        "size": size,
        "photo_a": photo_a,
        "photo_b": photo_b,
    }
    photos = {"A": photo_a, "B": photo_b}
    return write_once(Path(out), recipe, lambda: _single_photos(photos, size))


def _expect_two_photos(photo_a: str, photo_b: str) -> None:
    if photo_a == photo_b:
        raise UserError(
            f'photo_a and photo_b are both "{photo_a}". '
            f"Use two different ones of {', '.join(PHOTOS)}."
        )


def _digits_photos(seed: int, photos: list[str]) -> Images:
    backgrounds = {photo: load_background(photo) for photo in photos}
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
            yield (
                name,
                noisy_digit(strokes[source], counter_rng(seed, _NOISE_STREAM, source)),
                label,
            )
        else:
            photo = photos[counter_rng(seed, _PHOTO_STREAM, source).integers(len(photos))]
            crop, corner = random_crop(
                backgrounds[photo], DIGIT_SIZE, counter_rng(seed, _CROP_STREAM, source)
            )
            label |= {"photo": photo, "corner": corner}
            yield name, composite(strokes[source], crop), label


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
