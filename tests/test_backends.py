"""The table of backends: what is there, who chooses, and that a choice by name is kept.

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
from fastnce.backends import blocks, cuda, native, triton

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
    assert backends.names() == ("triton", "cuda", "native", "blocks", "torch")
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
    for module in (native, blocks, reference):
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
            ValueError, match="backend='tensorflow' .*: triton, cuda, native, blocks, torch"
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


def test_refusals_name_the_function_that_was_called():
    x, labels = torch.eye(3), torch.arange(3)
    for function, arguments in (
        ("info_nce", {"query": x, "positive_key": x, "query_ids": labels}),
        ("sup_con", {"features": x, "labels": labels, "positives": "each"}),
        ("nt_xent", {"z1": x, "z2": x, "ids": labels}),
        (
            "contrastive_distillation",
            dict.fromkeys(("query", "key", "teacher_query", "teacher_key"), x),
        ),
    ):
        with pytest.raises(RuntimeError, match=f"^{function}: backend 'cuda' cannot run it"):
            getattr(fastnce, function)(**arguments, backend="cuda")
