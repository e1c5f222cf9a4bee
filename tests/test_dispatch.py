"""The choice between backends by what was measured on a GPU, with tables made up; tensors stand for a GPU's."""

import logging

import pytest
import torch

import fastnce
from fastnce import backends
from fastnce.backends import dispatch
from fastnce.backends.dispatch import Point


class Able:
    """A backend that says it can run everything."""

    @staticmethod
    def available() -> str:
        return "ok"

    @staticmethod
    def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
        return "ok"


class Quick(Able):
    pass


class Other(Able):
    pass


class Unable(Able):
    @staticmethod
    def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
        return "not built"


@pytest.fixture
def table(monkeypatch):
    """Backends of which two are measured at some sizes on this machine's "GPU"; both only by name otherwise."""
    rows = {"quick": Quick, "other": Other, **backends._TABLE}
    monkeypatch.setattr(backends, "_TABLE", rows)
    only = {("quick", "cpu"): "has not run", ("other", "cpu"): "has not run"}
    monkeypatch.setattr(backends, "_ONLY_BY_NAME", only)
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(dispatch, "generation", lambda device: "sm_90")
    points = (
        Point("float32", (1, 256, 256), {"quick": 10.0, "other": 15.0, "torch": 300.0}),
        Point("float32", (16, 256, 256), {"quick": 50.0, "other": 40.0}),
        Point("float32", (1, 65536, 256), {"other": 9e5, "torch": 8e5}),
    )
    monkeypatch.setattr(dispatch, "MEASURED", {"sm_90": {"patch_nce": points}})
    return rows


def chosen(*sizes: int, op: str = "patch_nce", dtype: torch.dtype = torch.float32):
    return backends.select(op, torch.empty(sizes, dtype=dtype))


def test_nothing_is_measured_yet():
    """The table in the repository is filled from runs on hardware only; there was none."""
    assert dispatch.MEASURED == {}
    assert dispatch.quickest("patch_nce", torch.empty(1, 256, 256)) == ()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 256, 256), Quick),
        ((2, 200, 256), Quick),
        ((256, 256), Quick),  # a missing leading size is 1
        ((16, 256, 256), Other),
        ((8, 256, 256), Other),
        ((0, 256, 256), Quick),
    ],
)
def test_the_quickest_at_the_nearest_sizes(table, sizes, expected):
    assert chosen(*sizes) is expected


def test_plain_pytorch_may_be_the_quickest(table):
    assert chosen(1, 60000, 256) is fastnce.reference


def test_what_is_not_measured_is_chosen_as_without_a_table(table):
    """Another op, another dtype, another generation: the measured backends stay by name only."""
    usual = {name: module for name, module in table.items() if name not in ("quick", "other")}
    for op, dtype in (("sup_con", torch.float32), ("patch_nce", torch.float64)):
        assert chosen(1, 256, 256, op=op, dtype=dtype) in usual.values()


def test_another_generation_is_not_measured(table, monkeypatch):
    monkeypatch.setattr(dispatch, "generation", lambda device: "sm_80")
    assert chosen(1, 256, 256) not in (Quick, Other)
    monkeypatch.setattr(dispatch, "generation", lambda device: None)
    assert chosen(1, 256, 256) not in (Quick, Other)


def test_one_that_cannot_run_here_gives_way_to_the_next(table, monkeypatch):
    monkeypatch.setitem(table, "quick", Unable)
    assert chosen(1, 256, 256) is Other


def test_a_name_overrides_the_table(table):
    assert backends.select("patch_nce", torch.empty(1, 256, 256), "other") is Other
    with fastnce.use_backend("torch"):
        assert chosen(1, 256, 256) is fastnce.reference


def test_a_name_in_the_table_that_is_no_backend(table, monkeypatch):
    points = (Point("float32", (1, 2, 3), {"qick": 1.0}),)
    monkeypatch.setattr(dispatch, "MEASURED", {"sm_90": {"patch_nce": points}})
    with pytest.raises(ValueError, match="fastnce.backends.dispatch: backend='qick' is unknown"):
        chosen(1, 2, 3)


def test_each_choice_is_logged_once(table, caplog):
    caplog.set_level(logging.INFO, logger="fastnce")
    for batch in (1, 1, 16, 16):
        chosen(batch, 256, 256)
    assert [r.getMessage().split("backend ")[1] for r in caplog.records] == ["quick", "other"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_can_trace_the_choice(table, dynamic):
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if backends.select("patch_nce", x) is Quick else 3.0)

    traced = torch.compile(double, backend="eager", fullgraph=True, dynamic=dynamic)
    x = torch.ones(1, 256, 256)
    # A size that may vary has no nearest measured one.
    assert traced(x).eq(3.0 if dynamic else 2.0).all()


def test_without_a_table_the_tensor_is_not_looked_at():
    """So the choice costs next to nothing."""
    assert dispatch.quickest("patch_nce", None) == ()


def test_a_device_without_a_generation():
    assert dispatch.generation(torch.device("cpu")) is None
