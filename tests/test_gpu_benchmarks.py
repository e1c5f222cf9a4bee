"""The report of a GPU without one: its targets, its steps, and the table of dispatch, on results made up."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed

import fastnce  # noqa: E402
from benchmarks import (  # noqa: E402
    dispatch_table,
    gpu_steps,
    gpu_targets,
    harness,
    machine,
    report,
    suite,
    targets,
)
from benchmarks.__main__ import main  # noqa: E402
from fastnce.backends import dispatch  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def row(name: str, seconds: float | None, ours: bool = False, **more) -> dict:
    times = None if seconds is None else harness.quartiles([seconds])
    return {"name": name, "ours": ours, "status": "ok", "reason": "ok", "seconds": times, **more}


def entry(op: str, case: str, *rows: dict, **more) -> dict:
    values = {"op": op, "case": case, "dtype": "bfloat16", "device": "cuda", "shape": {}}
    return values | {"gradients": [], "products": 0, "providers": list(rows)} | more


# The targets.


def test_every_target_names_a_case_of_the_target_set():
    """And nothing is in that set that no target asks for."""
    cases = {(op, case.name) for op in suite.OPS for case in suite.cases(op, "target", GPU)}
    assert {(target.op, target.case) for target in targets.ALL} == cases
    assert len(targets.ALL) == len(set(targets.ALL))


def test_every_rival_and_provider_of_a_target_takes_part(monkeypatch):
    """By name, on a machine where everything is installed."""
    available = {"triton": "ok", "cuda": "ok", "native": "ok", "torch": "ok"}
    monkeypatch.setattr(fastnce.backends, "available", lambda: available)
    monkeypatch.setattr(fastnce.backends, "supports", lambda *arguments: "ok")
    for target in targets.ALL:
        case = suite.find_case(target.op, target.case)
        dtype = getattr(torch, target.dtype)
        names = [p.name for p in suite.providers(case, GPU, dtype, with_compile=False)]
        assert {target.provider, *target.against} <= set(names), target
        assert len(names) == len(set(names))


SPEED = targets.Target("o", "c", targets.SPEED, 3, ("eager", "published"))


def judged(target: targets.Target, *rows: dict, **more) -> targets.Verdict:
    (verdict,) = targets.judge([target], [entry("o", "c", *rows, **more)], {"bfloat16": 1e5}, 1e3)
    return verdict


def test_the_fastest_rival_counts():
    met = judged(SPEED, row("eager", 9.0), row("published", 4.0), row("triton", 1.0))
    assert (met.status, met.figure, str(met)) == ("met", 4.0, "met: 4x of 3x")
    missed = judged(SPEED, row("eager", 9.0), row("published", 2.0), row("triton", 1.0))
    assert (missed.status, str(missed)) == ("missed", "missed: 2x of 3x")


def test_what_was_not_timed_is_not_measured():
    skipped = row("eager", None) | {"status": "skipped", "reason": "needs about 103 GB"}
    verdict = judged(SPEED, skipped, row("triton", 1.0))
    assert verdict.status == "not measured"
    assert "eager: needs about 103 GB" in verdict.reason
    assert "published did not take part" in verdict.reason
    wrong = row("triton", None) | {"status": "wrong", "reason": "output error 1.0"}
    assert judged(SPEED, row("eager", 9.0), wrong).reason == "triton: output error 1.0"
    assert judged(SPEED, row("eager", 9.0)).reason == "triton did not take part"
    assert judged(SPEED, not_run="out of time").reason == "out of time"
    (absent,) = targets.judge([SPEED], [], {})
    assert (absent.status, absent.figure) == ("not measured", None)


def test_share_memory_and_least_time():
    share = dataclasses.replace(SPEED, quantity=targets.SHARE, bound=0.4, against=())
    ours = row("triton", 1.0, share_of_matmul=0.43)
    assert str(judged(share, ours)) == "met: 43% of 40%"
    assert judged(dataclasses.replace(share, bound=0.44), ours).status == "missed"
    assert judged(share, row("triton", 1.0)).reason == "torch.mm's rate is missing"

    memory = dataclasses.replace(share, quantity=targets.MEMORY, bound=4)
    for peak, status in ((400, "met"), (401, "missed")):
        verdict = judged(memory, row("triton", 1.0, peak_extra_bytes=peak), input_bytes=100)
        assert verdict.status == status
    short = row("triton", 1.0, peak_extra_note="out of memory")
    assert judged(memory, short).reason == "out of memory"

    # 1e12 bytes at 1e3 GB/s and 1e14 operations at 1e5 GFLOP/s: a second each.
    least = dataclasses.replace(memory, quantity=targets.LEAST_TIME, bound=2)
    sizes = {"input_bytes": 1e12, "flop": 1e14}
    assert judged(least, row("triton", 4.0), **sizes).figure == pytest.approx(2.0)
    assert judged(least, row("triton", 4.1), **sizes).status == "missed"
    (verdict,) = targets.judge([least], [entry("o", "c", row("triton", 1.0), **sizes)], {}, 1e3)
    assert verdict.status == "not measured"


def test_above_the_network_only_the_op_counts():
    target = dataclasses.replace(SPEED, quantity=targets.SPEED_ABOVE, bound=12)
    rival = row("eager", 2.3, seconds_above_alone=1.3)
    assert judged(target, rival, row("triton", 1.1, seconds_above_alone=0.1)).status == "met"
    assert judged(target, rival, row("triton", 1.2, seconds_above_alone=0.2)).status == "missed"
    unmeasurable = judged(target, rival, row("triton", 1.0, seconds_above_alone=-0.01))
    assert (unmeasurable.status, unmeasurable.figure) == ("met", math.inf)


def test_without_hardware_every_row_is_there_and_none_is_claimed(tmp_path, capsys):
    assert main(["gpu-targets", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["device"] is None
    assert len(document["targets"]) == len(targets.ALL)
    assert {x["status"] for x in document["targets"]} == {"not measured"}
    assert {x["figure"] for x in document["targets"]} == {None}
    text = (tmp_path / "gpu.md").read_text()
    assert text.count(f"| {targets.NO_HARDWARE} |") == len(targets.ALL)
    assert f"0 met, 0 missed, {len(targets.ALL)} not measured." in text
    assert text in capsys.readouterr().out


def test_the_committed_table_is_that_of_the_targets():
    """Made anew by ``python -m benchmarks gpu-targets --out benchmarks/results`` when a target changes."""
    document = json.loads((gpu_targets.RESULTS / "gpu.json").read_text())
    keys = ("op", "case", "provider", "quantity", "against", "bound")
    found = [tuple(x[key] for key in keys) for x in document["targets"]]
    wanted = [gpu_targets.as_row(v) for v in targets.judge(targets.ALL, [], {})]
    assert found == [tuple(x[key] for key in keys) for x in wanted]


def test_results_of_a_run_are_judged(tmp_path, capsys):
    case = "keys without gradient, 65536 x 256"
    results = [entry("info_nce", case, row("triton", 1.0, share_of_matmul=0.5))]
    document = {"machine": {"device": "GPU"}, "matmul_gflops": {}, "results": results}
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert main(["gpu-targets", "--results", str(tmp_path / "results.json")]) == 0
    text = capsys.readouterr().out
    assert "missed: 50% of 60%" in text
    assert "What is known without hardware" not in text


def test_a_file_that_is_no_report_is_refused_in_a_line(tmp_path, capsys):
    for content in ("[]", "{", '{"results": []}'):
        (tmp_path / "other.json").write_text(content)
        assert main(["gpu-targets", "--results", str(tmp_path / "other.json")]) == 1
        assert "is no results.json of make gpu-report" in capsys.readouterr().err


# The report.


def test_gpu_report_without_a_gpu_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-report", "--out", str(tmp_path / "report")]) == 1
    line = capsys.readouterr().err
    assert "sees no GPU" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.fixture
def pretended_gpu(monkeypatch):
    facts = machine.describe(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "describe", lambda device: facts)
    monkeypatch.setattr(machine, "matmul_rates", lambda *a, **k: {"bfloat16": 7e5, "tf32": 4e5})
    monkeypatch.setattr(machine, "bandwidth", lambda device: 4e3)
    monkeypatch.setattr(dispatch, "generation", lambda device: "sm_90")
    return facts


def test_gpu_report_survives_a_crash_and_reports_it(pretended_gpu, capsys, monkeypatch, tmp_path):
    """The report's steps, with subprocesses that stand in for those on a GPU: one op crashes after its first case."""

    def step(arguments, limit, **options):
        assert limit > 0
        if arguments[0] == "-c":
            return "ok", '{"native": "the compiled kernels run on cpu", "torch": "ok"}'
        if arguments[1] == "pytest":
            return "ok", "12 passed"
        op, out = arguments[2], Path(arguments[arguments.index("--out") + 1])
        assert arguments[arguments.index("--device") + 1] == "cuda"
        size = arguments[arguments.index("--size") + 1]
        case = suite.cases(op, size, GPU)[0]
        rows = [row("eager", 2.0), row("triton", 1.0, ours=True, share_of_matmul=0.43)]
        result = entry(op, case.name, *rows, shape=case.shape)
        settings = {"title": op, "machine": pretended_gpu, "rates": {}, "settings": {}}
        report.write(out, op, [result], **settings)
        return ("failed with status 1" if op == "sup_con" else "ok"), "illegal memory access"

    monkeypatch.setattr(gpu_steps, "step", step)
    assert main(["gpu-report", "--out", str(tmp_path)]) == 1
    document = json.loads((tmp_path / "results.json").read_text())
    found = [(x["op"], x["case"]) for x in document["results"]]
    assert {op for op, _ in found} == set(suite.OPS)
    assert len(found) == len(set(found)), "a case of both sets is there once"
    assert list(document["failures"]) == ["sup_con"]
    assert document["tests"]["status"] == "ok"
    assert len(document["targets"]) == len(targets.ALL)
    table = (tmp_path / "results.md").read_text()
    assert "- backend native: the compiled kernels run on cpu" in table
    assert "- compute-sanitizer memcheck: not run: the cuda backend: there is none" in table
    assert "not measured: the case was not run" in table
    assert "Point(dtype='bfloat16', sizes=(1, 256, 256)" in table


def test_sanitizers_that_cannot_run_say_why(monkeypatch):
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: None)
    found = gpu_steps.sanitize({"cuda": "ok"}, 60.0)
    assert {x["status"] for x in found.values()} == {
        "not run: compute-sanitizer is not installed; it comes with the CUDA toolkit"
    }
    found = gpu_steps.sanitize({"cuda": "not built"}, 60.0)
    assert found["memcheck"]["status"] == "not run: the cuda backend: not built"


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        ("ok", "40 passed", "ok"),
        ("failed with status 9", "========= ERROR SUMMARY: 1 error", "failed: the sanitizer found an error"),
        ("stopped after 20 s, its limit", "========= Invalid __global__ read", "failed: the sanitizer found an error"),
        ("stopped after 20 s, its limit", "....", "stopped after 20 s, its limit; nothing was found until then"),
        ("failed with status 1", "1 failed", "failed with status 1"),
    ],
)  # fmt: skip
def test_sanitizers_run_both_tools_over_the_suite(status, output, expected, monkeypatch):
    calls = []

    def step(arguments, limit, before=(), environment=None):
        calls.append((before, limit))
        assert "tests/ops" in arguments and "no:cacheprovider" in arguments
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return status, output

    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(gpu_steps, "step", step)
    found = gpu_steps.sanitize({"cuda": "ok"}, 60.0)
    assert {name: x["status"] for name, x in found.items()} == dict.fromkeys(
        ("memcheck", "racecheck"), expected
    )
    assert [before[:3] for before, _ in calls] == [
        ("/bin/compute-sanitizer", "--tool", name) for name in ("memcheck", "racecheck")
    ]
    assert calls[0][1] == pytest.approx(30, abs=1), "half the time each"


def test_every_suite_of_kernels_that_runs_on_a_gpu_is_run(monkeypatch):
    found = []
    monkeypatch.setattr(
        gpu_steps, "step", lambda arguments, limit: found.append(arguments) or ("ok", "")
    )
    gpu_steps.tests(1.0)
    suites = {word for word in found[0] if word.startswith("tests/")}
    on_a_gpu = {
        file.relative_to(ROOT).as_posix()
        for file in ROOT.glob("tests/*_kernels/test_*.py")
        if re.search('^DEVICE = "cpu" if|import DEVICE', file.read_text(), re.MULTILINE)
    }
    assert suites == {"tests/ops"} | on_a_gpu


def test_a_step_ends_at_its_limit_with_all_that_it_started():
    status, output = gpu_steps.step(["-c", "print('begun', flush=True); input()"], 1.0)
    assert status.startswith(("stopped after", "failed"))
    assert gpu_steps.step(["-c", "print(6 * 7)"], 60.0) == ("ok", "42\n")
    status, _ = gpu_steps.step(["-c", "import time; time.sleep(60)"], 1.0)
    assert status.startswith("stopped after 1 s")
    assert gpu_steps.step(["-c", "pass"], 60.0, before=("false",))[0] == "failed with status 1"


# From times to the table of dispatch.


def test_points_are_of_the_backends_that_ran_every_case_of_a_size():
    shape = {"layers": 5, "B": 1, "S": 256, "D": 256}
    rows = [row("eager", 4e-6), row("published", 1e-6), row("triton", 2e-6, ours=True)]
    first = entry("patch_nce", "a", *rows, row("cuda", 1e-6, ours=True), shape=shape)
    second = entry("patch_nce", "b", row("triton", 3e-6, ours=True), row("cuda", 1.5e-6, ours=True), shape=shape)  # fmt: skip
    alone = entry("sup_con", "c", row("triton", 1e-6, ours=True), shape={"N": 8, "D": 4})
    table = dispatch_table.points([first, second, alone])
    point = dispatch.Point("bfloat16", (1, 256, 256), {"triton": 5.0, "cuda": 2.5})
    assert table == {"patch_nce": (point,)}
    text = "{" + dispatch_table.python("sm_90", table) + "}"
    assert eval(text, {"Point": dispatch.Point}) == {"sm_90": table}


def test_points_have_the_sizes_by_which_the_ops_choose(monkeypatch):
    asked = []
    monkeypatch.setattr(
        dispatch, "quickest", lambda op, tensor: asked.append((op, tuple(tensor.shape))) or ()
    )
    tap = suite.find_case("sample_patches", "CUT's 5 maps, 1 image, inside a network")
    for case in (*(suite.cases(op, "quick", CPU)[0] for op in suite.OPS), tap):
        case = dataclasses.replace(
            case, shape=case.cut({"N": 24, "M": 40, "S": 16, "image": 32, "D": 40})
        )
        suite.fused(case, None)(case.inputs(CPU, torch.float32))
        timed = entry(case.op, case.name, row("eager", 2e-6), row("triton", 1e-6, ours=True))
        timed |= {"shape": case.shape} | ({"alone": {}} if case.alone else {})
        ((op, (point,)),) = dispatch_table.points([timed]).items()
        assert (op, point.sizes) in asked, (op, point.sizes, asked)
        asked.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_short_run_on_a_gpu(tmp_path):
    options = ["--seconds", "0.2", "--device", "cuda", "--no-compile", "--out", str(tmp_path)]
    assert main(["patch_nce", *options]) == 0
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["matmul_gflops"]["tf32"] > 0
    for found in document["results"]:
        rows = {x["name"]: x for x in found["providers"]}
        assert rows["eager"]["status"] == rows["published"]["status"] == "ok"
        assert rows["eager"]["peak_extra_bytes"] > 0
