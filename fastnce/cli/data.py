"""`fastnce data NAME`: the built-in data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


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


def digits(
    out: Path,
    size: int = 16,
    seed: int = 0,
    look: Literal["plain", "thin", "bold", "fading"] = "plain",
) -> None:
    """Real handwritten digits in 10 class folders, greyscale.

    Args:
        out: Folder for train/<digit> and test/<digit>; created.
        size: Side of the images in pixels, 16 or 32.
        seed: Seed of the split.
        look: Other looks of the same digits, for a second generator: thin strokes, bold ones, or fading towards the bottom.
    """
    from fastnce.demo import write_digits

    _tell(write_digits(out, size=size, seed=seed, look=look), "contragan --preset digits")


def photo_crops(out: Path, seed: int = 0) -> None:
    """Crops of seven real photographs, 32 x 32, in class folders: the class is the photograph.

    Args:
        out: Folder for train/<photograph> and test/<photograph>; created.
        seed: Seed of the crops.
    """
    from fastnce.demo import write_photo_crops

    _tell(write_photo_crops(out, seed=seed), "simclr --preset photo-crops")


def texture_mosaics(
    out: Path,
    size: int = 32,
    cells: int = 4,
    textures: int = 6,
    train_count: int = 1000,
    test_count: int = 250,
    seed: int = 0,
    networks: bool = True,
) -> None:
    """Label maps of random cells, and images in which each cell shows a texture cut from a real photograph.

    Args:
        out: Folder for train_label, train_img, train_inst, and the same of test; created.
        size: Side of the images in pixels, at most 66.
        cells: Cells of an image; each has a random texture, and is an instance.
        textures: How many textures, 2 to 9; the labels are 0 to textures - 1.
        train_count: Images for training.
        test_count: Images for testing, cut from other parts of the photographs.
        seed: Seed of the cells and the crops.
        networks: Trains three small networks too, in about a minute: critic.pt, a stand-in for VGG; judge.pt and segmenter.pt, which
            judge images and share nothing with it.
    """
    from fastnce.demo import TextureRecipe, write_texture_mosaics

    counts = {"train_count": train_count, "test_count": test_count}
    recipe = TextureRecipe() if networks else None
    written = write_texture_mosaics(
        out, size, cells=cells, textures=textures, **counts, seed=seed, networks=recipe
    )
    _tell(written, _cfl(size))


def posterised_photos(
    out: Path,
    size: int = 32,
    train_count: int = 1000,
    test_count: int = 250,
    seed: int = 0,
    networks: bool = True,
) -> None:
    """Crops of seven real photographs, with their luminance as label maps: blurred and quantised to 8 levels.

    Args:
        out: Folder for train_label and train_img, and the same of test; created.
        size: Side of the images in pixels, at most 100.
        train_count: Images for training.
        test_count: Images for testing, cut from other parts of the photographs.
        seed: Seed of the crops.
        networks: As of texture-mosaics; critic and judge tell the photographs apart, and there is no segmenter.
    """
    from fastnce.demo import TextureRecipe, write_posterised_photos

    counts = {"train_count": train_count, "test_count": test_count}
    recipe = TextureRecipe() if networks else None
    written = write_posterised_photos(out, size, **counts, seed=seed, networks=recipe)
    _tell(written, _cfl(size))


def _cfl(size: int) -> str:
    """The training of a set of label maps; the preset is for 32 pixels."""
    return "cfl --preset photos" + ("" if size == 32 else f" --load-size {size} --crop-size {size}")


def _tell(out: Path, training: str) -> None:
    """Prints the content of the set and its use."""
    from fastnce.data import list_images

    folders = sorted(folder for folder in out.iterdir() if folder.is_dir())
    print(f"{out}: {', '.join(f'{x.name} {len(list_images(x))} images' for x in folders)}")
    print(f"Next: fastnce train {training} --data {out} --out RUN")
