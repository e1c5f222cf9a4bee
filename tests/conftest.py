"""The fixtures of every test of an op: one suite, run on every backend."""

import hypothesis
import pytest
import python_kernels
import torch

from fastnce import backends

hypothesis.settings.register_profile("fastnce", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("fastnce")

# Where no fused backend can run, a stand-in keeps the autograd Functions under test.
STAND_IN = "python_kernels"


@pytest.fixture(params=[*backends.names(), STAND_IN])
def backend(request, monkeypatch) -> str:
    """The name of each backend that can run here. An op that it does not support is skipped with the reason."""
    name = request.param
    reasons = backends.available()
    if name == STAND_IN:
        if any(reason == "ok" for other, reason in reasons.items() if other != "torch"):
            pytest.skip("a real fused backend runs here")
        monkeypatch.setitem(backends._TABLE, STAND_IN, python_kernels)
    elif reasons[name] != "ok":
        pytest.skip(f"{name}: {reasons[name]}")
    return name


@pytest.fixture
def fused_backend(backend) -> str:
    """The backends with kernels of their own."""
    if backend == "torch":
        pytest.skip("plain PyTorch")
    return backend


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def needs_support():
    """Skips the test, with the backend's reason, where the backend does not run the op in that dtype."""

    def check(op: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
        reason = backends._TABLE[backend].supports(op, "cpu", dtype)
        if reason != "ok":
            pytest.skip(f"{backend}: {reason}")

    return check
