"""Compilers for the tests that compile. Without one they are skipped; what a compiler refuses is a failure, with its message."""

from collections.abc import Callable

import pytest

from fastnce.backends import build


def _there_is(*programs: Callable[[], object]) -> None:
    try:
        for program in programs:
            program()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cxx() -> None:
    _there_is(build.cxx, build.ninja)


@pytest.fixture(scope="session")
def nvcc(cxx) -> None:
    """And the host's, without which it compiles nothing."""
    _there_is(build.nvcc)
