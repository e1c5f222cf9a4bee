"""The CUDA backend's answers: why it is not there, what it runs, and that nobody gets it unasked."""

import os
import subprocess
import sys
import types

import pytest
import torch

import fastnce
from fastnce import backends
from fastnce.backends import build, cuda, verdicts


@pytest.fixture
def fresh(monkeypatch):
    """A process that has asked nothing yet; neither emulated nor on a GPU."""
    monkeypatch.setattr(cuda, "_EMULATED", None)
    monkeypatch.setattr(cuda, "_DEVICE", "cuda")
    monkeypatch.setattr(cuda, "_operators", None)
    monkeypatch.setattr(cuda, "_answers", {})


@pytest.fixture
def gpus(fresh, monkeypatch):
    """Two GPUs; what a probe says of the first comes from the list, which the test may change."""
    said = ["ok"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (7, 5)][i])
    monkeypatch.setattr(cuda, "_load", lambda: "ok")
    monkeypatch.setattr(
        cuda, "_operators", types.SimpleNamespace(has=lambda op: op != "labelled_lse")
    )
    probe = lambda index: said[-1] if index == 0 else "never asked"  # noqa: E731
    namespace = types.SimpleNamespace(probe=probe)
    monkeypatch.setattr(torch.ops, "fastnce_cuda", namespace, raising=False)
    return said


def test_without_a_gpu_or_library(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.available() == "the CUDA kernels need an NVIDIA GPU, and this torch sees none"
    monkeypatch.setattr(build, "library_candidates", lambda _: [tmp_path / "absent.so"])
    assert cuda._load() == "the CUDA library is not built. Run: FASTNCE_CUDA=1 fastnce build"


def test_an_emulated_library_that_is_not_there_or_old_or_broken(fresh, monkeypatch, tmp_path):
    file = tmp_path / "emulated.so"
    stamp = build.source_hash(build.source_folder(), build.CUDA.sources)
    monkeypatch.setattr(cuda, "_EMULATED", str(file))
    assert "not built. Run: python -m tests.cuda_kernels.emulated" in cuda._load()
    file.write_bytes(b"fastnce-build:0123;")
    assert "was built from other sources. Run: python -m" in cuda._load()
    file.write_bytes(f"not a library; fastnce-build:{stamp};".encode())
    assert "cannot be loaded" in cuda._load()
    assert cuda._operators is None


def test_each_gpu_is_tried_once_and_for_itself(gpus):
    """No code for this GPU, or a driver older than the library: "ok" would be an error in the user's first step."""
    gpus.append("no kernel image is available for execution on the device")
    for device in ("cuda", "cuda:0"):
        why = cuda.supports("info_nce", device, torch.bfloat16)
        assert "starts no kernel on this GPU: no kernel image is available" in why
        assert "FASTNCE_CUDA_ARCHS=90a fastnce build" in why
        gpus.append("ok")  # the answer stays
    assert "8.0, this one has 7.5" in cuda.supports("info_nce", "cuda:1", torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "target"),
    [("8.0", "80"), ("8.6", "80"), ("8.7", "87"), ("8.9", "80"), ("9.0", "90a"), ("10.3", "100")],
)
def test_targets(capability, target):
    """Orin's GPU runs no code for desktops' GPUs."""
    assert build.target_of(capability) == target


def test_nothing_is_tried_while_a_graph_is_captured(gpus, monkeypatch):
    gpus.append("asked in the middle of a capture")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda.supports("info_nce", "cuda:0", torch.bfloat16) == "ok"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda.supports("info_nce", "cuda:0", torch.bfloat16) != "ok"


def test_a_compiler_asks_and_does_not_look_inside(fresh, monkeypatch):
    """The first question of a process may come from torch.compile."""
    traced = torch.compiler.is_dynamo_compiling
    monkeypatch.setattr(cuda, "_runs_on", lambda device: "traced" if traced() else "asked")

    @torch.compile(fullgraph=True, backend="eager")
    def asked(x):
        return x + (cuda.supports("info_nce", "cuda:0", torch.bfloat16) == "asked")

    assert asked(torch.zeros(1)) == 1


def test_importing_asks_no_gpu():
    """It would freeze CUDA_VISIBLE_DEVICES, and no forked process could use a GPU."""
    code = "import torch\n"
    for name in ("is_available", "get_device_capability", "current_device", "_lazy_init"):
        code += f"def refuse(*_): raise AssertionError('{name}')\ntorch.cuda.{name} = refuse\n"
    code += "import fastnce.backends.cuda"
    environment = {**os.environ, "FASTNCE_CUDA_EMULATED": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_change_of_the_kernels_is_seen_and_one_of_the_cpu_s_is_not(tmp_path):
    for name in ("cuda/info_nce.cu", "cuda/device.cuh", "common/tensors.h", "cpu/info_nce.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")

    def hashes() -> tuple[str, str]:
        return tuple(build.source_hash(tmp_path, x.sources) for x in (build.CUDA, build.NATIVE))

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


def test_supports_gives_reasons(gpus):
    assert cuda.supports("info_nce", "cuda", torch.bfloat16) == "ok"
    assert cuda.supports("patch_nce", "cuda", torch.float32) == "ok"
    assert "float32, bfloat16 and float16" in cuda.supports("info_nce", "cuda", torch.float64)
    assert "on cuda tensors" in cuda.supports("info_nce", "cpu", torch.bfloat16)
    assert cuda.supports("labelled_lse", "cuda", torch.half) == "labelled_lse has no CUDA kernel"
    for op in ("info_nce", "sup_con", "conditional_contrastive"):
        why = f"the CUDA kernels of {op} take bfloat16 and float16"
        assert cuda.supports(op, "cuda", torch.float32) == why


def test_forms_without_kernels(gpus, monkeypatch):
    """Asked for by name an error with the reason; by itself another backend is chosen."""
    monkeypatch.setattr(cuda, "_DEVICE", "cpu")
    own = {"query": rows(5, 8), "positive_key": rows(5, 8), "negative_keys": rows(5, 3, 8)}
    deep = {"query_features": rows(1, 5, 300).float(), "key_features": rows(1, 5, 300).float()}
    both = {name: x.bfloat16() for name, x in deep.items()} | {"symmetric": True}
    for op, arguments, why in (
        (fastnce.info_nce, own, "negatives that all queries share, none of each query's own"),
        (fastnce.patch_nce, deep, "float32 rows of up to 256 elements, got 300"),
        (fastnce.patch_nce, both, "rows of a symmetric patch_nce.* of up to 256 elements, got 300"),
    ):
        with pytest.raises(RuntimeError, match=why):
            op(**arguments, backend="cuda")
        monkeypatch.setattr(backends, "_VERIFIED", ("cpu",))
        fastest = lambda names, *_: ("cuda" if "cuda" in names else "", ())  # noqa: E731
        monkeypatch.setattr(verdicts, "fastest", fastest)
        assert op(**arguments).isfinite()


def rows(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_is_never_chosen_unasked(monkeypatch, device):
    class Ready:
        available = staticmethod(lambda: "ok")
        supports = staticmethod(lambda *_: "ok")

    monkeypatch.setattr(backends, "_TABLE", {"cuda": Ready, "torch": backends._TABLE["torch"]})
    tensor = types.SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    assert backends.select("info_nce", tensor) is backends._TABLE["torch"]
    assert backends.select("info_nce", tensor, "cuda") is Ready
