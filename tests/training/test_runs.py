"""A run's folder and data over its life: locked, kept apart from its input, moved, started from another run, saved after errors."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from pictures import noise
from same_run import assert_identical, assert_same_run, checkpoint

from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.systems import SYSTEMS
from fastnce.systems.translation_system import collapse
from fastnce.training import build_config, generate_folder, load_generator, train
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.evaluation import evaluate_run
from fastnce.training.export import export_shared
from fastnce.training.lock import locked
from fastnce.training.patch_views import visualize_features
from fastnce.training.published import load_initial


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


HOLDER = """
import sys
from pathlib import Path
from fastnce.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_only_one_process_trains_in_a_folder(tiny):
    out = tiny().out
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"out={out} is in use: process {holder.pid} on "):
        train(tiny(steps=1))
    os.kill(holder.pid, signal.SIGKILL)  # the system takes the lock back
    holder.communicate()
    train(tiny(steps=1))
    assert not list(out.glob(".*"))


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match="is in use"), locked(tmp_path / "run"):
            pass
        child = os.fork()
        if child == 0:  # such as a data worker, which may outlive a killed training
            signal.pause()
            os._exit(0)
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("inside", ["trainA", "trainB/run", "testA/run"])
def test_a_run_does_not_feed_on_its_results(tiny, copy, inside):
    with pytest.raises(UserError, match=f"out={copy / inside} is in {copy / inside[:6]}"):
        train(tiny(data=copy, out=copy / inside))
    train(tiny(data=copy, out=copy / "run", steps=1))


def test_other_commands_do_not_write_among_what_they_read(data, tmp_path):
    # Both stop before they look at the network.
    with pytest.raises(UserError, match=r"testA is in .*testA, which is read"):
        visualize_features(None, data / "testA", data / "testA")
    config = build_config("contragan", overrides={"data": tmp_path, "out": tmp_path / "run"})
    with pytest.raises(UserError, match=r"train/cat is in .*train, which is read"):
        generate_folder(None, config, tmp_path / "train" / "cat")


def test_moved_data_is_the_same_run(tiny, whole, data, tmp_path, monkeypatch):
    moved = shutil.copytree(data, tmp_path / "moved")
    train(tiny(steps=2, sample_every=1, data=moved))
    monkeypatch.chdir(tmp_path)
    train(tiny(steps=3, sample_every=1, data="moved"))
    folders = {
        f"{s}_{d}": data / f"{t}{d.upper()}"
        for s, t in (("data", "train"), ("test", "test"))
        for d in "ab"
    }
    train(tiny(steps=4, sample_every=1, data=None, **folders))
    assert_same_run(tiny().out, whole("cut", steps=4, sample_every=1), free=("data", *folders))


def test_other_data_is_another_run(tiny, copy):
    train(tiny(steps=1, data=copy))
    extra = copy / "trainB" / "extra.png"  # in the smaller folder
    noise(extra)
    with pytest.raises(UserError, match=r"made with: B/extra\.png is new"):
        train(tiny(steps=2, data=copy))
    extra.unlink()
    for path in (copy / "trainA").iterdir():
        noise(path, (21, 20))
    with pytest.raises(UserError, match=r"A/0\.png has \d+ bytes instead of \d+, .*and 2 more"):
        train(tiny(steps=2, data=copy))


def test_a_run_that_did_not_keep_its_files_is_tied_to_the_place(tiny, copy, monkeypatch):
    train(tiny(steps=1, data=copy))
    path = tiny().out / "checkpoints" / "last.pt"
    state = checkpoint(tiny().out)
    del state["files"]
    torch.save(state, path)
    elsewhere = shutil.copytree(copy, copy.with_name("elsewhere"))
    with pytest.raises(UserError, match=r"holds another run, with data=.*copy"):
        train(tiny(steps=2, data=elsewhere))
    monkeypatch.chdir(copy.parent)
    train(tiny(steps=2, data="copy"))
    assert checkpoint(tiny().out)["step"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_saves_the_step_before_it(tiny, whole, copy, monkeypatch, capsys, workers):
    """A file that goes bad in step 3; the run goes on with a good one in its place."""
    victim = copy / "trainB" / "1.png"
    good, steps = victim.read_bytes(), 0
    training_step = CUT.training_step

    def breaking(self, batch, **kwargs):
        nonlocal steps
        steps += 1
        if steps == 3:
            victim.write_bytes(good[:200])
        return training_step(self, batch, **kwargs)

    monkeypatch.setattr(CUT, "training_step", breaking)
    config = tiny(data=copy, workers=workers, cache_gb=0, checkpoint_every=100)
    with pytest.raises(UserError, match=r"1\.png: cannot be read"):
        train(config)
    step = checkpoint(config.out)["step"]
    assert 3 <= step < 8
    assert f"error after step {step} of 8, saved in" in capsys.readouterr().err
    monkeypatch.undo()
    victim.write_bytes(good)
    train(config)
    assert_same_run(config.out, whole("cut"), free=("data", "cache_gb", "checkpoint_every"))


def test_a_step_that_was_not_completed_is_not_saved(tiny, monkeypatch):
    def failing(self, batch, **kwargs):
        self.generator.requires_grad_(False)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(CUT, "training_step", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        train(tiny())
    assert not (tiny().out / "checkpoints").exists()


def test_kept_checkpoints(tiny):
    out = train(tiny(steps=7, keep_every=3, checkpoint_every=4))
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["last.prev.pt", "last.pt", "step_000003.pt", "step_000006.pt"]
    train(tiny(steps=8, keep_every=0))  # it may change
    kept = torch.load(out / "checkpoints" / "step_000006.pt", weights_only=True)
    assert kept["step"] == 6


def network_of(run, name, file="last.pt"):
    """The weights of one of the networks in a checkpoint."""
    model = load_checkpoint(run / "checkpoints" / file)["model"]
    return {k.removeprefix(f"{name}."): v for k, v in model.items() if k.startswith(f"{name}.")}


def started_from(config):
    """The model of a run before its first step, and what was said of its networks."""
    system = SYSTEMS[config.system]
    model = system.model(config, system.dataset(config))
    return model, load_initial(model, config)


def test_a_new_run_from_another_ones_weights(tiny, tmp_path, capsys):
    """Also from a checkpoint file; with another learning rate it is the way to go on."""
    first = train(tiny(steps=3, keep_every=2))
    kept = first / "checkpoints" / "step_000002.pt"
    for source, file in ((first, "last.pt"), (kept, kept.name)):
        config = tiny(steps=1, lr=1e-5, init_from=source, out=tmp_path / "new")
        model, lines = started_from(config)
        expected = network_of(first, "generator", file)
        assert_identical(dict(model.generator.state_dict()), expected)
        assert [line.split(":")[0] for line in lines] == ["generator", "discriminator", "projector"]
    train(config)
    assert f"generator: from {kept}" in capsys.readouterr().out
    assert checkpoint(config.out)["step"] == 1
    assert checkpoint(config.out)["optimizers"]["G"]["state"][0]["step"] == 1


def test_networks_that_fit_come_from_a_run_of_another_system(tiny, whole, tmp_path):
    both = whole("cyclegan")
    model, lines = started_from(tiny(init_from=both))
    for own, other in (("generator", "generators.a_to_b"), ("discriminator", "discriminator_a")):
        assert_identical(dict(getattr(model, own).state_dict()), network_of(both, other))
    assert "projector: starts anew" in lines[2]
    with pytest.raises(UserError, match="none of its networks fits"):
        started_from(tiny(init_from=both, base_channels=4, disc_channels=4))
    with pytest.raises(UserError, match="no such checkpoint"):
        started_from(tiny(init_from=tmp_path / "none.pt"))


def test_folders_of_a_and_b_anywhere(tiny, data, tmp_path, extractor):
    train_a, train_b, test_a = (data / name for name in ("trainA", "trainB", "testA"))
    folders = {"data_a": train_a, "data_b": train_b}
    # Without test folders the grids show training images.
    run = train(tiny(steps=2, data=None, **folders))
    # An exported network has none of them.
    path = export_shared(run, tmp_path / "shared")
    config = load_generator(path)[1]
    assert config.data == tmp_path / "shared" and config.data_a is None
    # Measured translations need the test images, from the start.
    with pytest.raises(UserError, match="test_a is missing"):
        train(tiny(data=None, **folders, measure_every=1, extractor=extractor, out=tmp_path / "m"))
    assert not (tmp_path / "m").exists()
    for changes, message in (
        ({"data": None, "data_a": train_a}, "data_b is missing"),
        (folders, "data=.* holds all folders"),
        ({"data": None, "test_a": test_a}, "data_a is missing"),
        ({"data": None, "test_a": test_a, **folders}, "test_b is missing"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(**changes)


@pytest.fixture
def sizes(tmp_path):
    """Images of A and of B that all differ in size."""
    root = tmp_path / "sizes"
    for folder, count in (("trainA", 3), ("trainB", 2)):
        for index in range(count):
            noise(root / folder / f"{index}.png", (24 + 4 * index + len(folder), 32 - 4 * index))
    noise(root / "trainA" / "small.png", (24, 24))
    noise(root / "trainB" / "wide.png", (60, 24))
    return root


FREE_SIZE = {"preprocess": "none", "batch_size": 1}


def test_sizes_that_do_not_fit_are_found_before_the_first_step(tiny, sizes, tmp_path):
    for variant in ("fastcut", "cyclegan", "dclgan"):  # which take any
        train(tiny(variant, **FREE_SIZE, data=sizes, steps=4, out=tmp_path / variant))
    for changes, message in (
        ({"batch_size": 2}, r"1\.png: gives .*x.*, but .*0\.png .*batch_size=1"),
        ({}, r"gives .*x.*, but .*png .*x.*, and nce_idt"),
        (
            {"nce_idt": False, "nce_layers": [4, 8], "num_patches": 200},
            r"A/small\.png: gives 24x24, and num_patches=200",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny(**(FREE_SIZE | {"data": sizes} | changes)))
        assert not tiny().out.exists()


def test_collapsed_translations_are_told(tiny, monkeypatch, capsys):
    torch.manual_seed(0)
    images = [torch.rand(3, 20, width) * 2 - 1 for width in (20, 24, 28)]
    one = torch.rand(3, 20, 20)
    faint = [0.02 * image.flip(0) for image in images]
    plain = [torch.full_like(image, index / 9) for index, image in enumerate(images)]
    assert collapse(images, faint) is None
    assert "nearly the same, with 0.0 %" in collapse(images, [one, one, one])
    assert "nearly one colour" in collapse(images, plain)
    assert collapse([one], [one]) is None and collapse([one, one], [one, one]) is None

    def constant(self, batch, **kwargs):
        losses = training_step(self, batch, **kwargs)
        with torch.no_grad():
            self.generator.model[-2].weight.zero_()
        return losses

    training_step = CUT.training_step
    monkeypatch.setattr(CUT, "training_step", constant)
    train(tiny(steps=2, ema_decay=0.0))
    said = "translations have collapsed: each of them is nearly one colour"
    assert said in capsys.readouterr().err


def test_evaluation_says_that_the_path_is_the_runs(tiny, data, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "images").symlink_to(data)
    monkeypatch.chdir(tmp_path / "there")
    train(tiny(steps=1, data="images"))
    monkeypatch.chdir(tmp_path)
    message = r"data=images, which .*run/config\.json names, is not there in .*--data"
    with pytest.raises(UserError, match=message):
        evaluate_run(tiny().out)
