"""The libraries themselves, where they are installed: ``make test-dropins`` installs them and asks for them."""

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import pytest
from against import imported

# Asked for, a library that is not there is an error: otherwise its tests would be skipped, and none would fail.
_ASKED_FOR = os.environ.get("FASTNCE_DROPINS", "0") != "0"


def pytest_report_header() -> list[str]:
    return [f"comparison with the libraries: {'on' if _ASKED_FOR else 'see make test-dropins'}"]


@pytest.fixture
def library() -> Callable[[str], ModuleType]:
    """Imports a module of one of the libraries; without it, skips the test."""

    def imported_or_skipped(name: str) -> ModuleType:
        if not _ASKED_FOR and importlib.util.find_spec(name.split(".")[0]) is None:
            pytest.skip(f"{name.split('.')[0]} is not installed: make test-dropins")
        return imported(name)

    return imported_or_skipped
