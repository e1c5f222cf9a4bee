"""The benchmarks: what is compared is the same, what is wrong is not timed, and every command writes its report."""

import json
import math
from pathlib import Path

import pytest
import torch

import fastnce
from benchmarks import (
    cases,
    distributed,
    gpu_report,
    growth,
    machine,
    measure,
    report,
    rivals,
    steps,
)
from benchmarks.__main__ import main
from benchmarks.cases import Case, Provider
from benchmarks.timing import quartiles, run

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", cases.OPS)
def test_every_rival_computes_the_same(op):
    """At cut-down sizes, in float64."""
    full = cases.select(op, "full", CPU)
    assert cases.select(op, "quick", CPU) and len({case.name for case in full}) == len(full)
    for case in full:
        shape = case.cut({"N": 24, "M": 40, "S": 16, "image": 32, "D": 40})
        inputs = case.inputs(CPU, torch.float64, shape)
        truth = run(rivals.fused(case, "torch"), inputs, case.wrt)
        found = rivals.providers(case, CPU, torch.float64, with_compile=False)
        found = [p for p in found if p.reason == "ok" and p.name != "eager"]
        assert "published" in [p.name for p in found]
        for provider in found:
            error = measure.errors(run(provider.call, inputs, case.wrt), truth)
            assert max(error.values()) < 1e-6, (case.name, provider.name, error)


def square(inputs):
    return (inputs["x"] @ inputs["x"].T).square().sum()


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x @ x.T).square().sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 4 * (x @ x.T) @ x * 1.01


def broken(inputs):
    raise RuntimeError("no such kernel\nand more")


def test_what_is_wrong_or_absent_is_said_and_not_timed():
    case = Case(
        "square",
        "small",
        {"N": 8, "D": 3},
        lambda shape, draw: {"x": draw.normal(shape["N"], shape["D"])},
        ("x",),
        gate_limits={"N": 4},
    )
    providers = [
        Provider("eager", square),
        Provider("rival that rounds", lambda x: square(x) * (1 + 1e-4)),
        Provider("ours that rounds", lambda x: square(x) * (1 + 1e-4), ours=True),
        Provider("scaled", lambda x: square(x) * 1.01),
        Provider("gradient", lambda x: WrongGradient.apply(x["x"])),
        Provider("nan", lambda x: square(x) + torch.nan),
        Provider("shape", lambda x: square(x).unsqueeze(0)),
        Provider("large", lambda x: square(x) * (2.0 if len(x["x"]) > 4 else 1.0)),
        Provider("broken", broken),
        Provider("absent", square, reason="no compiler"),
        Provider("huge", square, extra_bytes=10**18),
    ]
    entry = measure.measure(case, providers, square, CPU, torch.float32, 0.01)
    status = ["ok", "ok", *["wrong"] * 6, "failed", "unavailable", "skipped"]
    assert [row["status"] for row in entry["providers"]] == status
    timed = [row["name"] for row in entry["providers"] if row["seconds"]]
    assert timed == ["eager", "rival that rounds"]
    assert report.has_fault([entry])
    text = report.case_table(entry)
    assert "full size" in text and "no such kernel" in text and "no compiler" in text


def test_a_run_writes_its_report(tmp_path, capsys, threads):
    options = ["--seconds", "0.1", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main(["sample_patches", *options, "--precision", "high"]) == 0
    (path,) = tmp_path.glob("*-sample_patches.json")
    document = json.loads(path.read_text())
    assert document["settings"]["precision"] == "high" and document["format"] == report.FORMAT
    assert len(document["results"]) == len(cases.select("sample_patches", "quick", CPU))
    for entry in document["results"]:
        found = {row["name"]: row for row in entry["providers"]}
        assert found["compile"]["status"] == "unavailable"
        for name in ("eager", "published"):
            seconds = found[name]["seconds"]
            assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert found[name]["peak_extra_bytes"] > found[name]["working_bytes"] >= 0
        expected = "ok" if fastnce.backends.available()["native"] == "ok" else "unavailable"
        assert found["native"]["status"] == expected
    text = path.with_suffix(".md").read_text()
    assert "| eager " in text and "| eager " in capsys.readouterr().out


def entry_with(ours: float, rival: float, **more) -> dict:
    rows = [
        {"name": name, "ours": name == "triton", "status": "ok", "seconds": quartiles([s])}
        for name, s in (("eager", rival), ("triton", ours))
    ]
    return {"op": "o", "case": "c", "dtype": "bfloat16", "providers": rows, **more}


def test_losses_are_reported_like_wins():
    lines = report.summary([entry_with(1.0, 3.0), entry_with(2.0, 1.0)])
    assert "3.00x faster than eager" in lines[0] and "LOSS, 2.00x slower than eager" in lines[1]
    assert lines[2] == "- 1 won, 1 lost"


def test_a_step_of_the_gpu_report_ends_in_time():
    assert gpu_report.step(["-c", "print(6 * 7)"], 60.0) == {"status": "ok", "output": "42\n"}
    found = gpu_report.step(["-c", "import time; time.sleep(600)"], 0.0)
    assert found["status"].startswith("stopped after")
    assert gpu_report.step(["-c", "raise SystemExit(3)"], 60.0)["status"] == "failed with status 3"


def test_the_gpu_report_has_its_rows(tmp_path, monkeypatch):
    """With the steps and figures of a GPU made up; one op breaks."""
    asked = []

    def step(arguments, limit, **options):
        asked.append((arguments, options))
        if "--out" not in arguments or arguments[2] != "info_nce":
            broken = arguments[2] == "sup_con"
            return {"status": "failed with status 3" if broken else "ok", "output": ""}
        more = {"shape": {}, "gradients": [], "products": 0, "device": "cuda"}
        entry = entry_with(1.0, 3.0, **more)
        folder = Path(arguments[arguments.index("--out") + 1])
        (folder / "x.json").write_text(json.dumps({"results": [entry]}))
        return {"status": "ok", "output": ""}

    facts = machine.describe(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "describe", lambda device: facts)
    monkeypatch.setattr(machine, "matmul_rates", lambda *args, **options: {"bfloat16": 1e5})
    monkeypatch.setattr(gpu_report, "step", step)
    assert gpu_report.main(tmp_path) == 1
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["results"]
    assert list(document["steps"])[:4] == ["build", "verify", "backends", "tests"]
    assert document["steps"]["build"]["status"] == document["steps"]["verify"]["status"] == "ok"
    ((command, options),) = [x for x in asked if "verify" in x[0]]
    assert command[command.index("--report") + 1] == str(tmp_path / "verify.md")
    assert options["FASTNCE_CACHE"] == str(tmp_path)  # where the verdicts are found
    text = (tmp_path / "results.md").read_text()
    assert (
        "triton 3.00x faster than eager" in text
        and "- sup_con, quick cases: failed with status 3" in text
    )


@pytest.mark.parametrize("system", steps.STEPS)
def test_the_published_step_is_ours(system):
    """CUT's, FastCUT's, SinCUT's and CFL's differ by the 1e-7 that is added to the norm of rows; MoCo's by the rounding of the first keys."""
    close = {"cut": 1e-6, "fastcut": 1e-6, "sincut": 1e-6, "cfl": 1e-5, "moco": 1e-8}.get(
        system, 1e-9
    )
    assert steps.check(steps.STEPS[system])["float64"] < close


def test_a_steps_report_and_the_table_of_all(tmp_path):
    arguments = ["steps", "--only", "contragan-cifar10", "--size", "quick", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (found,) = tmp_path.glob("*-contragan-cifar10_quick_step.json")
    assert not [*tmp_path.glob("*-steps.md")]  # of full sizes only
    document = json.loads(found.read_text())
    assert all(seconds[0] > 0 for seconds in document["seconds"].values())
    assert document["peak_bytes"].keys() == set(steps.providers())
    found.rename(tmp_path / found.name.replace("_quick", ""))
    steps.summary(tmp_path, document["machine"])
    (table,) = tmp_path.glob("*-steps.md")
    assert "| contragan-cifar10 |" in table.read_text()


@pytest.mark.parametrize("loss", distributed.LOSSES)
def test_ranks_are_checked_timed_and_measured(loss):
    """Every provider's gate, in bfloat16; a wrong one would raise."""
    names = ["eager", "ring", "gather"]
    answers = distributed.on_ranks(loss, 64, names, distributed.BF16, 0.01)
    assert all(list(times) == names for times in answers)
    assert all(len(samples) >= 1 for samples in answers[0].values())
    if loss == "info_nce":
        answers = distributed.on_ranks(loss, 64, ["ring"], torch.float32)
        assert all(answer["peak"] > 0 for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu_report"], "unknown command 'gpu_report'. Did you mean 'gpu-report'?"),
        (["steps", "--only", "cot"], "unknown system 'cot'. Did you mean 'cut'?"),
        (["info_nce", "--seconds", "-1"], "expected a positive number, got '-1'"),
        (["info_nce", "--dtype", "fp32"], "invalid choice: 'fp32'"),
        (["info_nce", "--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and message in line and line.count("\n") == 1


@pytest.mark.parametrize("name", growth.FORMS)
def test_growth_of_every_form(name):
    points = growth.measure(name, 9, math.inf, 1)
    assert [point["n"] for point in points] == [256, 512]
    assert all(point["seconds"] > 0 and point["bytes"] > 0 for point in points)
    few, more = (point["products"] for point in points)
    assert more / few == (2 if "images" in name else 4)
    assert growth.slope([{"x": 2**i, "y": 7 * 8**i} for i in range(4)], "x", "y") == pytest.approx(
        3
    )
