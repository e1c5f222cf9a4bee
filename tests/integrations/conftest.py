"""The libraries themselves, where they are installed: ``make test-dropins`` installs them and asks for them."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

# Asked for, a library that is not there is an error: otherwise its tests would be skipped, and none would fail.
_ASKED_FOR = os.environ.get("FASTNCE_DROPINS", "0") != "0"
_KEPT: list[torch.library.Library] = []  # what they declare goes with them


def pytest_report_header() -> list[str]:
    return [f"comparison with the libraries: {'on' if _ASKED_FOR else 'see make test-dropins'}"]


@pytest.fixture
def library() -> Callable[[str], ModuleType]:
    """Imports a module of one of the libraries; without it, skips the test."""

    def imported(name: str) -> ModuleType:
        if not _ASKED_FOR and importlib.util.find_spec(name.split(".")[0]) is None:
            pytest.skip(f"{name.split('.')[0]} is not installed: make test-dropins")
        _import_torchvision()
        return importlib.import_module(name)

    return imported


def _import_torchvision() -> None:
    """One for GPUs beside a torch without: its operators do not load, and it ends where it names them, unless they are there."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(declared)
        importlib.import_module("torchvision")
