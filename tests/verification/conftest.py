"""A verification of the stand-ins, in a cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_ins import CPU, prepare

from fastnce import verification
from fastnce.backends import verdicts


@pytest.fixture(scope="session")
def verified(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The report of a verification of everything that the stand-in has, and the file of its verdict."""
    cache = tmp_path_factory.mktemp("verified")
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare(monkeypatch, cache)
        report = verification.verify(progress=False)
        path = verdicts.path_of(verdicts.key_of("triton", CPU))
    verdicts.forget()
    yield report, path


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[Path]:
    """A stand-in for a GPU, never verified; where its verdict would be."""
    prepare(monkeypatch, tmp_path)
    yield verdicts.path_of(verdicts.key_of("triton", CPU))
    verdicts.forget()


@pytest.fixture
def verified_gpu(gpu, verified) -> Path:
    """The same after the verification."""
    gpu.parent.mkdir()
    gpu.write_text(verified[1].read_text())
    return gpu
