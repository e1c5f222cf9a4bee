"""The table of backends: what is there, who chooses, by what was measured on a GPU too, and that a choice by name is kept.

Backends that can run everything, or nothing, are those of the GPU with other answers; tensors of the host stand for a GPU's.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import fastnce
from fastnce import backends, reference
from fastnce.backends import cuda, dispatch, native, triton
from fastnce.backends.dispatch import Point

X = torch.eye(3)


def answering(monkeypatch, module, answer: str | Callable[[str], str]) -> None:
    """The backend is there, and answers so for every op."""
    supports = lambda op, device, dtype: answer if isinstance(answer, str) else answer(op)  # noqa: E731
    monkeypatch.setattr(module, "available", lambda: "ok")
    monkeypatch.setattr(module, "supports", supports)


@pytest.fixture
def refusing(monkeypatch) -> None:
    """Triton's is there but runs nothing, and CUDA's is not there; both come before the others."""
    answering(monkeypatch, triton, lambda op: f"{op} is not for me")
    answering(monkeypatch, cuda, "not built; run make")
    monkeypatch.setattr(cuda, "available", lambda: "not built; run make")


def test_names_and_available():
    assert backends.names() == ("triton", "cuda", "native", "torch")
    assert set(backends.available()) == set(backends.names())
    assert backends.available()["torch"] == "ok"


@pytest.mark.skipif(os.environ.get("FASTNCE_NATIVE") == "0", reason="built without on purpose")
def test_native_is_not_lost():
    """Without this, a failed build would only show as skipped tests. And it is chosen."""
    assert backends.available()["native"] == "ok"
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for op in fastnce.testing.SAMPLE_INPUTS:
            assert backends.supports("native", op, "cpu", dtype) == "ok"
            assert backends.select(op, X.to(dtype)) is native


def test_the_automatic_choice_falls_back_and_one_by_name_never(refusing, monkeypatch):
    assert fastnce.info_nce(X, X).isfinite()
    error = (
        "info_nce: backend 'triton' .*cpu torch.float32: info_nce is not for me.*backend='torch'"
    )
    with pytest.raises(RuntimeError, match=error):
        fastnce.info_nce(X, X, backend="triton")
    with fastnce.use_backend("triton"):
        with pytest.raises(RuntimeError, match=error):
            fastnce.info_nce(X, X)
        # An op's own argument overrides it.
        assert fastnce.info_nce(X, X, backend="torch").isfinite()
    for module in (native, reference):
        monkeypatch.setattr(module, "supports", lambda *_: "nor for me")
    with pytest.raises(RuntimeError, match="no backend .*cpu torch.float32: triton: .*nor for me"):
        fastnce.info_nce(X, X)


def test_use_backend_nests_and_survives_errors():
    def chosen() -> object:
        return backends.select("info_nce", X)

    automatic, used = chosen(), []
    with fastnce.use_backend("torch"):
        used.append(chosen())
        with fastnce.use_backend(None):
            used.append(chosen())
        used.append(chosen())
        with pytest.raises(KeyError), fastnce.use_backend(None):
            raise KeyError
        used.append(chosen())
    assert used == [reference, automatic, reference, reference] and chosen() is automatic


def test_unknown_and_unable_names(refusing):
    for call in (
        lambda: fastnce.info_nce(X, X, backend="tensorflow"),
        lambda: fastnce.use_backend("tensorflow").__enter__(),
    ):
        with pytest.raises(
            ValueError, match="backend='tensorflow' .*: triton, cuda, native, torch"
        ):
            call()
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: not built; run make"):
        fastnce.use_backend("cuda").__enter__()
    assert fastnce.info_nce(X, X).isfinite()


def test_each_choice_is_logged_once(refusing, caplog):
    """Of an op that no other test chooses a backend for."""
    caplog.set_level(logging.INFO, logger="fastnce")
    op = "an_op_of_test_backends"
    for x in (X, X, X, X.double()):
        backends.select(op, x)
        backends.select(op, x, "torch")
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"{op} on cpu torch.float32: backend torch (triton: {op} is not for me")
    assert second.startswith(f"{op} on cpu torch.float64") and caplog.records[0].levelname == "INFO"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import torch, fastnce; x = torch.eye(3); {code}"]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_environment_variable():
    """Asked for by name, a backend is refused where it cannot run, and nothing else runs."""
    chosen = "print(fastnce.backends.select('info_nce', x).__name__)"
    good = run_python(f"fastnce.info_nce(x, x); {chosen}", FASTNCE_BACKEND="torch")
    assert good.stdout.strip() == "fastnce.reference", good.stderr
    unknown = run_python("fastnce.info_nce(x, x)", FASTNCE_BACKEND="tensorflow")
    assert unknown.returncode != 0
    last = unknown.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FASTNCE_BACKEND='tensorflow' is unknown")
    absent = {"FASTNCE_BACKEND": "native", "FASTNCE_LIBRARY": "absent.so"}
    refused = run_python("fastnce.nt_xent(x, x)", **absent)
    assert refused.returncode != 0
    assert "RuntimeError: nt_xent: backend 'native' cannot run it" in refused.stderr


# By measurements.


@pytest.fixture
def measured(monkeypatch) -> None:
    """Both backends of the GPU can run everything, are used by name only, and are measured at some sizes on "this" GPU."""
    answering(monkeypatch, triton, "ok")
    answering(monkeypatch, cuda, "ok")
    monkeypatch.setattr(dispatch, "generation", lambda device: "sm_90")
    points = (
        Point("float32", (1, 256, 256), {"triton": 10.0, "cuda": 15.0, "torch": 300.0}),
        Point("float32", (16, 256, 256), {"triton": 50.0, "cuda": 40.0}),
        Point("float32", (1, 65536, 256), {"cuda": 9e5, "torch": 8e5}),
    )
    monkeypatch.setattr(dispatch, "MEASURED", {"sm_90": {"patch_nce": points}})


def chosen(*sizes: int, op: str = "patch_nce", dtype: torch.dtype = torch.float32) -> object:
    return backends.select(op, torch.empty(sizes, dtype=dtype))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 256, 256), triton),
        ((2, 200, 256), triton),
        ((256, 256), triton),  # a missing leading size is 1
        ((16, 256, 256), cuda),
        ((8, 256, 256), cuda),
        ((0, 256, 256), triton),
        ((1, 60000, 256), reference),  # plain PyTorch may be the quickest
    ],
)
def test_the_quickest_at_the_nearest_sizes(measured, sizes, expected):
    assert chosen(*sizes) is expected


def test_what_is_not_measured_is_chosen_as_without_a_table(measured, monkeypatch):
    """Another op, another dtype, another generation: the measured backends stay by name only."""
    for op, dtype in (("sup_con", torch.float32), ("patch_nce", torch.float64)):
        assert chosen(1, 256, 256, op=op, dtype=dtype) in (native, reference)
    for other in ("sm_80", None):
        monkeypatch.setattr(dispatch, "generation", lambda device, other=other: other)
        assert chosen(1, 256, 256) in (native, reference)


def test_a_name_or_what_cannot_run_overrides_the_table(measured, monkeypatch):
    assert backends.select("patch_nce", torch.empty(1, 256, 256), "cuda") is cuda
    with fastnce.use_backend("torch"):
        assert chosen(1, 256, 256) is reference
    monkeypatch.setattr(triton, "supports", lambda *_: "not built")
    assert chosen(1, 256, 256) is cuda
    points = (Point("float32", (1, 2, 3), {"qick": 1.0}),)
    monkeypatch.setattr(dispatch, "MEASURED", {"sm_90": {"patch_nce": points}})
    with pytest.raises(ValueError, match="fastnce.backends.dispatch: backend='qick' is unknown"):
        chosen(1, 2, 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_can_trace_the_choice(measured, dynamic):
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if backends.select("patch_nce", x) is triton else 3.0)

    traced = torch.compile(double, backend="eager", fullgraph=True, dynamic=dynamic)
    # A size that may vary has no nearest measured one.
    assert traced(torch.ones(1, 256, 256)).eq(3.0 if dynamic else 2.0).all()
