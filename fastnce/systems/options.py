"""Checks of configuration fields: one line that names the field, what was got and what is allowed."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Literal, get_args, get_origin, get_type_hints

import fastnce
from fastnce.errors import UserError


class Options:
    """Base of the configurations: each checks its own fields after `super().__post_init__()`.

    A field whose type is a `Literal` is checked here.
    """

    def __post_init__(self) -> None:
        for name, choices in _choices(type(self)).items():
            one_of(self, name, choices)


@functools.cache
def _choices(config_class: type[Options]) -> dict[str, tuple[object, ...]]:
    hints = get_type_hints(config_class)
    return {name: get_args(h) for name, h in hints.items() if get_origin(h) is Literal}


def at_least(config: object, minimum: float, *names: str) -> None:
    """Raises `UserError` unless every field in `names` is None or a number >= `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise UserError(f"{name}={value} is too small. Use {name} >= {minimum}.")


def above_zero(config: object, *names: str) -> None:
    """Raises `UserError` unless every field in `names` is None or a number > 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be positive. Use {name} > 0.")


def in_unit_interval(config: object, *names: str) -> None:
    """Raises `UserError` unless every field in `names` lies in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} is out of range. Use 0 <= {name} < 1.")


def one_of(config: object, name: str, choices: Collection[object]) -> None:
    """Raises `UserError` unless the field `name` is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        allowed = ", ".join(map(str, choices))
        raise UserError(f"{name}={value} is unknown. Use one of: {allowed}.")


def backend_is_there(name: str | None, option: str = "backend") -> None:
    """Raises `UserError`, which names the option, unless the backend `name` can run here; None always can."""
    if name is None:
        return
    reasons = fastnce.backends.available()
    if name not in reasons:
        raise UserError(f"{option}={name} is unknown. Use one of: {', '.join(reasons)}.")
    if reasons[name] != "ok":
        raise UserError(f"{option}={name} cannot run here: {reasons[name]}. Use {option}=torch.")
