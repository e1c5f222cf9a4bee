"""The benchmarks: statistics, the gate, and the files that they write."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed

import fastnce  # noqa: E402
from benchmarks import harness, machine, memory, report, suite  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
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


def entry_with(ours, rival):
    rows = [
        {"name": "rival", "ours": False, "status": "ok", "seconds": harness.quartiles([rival])},
        {"name": "native", "ours": True, "status": "ok", "seconds": harness.quartiles([ours])},
    ]
    return {"op": "o", "case": "c", "dtype": "float32", "providers": rows}


def test_losses_are_reported_like_wins():
    lines = report.summary([entry_with(1.0, 3.0), entry_with(2.0, 1.0)])
    assert "3.00x faster than rival" in lines[0]
    assert "LOSS, 2.00x slower than rival" in lines[1]
    assert lines[2] == "- 1 won, 1 lost"


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


@pytest.mark.parametrize("op", suite.OPS)
def test_every_op_has_cases_whose_published_form_is_right(op):
    """The baselines against the reference, cut down so that it is quick."""
    quick = suite.cases(op, "quick", CPU)
    assert quick
    assert suite.cases(op, "full", CPU)
    names = [case.name for case in quick]
    assert len(set(names)) == len(names)
    for case in suite.cases(op, "full", CPU):
        shape = case.cut({"N": 24, "M": 40, "S": 16, "image": 32, "D": 40})
        inputs = case.inputs(CPU, torch.float64, shape)
        truth = harness.run(suite.fused(case, "torch"), inputs, case.wrt)
        found = suite.providers(case, CPU, torch.float64, with_compile=False)
        rivals = [p for p in found if p.reason == "ok" and p.name != "eager"]
        assert any(p.name == "published" for p in rivals)
        for provider in rivals:
            error = harness.errors(harness.run(provider.call, inputs, case.wrt), truth)
            assert max(error.values()) < 1e-6, (case.name, provider.name, error)


def test_the_table_has_every_case_of_the_published_table():
    shapes = {(case.op, *case.shape.values()) for op in suite.OPS for case in table_cases(op)}
    assert shapes == {
        ("info_nce", 16384, 256),
        ("info_nce", 8192, 1024),
        ("info_nce", 131072, 128),
        ("info_nce", 256, 65536, 128),
        ("patch_nce", 5, 1, 256, 256),
        ("patch_nce", 5, 1, 16, 256),
        ("sample_patches", 1, 256, 256),
        ("conditional_contrastive", 1024, 768, 200),
        ("sup_con", 8192, 128, 4),
    }
    names = [case.name for case in table_cases("info_nce")]
    assert "both gradients, 16384 x 256" in names
    assert "keys without gradient, 16384 x 256" in names
    (huge,) = (case for op in suite.OPS for case in table_cases(op) if case.once)
    assert huge.shape == {"N": 131072, "D": 128}


def test_patch_sampling_inside_a_network():
    """Each map's gradient is the network's ones and the patches'; the table shows what is above the network alone."""
    (case,) = (case for case in table_cases("sample_patches") if case.alone)
    shape = {"B": 1, "image": 32, "S": 16}
    inputs = case.inputs(CPU, torch.float32, shape)
    _, alone = harness.run(case.alone, inputs, case.wrt)
    assert all(x.eq(1).all() for x in alone)
    for provider in suite.providers(case, CPU, torch.float32, with_compile=False):
        if provider.reason != "ok":
            continue
        outputs, grads = harness.run(provider.call, inputs, case.wrt)
        assert [x.shape for x in outputs[5:]] == [(1, 16, c) for c in (3, 128, 256, 256, 256)]
        for grad, ids in zip(grads, inputs["patch_ids"], strict=True):
            rest = grad.flatten(2).clone()
            assert not rest[:, :, ids].eq(1).all(), provider.name
            rest[:, :, ids] = 1
            assert rest.eq(1).all(), provider.name
    small = dataclasses.replace(case, shape=shape)
    (entry,) = suite.run_cases([small], CPU, [torch.float32], seconds=0.2, with_compile=False)
    timed = [row for row in entry["providers"] if row["seconds"]]
    assert len(timed) >= 2
    for row in timed:
        above = row["seconds"]["median"] - entry["alone"]["median"]
        assert row["seconds_above_alone"] == above
    text = report.case_table(entry)
    assert "the op's share" in text and "without the op" in text
    timed[0]["seconds_above_alone"] = -1e-6
    assert "none measurable" in report.case_table(entry)


def test_forward_alone_differentiates_nothing():
    (case,) = (case for case in table_cases("sample_patches") if not case.wrt)
    inputs = case.inputs(CPU, torch.float32, {"B": 1, "image": 32, "S": 16})
    outputs, grads = harness.run(suite.fused(case, None), inputs, case.wrt)
    assert len(outputs) == 5 and grads == []
    assert all(x.requires_grad for x in suite.fused(case, None)(inputs))


def table_cases(op):
    return suite.cases(op, "table", CPU)


def test_four_rows_of_each_class():
    (case,) = table_cases("sup_con")
    labels = case.inputs(CPU, torch.float32, {"N": 64, "D": 3, "per_class": 4})["labels"]
    assert torch.bincount(labels).tolist() == [4] * 16
    assert labels.tolist() != sorted(labels.tolist())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_a_case_that_runs_once_has_time_and_memory_of_ours_alone(monkeypatch):
    if fastnce.backends.available()["native"] != "ok":
        pytest.skip("no native library")
    calls = []
    monkeypatch.setattr(
        memory,
        "_ask_subprocess",
        lambda jobs, deadline: (
            calls.append(jobs),
            ([{"peak": 9, "outputs": 4, "seconds": 2.0}] * 2, ""),
        )[1],
    )
    (case,) = (case for case in table_cases("info_nce") if case.once)
    case = dataclasses.replace(case, shape={"N": 64, "D": 8})
    (entry,) = suite.run_cases([case], CPU, [torch.float32], seconds=0.1, with_compile=False)
    rows = {row["name"]: row for row in entry["providers"]}
    assert rows["eager"]["status"] == rows["published"]["status"] == "skipped"
    assert rows["native"]["seconds"] == harness.quartiles([2.0])
    assert rows["native"]["working_bytes"] == 5
    assert rows["native"]["gflops"] == case.flop / 2.0 / 1e9
    ours = ["native", "native, bf16 products"]
    assert [job["provider"] for jobs in calls for job in jobs] == ours, "one call of each"
    assert "| **native** " in report.case_table(entry)


def test_precision_is_recorded_and_reaches_the_measuring_process(tmp_path, monkeypatch, capsys):
    seen = []
    run = memory.subprocess.run

    def spy(command, **options):
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(memory.subprocess, "run", spy)
    before = torch.get_float32_matmul_precision()
    options = ["--precision", "high", "--seconds", "0.1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["nt_xent", *options]) == 0
    assert torch.get_float32_matmul_precision() == before
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["settings"]["precision"] == "high"
    assert document["machine"]["float32_matmul_precision"] == "high"
    if sys.platform == "linux":
        assert seen[-1][-1] == "high"


def test_plots_are_one_per_op(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"name": name, "ours": name == "native", "status": "ok", "seconds": harness.quartiles([s])}
        for name, s in (("eager", 2.0), ("native", 1.0))
    ]
    entries = [
        {"op": op, "case": "c", "dtype": "float32", "providers": rows} for op in ("a", "b", "a")
    ]
    assert report.plots(tmp_path, "x", entries, "t") == (["x-a.png", "x-b.png"], "ok")
    assert report.plots(tmp_path, "y", entries[1:2], "t") == (["y.png"], "ok")
    assert {p.name for p in tmp_path.iterdir()} == {"x-a.png", "x-b.png", "y.png"}
    names, note = report.plots(tmp_path, "z", [entries[0] | {"providers": []}], "t")
    assert (names, note) == ([], "no plot: nothing was timed beside eager")


def test_results_name_no_path_of_the_checkout(tmp_path):
    entry = entry_with(1.0, 2.0) | {"shape": {}, "gradients": [], "products": 0, "device": "cpu"}
    entry["providers"][0] |= {"status": "failed", "reason": f"no {ROOT}/fastnce/lib.so"}
    facts = {"title": "t", "machine": machine.describe(CPU), "rates": {}, "settings": {}}
    for path in report.write(tmp_path, "r", [entry], **facts):
        assert "no fastnce/lib.so" in path.read_text()
        assert str(ROOT) not in path.read_text()


def test_demo_set_and_the_ops_of_the_package():
    demo = {op for op in suite.OPS for _ in suite.cases(op, "demo", CPU)}
    assert {"info_nce", "patch_nce", "conditional_contrastive", "sample_patches"} <= demo
    assert all(callable(getattr(fastnce, op)) for op in suite.OPS)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_short_run_writes_its_json_table_and_plot(tmp_path, capsys, restored_threads):
    pytest.importorskip("matplotlib")
    options = ["--seconds", "0.2", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main(["patch_nce", *options]) == 0
    stem = machine.slug(machine.device_name(CPU)) + "-patch_nce"
    assert {p.name for p in tmp_path.iterdir()} == {f"{stem}.{s}" for s in ("json", "md", "png")}
    document = json.loads((tmp_path / f"{stem}.json").read_text())
    assert document["format"] == report.FORMAT
    assert document["machine"]["torch"] == torch.__version__
    assert document["matmul_gflops"]["float32"] > 0
    assert len(document["results"]) == len(suite.cases("patch_nce", "quick", CPU))
    for entry in document["results"]:
        assert entry["op"] == "patch_nce"
        assert entry["flop"] > 0
        rows = {row["name"]: row for row in entry["providers"]}
        assert rows["compile"]["status"] == "unavailable"
        for name in ("eager", "published"):
            row = rows[name]
            assert row["status"] == "ok"
            seconds = row["seconds"]
            assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert row["gflops"] > 0
            assert row["share_of_matmul"] > 0
            assert row["error"].keys() == row["allowed"].keys() == {"output", "gradient"}
            if sys.platform == "linux":
                assert row["peak_extra_bytes"] > row["working_bytes"] >= 0
        native = rows["native"]
        if fastnce.backends.available()["native"] == "ok":
            assert 0 < native["share_of_peak"] <= 1.1
            assert native["gflops"] / native["share_of_peak"] == pytest.approx(
                entry["fma_peak_gflops"]
            )
        available = fastnce.backends.available()["native"]
        assert native["status"] == ("ok" if available == "ok" else "unavailable")
    printed = capsys.readouterr().out
    assert "| eager" in printed
    assert "## patch_nce: CUT, 1 image" in (tmp_path / f"{stem}.md").read_text()


def test_cases_beyond_the_limit_are_listed_as_not_run():
    cases = suite.cases("nt_xent", "quick", CPU)
    results = suite.run_cases(cases, CPU, [torch.float32], seconds=0.1, deadline=0.0)
    assert [entry["not_run"] for entry in results] == ["out of time"] * len(cases)
    assert "Not run: out of time" in report.case_table(results[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info_nc"], "did you mean 'info_nce'?"),
        (["gpu_report"], "did you mean 'gpu-report'?"),
        (["info_nce", "--seconds", "-1"], "expected a positive number, got '-1'"),
        (["info_nce", "--dtype", "fp32"], "invalid choice: 'fp32'"),
        (["info_nce", "--precision", "low"], "invalid choice: 'low'"),
        (["info_nce", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["info_nce", "--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
