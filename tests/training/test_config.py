"""Configurations: layers of values, conversion, and mistakes."""

import dataclasses
import json
from pathlib import Path

import pytest

from fastnce.errors import UserError
from fastnce.systems import SYSTEMS
from fastnce.training import build_config
from fastnce.training.config import (
    FREE_FIELDS,
    SCHEDULE_FIELDS,
    differing_fields,
    from_dict,
    to_dict,
)

CLASSES = [system.config_class for system in SYSTEMS.values()]
PATHS = {"data": "images", "out": "run"}


def test_later_sources_win(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"lambda_nce": 3, "batch_size": 5, "data": "d", "out": "o"}))
    overrides = {"batch_size": 6, "out": "here"}
    config = build_config("fastcut", preset="digits", config_file=file, overrides=overrides)
    assert config.flip_equivariance  # from the variant
    assert config.base_channels == 16  # from the preset
    assert config.lambda_nce == 3.0  # from the file, over the variant
    assert config.batch_size == 6  # from the overrides, over file and preset
    assert (config.data, config.out) == (Path("d"), Path("here"))


def test_the_config_of_a_run_is_a_config_file(tmp_path):
    config = build_config("fastcut", preset="digits", overrides=PATHS)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    assert build_config("cut", config_file=file) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_patch": 4}, "unknown option 'num_patch'. Did you mean 'num_patches'?"),
        ({"zzzz": 4}, "unknown option 'zzzz'. Use one of: antialias,"),
        ({"batch_size": "8"}, "batch_size='8' must be a whole number."),
        ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number."),
        ({"batch_size": True}, "batch_size=True must be a whole number."),
        ({"batch_size": 0}, "batch_size=0 is too small. Use batch_size >= 1."),
        ({"temperature": "warm"}, "temperature='warm' must be a number."),
        ({"temperature": float("inf")}, "temperature=inf must be a number."),
        ({"flip": 1}, "flip=1 must be true or false."),
        ({"nce_layers": 4}, "nce_layers=4 must be a list."),
        ({"nce_layers": ["a"]}, "nce_layers='a' must be a whole number."),
        ({"augment_a": "big"}, "augment_a=big is unknown. Use one of: none, affine."),
        ({"ema_decay": 1.0}, "ema_decay=1.0 is out of range. Use 0 <= ema_decay < 1."),
        ({"steps": 0}, "steps=0 is too small. Use steps >= 1."),
        ({"epochs": 0, "decay_epochs": 0}, "leave nothing to train. Use epochs >= 1."),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError) as error:
        build_config("cut", overrides=PATHS | overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_option():
    with pytest.raises(UserError, match="out is missing. Give out as an option"):
        build_config("cut", overrides={"data": "images"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not JSON"),
        ("[]", "must hold one JSON object"),
        ('{"system": "gan"}', "is the configuration of another system than cut"),
        ('{"batchsize": 1}', "option 'batchsize'. Did you mean 'batch_size'?"),
    ],
)
def test_bad_config_files(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        build_config("cut", config_file=file, overrides=PATHS)
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_the_channels_of_a_run_from_before_there_were_two_numbers():
    values = to_dict(build_config("cut", overrides=PATHS))
    del values["in_channels"], values["out_channels"]
    config = from_dict(values | {"channels": 1})
    assert (config.in_channels, config.out_channels) == (1, 1)


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_field_has_a_help_text(config_class):
    import tyro._docstrings

    for field in dataclasses.fields(config_class):
        assert tyro._docstrings.get_field_docstring(config_class, field.name, ())


def test_differing_fields():
    one = build_config("cut", overrides=PATHS)
    changes = {"seed": 1, "lr": 1e-3, "nce_layers": (4,)}
    free = {"workers": 7, "steps": 9, "out": Path("x")}
    other = dataclasses.replace(one, **changes, **free)
    assert set(differing_fields(to_dict(one), to_dict(other))) == set(changes)
    names = {field.name for c in CLASSES for field in dataclasses.fields(c)}
    assert names >= FREE_FIELDS | SCHEDULE_FIELDS
