"""Compilers for the tests that compile. Without one they are skipped; what a compiler refuses is a failure, with its message."""

import ctypes
from collections.abc import Callable

import pytest
from emulated import HERE, LIBRARY, plan

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


@pytest.fixture(scope="session")
def emulator_cases(cxx) -> Callable[[str], ctypes.CDLL]:
    """Compiles a file of kernels, with the emulator, and loads it."""

    def load(file: str) -> ctypes.CDLL:
        output = LIBRARY.parent / f"{file}.so"
        made = plan([HERE / file, HERE / "emulator.cpp"], "-fvisibility=default")
        build.compile_library(made, output, LIBRARY.parent / file)
        loaded = ctypes.CDLL(str(output))
        loaded.run_case.restype = ctypes.c_char_p
        return loaded

    return load
