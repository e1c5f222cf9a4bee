"""Networks in files."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def scripted(tmp_path) -> Callable[[nn.Module, str], Path]:
    """Writes a module as TorchScript to the file of that name, whose path it returns."""

    def save(module: nn.Module, name: str) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(module).save(str(tmp_path / name))
        return tmp_path / name

    return save
