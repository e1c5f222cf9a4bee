"""One file that holds a trained network and how it was configured: safetensors, for sharing."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.files import atomic_path
from fastnce.systems import TrainConfig
from fastnce.systems.representation import import_safetensors
from fastnce.training.config import from_dict, to_dict

CONFIG_KEY = "fastnce.config"


def write_shared(network: nn.Module, config: TrainConfig, path: Path) -> None:
    """Writes a network's weights as a safetensors file, with the configuration in the file's metadata.

    Folders and devices of the training are left out of it.
    """
    values = shared_values(config)
    data = import_safetensors().torch.save(
        {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()},
        metadata={"format": "pt", CONFIG_KEY: json.dumps(values)},
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def shared_values(config: TrainConfig) -> dict[str, object]:
    """The configuration as JSON values, without the folders and devices of the training."""
    return {
        name: value
        for name, value in to_dict(config).items()
        if name != "device" and not isinstance(getattr(config, name), Path)
    }


def read_shared(path: Path) -> tuple[dict[str, Tensor], TrainConfig | None]:
    """The weights in a safetensors file, tensors on the CPU, and its configuration; None if the file has none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Name a weights file, such as model.safetensors.")
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is damaged or no safetensors file. Copy it again.") from error
    if CONFIG_KEY not in metadata:
        return state, None
    folders = {"data": str(path.parent), "out": str(path.parent)}
    try:
        return state, from_dict(json.loads(metadata[CONFIG_KEY]) | folders, f"{path}: option")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its configuration cannot be read ({error}). Update fastnce, or export it again."
        ) from error
