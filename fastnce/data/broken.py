"""Files that cannot be read: passing over them, and saying so once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fastnce.data.images import UnfitFile
from fastnce.errors import UserError

T = TypeVar("T")

_log = logging.getLogger("fastnce")


class BrokenFiles:
    """The files of a list that have been found broken; others take their place, or the first one found is an error.

    What one worker finds all of them know, so that the log names a file once. `folder` is named in errors. With `skip` other files
    take the place of broken ones; with `groups`, (N,) integers, only those of the same group, such as a class.
    """

    def __init__(
        self, folder: Path, paths: Sequence[Path], skip: bool, groups: np.ndarray | None = None
    ) -> None:
        self.folder, self.paths, self.skip, self.groups = folder, paths, skip, groups
        self._found = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __contains__(self, index: int) -> bool:
        """Whether file `index` has been found broken."""
        return bool(self._found[index])

    @property
    def count(self) -> int:
        """How many have been found broken so far."""
        return int(self._found.sum())

    def unsized(self, sizes: Mapping[str, int | None]) -> dict[str, int | None]:
        """`sizes`, which `fastnce.files.named_sizes` gave for the files, with None for the broken ones."""
        items = zip(sizes.items(), self._found.tolist(), strict=True)
        return {name: None if found else size for (name, size), found in items}

    def note(self, index: int, error: UserError) -> None:
        """Marks file `index` as broken and names it in the log, once. Raises `error` if it is an `UnfitFile`, or unless others take its place."""
        if isinstance(error, UnfitFile):
            raise error
        known = index in self
        self._found[index] = True
        if not self.skip:
            raise error
        if not known:
            _log.warning("skipped, %d so far: %s", self.count, error)
        self.stand_in(index)

    def stand_in(self, index: int) -> int:
        """`index`, or the next file in its place that has not been found broken, the first behind the last; UserError if there is none."""
        if index not in self:
            return index
        for step in range(1, len(self.paths)):
            other = (index + step) % len(self.paths)
            same = self.groups is None or self.groups[other] == self.groups[index]
            if same and other not in self:
                return other
        whose = self.folder if self.groups is None else self.paths[index].parent
        raise _none_left(whose, sum(p.is_relative_to(whose) for p in self.paths))

    def read(self, index: int, read: Callable[[int], T]) -> T:
        """`read(index)`, or that of the next file in its place that can be read; `read` raises `UserError` for a broken one."""
        while True:
            index = self.stand_in(index)
            try:
                return read(index)
            except UserError as error:
                self.note(index, error)


def readable(
    paths: Iterable[Path], read: Callable[[Path], T], *, skip: bool
) -> Iterator[tuple[Path, T]]:
    """(path, `read(path)`) of the files in turn; those of which it raises `UserError` are left out and named in the log.

    Raises:
        UserError: a broken file and not `skip`, or all are broken.
    """
    broken = found = 0
    for path in paths:
        try:
            value = read(path)
        except UserError as error:
            if not skip or isinstance(error, UnfitFile):
                raise
            broken += 1
            _log.warning("skipped, %d so far: %s", broken, error)
        else:
            found += 1
            yield path, value
    if broken and not found:
        raise _none_left(path.parent, broken)


def _none_left(folder: Path, count: int) -> UserError:
    return UserError(f"{folder}: none of its {count} files can be read as an image. Replace them.")
