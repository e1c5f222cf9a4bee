"""Writing files so that a reader sees the old one or the whole new one, never a part."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastnce.errors import UserError

# What mkstemp makes of the prefix ".stem-".
_TEMPORARY = re.compile(r"\..+-[a-z0-9_]{8}(\.[a-z]+)?")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error; its folder is made if it is missing.

    Raises:
        UserError: If the file cannot be written: a full disk, no permission, a file where a folder is needed.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes the file private; what users write should follow their umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path}: cannot be written ({reason}). "
            "Free some space or choose a folder that you can write to."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path | str) -> None:
    """Removes the temporary files that `atomic_path`, or a checkpoint, left in a folder when its process was killed."""
    for path in Path(folder).glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(value: object, path: Path | str) -> None:
    """Writes `value` as indented JSON to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def expect_apart(out: Path | str, folders: Iterable[Path | str]) -> None:
    """Raises `UserError` if what is written to `out` would be read from one of `folders`, at once or the next time."""
    target = Path(out).resolve()
    for folder in folders:
        if target.is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"out={out} is in {folder}, which is read: results would become input. Name a folder outside of it."
            )


# What a run was made with: for each of its folders the names in it with their sizes in bytes; None for a broken file.
Files = Mapping[str, Mapping[str, int | None]]


def named_sizes(folder: Path, paths: Sequence[Path]) -> dict[str, int | None]:
    """The size in bytes of each file by its name relative to `folder`; None for one that is not there."""

    def size(path: Path) -> int | None:
        try:
            return path.stat().st_size
        except OSError:
            return None

    return {path.relative_to(folder).as_posix(): size(path) for path in paths}


def changed_files(before: Files, now: Files) -> list[str]:
    """How two results of a dataset's `files` differ, a line for each file: "A/x.png is new".

    The size of a file that was or is broken does not count: it may have been replaced by a good one.
    """
    lines = []
    for folder in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(folder, {}), now.get(folder, {})
        lines += [f"{folder}/{name} is missing" for name in old if name not in new]
        for name, size in new.items():
            if name not in old:
                lines.append(f"{folder}/{name} is new")
            elif None not in (size, old[name]) and size != old[name]:
                lines.append(f"{folder}/{name} has {size} bytes instead of {old[name]}")
    return lines
