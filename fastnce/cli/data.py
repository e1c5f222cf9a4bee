"""`fastnce data NAME`: the built-in data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastnce.cli.parsing import with_options_of


@with_options_of("fastnce.demo.write_digits_photos")
def digits_photos(out: Path, photo: tuple[str, ...] = ("coffee",), **how: Any) -> None:
    """Real handwritten digits (A) and the same kind of digits over a photograph (B), 32 x 32, unpaired.

    Args:
        out: Folder for trainA, trainB, testA and testB; created.
        photo: The photograph, one of those that scikit-learn and scikit-image carry; or several, then each image of B is on
            one of them.
    """
    from fastnce.demo import write_digits_photos

    _tell(write_digits_photos(out, photo=photo, **how), "cut --preset digits")


@with_options_of("fastnce.demo.write_photos")
def photos(out: Path, **how: Any) -> None:
    """Two folders of crops from real photographs, for the real-size path.

    Args:
        out: Folder for trainA, trainB, testA and testB; created.
    """
    from fastnce.demo import write_photos

    _tell(write_photos(out, **how), "cut")


@with_options_of("fastnce.demo.write_single_photos")
def single_photos(out: Path, **how: Any) -> None:
    """Two real photographs, one for each domain, for SinCUT; by default a temple by day and a rocket at dusk.

    Args:
        out: Folder for trainA and trainB; created.
    """
    from fastnce.demo import write_single_photos

    _tell(write_single_photos(out, **how), "sincut --preset single-photos")


@with_options_of("fastnce.demo.write_digits")
def digits(out: Path, **how: Any) -> None:
    """Real handwritten digits in 10 class folders, greyscale.

    Args:
        out: Folder for train/<digit> and test/<digit>; created.
    """
    from fastnce.demo import write_digits

    _tell(write_digits(out, **how), "contragan --preset digits")


@with_options_of("fastnce.demo.write_photo_crops")
def photo_crops(out: Path, **how: Any) -> None:
    """Crops of seven real photographs, 32 x 32, in class folders: the class is the photograph.

    Args:
        out: Folder for train/<photograph> and test/<photograph>; created.
    """
    from fastnce.demo import write_photo_crops

    _tell(write_photo_crops(out, **how), "simclr --preset photo-crops")


@with_options_of("fastnce.demo.write_texture_mosaics")
def texture_mosaics(out: Path, networks: bool = True, **how: Any) -> None:
    """Label maps of random cells, and images in which each cell shows a texture cut from a real photograph.

    Args:
        out: Folder for train_label, train_img, train_inst, and the same of test; created.
        networks: Trains three small networks too, in about a minute: critic.pt, a stand-in for VGG; judge.pt and segmenter.pt, which
            judge images and share nothing with it.
    """
    from fastnce.demo import TextureRecipe, write_texture_mosaics

    written = write_texture_mosaics(out, **how, networks=TextureRecipe() if networks else None)
    _tell(written, _cfl(how["size"]))


@with_options_of("fastnce.demo.write_posterised_photos")
def posterised_photos(out: Path, networks: bool = True, **how: Any) -> None:
    """Crops of seven real photographs, with their luminance as label maps: blurred and quantised to 8 levels.

    Args:
        out: Folder for train_label and train_img, and the same of test; created.
        networks: As of texture-mosaics; critic and judge tell the photographs apart, and there is no segmenter.
    """
    from fastnce.demo import TextureRecipe, write_posterised_photos

    written = write_posterised_photos(out, **how, networks=TextureRecipe() if networks else None)
    _tell(written, _cfl(how["size"]))


def _cfl(size: int) -> str:
    """The training of a set of label maps; the preset is for 32 pixels."""
    return "cfl --preset photos" + ("" if size == 32 else f" --load-size {size} --crop-size {size}")


def _tell(out: Path, training: str) -> None:
    """Prints the content of the set and its use."""
    from fastnce.data import list_images

    folders = sorted(folder for folder in out.iterdir() if folder.is_dir())
    print(f"{out}: {', '.join(f'{x.name} {len(list_images(x))} images' for x in folders)}")
    print(f"Next: fastnce train {training} --data {out} --out RUN")
