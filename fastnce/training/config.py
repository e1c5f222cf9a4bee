"""A run's configuration: from its sources (variant < preset < config file < explicit values), to JSON and back, compared."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from fastnce.errors import UserError, known
from fastnce.systems import TrainConfig, of_variant, system_named

# Fields that change how a run is carried out or watched, not what it computes: a resumed run may change them.
FREE_FIELDS = frozenset(
    {
        "out",
        "device",
        "workers",
        "deterministic",
        "log_every",
        "sample_every",
        "sample_count",
        "measure_every",
        "measure_count",
        "checkpoint_every",
        "keep_every",
        "test_a",
        "test_b",
        "extractor",
        "cache_gb",
        "broken_files",
    }
)
# Where the training images are: a resumed run may find them elsewhere, if they are the same files.
DATA_FIELDS = frozenset({"data", "data_a", "data_b"})
# Fields that a resumed run may change as long as the steps already made stay what they were.
SCHEDULE_FIELDS = frozenset({"epochs", "decay_epochs", "warmup_epochs", "steps"})
# Options of earlier versions, in the configurations of runs that are there, and those that replaced them.
_RENAMED = {"channels": ("in_channels", "out_channels")}


def build_config(
    variant: str,
    *,
    preset: str | None = None,
    config_file: Path | str | None = None,
    overrides: Mapping[str, object] | None = None,
) -> TrainConfig:
    """The configuration of a run.

    Args:
        variant: what to train, such as "cut" or "fastcut": see `fastnce.systems.variants`.
        preset: one of the `presets` of its system, or None.
        config_file: JSON object of field values; `config.json` of an earlier run is one.
        overrides: field values that win over all others. `data` and `out` must come from here or from the file.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range, a missing field, an unreadable file.

    Examples:
        >>> build_config("fastcut", overrides={"data": "horses", "out": "run"}).lambda_nce
        10.0
    """
    config_class, values = layered_values(variant, preset, config_file)
    values |= checked_values(config_class, overrides or {}, "option")
    for name in required_fields(values):
        if name not in values:
            raise UserError(f"{name} is missing. Give {name} as an option or in the config file.")
    return config_class(**values)


def required_fields(given: Collection[str]) -> list[str]:
    """The fields that must be given; `data` too, unless folders are named one by one."""
    return ["out"] if {"data_a", "data_b"} & set(given) else ["data", "out"]


def layered_values(
    variant: str, preset: str | None, config_file: Path | str | None
) -> tuple[type[TrainConfig], dict[str, object]]:
    """The configuration class of `variant`, and the values from variant, preset and file, the later winning."""
    system = of_variant(variant)
    config_class = system.config_class
    layers = [system.variants[variant]]
    if preset is not None:
        layers.append(system.presets[known(preset, system.presets, "preset")])
    if config_file is not None:
        layers.append(_read_file(Path(config_file), system.name))
    merged: dict[str, object] = {}
    for layer in layers:
        merged |= checked_values(config_class, layer, f"{config_file or preset}: option")
    return config_class, merged


def checked_values(
    config_class: type[TrainConfig], values: Mapping[str, object], what: str
) -> dict[str, object]:
    """`values` converted to their fields' types; raises `UserError` for an unknown field or a wrong type."""
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    return {
        known(name, names, what): _convert(name, value, hints[name])
        for name, value in values.items()
        if known(name, names, what)
    }


def from_dict(values: Mapping[str, object], what: str = "option") -> TrainConfig:
    """The configuration that `to_dict` made into JSON values; `what` names them in errors."""
    rest = dict(values)
    system = system_named(rest.pop("system"))
    rest = dict(system.older) | rest
    for old, names in _RENAMED.items():
        if old in rest and not hasattr(system.config_class, old):
            value = rest.pop(old)
            rest |= {name: rest.get(name, value) for name in names}
    return system.config_class(**checked_values(system.config_class, rest, what))


def _read_file(path: Path, system: str) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Name a JSON file.") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}). Correct the file.") from error
    if not isinstance(values, dict):
        raise UserError(f'{path}: must hold one JSON object, such as {{"batch_size": 4}}.')
    if values.pop("system", system) != system:
        raise UserError(f"{path}: is the configuration of another system than {system}.")
    return values


def _convert(name: str, value: object, hint: object) -> object:
    """`value` as a value of the field type `hint`, without guessing: "8" is no number and 1 no bool."""
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        choices = [choice for choice in get_args(hint) if choice is not type(None)]
        if value is None:
            return None
        return _convert(name, value, choices[0])
    if origin is Literal:
        if value in get_args(hint):
            return value
        allowed = ", ".join(map(str, get_args(hint)))
        raise UserError(f"{name}={value} is unknown. Use one of: {allowed}.")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(name, item, get_args(hint)[0]) for item in value)
        raise UserError(f"{name}={value!r} must be a list.")
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and value == int(value):
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    raise UserError(f"{name}={value!r} must be {kinds.get(hint, 'text')}.")


def to_dict(config: TrainConfig) -> dict[str, object]:
    """The configuration as JSON values, with its system's name first."""
    values: dict[str, object] = {"system": config.system}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        values[field.name] = value
    return values


def differing_fields(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of the fields of two `to_dict` results that differ and change what a run computes."""
    names = [*one, *(name for name in other if name not in one)]
    return [
        name
        for name in names
        if name not in FREE_FIELDS
        and name not in SCHEDULE_FIELDS
        and one.get(name) != other.get(name)
    ]


def as_option(name: str, value: object) -> list[str]:
    """The words of the command line that give an option a value."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    items = value if isinstance(value, list) else [value]
    return [f"--{dashed}", *map(str, items)]
