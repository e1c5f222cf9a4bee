"""`fastnce train simclr|moco|supcon` and `fastnce evaluate` on a tiny set, in seconds."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import folders
from PIL import Image
from safetensors import safe_open
from same_run import assert_identical, checkpoint
from test_ranks import run
from tiny import ENCODER

from fastnce import cli
from fastnce.errors import UserError
from fastnce.metrics.probes import encode
from fastnce.systems import SYSTEMS
from fastnce.systems.representation import images_of, random_encoder
from fastnce.systems.schedule import warmup_cosine
from fastnce.training import (
    evaluate_run,
    export_shared,
    load_generator,
    train,
    write_features,
)
from fastnce.training.ablation import ablate, ablations
from fastnce.training.checkpoint import save_checkpoint
from fastnce.training.log import read_metrics


@pytest.fixture
def tiny(tiny):
    return lambda variant="simclr", **changes: tiny(variant, **changes)


def test_the_learning_rate_and_the_neighbours(whole):
    run = whole("simclr")
    # 15 images are 3 whole batches an epoch.
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["lr_factor"] for line in lines] == [warmup_cosine(step, 3, 8) for step in (2, 5)]
    # For each of 3 classes a row of a test image and 2 neighbours, enlarged to 96 pixels.
    with Image.open(run / "samples" / "step_000008.png") as grid:
        assert grid.height == 3 * 100 + 4 and grid.width > 3 * 96


def test_another_length_is_another_run(tiny):
    """Unlike CUT's learning rate, the cosine depends on the end from the start on."""
    train(tiny(steps=6))
    with pytest.raises(UserError, match="first 6 steps would have been others with"):
        train(tiny(steps=8))


def test_epochs_give_the_steps(tiny):
    schedule = SYSTEMS["representation"].schedule(tiny(steps=None, epochs=5), 12)
    assert (schedule.total_steps, schedule.warmup_steps) == (15, 3)


def test_evaluate_shows_the_run_beside_its_baselines(tiny, capsys):
    config = tiny(measure_every=8)
    train(config)
    (measured,) = read_metrics(config.out / "measurements.jsonl")
    assert 0 <= measured["knn/accuracy"] <= 1
    assert cli.main(["evaluate", "--run", str(config.out), "--data", str(config.data)]) == 0
    shown, names = capsys.readouterr().out, ["trained encoder", "random encoder", "raw pixels"]
    assert all(f"| {name}" in shown for name in names)
    result = json.loads((config.out / "metrics.json").read_text())
    assert result["run"] == {"method": "simclr", "checkpoint": "last"}
    assert [row["name"] for row in result["rows"]] == names
    assert result["rows"][2]["linear"] > 0.7


def test_the_random_encoder_is_the_runs_own_before_training(tiny, monkeypatch):
    config = tiny(steps=1, warmup_epochs=0, lr=1e-12, weight_decay=0.0)
    train(config)
    trained, _ = load_generator(config.out)
    random = random_encoder(config, images_of(config, "train"))
    for name, value in random.named_parameters():
        torch.testing.assert_close(value, trained.get_parameter(name), msg=name)
    # Its statistics are not the initial ones.
    assert random.bn1.running_mean.abs().max() > 0


def test_an_ablation(classes, tmp_path):
    only = [list(ablations()["moco"].choices)[index] for index in (0, -1)]
    settings = {"seeds": [0], "only": only, "overrides": ENCODER | {"steps": 4}}
    result, table = ablate("moco", data=classes, out=tmp_path, **settings)
    assert [choice["name"] for choice in result["choices"]] == only
    assert f"| {only[0]}" in table and "k-NN, k=20" in table


@pytest.fixture
def flat(tmp_path):
    """Seven images without classes, of 8x8."""
    return folders(tmp_path, {"flat": 7}, size=(8, 8), channels=1) / "flat"


@pytest.mark.parametrize("variant", ["simclr", "moco"])
def test_images_without_labels(tiny, variant, flat, capsys, classes):
    """Batches of four: one an epoch. No test images, so no measurement, but a grid."""
    config = tiny(variant, data=flat, warmup_epochs=0, measure_every=4)
    train(config)
    assert [line["epoch"] for line in read_metrics(config.out / "metrics.jsonl")] == [3, 6]
    assert "has no test images: trained without measuring" in capsys.readouterr().err
    assert not (config.out / "measurements.jsonl").exists()
    assert Image.open(config.out / "samples" / "step_000008.png").height > 6 * 96
    with pytest.raises(UserError, match=r"flat has no classes .* Name a folder with train/CLASS"):
        evaluate_run(config.out)
    with pytest.raises(UserError, match="flat, which is read"):
        train(tiny(variant, data=flat, out=flat / "run", warmup_epochs=0))
    result, _ = evaluate_run(config.out, classes)  # labels that the training did not have
    assert result["test_count"] == 12


def test_supcon_needs_labels(tiny, flat):
    with pytest.raises(UserError, match="Images without classes are for simclr, moco"):
        train(tiny("supcon", data=flat))


def test_a_class_without_test_images(tiny, classes, tmp_path):
    shutil.copytree(classes, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test" / "ant")
    config = tiny(data=tmp_path / "data")
    train(config)
    # Rows of the classes that have one.
    assert Image.open(config.out / "samples" / "step_000008.png").height < 3 * 96
    assert evaluate_run(config.out)[0]["test_count"] == 8


def test_a_run_from_before_goes_on_as_it_was(tiny, stopped, tmp_path):
    """Its batches reach over two epochs, 15 images in batches of 4, and it knows no names of classes."""
    options = {"warmup_epochs": 0}
    train(tiny(out=tmp_path / "whole", last_batch="keep", **options))
    path = tiny().out / "checkpoints" / "last.pt"
    stopped(tiny(last_batch="keep", **options), 4)
    state = checkpoint(tiny().out)
    for name in ("last_batch", "class_names", "class_balance"):
        del state["config"][name]
    del state["files"]
    save_checkpoint({k: v for k, v in state.items() if k != "format"}, path)
    stopped(tiny(**options), 2)
    train(tiny(**options))
    one, other = (checkpoint(run)["model"] for run in (tmp_path / "whole", tiny().out))
    assert_identical(one, other)
    config = json.loads((tiny().out / "config.json").read_text())
    assert config["last_batch"] == "keep" and config["class_names"] == ["ant", "bee", "cat"]
    new = checkpoint(train(tiny(out=tmp_path / "new", **options)))["model"]
    assert any(not torch.equal(value, one[name]) for name, value in new.items())
    with pytest.raises(UserError, match='last_batch="keep" .now "drop"'):
        train(tiny(last_batch="drop", **options))


def test_features(whole, classes, tmp_path, capsys):
    run = whole("simclr")
    folder = classes / "test"
    encoder, config = load_generator(run)
    expected = encode(encoder, images_of(config, "test"))
    names = [f"{name}/{index}.png" for name in ("ant", "bee", "cat") for index in range(4)]
    out = tmp_path / "features.npz"
    command = ["features", "--run", str(run), "--input", str(folder), "--device", "cpu"]
    assert cli.main([*command, "--out", str(out), "--batch-size", "3"]) == 0
    assert "features of each of 12 images" in capsys.readouterr().out
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
    image = str(folder / "ant" / "2.png")
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


def test_features_leave_broken_files_out_if_asked_to(whole, flat, tmp_path):
    (flat / "1.png").write_bytes(b"nothing")
    encoder, config = load_generator(whole("simclr"))
    with pytest.raises(UserError, match=r"1\.png: cannot be read"):
        write_features(encoder, config, flat, tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
    count, _ = write_features(encoder, config, flat, tmp_path / "x.npz", broken_files="skip")
    with np.load(tmp_path / "x.npz") as file:
        assert count == 6 and file["names"].tolist() == [f"{n}.png" for n in (0, 2, 3, 4, 5, 6)]


def test_two_processes_share_their_negatives(tiny, tmp_path):
    """At a huge temperature the loss is the logarithm of the number of candidates: 7 of the 8 views, not 3 of a rank's 4."""
    config = tiny(temperature=1e4, steps=2, warmup_epochs=0, log_every=1)
    code, output = run("simclr", [config], tmp_path)
    assert code == 0, output
    for line in read_metrics(config.out / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(math.log(7), abs=1e-3)
