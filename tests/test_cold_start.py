"""The benchmark of cold starts: what it compiles, counts and prints, with compiler and GPU made up."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import cold_start, launches


@pytest.fixture
def built(monkeypatch) -> list[tuple[str, int]]:
    """A compiler that takes half a second."""
    found, now = [], [0.0]

    def build(launch, capability):
        found.append((launch.name, capability))
        now[0] += 0.5

    monkeypatch.setattr(launches, "build", build)
    monkeypatch.setattr(cold_start, "cpu_seconds", lambda: now[0])
    return found


@pytest.mark.parametrize(
    ("step", "kernels"),
    [
        ("info_nce", {"pack", "sums", "losses", "panel", "row_gradients"}),
        ("CUT", {"gather", "scatter", "pack", "sums", "losses", "panel", "row_gradients"}),
    ],
)
def test_every_kernel_of_a_step_is_compiled_once(step, kernels, built):
    seconds = cold_start.compile_seconds(step, 90)
    assert {name.rstrip("'") for name in seconds} == kernels
    assert len(seconds) == len(built) and {target for _, target in built} == {90}
    assert set(seconds.values()) == {0.5}


def test_the_table_has_every_step_and_target():
    found = {
        "compile_cpu_seconds": {"info_nce sm_90": {"pack": 1.0, "sums": 2.5}},
        "calls": {"CUT, cache empty": {"seconds": [3.0, 0.002]}},
    }
    text = cold_start.table(found, "a machine")
    assert "| info_nce | sm_90 | 2 | 3.5 s | `sums` 2.5 s |" in text
    assert "CUT, cache empty: first call 3.00 s, second 2.00 ms." in text
    assert "not measured" not in text
    assert "not measured on hardware" in cold_start.table({**found, "calls": {}}, "a machine")


@pytest.mark.parametrize("step", cold_start.STEPS)
def test_calls_run(step, monkeypatch):
    monkeypatch.setattr(cold_start, "_ROWS", 8)
    monkeypatch.setattr(cold_start, "_MAPS", ((3, 20), (4, 16)))
    times = cold_start.first_calls(step, torch.device("cpu"), "torch")
    assert len(times) == 2 and all(x > 0 for x in times)


def test_a_process_that_fails_says_why(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nKeyError: 'nothing'\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(
        RuntimeError, match=r"--compile nothing 90 failed: (?s:.*)KeyError: 'nothing'"
    ):
        cold_start.in_fresh_process("--compile", "nothing", "90", cache=tmp_path)


def test_the_results_are_what_the_command_writes():
    (path,) = (Path(__file__).parents[1] / "benchmarks/results").glob("*-cold-start.json")
    found = json.loads(path.read_text())
    steps = [f"{step} sm_{target}" for target in cold_start.TARGETS for step in cold_start.STEPS]
    assert list(found["compile_cpu_seconds"]) == steps
    assert (
        cold_start.table(found, found["machine"]["device"]) == path.with_suffix(".md").read_text()
    )
