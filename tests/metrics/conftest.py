"""Networks in files."""

from collections.abc import Callable
from pathlib import Path

import pictures
import pytest
from torch import nn


@pytest.fixture
def scripted(tmp_path) -> Callable[[nn.Module, str], Path]:
    """Writes a module as TorchScript to the file of that name, whose path it returns."""
    return lambda module, name: pictures.scripted(module, tmp_path / name)
