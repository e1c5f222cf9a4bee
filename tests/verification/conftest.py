"""A verification of the stand-ins, in a cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stand_ins import stand_in

from fastnce import backends, verification
from fastnce.backends import verdicts

CPU = torch.device("cpu")


def prepare(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The CPU is a GPU, the stand-in is its Triton backend, and nothing is known of it."""
    monkeypatch.setenv("FASTNCE_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(verification, "_DEVICE", "stand_ins:Device")
    monkeypatch.setattr(backends, "_TABLE", {**backends._TABLE, "triton": stand_in("triton")})
    monkeypatch.setattr(backends, "_UNPROVED", ())
    monkeypatch.setattr(verdicts, "machine", lambda device: ("Stand-in 9000", "1.0"))
    monkeypatch.setattr(verdicts, "_said", set())
    verdicts.forget()


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
