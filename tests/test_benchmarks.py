"""The benchmarks: their cases, their command, and the files that they write."""

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

CPU = torch.device("cpu")


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
            assert native["share_of_peak"] > 0
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
