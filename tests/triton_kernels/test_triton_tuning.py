"""Autotuning with a made-up clock: which tile wins, for which problems, how it is remembered, and when nothing is timed."""

import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

pytest.importorskip("triton")

import calls
from triton.runtime.errors import OutOfResources

from benchmarks.launches import recorded
from fastnce import reference, triton_kernels
from fastnce.triton_kernels import config, gradients, info_nce, launch, tuning
from fastnce.triton_kernels.config import Tile

SLOW, FAST, FASTER = Tile(16, 16, 4, 2), Tile(32, 32, 4, 2), Tile(64, 64, 4, 2)
TILES = (SLOW, FAST, FASTER)
SECONDS = {SLOW: 3.0, FAST: 2.0, FASTER: 1.0}
DEVICE = torch.device("meta")


class Clock:
    """Seconds by the tile that a function asked for; an exception in their place is raised."""

    def __init__(self, seconds: dict[Tile, object]) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, function, device: torch.device) -> float:
        self.calls += 1
        result = self.seconds[function()]
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture(autouse=True)
def timing_allowed(monkeypatch):
    monkeypatch.setattr(tuning, "may_time", lambda device: True)


def ask(tuner: tuning.Tuner, name: str = "sums", tiles: tuple[Tile, ...] = TILES) -> Tile:
    """A pass that does nothing but ask, twice, as the passes do."""

    def run() -> Tile:
        first = tuner.tile(DEVICE, name, tiles)
        assert tuner.tile(DEVICE, name, tiles) == first
        return first

    return tuner.run(run)


def test_the_fastest_is_timed_once_and_stays():
    clock = Clock(SECONDS)
    tuner = tuning.Tuner(None, clock)
    assert ask(tuner) == SLOW  # the call that tunes has the table's result
    assert ask(tuner) == FASTER and ask(tuner) == FASTER
    assert clock.calls == 3
    ask(tuner, "products")
    assert clock.calls == 6


TOO_LARGE = OutOfResources(300000, 232448, "shared memory")


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ((1.0, 0.98, 2.0), SLOW),  # less is noise
        ((1.0, 0.96, 2.0), FAST),
        ((1.0, TOO_LARGE, 0.5), FASTER),
        ((TOO_LARGE, TOO_LARGE, TOO_LARGE), SLOW),
    ],
)
def test_what_wins(seconds, winner):
    tuner = tuning.Tuner(None, Clock(dict(zip(TILES, seconds, strict=True))))
    ask(tuner)
    assert ask(tuner) == winner


def test_a_mistake_is_no_tile_that_does_not_fit():
    tuner = tuning.Tuner(None, Clock(dict.fromkeys(TILES, ValueError("a mistake"))))
    with pytest.raises(ValueError, match="a mistake"):
        ask(tuner)
    assert tuner.tile(DEVICE, "sums", TILES) == SLOW  # and nothing is left behind


def test_several_classes_of_one_call_are_timed_one_by_one():
    seen = []
    tuner = tuning.Tuner(None, lambda function, device: seen.append(function()) or 1.0)
    names = ("sums", "products")
    tuner.run(lambda: tuple(tuner.tile(DEVICE, name, TILES) for name in names))
    assert seen == [(tile, SLOW) for tile in TILES] + [(SLOW, tile) for tile in TILES]


def test_what_is_known_survives_the_process(tmp_path, monkeypatch):
    path, clock = tmp_path / "folder" / "tiles.json", Clock(SECONDS)
    one, other = tuning.Tuner(path, clock), tuning.Tuner(path, clock)
    ask(one, "sums")
    ask(other, "products")  # which keeps what the other process has written
    later = tuning.Tuner(path, clock)
    assert ask(later, "sums") == ask(later, "products") == FASTER
    assert clock.calls == 6
    assert os.listdir(path.parent) == ["tiles.json"]
    assert all("triton" in device for device in json.loads(path.read_text()))
    # A tile that is no candidate any more, and another GPU or compiler, are timed anew.
    assert ask(tuning.Tuner(path, clock), tiles=(SLOW, FAST)) == SLOW
    monkeypatch.setattr(tuning, "device_key", lambda device: "another")
    assert ask(tuning.Tuner(path, clock)) == SLOW


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"b": "c"}}'])
def test_a_broken_file_is_ignored_with_a_warning(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored"):
        tuner = tuning.Tuner(path, Clock(SECONDS))
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored"):
        ask(tuner)
    assert tuning.Tuner(path).tile(DEVICE, "sums", TILES) == FASTER


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    tuner = tuning.Tuner(tmp_path / "file" / "tiles.json", Clock(SECONDS))
    with pytest.warns(UserWarning, match="cannot be kept"):
        ask(tuner)


def test_nothing_is_timed_where_it_must_not_be(monkeypatch):
    """Under capture or tracing, outside the marked functions, and where results have to be repeatable."""
    clock = Clock(SECONDS)
    tuner = tuning.Tuner(None, clock)
    assert tuner.tile(DEVICE, "sums", TILES) == SLOW
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    assert ask(tuner) == SLOW
    assert clock.calls == 0
    monkeypatch.setattr(tuning, "may_time", lambda device: True)
    ask(tuner)
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    assert ask(tuner) == FASTER  # what is known serves there, too
    torch.use_deterministic_algorithms(True)
    try:
        assert ask(tuner) == SLOW
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("capturing", "compiling"), [(True, False), (False, True), (False, False)])
def test_capture_and_tracing_forbid_timing(capturing, compiling, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert tuning.may_time(torch.device("cuda")) == (not capturing and not compiling)
    assert not tuning.may_time(torch.device("cpu"))


def test_a_thread_sees_no_other_thread_s_trials():
    inside, over = threading.Event(), threading.Event()

    def clock(function, device):
        if function() == FAST:
            inside.set()
            over.wait(10)
        return 1.0

    tuner = tuning.Tuner(None, clock)
    thread = threading.Thread(target=ask, args=(tuner,))
    thread.start()
    assert inside.wait(10)
    assert tuner.tile(DEVICE, "sums", TILES) == SLOW
    over.set()
    thread.join()


@pytest.fixture
def tuner(monkeypatch) -> tuning.Tuner:
    """In the passes of info_nce; a later candidate is the faster one."""
    seconds = (0.5**i for i in itertools.count())
    tuner = tuning.Tuner(None, lambda function, device: (function(), next(seconds))[1])
    monkeypatch.setattr(tuning, "TUNER", tuner)
    monkeypatch.setattr(info_nce, "solve", tuning.tuned(info_nce.solve, tuner))
    both = tuning.tuned(gradients.both_products, tuner)
    monkeypatch.setattr(info_nce, "both_products", both)
    return tuner


def forward(query: torch.Tensor, key: torch.Tensor, temperature: float):
    options = {**calls.IN_BATCH, "symmetric": True, "grad_scale": 1.0}
    needs = (True, True, False, False)
    return triton_kernels.info_nce_forward(query, key, None, temperature, **options, needs=needs)


@pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter launches nothing to be recorded")
def test_every_candidate_of_a_pass_is_launched_and_classes_are_few(tuner):
    rows = [torch.empty(2, 1, 16384, 256, device="meta", dtype=torch.bfloat16)] * 2
    with recorded() as found:
        forward(*rows[0], 0.07)
    tried = {
        (each.constant("BLOCK_M"), each.constant("BLOCK_N"), *dict(each.options).values())
        for each in found
        if each.name == "_row_products_kernel"
    }
    of_table = config.tiles("products", False, torch.bfloat16, 256, 228 * 1024)
    expected = config.candidates("products", torch.bfloat16, *of_table)
    assert {shape[:4] for shape in tried} == {(t.m, t.n, t.warps, t.stages) for t in expected}
    with recorded():
        for count, depth in itertools.product((64, 1000, 5000, 300_000), (16, 96, 200, 384, 4096)):
            forward(*torch.empty(2, 1, count, depth, device="meta", dtype=torch.bfloat16), 0.07)
    names = {name for _, name in tuner.known}
    assert {name.partition(",")[0] for name in names} == {"sums", "products", "panel"}
    assert len(names) <= 3 * 4 * 3  # passes, depths, sizes


@pytest.mark.skipif(not launch.INTERPRETED, reason="runs the kernels")
def test_what_is_being_timed_gives_right_results(tuner, monkeypatch):
    """In a problem that every candidate cuts differently, before, while and after one is chosen."""
    first, second, third = Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)
    monkeypatch.setattr(config, "tiles", lambda *arguments: (first, second))
    monkeypatch.setattr(config, "CANDIDATES", dict.fromkeys(config.CANDIDATES, (third,)))
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 40, 20, generator=generator).requires_grad_() for _ in "qk")
    options = {**calls.IN_BATCH, "symmetric": True}
    exact = reference.info_nce(query.double(), key.double(), None, 0.1, **options)
    expected = [exact, *torch.autograd.grad(exact.sum(), (query, key))]
    for _ in "tuning", "tuned":
        loss, _, grads = forward(query.detach(), key.detach(), 0.1)
        for a, b in zip((loss, *grads[:2]), expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    assert set(tuner.known.values()) == {third}


@pytest.mark.parametrize(
    ("value", "expected"), [("", "None"), ("1", "tiles.json"), ("on", "must be 0 or 1, got 'on'")]
)
def test_the_variable_turns_it_on(value, expected, tmp_path):
    """Without it functions are left alone, so that it costs nothing."""
    code = (
        "from fastnce.triton_kernels import info_nce, tuning; tuner = tuning.TUNER\n"
        "assert hasattr(info_nce.solve, '__wrapped__') == (tuner is not None)\n"
        "print(tuner and tuner.path)"
    )
    environment = {**os.environ, "FASTNCE_AUTOTUNE": value, "FASTNCE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert expected in done.stdout + done.stderr
