"""Reads the checkpoints of StudioGAN."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnce.errors import UserError

# `best_fid` is a np.float64, pickled as scalar(dtype, bytes); NumPy 1 and 2 write `scalar` under different names.
_SCALAR = np.float64().__reduce__()[0]
_NUMPY_SCALAR_PARTS = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]
_PREFIX = "module."


def load_studiogan(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a StudioGAN checkpoint, ready for the `load_state_dict` of our BigGAN networks.

    The file (`model={G,D,G_ema}-...-weights-step=N.pth`) is a dict with `state_dict` and the state of the training; names
    may have the prefix `module.` of a parallel run, which is taken off. Code in the file is never run: besides tensors and
    plain values only a NumPy fp64 scalar (`best_fid`) is read.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        UserError: there is no such file, it cannot be read or is damaged, holds other objects or is no such checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint. Name an existing file.")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR_PARTS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Check that you may read it."
        ) from error
    except Exception as error:
        # torch.load has no exception of its own: what a damaged file raises depends on where it is cut.
        raise UserError(
            f"{path}: is damaged, or holds objects other than tensors and plain values, which are not loaded because "
            "that could run code. Name a checkpoint as StudioGAN writes it."
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UserError(
            f"{path}: is no StudioGAN checkpoint: expected a dict whose `state_dict` holds tensors by name. "
            "Name a checkpoint as StudioGAN writes it."
        )
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}
