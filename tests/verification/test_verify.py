"""``fastnce verify`` on a stand-in for a GPU: what it finds of kernels that are right, wrong, slow, or end their process."""

import itertools
import json
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
from stand_ins import CPU, answering
from torch import Tensor

from fastnce import backends, cli, testing, verification
from fastnce.backends import verdicts
from fastnce.backends.verdicts import Entry
from fastnce.errors import UserError
from fastnce.registry import OPS, Make, Sample
from fastnce.verification import cases, process
from fastnce.verification.device import GPU

# What the stand-ins are, see ``stand_ins.BEHAVIOUR``: status and reason.
FOUND = {
    ("info_nce", "bfloat16", "both gradients"): ("right", ""),
    ("info_nce", "float32", "symmetric"): ("wrong", "temperature 0.07: d query is off by"),
    ("info_nce", "float16", "keys fixed"): ("wrong", "queue of 20011: repeat 13 gives another d"),
    ("sup_con", "bfloat16", "any"): ("failed", "N = 515: RuntimeError: no kernel image is avail"),
    ("sup_con", "float32", "any"): ("right", ""),
    ("sup_con", "float16", "any"): ("wrong", "the large race: off by 1.0e+00 of (327, 128)"),
    ("conditional_contrastive", "bfloat16", "any"): ("hung", "N = 515: no answer for 5 s"),
    ("conditional_contrastive", "float32", "any"): ("crashed", "N = 515: signal 11"),
    ("pairwise_cosine_similarity", "bfloat16", "any"): ("wrong", "77 x 1003: out is off by nan"),
    ("pairwise_cosine_similarity", "float32", "any"): ("right", ""),
}
TASK = ("info_nce", "bfloat16", "symmetric")


def test_what_is_found(verified):
    """After a process has ended early, the others are still verified."""
    entries = json.loads(verified[1].read_text())["found"]
    found = {tuple(x.pop(name) for name in ("op", "dtype", "form")): Entry(**x) for x in entries}
    assert len(found) == 19
    for task, (status, reason) in FOUND.items():
        assert found[task].status == status, found[task]
        assert found[task].reason.startswith(reason), found[task]
    assert found[TASK].speed == dict.fromkeys(verdicts.SIZES, 3.0)
    assert found["info_nce", "bfloat16", "own negatives"].speed.keys() == {"small", "medium"}
    assert found["sup_con", "float32", "any"].speed == dict.fromkeys(verdicts.SIZES, 0.3)
    errors = found[TASK].errors.values()
    assert len(errors) == 2 and all(0 < x < 1 for x in errors)
    assert not any(entry.speed for entry in found.values() if entry.status != "right")


def test_the_report(verified):
    report = verified[0]
    assert report.startswith("# fastnce verify: Stand-in 9000\n") and "driver 1.0" in report
    assert f"torch {torch.__version__}" in report
    assert "| info_nce | bfloat16 | symmetric | right |" in report
    assert "| 3.00 | 3.00 | 3.00 | 3.00 |" in report
    assert "| conditional_contrastive | float32 | any | crashed: N = 515: signal 11 |" in report
    assert "## cuda\n\nIt cannot run here: the CUDA kernels" in report


def test_what_is_known_is_not_done_again_unless_asked(verified_gpu, monkeypatch, capsys):
    began = answering(monkeypatch)
    before = verified_gpu.read_text()
    verification.verify()
    assert began == [] and verified_gpu.read_text() == before
    line = "fastnce verify: triton: everything is known already; --again does it anew\n"
    assert capsys.readouterr().err == line
    verification.verify(progress=False, again=True)
    assert len(began) == 19
    with pytest.raises(UserError, match="unknown backend 'tritn'. Did you mean 'triton'?"):
        verification.verify(backend="tritn")
    with pytest.raises(UserError, match="seconds=0 must be a positive number"):
        verification.verify(seconds=0)


def test_forms_that_cuda_lacks_are_left_out(gpu, monkeypatch):
    monkeypatch.setitem(backends._TABLE, "cuda", backends._TABLE["triton"])
    of_triton, of_cuda = (verification._tasks(name, CPU) for name in verdicts.EARNING)
    assert of_cuda == [task for task in of_triton if task[2] != "own negatives"] != of_triton


def test_what_was_not_reached_is_done_next_time(gpu, monkeypatch):
    verification.verify(seconds=0.01, progress=False)
    entries = verdicts.find(verdicts.key_of("triton", CPU))
    assert {entry.why_not("small") for entry in entries.values()} == {"not verified: time ran out"}
    began = answering(monkeypatch)
    verification.verify(progress=False)
    assert len(began) == 19


def test_interrupted_it_keeps_what_it_has(gpu, monkeypatch):
    def run(request, tasks, limit, patience, tell):
        tell(tasks[0], {"status": "wrong", "reason": "of all things"})
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "run", run)
    with pytest.raises(KeyboardInterrupt):
        verification.verify(progress=False)
    found = json.loads(gpu.read_text())["found"]
    assert [x["status"] for x in found[:2]] == ["wrong", "not verified"]


def test_a_process_that_cannot_start_is_started_once(monkeypatch):
    told, begun = {}, []
    start = process._Child.__init__
    monkeypatch.setattr(
        process._Child, "__init__", lambda self, *given: begun.append(1) or start(self, *given)
    )
    request = {"device": "fastnce.errors:Missing", "index": 0, "backend": "", "stage": "right"}
    limit = process.Limit(float("inf"))
    process.run(request, [TASK, ("", "", "")], limit, 60.0, told.__setitem__)
    assert len(begun) == 1 and list(told) == [TASK, ("", "", "")]
    assert told[TASK]["reason"].startswith("starting: status 1, AttributeError")


def test_a_process_ends_with_the_one_that_has_started_it(gpu):
    """Here: it is told what to do, in an op that hangs, and its standard input ends."""
    task = ("conditional_contrastive", "bfloat16", "any")
    request = {"device": "stand_ins:Device", "index": 0, "backend": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "fastnce.verification.child"],
        input=json.dumps(request | {"stage": "right", "tasks": [task]}) + "\n",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr == ""


def test_who_comes_second_waits_and_finds_nothing_to_do(gpu, verified, monkeypatch, capsys):
    began = answering(monkeypatch)
    second = threading.Thread(target=lambda: reports.append(verification.verify()))
    reports: list[str] = []
    with verification._alone(print):
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive()
        gpu.write_text(verified[1].read_text())
    second.join()
    assert began == [] and "| info_nce | bfloat16 | symmetric | right |" in reports[0]
    assert "waiting for another verification" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(gpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTNCE_CACHE", str(tmp_path / "file"))

    answering(monkeypatch, status="right", speed={"small": 2.0})
    assert "| right |" in verification.verify(progress=False)
    (record,) = caplog.records
    assert "cannot be written (Not a directory)" in record.getMessage()
    assert backends.verdict("triton", "sup_con", "cpu", torch.float32)["any"]["small"] == "ok"


def test_before_a_training_only_what_never_was_verified(gpu, monkeypatch, capsys):
    began = answering(monkeypatch)
    verification.verify_once(CPU)
    assert len(began) == 19 and "--no-verify" in capsys.readouterr().err
    verification.verify_once(CPU)
    assert len(began) == 19 and capsys.readouterr().err == ""


def test_the_command(verified_gpu, capsys, tmp_path):
    assert cli.main(["verify"]) == 0
    assert capsys.readouterr().out.startswith("# fastnce verify: Stand-in 9000")
    assert cli.main(["verify", "--report", str(tmp_path / "new" / "report.md")]) == 0
    assert "| right |" in (tmp_path / "new" / "report.md").read_text()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    for words, message in {
        ("--report", str(tmp_path / "file" / "x")): "cannot be written (File exists)",
        ("--backend", "tritn"): "invalid choice: 'tritn'",
        ("--second", "3"): "Did you mean '--seconds'?",
        ("--seconds", "-1"): "seconds=-1.0 must be a positive",
    }.items():
        assert cli.main(["verify", *words]) == 2
        line = capsys.readouterr().err
        assert line.startswith("fastnce verify: error: ") and message in line
        assert line.count("\n") == 1


def test_what_is_done_on_a_gpu(monkeypatch):
    """With a torch.cuda that only counts."""
    cuda = mock.MagicMock()
    cuda.Event.return_value.elapsed_time.return_value = 30.0  # milliseconds
    monkeypatch.setattr(torch, "cuda", cuda)
    gpu = GPU.__new__(GPU)
    gpu.device = CPU
    calls = []
    assert gpu.seconds(lambda: calls.append(1), 3) == 0.01 and len(calls) == 3
    results, replay = gpu.captured(lambda: {"out": calls.append(1)})
    assert results == {"out": None} and len(calls) == 3 + 2 + 1
    assert replay is cuda.CUDAGraph.return_value.replay
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value)
    gpu.busy()
    gpu.poison()
    cuda.Stream.assert_called_with(CPU)
    cuda.empty_cache.assert_called_once()
    for memory, workers in ((6, 1), (24, 3), (80, 4)):
        cuda.get_device_properties.return_value.total_memory = memory * 2**30
        assert gpu.workers(CPU) == workers
    cuda.device_count.return_value = 3
    cuda.current_device.return_value = 1
    cuda.get_device_name.side_effect = lambda place: "AAB"[place.index]
    assert gpu.kinds() == [torch.device("cuda", 0), torch.device("cuda", 2)]
    assert gpu.place(None) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="device=cuda:3 is not there: GPUs 0 to 2 are"):
        gpu.place("cuda:3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert cli.main(["verify"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("fastnce verify: torch ") and line.count("\n") == 1
    with pytest.raises(UserError, match="device=cuda is not there: torch .* sees no GPU"):
        verification.verify()
    with pytest.raises(UserError, match="device='gpu' is no device"):
        GPU.place("gpu")
    with pytest.raises(UserError, match="device=cpu is no GPU"):
        verification.verify("cpu")


def form_of(op: str, arguments: dict[str, object], monkeypatch) -> tuple[str, str]:
    """The form and the size that the choice sees of a call."""
    seen = []

    def select(
        op: str, tensor: Tensor, backend: str | None = None, *found_by: object, **_: str
    ) -> None:
        form = OPS[op].form(*found_by)
        seen.append((form.name, verdicts.size_of(form)))
        raise InterruptedError

    monkeypatch.setattr(backends, "select", select)
    with pytest.raises(InterruptedError):
        testing.outputs_of(op, arguments)
    return seen[0]


@pytest.mark.parametrize("op", cases.CASES)
def test_cases_and_races_are_of_the_form_and_size_that_they_say(op, monkeypatch):
    make = cases.QuickMake(torch.bfloat16, "meta")
    assert cases.RACES[op].keys() == cases.CASES[op].keys()
    for calls in (cases.CASES, cases.RACES):
        for form, of_form in calls[op].items():
            for name, arguments in of_form.items():
                found = form_of(op, arguments(make, lambda count: count), monkeypatch)
                assert found == (form, name if calls is cases.RACES else found[1])


@pytest.mark.parametrize("op", cases.CASES)
def test_every_case_sees_a_gradient_that_is_a_little_off(op):
    dtype = torch.float32
    for name, arguments in itertools.chain(*(x.items() for x in cases.CASES[op].values())):
        make = Make(dtype, "cpu", torch.Generator().manual_seed(0))
        sample = Sample(name, arguments(make, lambda count: max(1, count // 20)))
        got = testing.run(op, sample, backend="blocks")
        assert testing.assert_close_to_truth(op, "blocks", sample, dtype, got=got) <= 1
        # Of one patch alone there is next to none.
        gradients = {k: x for k, x in got.items() if k.startswith("d ") and x.abs().max() > 1e-4}
        assert gradients
        for name, x in gradients.items():
            with pytest.raises(AssertionError, match="is off by"):
                wrong = got | {name: x * 1.01}
                testing.assert_close_to_truth(op, "blocks", sample, dtype, got=wrong)
