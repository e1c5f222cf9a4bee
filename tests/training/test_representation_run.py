"""`fastnce train simclr|moco|supcon` and `fastnce evaluate` on a tiny set, in seconds."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from test_ranks import run

from fastnce import cli
from fastnce.errors import UserError
from fastnce.metrics.probes import encode
from fastnce.models import Representation
from fastnce.systems import SYSTEMS
from fastnce.systems.representation import images_of, random_encoder
from fastnce.systems.schedule import warmup_cosine
from fastnce.training import (
    Interrupted,
    build_config,
    evaluate_run,
    export_shared,
    load_generator,
    train,
    write_features,
)
from fastnce.training.ablation import ablate, ablations
from fastnce.training.checkpoint import load_checkpoint, save_checkpoint
from fastnce.training.log import read_metrics

TINY = {
    "encoder": "small",
    "encoder_channels": 2,
    "image_channels": 1,
    "image_size": 8,
    "views": "digits",
    "head_dim": 4,
    "projection_dim": 4,
    "queue_size": 10,
    "norm_splits": 2,
    "optimizer": "sgd",
    "lr": 0.05,
    "batch_size": 4,
    "warmup_epochs": 1,
    "steps": 8,
    "workers": 0,
    "device": "cpu",
    "log_every": 2,
    "sample_every": 4,
    "sample_count": 3,
    "measure_every": 4,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes of 8x8 images: noise that is brighter at the left, or at the right; 6 of each to train, 4 to test."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        for name in ("left", "right"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 200, (8, 8), dtype=np.uint8)
                half = slice(0, 4) if name == "left" else slice(4, 8)
                pixels[:, half] += 55
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def tiny(labelled, tmp_path):
    def make(variant="simclr", **changes):
        paths = {"data": labelled, "out": tmp_path / "run"}
        return build_config(variant, overrides=paths | TINY | changes)

    return make


def weights(run):
    return load_checkpoint(run / "checkpoints" / "last.pt")["model"]


@pytest.mark.parametrize("variant", ["simclr", "moco", "supcon"])
def test_a_run(tiny, variant):
    config = tiny(variant)
    train(config)
    lines = read_metrics(config.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    # 12 images in an epoch are 3 steps.
    expected = [warmup_cosine(step - 1, 3, 8) for step in (2, 4, 6, 8)]
    assert [line["lr_factor"] for line in lines] == expected
    measured = read_metrics(config.out / "measurements.jsonl")
    assert [line["step"] for line in measured] == [4, 8]
    assert all(0 <= line["knn/accuracy"] <= 1 for line in measured)
    grid = Image.open(config.out / "samples" / "step_000008.png")
    # For each of 2 classes a row of a test image and 3 neighbours, enlarged to 96 pixels.
    assert grid.height == 2 * 100 + 4 and grid.width > 4 * 96


@pytest.mark.parametrize("variant", ["simclr", "moco"])
def test_a_stopped_run_continues_bit_for_bit(tiny, variant, tmp_path, monkeypatch):
    train(tiny(variant, out=tmp_path / "whole"))
    training_step, left = Representation.training_step, 6

    def crash(self, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("power cut")
        return training_step(self, batch)

    monkeypatch.setattr(Representation, "training_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny(variant))
    monkeypatch.undo()
    torch.rand(3)
    train(tiny(variant))
    whole, parts = (weights(run) for run in (tmp_path / "whole", tiny().out))
    assert list(whole) == list(parts)
    assert ("queue.queue" in whole) == (variant == "moco")
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    logs = [read_metrics(run / "metrics.jsonl") for run in (tmp_path / "whole", tiny().out)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_another_length_is_another_run(tiny):
    """Unlike CUT's learning rate, the cosine depends on the end from the start on."""
    train(tiny(steps=6))
    with pytest.raises(UserError, match="first 6 steps would have been others with"):
        train(tiny(steps=8))


def test_epochs_give_the_steps(tiny):
    schedule = SYSTEMS["representation"].schedule(tiny(steps=None, epochs=5), 12)
    assert (schedule.total_steps, schedule.warmup_steps) == (15, 3)


def test_evaluate_shows_the_run_beside_its_baselines(tiny, capsys):
    config = tiny()
    train(config)
    assert cli.main(["evaluate", "--run", str(config.out), "--data", str(config.data)]) == 0
    shown = capsys.readouterr().out
    for name in ("trained encoder", "random encoder", "raw pixels"):
        assert f"| {name}" in shown
    result = json.loads((config.out / "metrics.json").read_text())
    assert result["run"] == {"method": "simclr", "checkpoint": "last"}
    assert [row["name"] for row in result["rows"]] == [
        "trained encoder",
        "random encoder",
        "raw pixels",
    ]
    assert result["rows"][2]["linear"] > 0.7
    with pytest.raises(UserError, match="without_nce=x is not for a run of representation"):
        evaluate_run(config.out, without_nce="x")


def test_the_random_encoder_is_the_runs_own_before_training(tiny, monkeypatch):
    config = tiny(steps=1, warmup_epochs=0, lr=1e-12, weight_decay=0.0)
    train(config)
    trained, _ = load_generator(config.out)
    random = random_encoder(config, images_of(config, "train"))
    for name, value in random.named_parameters():
        torch.testing.assert_close(value, trained.get_parameter(name), msg=name)
    # Its statistics are not the initial ones.
    assert random.bn1.running_mean.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size=1 leaves method=simclr no negatives"),
        ({"views": "simclear"}, "views=simclear is unknown. Use one of: simclr, moco-v2"),
        ({"steps": 3}, "warmup_epochs=1 takes 3 steps, but the run has 3"),
        (
            {"steps": None, "epochs": 1, "batch_size": 13},
            "batch_size=13 is larger than the 12 images",
        ),
    ],
)
def test_mistakes(tiny, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(**changes))
    assert not (tiny().out / "config.json").exists()


def test_moco_takes_a_queue_that_no_batch_divides_but_not_more_parts_than_images(tiny):
    train(tiny("moco", queue_size=7, steps=4))
    assert weights(tiny().out)["queue.queue"].shape == (4, 7)
    with pytest.raises(UserError, match="norm_splits=9 is more than batch_size=4"):
        tiny("moco", norm_splits=9)


def test_presets_keep_what_makes_a_method():
    """A preset comes after the variant, and must not change what was asked for."""
    system = SYSTEMS["representation"]
    ours = list(system.variants)
    assert ours == ["simclr", "supcon", "moco"]
    for preset in system.presets:
        for variant in ours:
            config = build_config(variant, preset=preset, overrides={"data": "d", "out": "o"})
            assert config.method == variant


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_ablations(tiny, name, labelled, tmp_path):
    """Two choices of each are trained and compared; all of them are valid."""
    ablation = ablations()[name]
    first, *_, last = ablation.choices
    result, table = ablate(
        name,
        data=labelled,
        out=tmp_path,
        seeds=[0],
        only=[first, last],
        overrides=TINY | {"steps": 4},
    )
    assert [choice["name"] for choice in result["choices"]] == [first, last]
    assert f"| {first}" in table and "k-NN, k=20" in table
    for options in ablation.choices.values():
        build_config(name, preset="digits", overrides={"data": "d", "out": "o"} | options)


def flat_images(folder, count=7):
    """Images without classes: noise of 8x8."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("variant", ["simclr", "moco"])
def test_images_without_labels(tiny, variant, tmp_path, capsys, labelled):
    """Seven images in batches of four: a batch an epoch. No test images, so no measurement, but a grid."""
    data = flat_images(tmp_path / "flat")
    config = tiny(variant, data=data, warmup_epochs=0)
    train(config)
    assert [line["epoch"] for line in read_metrics(config.out / "metrics.jsonl")] == [2, 4, 6, 8]
    assert "has no test images: trained without measuring" in capsys.readouterr().err
    assert not (config.out / "measurements.jsonl").exists()
    assert Image.open(config.out / "samples" / "step_000008.png").height > 6 * 96
    with pytest.raises(UserError, match=r"flat has no classes .* Name a folder with train/CLASS"):
        evaluate_run(config.out)
    with pytest.raises(UserError, match="flat, which is read"):
        train(tiny(variant, data=data, out=data / "run", warmup_epochs=0))
    result, _ = evaluate_run(config.out, labelled)  # labels that the training did not have
    assert result["test_count"] == 8


def test_supcon_needs_labels(tiny, tmp_path):
    data = flat_images(tmp_path / "flat")
    with pytest.raises(UserError, match="Images without classes are for simclr, moco"):
        train(tiny("supcon", data=data))
    with pytest.raises(UserError, match="class_balance is for method=supcon.*got method=moco"):
        tiny("moco", class_balance=True)


def test_class_balance(tiny, tmp_path):
    """A class of 1 image beside one of 6 is half of what is drawn."""
    root = tmp_path / "data"
    for name, count in (("few", 1), ("many", 6)):
        (root / "train").mkdir(parents=True, exist_ok=True)
        flat_images(root / "train" / name, count)
    config = tiny("supcon", data=root, class_balance=True, measure_every=0, warmup_epochs=0)
    stream = SYSTEMS["representation"].dataset(config)
    assert sum(int(stream[index]["label"]) for index in range(40)) == 20
    train(config)


def test_a_class_without_test_images(tiny, labelled, tmp_path):
    shutil.copytree(labelled, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test" / "left")
    config = tiny(data=tmp_path / "data")
    train(config)
    # One row: of the class that has one.
    assert Image.open(config.out / "samples" / "step_000008.png").height < 2 * 96
    assert evaluate_run(config.out)[0]["test_count"] == 4


def test_a_run_from_before_goes_on_as_it_was(tiny, tmp_path):
    """Its batches reach over two epochs, 12 images in batches of 5, and it knows no names of classes."""
    options = {"batch_size": 5, "warmup_epochs": 0, "measure_every": 0}
    train(tiny(out=tmp_path / "whole", last_batch="keep", **options))
    path = tiny().out / "checkpoints" / "last.pt"
    stop_after(4, tiny(last_batch="keep", **options))
    state = load_checkpoint(path)
    for name in ("last_batch", "class_names", "class_balance"):
        del state["config"][name]
    del state["files"]
    save_checkpoint({k: v for k, v in state.items() if k != "format"}, path)
    stop_after(2, tiny(**options))
    train(tiny(**options))
    one, other = weights(tmp_path / "whole"), weights(tiny().out)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    config = json.loads((tiny().out / "config.json").read_text())
    assert config["last_batch"] == "keep" and config["class_names"] == ["left", "right"]
    train(tiny(out=tmp_path / "new", **options))
    assert any(not torch.equal(v, one[name]) for name, v in weights(tmp_path / "new").items())
    with pytest.raises(UserError, match='last_batch="keep" .now "drop"'):
        train(tiny(last_batch="drop", **options))


def stop_after(steps, config):
    """Trains for some steps, and is then interrupted, after saving."""
    training_step, left = Representation.training_step, steps

    def step(self, batch):
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Representation, "training_step", step)
        train(config)


def test_features(tiny, labelled, tmp_path, capsys):
    run = train(tiny(steps=4, measure_every=0))
    folder = labelled / "test"
    encoder, config = load_generator(run)
    expected = encode(encoder, images_of(config, "test"))
    names = [f"{name}/{index}.png" for name in ("left", "right") for index in range(4)]
    out = tmp_path / "features.npz"
    command = ["features", "--run", str(run), "--input", str(folder), "--device", "cpu"]
    assert cli.main([*command, "--out", str(out), "--batch-size", "3"]) == 0
    assert "features of each of 8 images" in capsys.readouterr().out
    with np.load(out) as file:
        assert file["names"].tolist() == names and file["features"].dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(file["features"]), expected)
    out = tmp_path / "features.safetensors"
    assert cli.main([*command, "--out", str(out), "--normalize"]) == 0
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["names"]) == names
        torch.testing.assert_close(file.get_tensor("features"), F.normalize(expected))
    shared = export_shared(run, tmp_path)
    one = tmp_path / "one.npz"
    image = str(folder / "left" / "2.png")
    assert cli.main(["features", "--run", str(shared), "--input", image, "--out", str(one)]) == 0
    with np.load(one) as file:
        assert file["names"].tolist() == ["2.png"]
        torch.testing.assert_close(torch.from_numpy(file["features"]), expected[2:3])
    for options, message in (
        (["--out", "x.csv"], "out=x.csv: expected a file that ends in .npz"),
        (["--out", str(out), "--batch-size", "0"], "batch_size=0 is too small"),
    ):
        assert cli.main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_features_leave_broken_files_out_if_asked_to(tiny, tmp_path):
    run = train(tiny(steps=1, measure_every=0, warmup_epochs=0))
    folder = flat_images(tmp_path / "flat", 3)
    (folder / "1.png").write_bytes(b"nothing")
    encoder, config = load_generator(run)
    with pytest.raises(UserError, match=r"1\.png: cannot be read"):
        write_features(encoder, config, folder, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
    count, _ = write_features(encoder, config, folder, tmp_path / "x.npz", broken_files="skip")
    with np.load(tmp_path / "x.npz") as file:
        assert count == 2 and file["names"].tolist() == ["0.png", "2.png"]


def test_two_processes_share_their_negatives(tiny, tmp_path):
    """At a huge temperature the loss is the logarithm of the number of candidates: 7 of the 8 views, not 3 of a rank's 4."""
    config = tiny(temperature=1e4, steps=2, warmup_epochs=0, log_every=1)
    code, output = run("simclr", [config], tmp_path)
    assert code == 0, output
    for line in read_metrics(config.out / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(math.log(7), abs=1e-3)
