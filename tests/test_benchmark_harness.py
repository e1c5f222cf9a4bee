"""How the benchmarks measure: statistics, taking turns, the gate, rates and memory, on cases made up."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed

from benchmarks import harness, machine, memory, report  # noqa: E402
from benchmarks.case import Case, Provider  # noqa: E402

CPU = torch.device("cpu")


class FakeClock:
    """Takes the seconds that each call returns, and notes who was called."""

    def __init__(self):
        self.order = []

    def __call__(self, call, count):
        self.order.append((call.name, count))
        return [call() for _ in range(count)]


class FakeCall:
    def __init__(self, name, seconds):
        self.name, self.seconds = name, iter(seconds)

    def __call__(self):
        return next(self.seconds)


def constant(name, seconds):
    return FakeCall(name, (seconds for _ in range(10**6)))


def test_quartiles():
    assert harness.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "samples": 5,
    }
    assert harness.quartiles([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "samples": 1}


def test_providers_take_turns():
    clock = FakeClock()
    calls = {name: constant(name, 1.0) for name in "abc"}
    times = harness.time_interleaved(calls, 15.0, clock)
    turns = [name for name, _ in clock.order]
    assert turns == list("abc") * (len(turns) // 3)
    # One warm call each, then 15 s shared among three calls of 1 s.
    assert {t["samples"] for t in times.values()} == {5}


def test_a_quick_provider_gets_more_calls_and_the_same_time():
    clock = FakeClock()
    times = harness.time_interleaved(
        {"slow": constant("slow", 1.0), "quick": constant("quick", 0.1)}, 10.0, clock
    )
    assert times["slow"]["samples"] == 5
    assert 45 <= times["quick"]["samples"] <= 50
    assert times["quick"]["median"] == pytest.approx(0.1)


def test_a_call_longer_than_the_budget_is_not_repeated():
    clock = FakeClock()
    times = harness.time_interleaved(
        {"endless": constant("endless", 100.0), "quick": constant("quick", 0.5)}, 3.0, clock
    )
    assert times["endless"] == {"median": 100.0, "q1": 100.0, "q3": 100.0, "samples": 1}
    assert times["quick"]["samples"] == 6


def test_one_slow_sample_does_not_move_the_median():
    seconds = [1.0, 1.0, 90.0, *[1.0] * 100]
    times = harness.time_interleaved({"a": FakeCall("a", seconds)}, 10.0, FakeClock())
    assert times["a"]["median"] == 1.0


def square_case(**changes):
    values = {
        "op": "square",
        "name": "4 x 3",
        "shape": {"N": 4, "D": 3},
        "make": lambda shape, draw: {"x": draw.normal(shape["N"], shape["D"])},
        "wrt": ("x",),
        "products": 2,
        "pairs": lambda shape: shape["N"] ** 2,
    }
    return Case(**(values | changes))


def square(inputs):
    return (inputs["x"] @ inputs["x"].T).square().sum()


def measured(*providers, case=None, dtype=torch.float32):
    entry = harness.measure(case or square_case(), list(providers), square, CPU, dtype, 0.01)
    return {row["name"]: row for row in entry["providers"]}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x @ x.T).square().sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 4 * (x @ x.T) @ x * 1.01


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda inputs: square(inputs) * 1.01,
        lambda inputs: WrongGradient.apply(inputs["x"]),
        lambda inputs: square(inputs) + torch.nan,
        lambda inputs: square(inputs).unsqueeze(0),
    ],
    ids=["result", "gradient", "nan", "shape"],
)
def test_the_gate_catches_a_wrong_provider_and_does_not_time_it(call, ours):
    rows = measured(Provider("right", square), Provider("wrong", call, ours=ours))
    assert rows["right"]["status"] == "ok"
    assert rows["right"]["seconds"]["samples"] >= 1
    assert rows["wrong"]["status"] == "wrong"
    assert "error" in rows["wrong"]["reason"]
    assert rows["wrong"]["seconds"] is None


def test_ours_has_a_narrower_bound_than_a_rival():
    def rounded(inputs):
        return square(inputs) * (1 + 1e-4)

    rows = measured(
        Provider("eager", square),
        Provider("ours", rounded, ours=True),
        Provider("rival", rounded),
    )
    assert (rows["ours"]["status"], rows["rival"]["status"]) == ("wrong", "ok")


def test_above_the_gate_providers_are_compared_at_the_timed_sizes():
    """A provider that is wrong for large sizes only."""

    def wrong_when_large(inputs):
        return square(inputs) * (2.0 if len(inputs["x"]) > 4 else 1.0)

    case = square_case(shape={"N": 8, "D": 3}, gate_limits={"N": 4})
    rows = measured(Provider("eager", square), Provider("large", wrong_when_large), case=case)
    assert rows["eager"]["status"] == "ok"
    assert rows["large"]["status"] == "wrong"
    assert "full size" in rows["large"]["reason"]


def test_the_gate_shrinks_until_the_truth_fits():
    case = square_case(shape={"N": 10**6, "D": 3})
    shape = case.gate_shape(64 * 1000**2)
    assert shape["D"] == 3
    assert 500 <= shape["N"] <= 1000


def test_a_provider_that_breaks_or_cannot_run_is_reported():
    def broken(inputs):
        raise RuntimeError("no such kernel\nand more")

    rows = measured(
        Provider("eager", square),
        Provider("broken", broken),
        Provider("absent", square, reason="no compiler"),
        Provider("huge", square, extra_bytes=10**18),
    )
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == (
        "failed",
        "RuntimeError: no such kernel",
    )
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("unavailable", "no compiler")
    assert rows["huge"]["status"] == "skipped"
    assert rows["eager"]["seconds"] is not None


def test_rate_counts_the_mandatory_products():
    case = square_case()
    assert case.flop == 2 * 2 * 4 * 4 * 3
    entry = harness.measure(case, [Provider("eager", square)], square, CPU, torch.float32, 0.01)
    harness.add_rates(entry, matmul=50.0, peak=100.0)
    (row,) = entry["providers"]
    assert row["gflops"] == pytest.approx(case.flop / row["seconds"]["median"] / 1e9)
    assert row["share_of_matmul"] == pytest.approx(row["gflops"] / 50)
    assert row["share_of_peak"] == pytest.approx(row["gflops"] / 100)
    assert entry["fma_peak_gflops"] == 100.0


def test_products_of_rounded_factors_have_a_wider_gate_their_own_peak_and_no_part_in_the_verdict():
    rounded = lambda inputs: square({**inputs, "x": inputs["x"].bfloat16().float()})  # noqa: E731
    providers = [
        Provider("eager", square),
        Provider("exact", rounded, ours=True),
        Provider("rounding", rounded, ours=True, rounds_products=True),
    ]
    entry = harness.measure(square_case(), providers, square, CPU, torch.float32, 0.01)
    _, exact, rounding = entry["providers"]
    assert exact["status"] == "wrong" and rounding["status"] == "ok"
    harness.add_rates(entry, matmul=None, peak=100.0, rounded_peak=200.0)
    assert rounding["share_of_peak"] == pytest.approx(rounding["gflops"] / 200)
    fast = {**rounding, "status": "ok", "seconds": {"median": 1e-9}}
    lines = report.summary([{**entry, "providers": [entry["providers"][0], fast]}])
    assert lines == ["No fused backend was timed; the tables say why."]


def test_no_peak_no_share():
    entry = harness.measure(
        square_case(), [Provider("eager", square)], square, CPU, torch.float32, 0.01
    )
    harness.add_rates(entry, matmul=None, peak=None)
    (row,) = entry["providers"]
    assert row["gflops"] > 0
    assert not row.keys() & {"share_of_matmul", "share_of_peak"}


def test_the_peak_is_the_median_of_what_was_measured_around_the_case(monkeypatch):
    rates = iter([100.0, 90.0, 10.0, 80.0])
    monkeypatch.setattr(machine.native, "available", lambda: "ok")
    monkeypatch.setattr(machine.native, "fma_peak", lambda seconds, dtype: next(rates))
    meter = machine.PeakMeter(CPU, torch.float32)
    assert meter.rate() is None
    meter.measure(2)
    meter.measure(2)
    assert meter.rate() == 85.0
    elsewhere = machine.PeakMeter(torch.device("cuda"), torch.float32)
    elsewhere.measure()
    assert elsewhere.rate() is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_peak_memory_of_a_known_allocation():
    """A job whose arrays have a known size, measured as the subprocess measures."""
    case = square_case(shape={"N": 3000, "D": 3})
    eager = Provider("eager", square)
    matrix = 3000**2 * 4
    answer = memory.peak_extra(case, eager, torch.float32)
    # The products and their square; in the backward two gradients of that size.
    assert 1.5 * matrix < answer["peak"] < 6 * matrix
    assert answer["outputs"] == 4 + 3000 * 3 * 4  # the loss and the gradient
    assert answer["seconds"] > 0


def test_shared_storage_is_counted_once():
    x = torch.zeros(100)
    assert memory.storage_bytes(([x, x[:10]], [x.view(10, 10), torch.zeros(5)])) == 420
