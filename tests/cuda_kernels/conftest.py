"""Compilers for the tests that compile. Without one they are skipped; what a compiler refuses is a failure, with its message."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import FLAGS, HERE, SOURCES

from fastnce.backends import build, build_cuda


def _there_is(compiler: Callable[[], list[str]]) -> None:
    try:
        compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cxx() -> None:
    _there_is(build.cxx)


@pytest.fixture(scope="session")
def nvcc(cxx) -> None:
    """And the host's, without which it compiles nothing."""
    _there_is(build_cuda.nvcc)


@pytest.fixture(scope="session")
def emulator_cases(cxx, tmp_path_factory) -> Callable[[str], ctypes.CDLL]:
    """Compiles a file of kernels, with the emulator, and loads it."""
    folder: Path = tmp_path_factory.mktemp("emulator")

    def load(file: str) -> ctypes.CDLL:
        output = folder / f"{file}.so"
        command = [*build.cxx(), *FLAGS, "-fvisibility=default", "-shared", "-x", "c++"]
        command += [str(HERE / file), str(HERE / "emulator.cpp"), f"-I{SOURCES}", f"-I{HERE}"]
        build.run_compiler([*command, "-o", str(output)], False)
        loaded = ctypes.CDLL(str(output))
        loaded.run_case.restype = ctypes.c_char_p
        return loaded

    return load
