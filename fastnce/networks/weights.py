"""Files of weights: reading a state dict, loading it with the first difference in words, and TorchScript modules."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnce.errors import UserError


def read_plain(path: Path | str, instead: str, allowed: Sequence[Any] = ()) -> Any:
    """What a PyTorch file holds, tensors on the CPU; code in the file is never run.

    Args:
        path: the file.
        instead: what to do if there is no such file, a sentence.
        allowed: classes that the file may hold besides tensors, numbers, strings and collections of these.

    Raises:
        UserError: the file is missing, cannot be read, is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. {instead}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    except Exception as error:
        # torch.load has no exception of its own: what a damaged file raises depends on where it is cut.
        raise UserError(
            f"{path}: is damaged or no PyTorch file of plain weights. Copy it again, or save a state dict alone."
        ) from error


def read_state_dict(path: Path | str, instead: str, entry: str | None = None) -> dict[str, Tensor]:
    """The state dict of one network in a file, tensors on the CPU; code in the file is never run.

    The prefix `module.`, which some code leaves on every key, is removed.

    Args:
        path: the file.
        instead: what to do if there is no such file, a sentence.
        entry: the name under which the file may hold it, with other things beside it.

    Raises:
        UserError: the file is missing, cannot be read, is damaged or holds something else.
    """
    state = read_plain(path, instead)
    path = Path(path)
    if isinstance(state, dict) and entry in state:
        return _plain(state[entry], path)
    if isinstance(state, dict) and "format" in state and "model" in state:
        raise UserError(
            f"{path}: is a checkpoint of fastnce training. Name the run's folder with run instead."
        )
    return _plain(state, path)


def _plain(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise UserError(
            f"{path}: holds {'nothing' if state == {} else type(state).__name__}, expected the state dict of one network."
        )
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{path}: expected the state dict of one network, tensors by name, got other values under "
            f"{', '.join(others[:4])}. Save the state dict of the network alone."
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def load_strictly(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, instead: str = ""
) -> None:
    """Loads weights into a network; raises `UserError` with the first difference, and `instead`, if they do not fit exactly."""
    own = network.state_dict()
    # Files from before PyTorch 0.4.1 do not count batches, and nothing here reads the count.
    counts = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}
    state = counts | dict(state)
    why_not = difference(own, state)
    if why_not is not None:
        raise UserError(f"{path}: does not fit the network: {why_not}. {instead}".rstrip())
    network.load_state_dict(state)


def difference(own: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """The first difference between two networks' weights; None if they have the same names and shapes."""
    for name in [*own, *other]:
        if name not in other:
            return f"the file lacks weight {name}"
        if name not in own:
            return f"the file has the unknown weight {name}"
        here, there = (getattr(values[name], "shape", None) for values in (own, other))
        if here != there:
            return f"{name} has the shape {tuple(there)} in the file, expected {tuple(here)}"
    return None


def load_scripted(
    what: str, path: Path | str, device: torch.device | str = "cpu"
) -> tuple[nn.Module, str]:
    """A module from a TorchScript file in eval mode, and its name: the file's, and twelve digits of the content's hash.

    UserError if there is no such file, or it is no TorchScript module; `what` names it there. Use only files whose origin you
    trust.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path}: no such file. Give a TorchScript file.")
    try:
        with warnings.catch_warnings():
            # torch.export is to replace TorchScript, but the published extractors are such files.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # RuntimeError mostly, and whatever a damaged archive raises
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{what} {path}: not a TorchScript module ({reason}). "
            "Give a file that torch.jit.save wrote, not a state dict or a pickle."
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return module, f"{path.name}-{digest[:12]}"
