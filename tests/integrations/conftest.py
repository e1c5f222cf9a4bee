"""The libraries themselves: ``make test-dropins`` installs them and asks for them; elsewhere their equations stand for them."""

from collections.abc import Callable
from types import ModuleType

import pytest
from against import ASKED_FOR, imported


def pytest_report_header() -> list[str]:
    return [
        f"the libraries that are stood in for: {'compared with' if ASKED_FOR else 'see make test-dropins'}"
    ]


@pytest.fixture
def library() -> Callable[[str], ModuleType]:
    """Imports a module of one of the libraries. One that is asked for and not there is an error, for no skip would be seen."""
    if not ASKED_FOR:
        pytest.skip("make test-dropins has the library")
    return imported
