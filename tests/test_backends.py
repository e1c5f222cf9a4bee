"""The table of backends: what is there, who chooses, and that a choice by name is kept."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

import fastnce
from fastnce import backends
from fastnce.backends import native

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FUSED = ["info_nce", "patch_nce", "conditional_contrastive", "sample_patches"]


def test_names_and_available():
    assert backends.names() == ("triton", "cuda", "native", "torch")
    assert set(backends.available()) == set(backends.names())
    assert backends.available()["torch"] == "ok"


def test_native_is_not_lost():
    """Without this, a failed build would only show as skipped tests."""
    if os.environ.get("FASTNCE_NATIVE") == "0":
        pytest.skip("FASTNCE_NATIVE=0: built without native code on purpose")
    assert backends.available()["native"] == "ok"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", FUSED)
def test_native_runs_its_ops_in_every_dtype(op, dtype):
    if backends.available()["native"] != "ok":
        pytest.skip(backends.available()["native"])
    assert backends.supports("native", op, "cpu", dtype) == "ok"
    assert backends.select(op, torch.empty(1, dtype=dtype)) is native


@pytest.fixture
def refusing(monkeypatch):
    """A backend that is there but runs nothing, and one that is not there; both before the others."""

    class Refusing:
        @staticmethod
        def available() -> str:
            return "ok"

        @staticmethod
        def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
            return f"{op} is not for me"

    class Missing(Refusing):
        @staticmethod
        def available() -> str:
            return "not built; run make"

    table = {"refusing": Refusing, "missing": Missing, **backends._TABLE}
    monkeypatch.setattr(backends, "_TABLE", table)
    monkeypatch.setattr(backends, "_logged", set())


def test_automatic_choice_falls_back(refusing):
    assert fastnce.info_nce(torch.eye(3), torch.eye(3)).isfinite()


def test_by_name_never_falls_back(refusing):
    with pytest.raises(
        RuntimeError,
        match=r"info_nce: backend 'refusing' cannot run it on cpu torch.float32: info_nce is not for me.*backend='torch'",
    ):
        fastnce.info_nce(torch.eye(3), torch.eye(3), backend="refusing")
    with fastnce.use_backend("refusing"), pytest.raises(RuntimeError, match="'refusing' cannot"):
        fastnce.info_nce(torch.eye(3), torch.eye(3))


def test_no_backend_at_all(refusing, monkeypatch):
    monkeypatch.setattr(backends, "_TABLE", {"refusing": backends._TABLE["refusing"]})
    with pytest.raises(
        RuntimeError, match="no backend can run it on cpu torch.float32: refusing: "
    ):
        fastnce.info_nce(torch.eye(3), torch.eye(3))


def test_ops_without_a_native_kernel_say_so():
    if backends.available()["native"] != "ok":
        pytest.skip(backends.available()["native"])
    for op, arguments in (
        ("sup_con", (torch.eye(3), torch.zeros(3, dtype=torch.long))),
        ("nt_xent", (torch.eye(3), torch.eye(3))),
        ("pairwise_cosine_similarity", (torch.eye(3),)),
    ):
        if backends.supports("native", op, "cpu", torch.float32) != "ok":
            with pytest.raises(RuntimeError, match=f"{op}: backend 'native' cannot run it.*torch"):
                getattr(fastnce, op)(*arguments, backend="native")


def test_use_backend_nests_and_survives_errors():
    used = []

    def chosen() -> str:
        return backends.select("info_nce", torch.eye(2)).__name__

    automatic = chosen()
    with fastnce.use_backend("torch"):
        used.append(chosen())
        with fastnce.use_backend(None):
            used.append(chosen())
        used.append(chosen())
        with pytest.raises(KeyError), fastnce.use_backend(None):
            raise KeyError
        used.append(chosen())
    assert used == ["fastnce.reference", automatic, "fastnce.reference", "fastnce.reference"]
    assert chosen() == automatic


def test_an_ops_own_argument_overrides_use_backend(refusing):
    with fastnce.use_backend("refusing"):
        assert fastnce.info_nce(torch.eye(3), torch.eye(3), backend="torch").isfinite()


def test_unknown_and_unable_names(refusing):
    for call in (
        lambda: fastnce.info_nce(torch.eye(3), torch.eye(3), backend="tensorflow"),
        lambda: fastnce.use_backend("tensorflow").__enter__(),
    ):
        with pytest.raises(
            ValueError, match=r"backend='tensorflow' is unknown\. Expected one of: .*torch"
        ):
            call()
    with pytest.raises(RuntimeError, match="'missing' cannot run here: not built; run make"):
        fastnce.use_backend("missing").__enter__()
    assert fastnce.info_nce(torch.eye(3), torch.eye(3)).isfinite()


def test_the_choice_is_logged_once(refusing, caplog):
    caplog.set_level(logging.INFO, logger="fastnce")
    for _ in range(3):
        fastnce.info_nce(torch.eye(3), torch.eye(3))
        fastnce.info_nce(torch.eye(3), torch.eye(3), backend="torch")
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert re.match(
        r"info_nce on cpu torch.float32: backend \w+ \(refusing: info_nce is not for me", message
    )
    assert caplog.records[0].levelno == logging.INFO
    fastnce.info_nce(torch.eye(3).double(), torch.eye(3).double())
    assert len(caplog.records) == 2


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


CALL = (
    "import torch, fastnce; x = torch.eye(3); fastnce.info_nce(x, x); "
    "print(fastnce.backends.select('info_nce', x).__name__)"
)


def test_environment_variable():
    good = run_python(CALL, FASTNCE_BACKEND="torch")
    assert good.stdout.strip() == "fastnce.reference", good.stderr
    unknown = run_python(CALL, FASTNCE_BACKEND="tensorflow")
    assert unknown.returncode != 0
    last = unknown.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FASTNCE_BACKEND='tensorflow' is unknown. Expected one of:")


def test_environment_variable_with_a_backend_that_cannot():
    """Asked for by name, it is refused, not run elsewhere."""
    call = "import torch, fastnce; fastnce.nt_xent(torch.eye(3), torch.eye(3))"
    refused = run_python(call, FASTNCE_BACKEND="native", FASTNCE_LIBRARY="absent.so")
    assert refused.returncode != 0
    assert "RuntimeError: nt_xent: backend 'native' cannot run it" in refused.stderr
