"""The losses of other libraries under their own names, on the kernels of fastnce.

``fastnce.integrations.open_clip.ClipLoss`` has the signature, the defaults and the behaviour of open_clip's, and does not need
open_clip. ``docs/migrate.md`` has a table for each library, with what differs. ``apply_to`` puts them into the library itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType

__all__ = ["Applied", "apply_to"]

_log = logging.getLogger("fastnce")


@dataclass(frozen=True)
class _Replaced:
    """``owner.name`` was ``original`` and is ``ours``."""

    owner: ModuleType
    name: str
    original: object
    ours: object


class Applied:
    """What ``apply_to`` replaced; ``str`` says it in a line."""

    def __init__(self, library: str, replaced: list[_Replaced]) -> None:
        self.library, self.replaced = library, replaced

    def __str__(self) -> str:
        places: dict[str, list[str]] = {}
        for x in self.replaced:
            places.setdefault(x.name, []).append(x.owner.__name__)
        found = [f"{name} (in {', '.join(owners)})" for name, owners in places.items()]
        return f"{self.library}: {'; '.join(found) or 'nothing is left to replace'}"

    def undo(self) -> None:
        """Puts the originals back; what was constructed in between stays."""
        for x in self.replaced:
            if vars(x.owner).get(x.name) is x.ours:
                setattr(x.owner, x.name, x.original)
        self.replaced = []


def apply_to(library: str | ModuleType) -> Applied:
    """Replaces the losses of a library by ours of the same names, wherever loaded modules have them, and logs what.

    Args:
        library: a module of ``fastnce.integrations`` by its name, or the library's own module. Modules that are imported later
            get ours from the library; what was constructed before stays.

    Returns:
        What was replaced, with ``undo()``.

    Raises:
        ValueError: there is no such integration.
        ImportError: the library is not there.

    Warns:
        UserWarning: this version of the library has not been compared with ours.

    Examples:
        >>> import fastnce.integrations, open_clip  # doctest: +SKIP
        >>> fastnce.integrations.apply_to("open_clip")  # doctest: +SKIP
    """
    name = library if isinstance(library, str) else library.__name__
    ours = _integration(name)
    try:
        modules = [importlib.import_module(x) for x in ours.STANDS_FOR]
    except ImportError as error:
        raise ImportError(
            f"apply_to: {name} cannot be imported: {error}. Install it, or import the class from {ours.__name__}."
        ) from error
    version = _version(*ours.LIBRARY) if ours.LIBRARY else ""
    replaced = []
    for theirs, (module_name, replacements) in zip(modules, ours.STANDS_FOR.items(), strict=True):
        for attribute in replacements:
            original, new = getattr(theirs, attribute, None), getattr(ours, attribute)
            if original is None:
                warnings.warn(f"apply_to: {module_name} has no {attribute}{version}.", stacklevel=2)
            elif original is not new:
                found = _names_of(original)
                replaced += [_Replaced(x, name, original, new) for x, name in found]
    for x in replaced:
        setattr(x.owner, x.name, x.ours)
    applied = Applied(f"fastnce in {ours.__name__.rpartition('.')[2]}{version}", replaced)
    _log.warning("%s", applied)
    return applied


def _integration(name: str) -> ModuleType:
    """By its own name, or by that of a module that it stands for, or of its package."""
    known = sorted(x.name for x in pkgutil.iter_modules(__path__))
    for candidate in known:
        ours = importlib.import_module(f"{__name__}.{candidate}")
        theirs = ours.STANDS_FOR
        if name == candidate or any(f"{x}.".startswith(f"{name}.") for x in theirs):
            return ours
    raise ValueError(
        f"apply_to: there is no integration of {name!r}. Use one of: {', '.join(known)}."
    )


def _version(distribution: str, *compared: str) -> str:
    """In words; warns of one that is not among those that were ``compared``."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    if version not in compared:
        warnings.warn(
            f"apply_to: {distribution} {version} has not been compared with fastnce, {' and '.join(compared)} has. "
            f"Look at the first losses with and without.",
            stacklevel=3,
        )
    return f" ({distribution} {version})"


def _names_of(value: object) -> list[tuple[ModuleType, str]]:
    """Where modules that are loaded have it, and under which name; but for those of fastnce."""
    found = []
    for module_name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and module_name.split(".")[0] != "fastnce":
            found += [(module, name) for name, x in list(vars(module).items()) if x is value]
    return found
