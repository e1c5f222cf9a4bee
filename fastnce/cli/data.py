"""`fastnce data NAME`: the built-in data sets."""

from __future__ import annotations

from pathlib import Path


def digits_photos(out: Path, photo: tuple[str, ...] = ("coffee",), seed: int = 0) -> None:
    """Real handwritten digits (A) and the same kind of digits over a photograph (B), 32 x 32, unpaired.

    Args:
        out: Folder for trainA, trainB, testA and testB; created.
        photo: The photograph, one of those that scikit-learn and scikit-image carry; or several, then each image of B is on
            one of them.
        seed: Seed of the split, the noise and the crops.
    """
    from fastnce.demo import write_digits_photos

    _tell(write_digits_photos(out, seed=seed, photo=photo), "cut --preset digits")


def photos(out: Path, size: int = 128, seed: int = 0) -> None:
    """Two folders of crops from real photographs, for the real-size path.

    Args:
        out: Folder for trainA, trainB, testA and testB; created.
        size: Side of the crops in pixels.
        seed: Seed of the crops.
    """
    from fastnce.demo import write_photos

    _tell(write_photos(out, size=size, seed=seed), "cut")


def single_photos(
    out: Path, size: int = 192, photo_a: str = "china", photo_b: str = "rocket"
) -> None:
    """Two real photographs, one for each domain, for SinCUT; by default a temple by day and a rocket at dusk.

    Args:
        out: Folder for trainA and trainB; created.
        size: Shorter side of the photographs in pixels.
        photo_a: The photograph of trainA, one of those that scikit-learn and scikit-image carry.
        photo_b: The photograph of trainB.
    """
    from fastnce.demo import write_single_photos

    _tell(
        write_single_photos(out, size=size, photo_a=photo_a, photo_b=photo_b),
        "sincut --preset single-photos",
    )


def digits(out: Path, size: int = 16, seed: int = 0) -> None:
    """Real handwritten digits in 10 class folders, greyscale.

    Args:
        out: Folder for train/<digit> and test/<digit>; created.
        size: Side of the images in pixels, 16 or 32.
        seed: Seed of the split.
    """
    from fastnce.demo import write_digits

    _tell(write_digits(out, size=size, seed=seed), "contragan --preset digits")


def photo_crops(out: Path, seed: int = 0) -> None:
    """Crops of seven real photographs, 32 x 32, in class folders: the class is the photograph.

    Args:
        out: Folder for train/<photograph> and test/<photograph>; created.
        seed: Seed of the crops.
    """
    from fastnce.demo import write_photo_crops

    _tell(write_photo_crops(out, seed=seed), "simclr --preset photo-crops")


def _tell(out: Path, training: str) -> None:
    """Prints the content of the set and its use."""
    from fastnce.data import list_images

    folders = sorted(folder for folder in out.iterdir() if folder.is_dir())
    print(f"{out}: {', '.join(f'{x.name} {len(list_images(x))} images' for x in folders)}")
    print(f"Next: fastnce train {training} --data {out} --out RUN")
