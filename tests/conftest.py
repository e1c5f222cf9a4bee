"""The fixtures of every test of an op: one suite, run on every backend."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from fastnce import backends
from fastnce.backends import native
from fastnce.testing import SAMPLE_INPUTS

# On a GPU cuBLAS is deterministic, as some tests ask of PyTorch, with workspaces of a fixed size alone.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_REASONS = backends.available()

# By these ``make test-kernels`` asks for a backend. Were it not there, every test of it would be skipped, and none would fail.
_ASKED_FOR = {"TRITON_INTERPRET": "triton", "FASTNCE_CUDA_EMULATED": "cuda"}


def pytest_configure() -> None:
    for variable, name in _ASKED_FOR.items():
        if os.environ.get(variable, "0") != "0" and _REASONS[name] != "ok":
            raise pytest.UsageError(f"{variable} asks for the {name} backend. {_REASONS[name]}")


def pytest_report_header() -> list[str]:
    return [f"backend {name}: {reason}" for name, reason in _REASONS.items()]


# The GPU's backends where they run only: elsewhere every test would be skipped once more. The header tells.
_OF_THE_GPU = ("triton", "cuda")
_PARAMS = [name for name in _REASONS if name not in _OF_THE_GPU or _REASONS[name] == "ok"]


def _one_that_runs(request) -> Iterator[str]:
    """A backend; one that cannot run here is skipped with its reason.

    On one thread: the calls are small, and on a busy machine threads wait for one another. Tests of threads set their number.
    """
    if _REASONS[request.param] != "ok":
        pytest.skip(f"{request.param}: {_REASONS[request.param]}")
    if request.param in _OF_THE_GPU and "device" not in request.fixturenames:
        pytest.skip(f"{request.param}: this test has its tensors on the host, or in float64")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)


@pytest.fixture(params=_PARAMS)
def backend(request) -> Iterator[str]:
    """The name of each backend."""
    yield from _one_that_runs(request)


@pytest.fixture(params=[name for name in _PARAMS if name != "torch"])
def fused_backend(request) -> Iterator[str]:
    """The backends with kernels of their own."""
    yield from _one_that_runs(request)


@pytest.fixture
def device(request) -> str:
    """Where the backend's tests run: on the GPU what runs there alone. Interpreted or emulated, kernels run on the host."""
    of_test = "backend" if "backend" in request.fixturenames else "fused_backend"
    name = request.getfixturevalue(of_test)
    on_host = [backends.supports(name, op, "cpu", torch.float32) for op in SAMPLE_INPUTS]
    return "cpu" if "ok" in on_host else "cuda"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Memory that PyTorch hands out is filled with NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def needs_support(request):
    """The first of the dtypes that the backend runs the op in; without one, skips the test, with the backend's reason."""
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"

    def check(op: str, backend: str, *dtypes: torch.dtype) -> torch.dtype:
        for dtype in dtypes or (torch.float32,):
            reason = backends.supports(backend, op, device, dtype)
            if reason == "ok":
                return dtype
        pytest.skip(f"{backend}: {reason}")

    return check


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instruction_sets(monkeypatch) -> Callable[[], Iterator[str]]:
    """Goes through those of this processor, narrowest first; the compiled kernels use each in its turn."""

    def each() -> Iterator[str]:
        for level in ("portable", "avx2", "avx512", "avx512bf16"):
            monkeypatch.setenv("FASTNCE_CPU_ISA", level)
            try:
                assert native.instruction_set() == level
            except RuntimeError as error:
                assert "this processor does not have it" in str(error)
            else:
                yield level
        monkeypatch.delenv("FASTNCE_CPU_ISA")

    return each
