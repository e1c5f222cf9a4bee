"""The CUDA backend's answers: why it is not there, what it runs, and that nobody gets it unasked."""

import types

import pytest
import torch

from fastnce import backends
from fastnce.backends import build, cuda


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """A place for an emulated library; the stamp is that of the present sources."""
    file = tmp_path / "emulated.so"
    monkeypatch.setattr(cuda, "_EMULATED", str(file))
    return file, build.source_hash(build.source_folder(), build.CUDA)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        (None, "the CUDA kernels need an NVIDIA GPU, and this torch sees none"),
        ((7, 5), "compute capability 8.0, this one has 7.5"),
        ((9, 0), "the CUDA library is not built. Run: FASTNCE_CUDA=1 fastnce build"),
    ],
)
def test_without_a_gpu_or_library(capability, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_EMULATED", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(build, "library_candidates", lambda _: [tmp_path / "absent.so"])
    ops, why = cuda._load()
    assert not ops and reason in why


def test_an_emulated_library_that_is_not_there_or_old_or_broken(emulated):
    file, stamp = emulated
    assert "not built. Run: python -m tests.cuda_kernels.emulated" in cuda._load()[1]
    file.write_bytes(b"fastnce-build:0123;")
    assert "was built from other sources. Run: python -m" in cuda._load()[1]
    file.write_bytes(f"not a library; fastnce-build:{stamp};".encode())
    ops, reason = cuda._load()
    assert not ops
    assert "cannot be loaded" in reason


def test_a_change_of_the_kernels_is_seen_and_one_of_the_cpu_s_is_not(tmp_path):
    for name in ("cuda/info_nce.cu", "cuda/device.cuh", "common/tensors.h", "cpu/info_nce.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")

    def hashes() -> tuple[str, str]:
        return tuple(build.source_hash(tmp_path, x) for x in (build.CUDA, build.NATIVE))

    for name, changes in (
        ("cuda/device.cuh", (True, False)),
        ("cuda/info_nce.cu", (True, False)),
        ("cpu/info_nce.cpp", (False, True)),
        ("common/tensors.h", (True, True)),
    ):
        before = hashes()
        (tmp_path / name).write_text(name)
        after = hashes()
        assert tuple(x != y for x, y in zip(before, after, strict=True)) == changes, name


def test_supports_gives_reasons(monkeypatch):
    monkeypatch.setattr(cuda, "_STATUS", "ok")
    monkeypatch.setattr(cuda, "_operators", types.SimpleNamespace(has=lambda op: op == "info_nce"))
    monkeypatch.setattr(cuda, "_DEVICE", "cuda")
    assert cuda.supports("info_nce", "cuda", torch.bfloat16) == "ok"
    assert "float32, bfloat16 and float16" in cuda.supports("info_nce", "cuda", torch.float64)
    assert "on cuda tensors" in cuda.supports("info_nce", "cpu", torch.float32)
    for op in ("pairwise_cosine_similarity", "labelled_lse", "sup_con"):
        assert cuda.supports(op, "cuda", torch.float32) == f"{op} has no CUDA kernel"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_never_chosen_unasked(monkeypatch, device):
    class Ready:
        available = staticmethod(lambda: "ok")
        supports = staticmethod(lambda *_: "ok")

    monkeypatch.setattr(backends, "_TABLE", {"cuda": Ready, "torch": backends._TABLE["torch"]})
    tensor = types.SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    assert backends.select("info_nce", tensor) is backends._TABLE["torch"]
    assert backends.select("info_nce", tensor, "cuda") is Ready
