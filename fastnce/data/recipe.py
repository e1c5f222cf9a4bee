"""Writing a demo set whole or not at all, with the recipe that it was made from."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastnce.data.files import write_json
from fastnce.data.folders import to_image
from fastnce.errors import UserError

LABELS_FILE = "labels.json"

# Images of a set, one after the other: name below the set's folder, pixels, label.
Images = Iterator[tuple[str, np.ndarray, dict[str, Any]]]


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


def write_once(out: Path, recipe: dict[str, Any], images: Callable[[], Images]) -> Path:
    """Writes a set into a folder beside `out` and renames it when complete; skips what is there.

    Args:
        out: Folder to write. Left as it is if it holds the set with this recipe already.
        recipe: What the set is made from: "kind", its name, and every setting that its images depend on.
        images: Called only if there is something to write.

    Returns:
        `out`.

    Raises:
        UserError: If `out` holds something else, or cannot be written.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        if (out / LABELS_FILE).is_file() and read_labels(out)["recipe"] == recipe:
            return out
        raise UserError(
            f"{out}: holds something else already, not the {recipe['kind']} set with these "
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
        write_json({"recipe": recipe, "images": labels}, partial / LABELS_FILE)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}). "
            "Free some space or choose a folder that you can write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
