"""Checkpoint files: written whole or not at all, and read without running code."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from fastnce.errors import UserError
from fastnce.files import atomic_path

FORMAT = 1


def save_checkpoint(state: dict, path: Path) -> None:
    """Writes `state` (tensors, numbers, text, and dicts, lists and tuples of them) to `path`.

    The file is written beside `path`, forced to disk and renamed, so `path` is always a whole checkpoint. The one that was
    there before is kept as `<stem>.prev<suffix>`.

    Raises:
        UserError: the file cannot be written, for instance for want of space; the checkpoint at `path` is untouched.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    try:
        with atomic_path(path) as temporary:
            with temporary.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            _keep_previous(path)
        _sync_folder(path.parent)
    except (OSError, UserError) as error:
        size = buffer.getbuffer().nbytes / 2**20
        kept = " The checkpoint before it is untouched." if path.exists() else ""
        raise UserError(f"{error} The checkpoint has {size:.1f} MiB.{kept}") from error


def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint, tensors on the CPU."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint. Train first, or name an existing file.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Check that you may read it."
        ) from error
    with file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch.load has no exception of its own: what a damaged file raises depends on where it is cut.
            raise UserError(f"{path}: is damaged or no checkpoint. {_remedy(path)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: is no checkpoint of fastnce training. Name one, such as last.pt.")
    return state


def below(state: dict[str, Any], attribute: str) -> dict[str, Any]:
    """The part of a model's state dict that belongs to an attribute."""
    prefix = f"{attribute}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def previous_path(path: Path) -> Path:
    """Where `save_checkpoint` keeps the checkpoint before the one at `path`."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def _keep_previous(path: Path) -> None:
    if path.exists():
        previous_path(path).unlink(missing_ok=True)
        # A second name for the same file, so that `path` itself is never missing. Some file systems have no such links.
        with contextlib.suppress(OSError):
            os.link(path, previous_path(path))


def _remedy(path: Path) -> str:
    previous = previous_path(path)
    if previous.is_file():
        return f"To go on from the checkpoint before it, move {previous.name} over {path.name}."
    return "Delete it to start again."


def _sync_folder(folder: Path) -> None:
    """Forces a rename in `folder` to disk, where the system allows it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
