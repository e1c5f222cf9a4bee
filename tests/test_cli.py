"""The command line: every mistake a newcomer can make is one clear line on standard error and exit code 2."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce import cli, doctor, waiting
from fastnce.backends import build, native
from fastnce.cli import tools
from fastnce.errors import UserError
from fastnce.training.checkpoint import load_checkpoint

TINY = [
    *("--base-channels", "4", "--num-blocks", "1", "--disc-channels", "4", "--disc-layers", "1"),
    *("--nce-layers", "4", "8", "--num-patches", "16", "--projection-dim", "8"),
    *("--load-size", "32", "--crop-size", "32", "--batch-size", "2", "--workers", "0"),
    *("--steps", "3", "--log-every", "1", "--device", "cpu"),
]


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for folder in ("trainA", "trainB", "testA", "testB"):
        (root / folder).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index}.png")
    return root


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


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize(
    "command", [["trian"], ["train", "cutt"], ["train", "cut", "--preset", "digts"]]
)
def test_a_misspelt_name_gives_the_nearest(capsys, command):
    assert_one_line(run(capsys, *command), "Did you mean")


def test_a_misspelt_option_gives_the_nearest(capsys, data, tmp_path):
    result = train(capsys, data, tmp_path / "run", "--nmu-patches", "3")
    assert_one_line(result, "--nmu-patches", "--num-patches")
    result = train(capsys, data, tmp_path / "run", "--dryrun")
    assert_one_line(result, "--dryrun", "--dry-run")


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
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


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("translate --input x", "--out"),
        ("train cut --out x", "--data"),
        ("train cut --data x --out y --batch-size two", "--batch-size"),
        ("translate --input x --out y --part up", "up"),
        ("translate --input x --out y stray", "stray"),
        ("data digits --out x --size", "--size"),
    ],
)
def test_missing_and_unreadable_values_are_one_line(capsys, command, expected):
    assert_one_line(run(capsys, *command.split()), expected)


@pytest.mark.parametrize("layers", ["0,4,8", "0, 4, 8", "0 4 8"])
def test_lists_of_numbers_may_be_joined_by_commas(capsys, layers):
    command = ["train", "cut", "--data", "x", "--out", "y", "--nce-layers", *layers.split(" ")]
    assert cli.main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["nce_layers"] == [0, 4, 8]
    command = [
        "train",
        "cut",
        "--data",
        "x",
        "--out",
        "y",
        f"--nce-layers={layers}".replace(" ", ""),
    ]
    if "," in layers:
        assert cli.main([*command, "--dry-run"]) == 0
        assert json.loads(capsys.readouterr().out)["nce_layers"] == [0, 4, 8]


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


def test_a_run_is_told_what_it_is_for(capsys, data, tmp_path):
    out = tmp_path / "run"
    assert train(capsys, data, out)[0] == 0
    result = run(capsys, "generate", "--run", out, "--out", tmp_path / "x")
    assert_one_line(result, "cut", f"fastnce translate --run {out}")
    result = run(
        capsys, "translate", "--weights", "net.pt", "--input", data, "--out", tmp_path / "x"
    )
    assert_one_line(result, "weights=net.pt", ".pth", "--checkpoint net.pt")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        sys.exit(cli.main([command, "--help"]))
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_missing_folder(capsys, tmp_path):
    result = train(capsys, tmp_path / "nowhere", tmp_path / "run")
    assert_one_line(result, tmp_path / "nowhere", "trainA and trainB")


def test_empty_folder(capsys, data, tmp_path):
    for path in (data / "trainA").iterdir():
        path.unlink()
    assert_one_line(train(capsys, data, tmp_path / "run"), "trainA", ".png")


def test_broken_image(capsys, data, tmp_path):
    (data / "trainA" / "1.png").write_bytes(b"no picture")
    assert_one_line(train(capsys, data, tmp_path / "run"), "trainA/1.png")


def test_image_cut_short(capsys, data, tmp_path):
    path = data / "trainB" / "2.png"
    path.write_bytes(path.read_bytes()[:1500])
    assert_one_line(train(capsys, data, tmp_path / "run"), "trainB/2.png")


def test_image_smaller_than_the_crop(capsys, data, tmp_path):
    result = train(capsys, data, tmp_path / "run", "--preprocess", "crop", "--crop-size", "64")
    assert_one_line(result, "32x32", "64")


def test_more_patches_than_positions(capsys, data, tmp_path):
    result = train(capsys, data, tmp_path / "run", "--num-patches", "1024")
    assert_one_line(result, "num_patches=1024", "16x16 = 256", "num_patches <= 256")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there(capsys, data, tmp_path):
    assert_one_line(train(capsys, data, tmp_path / "run", "--device", "cuda"), "device=cuda", "cpu")


def test_a_backend_that_is_not_there(capsys, data, tmp_path):
    assert_one_line(train(capsys, data, tmp_path / "run", "--backend", "tpu"), "tpu", "native")


def test_a_backend_of_the_environment_that_is_not_there(capsys, data, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTNCE_BACKEND", "tpu")
    assert_one_line(train(capsys, data, tmp_path / "run"), "FASTNCE_BACKEND=tpu", "native, torch")


def test_a_wrong_dtype_names_argument_and_fix():
    import fastnce

    integers = torch.zeros(4, 8, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"info_nce: query must be float64.*query\.float\(\)"):
        fastnce.info_nce(integers, integers)


def test_a_folder_with_another_run(capsys, data, tmp_path):
    assert train(capsys, data, tmp_path / "run")[0] == 0
    result = train(capsys, data, tmp_path / "run", "--lr", "0.1")
    assert_one_line(result, "another run", "lr=0.0002 (now 0.1)", "another folder")


def test_a_checkpoint_cut_short(capsys, data, tmp_path):
    out = tmp_path / "run"
    assert train(capsys, data, out)[0] == 0
    path = out / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:-200])
    assert_one_line(train(capsys, data, out, "--steps", "4"), path, "damaged")
    result = run(capsys, "translate", "--run", out, "--input", data / "testA", "--out", out / "t")
    assert_one_line(result, path, "damaged")


def test_a_full_disk_leaves_the_old_checkpoint(capsys, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert train(capsys, data, out)[0] == 0

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = train(capsys, data, out, "--steps", "5")
    assert result[0] == 2
    last = result[1].strip().splitlines()[-1]
    assert last.startswith("fastnce train: error:") and "No space left on device" in last
    assert load_checkpoint(out / "checkpoints" / "last.pt")["step"] == 3


def test_the_whole_way(capsys, data, tmp_path):
    out = tmp_path / "run"
    code, text = train(capsys, data, out)
    assert code == 0 and "step 3/3" in text
    again, _ = train(capsys, data, out)
    assert again == 0
    code, _ = run(capsys, "translate", "--run", out, "--input", data / "testA", "--out", out / "t")
    assert code == 0
    assert sorted(path.name for path in (out / "t").iterdir()) == ["0.png", "1.png", "2.png"]
    result = run(capsys, "evaluate", "--run", out, "--data", data)
    assert_one_line(result, data, "fastnce data digits-photos")


def test_counts_below_one(capsys, data, tmp_path):
    out = tmp_path / "run"
    assert train(capsys, data, out)[0] == 0
    folder = ("--run", out, "--input", data / "testA", "--out", tmp_path / "x")
    one = ("--run", out, "--input", data / "testA" / "0.png", "--out", tmp_path / "x")
    for count in (0, -1):
        result = run(capsys, "translate", *folder, "--batch-size", count)
        assert_one_line(result, f"batch_size={count} ")
        result = run(capsys, "visualize", "pca", *folder, "--count", count)
        assert_one_line(result, f"count={count} ")
        result = run(capsys, "visualize", "similarity", *one, "--count", count)
        assert_one_line(result, f"count={count} ")


def test_evaluate_says_what_belongs_together(capsys, data, tmp_path):
    assert_one_line(run(capsys, "evaluate"), "either --run", "or --images")
    assert_one_line(run(capsys, "evaluate", "--run", "r", "--images", "i"), "either --run")
    images = ("evaluate", "--images", data / "testA")
    assert_one_line(run(capsys, *images, "--segmenter", "s.pt"), "belong together")
    assert_one_line(run(capsys, *images, "--without-nce", "r"), "--without-nce is for --run")
    assert_one_line(run(capsys, *images), "Give --data, or --segmenter and --labels")
    assert_one_line(run(capsys, *images, "--data", data), data, "Give --extractor FILE")


def test_dry_run_prints_the_configuration(capsys, data, tmp_path):
    code = cli.main(
        ["train", "fastcut", "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    )
    values = json.loads(capsys.readouterr().out)
    assert code == 0 and values["lambda_nce"] == 10.0 and values["flip_equivariance"]
    assert not (tmp_path / "run").exists()


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
