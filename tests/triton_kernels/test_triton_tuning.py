"""Autotuning with a made-up clock: which tile wins, for which problems, how it is remembered, and when nothing is timed."""

import importlib.util
import itertools
import json
import os
import re
import sys
import threading
import warnings

import pytest
import torch

pytest.importorskip("triton")

import calls

from benchmarks.launches import SHARED_MEMORY, compiled, recorded
from fastnce import reference, triton_kernels
from fastnce.triton_kernels import config, gradients, info_nce, launch, tuning
from fastnce.triton_kernels.config import Tile

SLOW, FAST, FASTER = Tile(16, 16, 4, 2), Tile(32, 32, 4, 2), Tile(64, 64, 4, 2)
TILES = (SLOW, FAST, FASTER)
DEVICE = torch.device("meta")
records = pytest.mark.skipif(
    launch.INTERPRETED, reason="the interpreter launches nothing that could be recorded"
)


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


def ask(tuner: tuning.Tuner, name: str = "sums") -> Tile:
    """A pass that does nothing but ask, twice, as the passes do."""

    def run() -> Tile:
        first = tuner.tile(DEVICE, name, TILES)
        assert tuner.tile(DEVICE, name, TILES) == first
        return first

    return tuner.run(run)


def test_the_fastest_is_timed_once_and_stays():
    clock = Clock({SLOW: 3.0, FAST: 2.0, FASTER: 1.0})
    tuner = tuning.Tuner(None, clock)
    assert ask(tuner) == SLOW  # the call that tunes has the table's result
    assert clock.calls == 3
    assert ask(tuner) == FASTER and ask(tuner) == FASTER
    assert clock.calls == 3
    ask(tuner, "products")
    assert clock.calls == 6


@pytest.mark.parametrize(("second", "winner"), [(0.98, SLOW), (0.96, FAST)])
def test_noise_does_not_unseat_the_table(second, winner):
    tuner = tuning.Tuner(None, Clock({SLOW: 1.0, FAST: second, FASTER: 2.0}))
    ask(tuner)
    assert ask(tuner) == winner


def test_tiles_that_do_not_fit_are_passed_over():
    from triton.runtime.errors import OutOfResources

    too_large = OutOfResources(300000, 232448, "shared memory")
    tuner = tuning.Tuner(None, Clock({SLOW: 1.0, FAST: too_large, FASTER: 0.5}))
    ask(tuner)
    assert ask(tuner) == FASTER
    tuner = tuning.Tuner(None, Clock(dict.fromkeys(TILES, too_large)))
    ask(tuner)
    assert ask(tuner) == SLOW
    tuner = tuning.Tuner(None, Clock(dict.fromkeys(TILES, ValueError("a mistake"))))
    with pytest.raises(ValueError, match="a mistake"):
        ask(tuner)
    assert tuner.tile(DEVICE, "sums", TILES) == SLOW  # and nothing is left behind


def test_several_classes_of_one_call_are_timed_one_by_one():
    seen = []
    tuner = tuning.Tuner(None, lambda function, device: seen.append(function()) or 1.0)

    def run():
        return tuple(tuner.tile(DEVICE, name, TILES) for name in ("sums", "products"))

    tuner.run(run)
    others = [(tile, SLOW) for tile in TILES] + [(SLOW, tile) for tile in TILES]
    assert seen == others


def test_what_is_known_survives_the_process(tmp_path):
    path = tmp_path / "folder" / "tiles.json"
    clock = Clock({SLOW: 3.0, FAST: 1.0, FASTER: 2.0})
    one, other = tuning.Tuner(path, clock), tuning.Tuner(path, clock)
    ask(one, "sums")
    ask(other, "products")  # which keeps what the other process has written
    assert clock.calls == 6
    later = tuning.Tuner(path, clock)
    assert ask(later, "sums") == ask(later, "products") == FAST
    assert clock.calls == 6
    assert os.listdir(path.parent) == ["tiles.json"]
    (device,) = json.loads(path.read_text())
    assert device == tuning.device_key(DEVICE) and "triton" in device


def test_another_gpu_or_compiler_starts_anew(tmp_path, monkeypatch):
    clock = Clock({SLOW: 3.0, FAST: 1.0, FASTER: 2.0})
    ask(tuning.Tuner(tmp_path / "tiles.json", clock))
    monkeypatch.setattr(tuning, "device_key", lambda device: "another")
    assert ask(tuning.Tuner(tmp_path / "tiles.json", clock)) == SLOW
    assert clock.calls == 6


def test_a_tile_that_is_no_candidate_any_more_is_timed_anew(tmp_path):
    clock = Clock({SLOW: 3.0, FAST: 1.0, FASTER: 2.0})
    ask(tuning.Tuner(tmp_path / "tiles.json", clock))
    tuner = tuning.Tuner(tmp_path / "tiles.json", clock)
    tuner.run(lambda: tuner.tile(DEVICE, "sums", (SLOW, FASTER)))
    assert tuner.run(lambda: tuner.tile(DEVICE, "sums", (SLOW, FASTER))) == FASTER


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"b": [1]}}', '{"a": {"b": "c"}}', '{"a": 1}'])
def test_a_broken_file_is_ignored_with_a_warning(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored, tiles will be timed anew"):
        tuner = tuning.Tuner(path, Clock({SLOW: 3.0, FAST: 1.0, FASTER: 2.0}))
    with warnings.catch_warnings(action="ignore"):
        ask(tuner)
    assert tuning.Tuner(path).tile(DEVICE, "sums", TILES) == FAST


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    tuner = tuning.Tuner(tmp_path / "file" / "tiles.json", Clock(dict.fromkeys(TILES, 1.0)))
    with pytest.warns(UserWarning, match="the tuned tiles cannot be kept"):
        ask(tuner)


def test_nothing_is_timed_where_it_must_not_be(monkeypatch):
    """Under capture or tracing, outside the marked functions, and where results have to be repeatable."""
    clock = Clock({SLOW: 3.0, FAST: 1.0, FASTER: 2.0})
    tuner = tuning.Tuner(None, clock)
    assert tuner.tile(DEVICE, "sums", TILES) == SLOW
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    assert ask(tuner) == SLOW
    assert clock.calls == 0
    monkeypatch.setattr(tuning, "may_time", lambda device: True)
    ask(tuner)
    assert ask(tuner) == FAST
    monkeypatch.setattr(tuning, "may_time", lambda device: False)
    assert ask(tuner) == FAST  # what is known serves there, too
    torch.use_deterministic_algorithms(True)
    try:
        assert ask(tuner) == SLOW
    finally:
        torch.use_deterministic_algorithms(False)


def test_capture_and_tracing_forbid_timing(monkeypatch):
    monkeypatch.undo()
    cuda = torch.device("cuda")
    assert not tuning.may_time(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.may_time(cuda)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not tuning.may_time(cuda)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not tuning.may_time(cuda)


def test_a_thread_sees_no_other_thread_s_trials():
    inside, over = threading.Event(), threading.Event()

    def clock(function, device):
        tile = function()
        if tile == FAST:
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
    """In the passes of info_nce, on tensors without memory; all candidates are equally fast."""
    tuner = tuning.Tuner(None, lambda function, device: (function(), 1.0)[1])
    monkeypatch.setattr(tuning, "TUNER", tuner)
    monkeypatch.setattr(info_nce, "solve", tuning.wrapped(info_nce.solve))
    monkeypatch.setattr(info_nce, "both_products", tuning.wrapped(gradients.both_products))
    return tuner


def forward(count: int, depth: int, **options) -> None:
    query, key = (torch.empty(1, count, depth, device="meta", dtype=torch.bfloat16) for _ in "qk")
    triton_kernels.info_nce_forward(
        query, key, None, 0.07, **{**calls.IN_BATCH, **options},
        grad_scale=1.0, needs=(True, True, False, False),
    )  # fmt: skip


@records
def test_every_candidate_of_a_pass_is_launched_and_the_next_call_has_one(tuner):
    with recorded() as found:
        forward(16384, 256, symmetric=True)
    tried = {
        Tile(each.constant("BLOCK_M"), each.constant("BLOCK_N"), *dict(each.options).values())
        for each in found
        if each.name == "_row_products_kernel"
    }
    tile, small = config.tiles("products", False, torch.bfloat16, 256, 228 * 1024)
    expected = config.candidates("products", torch.bfloat16, tile, small)
    shapes = {(t.m, t.n, t.warps, t.stages) for t in expected}
    assert {(t.m, t.n, t.warps, t.stages) for t in tried} == shapes and len(shapes) >= 4
    with recorded() as again:
        forward(16384, 256, symmetric=True)
    # Sums, and the products of either side.
    passes = [each for each in again if each.constant("BLOCK_N") is not None]
    assert len(passes) == 3


@pytest.mark.skipif(not launch.INTERPRETED, reason="runs the kernels")
def test_what_is_being_timed_gives_right_results(tuner, monkeypatch):
    """In a problem that every candidate cuts differently, before, while and after one is chosen."""
    first, second, third = Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)
    monkeypatch.setattr(config, "tiles", lambda *arguments: (first, second))
    monkeypatch.setattr(config, "CANDIDATES", dict.fromkeys(config.CANDIDATES, (third,)))
    seconds = (0.5**i for i in itertools.count())  # the last is the fastest
    monkeypatch.setattr(tuner, "_clock", lambda function, device: (function(), next(seconds))[1])
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 40, 20, generator=generator).requires_grad_() for _ in "qk")
    options = {**calls.IN_BATCH, "symmetric": True}
    exact = reference.info_nce(query.double(), key.double(), None, 0.1, **options)
    expected = [exact, *torch.autograd.grad(exact.sum(), (query, key))]
    for _ in "tuning", "tuned":
        loss, _, grads = triton_kernels.info_nce_forward(
            query.detach(), key.detach(), None, 0.1, **options,
            grad_scale=1.0, needs=(True, True, False, False),
        )  # fmt: skip
        for a, b in zip((loss, *grads[:2]), expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    assert {name.partition(",")[0]: tile for (_, name), tile in tuner._known.items()} == {
        "sums rich": third,
        "products rich": third,
    }


@records
def test_classes_are_few(tuner):
    with recorded():
        for count in (64, 1000, 5000, 300_000):
            for depth in (16, 96, 128, 200, 384, 4096):
                forward(count, depth)
                forward(count, depth, symmetric=True)
    names = {name for _, name in tuner._known}
    kinds = {name.partition(",")[0] for name in names}
    assert kinds == {"sums", "products", "panel"}
    assert len(names) <= 3 * 4 * 3  # passes, depths, sizes


def test_the_variable_turns_it_on(monkeypatch, tmp_path):
    """Without it functions are left alone, so that it costs nothing."""
    assert tuning.TUNER is None
    assert tuning.tuned(forward) is forward
    assert not hasattr(info_nce.solve, "__wrapped__")
    monkeypatch.setenv("FASTNCE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTNCE_CACHE", str(tmp_path))
    name = "fastnce.triton_kernels.tuning_once_more"
    spec = importlib.util.spec_from_file_location(name, tuning.__file__)
    monkeypatch.setitem(sys.modules, name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    assert module.TUNER._path == tmp_path / "tiles.json"
    assert module.tuned(forward).__wrapped__ is forward
    monkeypatch.setenv("FASTNCE_AUTOTUNE", "on")
    with pytest.warns(UserWarning, match="must be 0 or 1, got 'on'"):
        spec.loader.exec_module(module)
    assert module.TUNER is None


@records
def test_candidates_in_fp8_compile(monkeypatch):
    """Those of the other dtypes are part of ``make triton-sweep``. One that does not fit would be passed over."""
    monkeypatch.setattr(launch, "shared_memory", lambda device: SHARED_MEMORY[90] + 1024)
    of_table = config.tiles
    for candidate in config.CANDIDATES["panel", 1]:

        def tiles(kind, *rest, new=candidate):
            return (new, new) if kind == "panel" else of_table(kind, *rest)

        monkeypatch.setattr(config, "tiles", tiles)
        with recorded() as found:
            forward(16384, 768, symmetric=True, similarity_dtype=torch.float8_e4m3fn)
        each = next(each for each in found if each.name == "_panel_kernel")
        assert (each.constant("BLOCK_M"), each.constant("BLOCK_N")) == (candidate.m, candidate.n)
        result = compiled(each, 90)
        assert re.search(r"wgmma\S*e4m3", result.ptx), result
        assert result.shared <= SHARED_MEMORY[90]
