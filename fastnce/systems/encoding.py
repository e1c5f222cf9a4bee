"""Features of images from a trained encoder, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastnce.data import list_images
from fastnce.data.broken import readable
from fastnce.data.files import atomic_path
from fastnce.data.images import read_image, to_array, to_tensor
from fastnce.data.labelled import to_square
from fastnce.errors import UserError
from fastnce.systems.labelled import LabelledConfig

if TYPE_CHECKING:
    from types import ModuleType


@torch.inference_mode()
def write_features(
    encoder: nn.Module,
    config: LabelledConfig,
    input: Path,
    out: Path,
    *,
    normalize: bool = False,
    batch_size: int = 64,
    broken_files: Literal["error", "skip"] | None = None,
) -> tuple[int, int]:
    """Writes an encoder's features of a folder of images, with their names.

    An image is cut to its central square and scaled to the size of the training. The file has the arrays "features" (N, F)
    float32 and "names" (N,), the files' names below `input`, sorted; a .safetensors file has "names" in its metadata, as JSON.

    Args:
        encoder: as `load_generator` gives it.
        config: the configuration of its run, with `image_size` and `image_channels`.
        input: folder of images, also in folders below it; or one image.
        out: file to write, .npz or .safetensors.
        normalize: Scale each image's features to length 1, as k-NN compares them.
        batch_size: Images at a time.
        broken_files: error: stop at a file that cannot be read; skip: leave it out and name it; by default as in training.

    Returns:
        N and F.

    Raises:
        UserError: no images, a broken one, another kind of file, or it cannot be written.
    """
    if Path(out).suffix not in (".npz", ".safetensors"):
        raise UserError(f"out={out}: expected a file that ends in .npz or .safetensors.")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is too small. Use batch_size >= 1.")
    input = Path(input)
    folder, paths = (input.parent, [input]) if input.is_file() else (input, list_images(input))
    device = next(encoder.parameters()).device
    skip = (broken_files or config.broken_files) == "skip"

    def read(path: Path) -> Tensor:
        image = to_square(read_image(path, config.image_channels), config.image_size)
        return to_tensor(to_array(image))

    names, parts, batch = [], [], []
    shown = tqdm(paths, desc="features", unit="image", disable=None)
    for path, image in readable(shown, read, skip=skip):
        names.append(path.relative_to(folder).as_posix())
        batch.append(image)
        if len(batch) == batch_size:
            parts.append(encoder(torch.stack(batch).to(device)).float().cpu())
            batch = []
    if batch:
        parts.append(encoder(torch.stack(batch).to(device)).float().cpu())
    features = F.normalize(torch.cat(parts)) if normalize else torch.cat(parts)
    if Path(out).suffix == ".npz":
        with atomic_path(out) as temporary:
            np.savez(temporary, features=features.numpy(), names=np.array(names))
    else:
        data = import_safetensors().torch.save(
            {"features": features}, metadata={"names": json.dumps(names)}
        )
        with atomic_path(out) as temporary:
            temporary.write_bytes(data)
    return features.shape[0], features.shape[1]


def import_safetensors() -> ModuleType:
    """The package; raises `UserError` where it is not installed."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UserError(
            "safetensors files need the package safetensors. Install it with: pip install 'fastnce[train]'"
        ) from error
    return safetensors
