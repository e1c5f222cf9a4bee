"""The command line: every mistake a newcomer can make is one clear line on standard error and exit code 2."""

import json
import os
import subprocess
import sys

import pytest
from pictures import cut_short, folders

from fastnce import cli, doctor, waiting
from fastnce.backends import build, native
from fastnce.cli import tools
from fastnce.errors import UserError

TINY = [
    *("--base-channels", "4", "--num-blocks", "1", "--disc-channels", "4", "--disc-layers", "1"),
    *("--nce-layers", "4", "8", "--num-patches", "16", "--projection-dim", "8"),
    *("--load-size", "32", "--crop-size", "32", "--batch-size", "2", "--workers", "0"),
    *("--steps", "3", "--log-every", "1", "--device", "cpu"),
]


@pytest.fixture
def data(tmp_path):
    counts = dict.fromkeys(("trainA", "trainB", "testA", "testB"), 3)
    return folders(tmp_path / "data", counts, size=(32, 32))


def run(capsys, *args):
    """Exit code and standard error of a command."""
    try:
        code = cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def train(capsys, data, out, *more):
    return run(capsys, "train", "cut", "--data", data, "--out", out, *TINY, *more)


def assert_one_line(result, *expected):
    code, text = result
    assert code == 2
    assert text.startswith("fastnce") and ": error: " in text and text.count("\n") == 1, text
    for part in expected:
        assert str(part) in text, text


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("trian", "trian", "train"),
        ("train cutt", "cutt", "cut"),
        ("train cut --preset digts", "digts", "digits"),
        ("train cut --nmu-patches 3", "--nmu-patches", "--num-patches"),
        ("train cut --dryrun", "--dryrun", "--dry-run"),
        ("translate --rnu x", "--rnu", "--run"),
        ("generate --cuont=3", "--cuont", "--count"),
        ("features --ipnut x", "--ipnut", "--input"),
        ("evaluate --dta x", "--dta", "--data"),
        ("export --formta onnx", "--formta", "--format"),
        ("ablate cut --sedes 0", "--sedes", "--seeds"),
        ("ablate cutt", "cutt", "cut"),
        ("visualize galery --run x", "galery", "gallery"),
        ("visualize gallery --rum x", "--rum", "--run"),
        ("data digits-photo --out x", "digits-photo", "digits-photos"),
        ("data digits --ot x", "--ot", "--out"),
    ],
)
def test_every_command_names_the_nearest_word(capsys, command, wrong, right):
    assert_one_line(run(capsys, *command.split()), wrong, f"Did you mean {right!r}")


MISTAKES = [
    ("translate --input x", "--out"),
    ("translate --input x --out y --part up", "up"),
    ("translate --input x --out y stray", "stray"),
    ("translate --weights net.pt --input x --out y", "--checkpoint net.pt"),
    ("translate --weights net.pth --input x --out y", "net.pth: no such file"),
    ("translate --run r --weights net.pth --input x --out y", "two generators"),
    ("translate --input x --out y", "name a generator: --run FOLDER"),
    ("data digits --out x --size", "--size"),
    ("evaluate", "either --run"),
    ("evaluate --run r --images i", "either --run"),
    ("evaluate --images DATA/testA --segmenter s.pt", "belong together"),
    ("evaluate --images DATA/testA --without-nce r", "--without-nce is for --run"),
    ("evaluate --images DATA/testA", "Give --data, or --segmenter and --labels"),
    ("evaluate --images DATA/testA --data DATA", "Give --extractor FILE"),
    ("train cut --out x", "--data"),
    ("TRAIN --batch-size two", "--batch-size"),
    ("TRAIN --preprocess crop --crop-size 64", "32x32"),
    ("TRAIN --backend tpu", "native"),
    ("TRAIN --device cuda:99", "device=cuda:99"),
    ("TRAIN --data nowhere", "nowhere"),
    ("TRAIN --data DATA/trainA", "trainA and trainB"),
]


@pytest.mark.parametrize(("command", "expected"), MISTAKES)
def test_mistakes_are_one_line(capsys, data, tmp_path, command, expected):
    words = command.replace("DATA", str(data)).split()
    if words[0] == "TRAIN":
        assert_one_line(train(capsys, data, tmp_path / "run", *words[1:]), expected)
    else:
        assert_one_line(run(capsys, *words), expected)


def test_mistakes_in_files_are_one_line(capsys, data, tmp_path, monkeypatch):
    cut_short(data / "trainB" / "2.png", 1500)
    assert_one_line(train(capsys, data, tmp_path / "run"), "trainB/2.png")
    for path in (data / "trainA").iterdir():
        path.unlink()
    assert_one_line(train(capsys, data, tmp_path / "run"), "trainA", ".png")
    monkeypatch.setenv("FASTNCE_BACKEND", "tpu")
    assert_one_line(
        train(capsys, data, tmp_path / "run"), "FASTNCE_BACKEND=tpu", "native, blocks, torch"
    )


@pytest.mark.parametrize(
    "layers",
    [["--nce-layers", "0,", "4,8"], ["--nce-layers", "0", "4", "8"], ["--nce-layers=0,4,8"]],
)
def test_lists_of_numbers_may_be_joined_by_commas(capsys, layers):
    assert cli.main(["train", "fastcut", "--data", "x", "--out", "y", *layers, "--dry-run"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["nce_layers"] == [0, 4, 8] and values["lambda_nce"] == 10.0
    assert not os.path.exists("y")


def test_first_and_last_lines(capsys, data, tmp_path):
    """What was found, where the results are, and what to do next."""

    def lines(*args):
        assert cli.main([str(arg) for arg in args]) == 0
        return capsys.readouterr().out.splitlines()

    out, results = tmp_path / "run", tmp_path / "results"
    said = lines("train", "cut", "--data", data, "--out", out, *TINY)
    assert said[0].startswith(f"{data / 'trainA'}: 3 images")
    assert "Done: 3 steps" in said[-2] and str(out) in said[-2]
    assert said[-1].startswith("Next: fastnce translate") and str(out) in said[-1]
    said = lines("translate", "--run", out, "--input", data / "testA", "--out", results)
    assert str(out) in said[0] and "checkpoint last" in said[0]
    assert "3 images" in said[-1] and str(results) in said[-1]
    said = lines("export", "--run", out, "--out", results)
    assert str(out) in said[0] and str(results / "model.safetensors") in said[-1]
    said = lines("data", "digits", "--out", tmp_path / "digits")
    assert "train 1195 images" in said[0] and said[-1].startswith("Next: fastnce train contragan")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        sys.exit(cli.main([command, "--help"]))
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out
    assert cli.main([]) == 0 and f"\n  {command} " in capsys.readouterr().out


def test_a_checkpoint_cut_short(capsys, data, tmp_path):
    out = tmp_path / "run"
    assert train(capsys, data, out)[0] == 0
    path = cut_short(out / "checkpoints" / "last.pt", 500)
    assert_one_line(train(capsys, data, out, "--steps", "4"), path, "damaged")
    assert path.stat().st_size == 500
    result = run(capsys, "translate", "--run", out, "--input", data / "testA", "--out", out / "t")
    assert_one_line(result, path, "damaged")


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ({}, f"GOMP_SPINCOUNT={waiting.SPINS}"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT=77"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"),
    ],
)
def test_commands_wait_briefly_unless_told_otherwise(setting, shown):
    environment = {k: v for k, v in os.environ.items() if k not in waiting.VARIABLES} | setting
    command = [sys.executable, "-m", "fastnce", "doctor"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert f"waiting {shown}\n" in found


def test_a_program_that_imports_fastnce_keeps_its_waiting():
    code = "import fastnce.waiting; print(fastnce.waiting.shown())"
    environment = {k: v for k, v in os.environ.items() if k not in waiting.VARIABLES}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert found == "OpenMP's default\n"


def test_doctor_names_the_instruction_set_or_what_is_wrong_with_the_one_asked_for(monkeypatch):
    if native.available() != "ok":
        pytest.skip(native.available())
    monkeypatch.setenv("FASTNCE_CPU_ISA", "portable")
    assert "native   ok, instructions: portable" in doctor.report()
    monkeypatch.setenv("FASTNCE_CPU_ISA", "sse9")
    assert "native   ok, but FASTNCE_CPU_ISA=sse9 is unknown. Use portable" in doctor.report()


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m fastnce doctor | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("fastnce ")


def test_build_says_why_there_is_no_cuda_library(monkeypatch, capsys):
    monkeypatch.setattr(build, "gpu_targets", lambda: ("90a",))
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    monkeypatch.delenv("FASTNCE_CUDA", raising=False)
    assert tools.build([]) == 0
    expected = "CUDA library: not built: there is no CUDA compiler 'no-such-nvcc'."
    assert expected in capsys.readouterr().out
    monkeypatch.setenv("FASTNCE_CUDA", "1")
    with pytest.raises(UserError, match="no CUDA compiler 'no-such-nvcc'"):
        tools.build([])
