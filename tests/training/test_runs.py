"""A run's folder and data over its life: locked, kept apart from its input, moved, started from another run, saved after errors."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from same_run import assert_same_run, checkpoint

from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.systems.translation_system import collapse
from fastnce.training import build_config, generate_folder, load_generator, train
from fastnce.training.evaluation import evaluate_run
from fastnce.training.export import export_shared
from fastnce.training.lock import locked
from fastnce.training.patch_views import visualize_features


def picture(path: Path, size=(20, 20), seed=7) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


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


def test_moved_data_is_the_same_run(tiny, data, tmp_path, monkeypatch):
    whole = train(tiny(steps=4, sample_every=1, out=tmp_path / "whole"))
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
    assert_same_run(tiny().out, whole, free=("data", *folders))


def test_other_data_is_another_run(tiny, copy):
    train(tiny(steps=1, data=copy))
    extra = copy / "trainB" / "extra.png"  # in the smaller folder
    picture(extra)
    with pytest.raises(UserError, match=r"made with: B/extra\.png is new"):
        train(tiny(steps=2, data=copy))
    extra.unlink()
    for path in (copy / "trainA").iterdir():
        picture(path, (21, 20))
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
def test_an_error_saves_the_step_before_it(tiny, copy, monkeypatch, capsys, workers):
    """A file that goes bad in step 3; the run goes on with a good one in its place."""
    whole = train(tiny(data=copy, steps=8, out=tiny().out.with_name("whole")))
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
    config = tiny(data=copy, steps=8, workers=workers, cache_gb=0, checkpoint_every=100)
    with pytest.raises(UserError, match=r"1\.png: cannot be read"):
        train(config)
    step = checkpoint(config.out)["step"]
    assert 3 <= step < 8
    assert f"error after step {step} of 8, saved in" in capsys.readouterr().err
    monkeypatch.undo()
    victim.write_bytes(good)
    train(config)
    assert_same_run(config.out, whole, free=("cache_gb", "checkpoint_every"))


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


def weights(run, network):
    model = checkpoint(run)["model"]
    prefix = f"{network}."
    return {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}


def started_from(source, config):
    """The model of a run that starts from another one, before its first step."""
    from fastnce.systems import SYSTEMS
    from fastnce.training.published import load_initial

    torch.manual_seed(5)
    system = SYSTEMS[config.system]
    model = system.model(config, system.dataset(config))
    lines = load_initial(model, config)
    return model, lines


def assert_equal_weights(network, expected):
    own = network.state_dict()
    assert list(own) == list(expected)
    assert all(torch.equal(own[name], expected[name]) for name in own)


def test_a_new_run_from_another_ones_weights(tiny, tmp_path, capsys):
    """Also from a checkpoint file; with another learning rate it is the way to go on."""
    first = train(tiny(steps=3, keep_every=2))
    for source, step in ((first, 3), (first / "checkpoints" / "step_000002.pt", 2)):
        config = tiny(steps=1, lr=1e-5, init_from=source, out=tmp_path / f"from{step}")
        model, lines = started_from(source, config)
        state = torch.load(
            first / "checkpoints" / ("last.pt" if step == 3 else source.name), weights_only=True
        )
        expected = {k: v for k, v in state["model"].items() if k.startswith("generator.")}
        assert_equal_weights(
            model.generator, {k.removeprefix("generator."): v for k, v in expected.items()}
        )
        assert [line.split(":")[0] for line in lines] == ["generator", "discriminator", "projector"]
    capsys.readouterr()
    train(config)
    assert f"generator: from {source}" in capsys.readouterr().out
    assert checkpoint(config.out)["step"] == 1
    assert checkpoint(config.out)["optimizers"]["G"]["state"][0]["step"] == 1


def test_networks_that_fit_come_from_a_run_of_another_system(tiny, tmp_path):
    two_way = {"base_channels": 2, "num_blocks": 1, "disc_channels": 2, "disc_layers": 1}
    common = {"data": tiny().data, "device": "cpu", "workers": 0, "load_size": 20, "crop_size": 16}
    both = train(
        build_config(
            "cyclegan", overrides={**common, **two_way, "out": tmp_path / "both", "steps": 1}
        )
    )
    model, lines = started_from(both, tiny(init_from=both))
    assert_equal_weights(model.generator, weights(both, "generators.a_to_b"))
    assert_equal_weights(model.discriminator, weights(both, "discriminator_a"))
    assert "projector: starts anew" in lines[2]
    with pytest.raises(UserError, match="none of its networks fits"):
        started_from(both, tiny(init_from=both, base_channels=4, disc_channels=4))
    with pytest.raises(UserError, match="no such checkpoint"):
        started_from(both, tiny(init_from=tmp_path / "none.pt"))


def test_folders_of_a_and_b_anywhere(tiny, data, tmp_path, extractor):
    whole = train(tiny(steps=2, out=tmp_path / "whole"))
    folders = {"data_a": data / "trainA", "data_b": data / "trainB"}
    tests = {"test_a": data / "testA", "test_b": data / "testB"}
    train(tiny(steps=2, data=None, **folders, **tests))
    assert_same_run(tiny().out, whole, free=("data", *folders, *tests))
    # An exported network has none of them.
    path = export_shared(tiny().out, tmp_path / "shared")
    config = load_generator(path)[1]
    assert config.data == tmp_path / "shared" and config.data_a is None
    # Measured translations need the test images, from the start.
    with pytest.raises(UserError, match="test_a is missing"):
        train(tiny(data=None, **folders, measure_every=1, extractor=extractor, out=tmp_path / "m"))
    assert not (tmp_path / "m").exists()
    # Without test folders the grids show training images.
    train(
        tiny(steps=2, data=None, data_a=data / "trainA", data_b=data / "trainB", out=tmp_path / "c")
    )
    for changes, message in (
        ({"data": None, "data_a": data / "trainA"}, "data_b is missing"),
        ({"data_a": data / "trainA", "data_b": data / "trainB"}, "data=.* holds all folders"),
        ({"data": None, "test_a": data / "testA"}, "data_a is missing"),
        ({"data": None, "test_a": data / "testA", **folders}, "test_b is missing"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(**changes)


@pytest.fixture
def sizes(tmp_path):
    """Images of A and of B that all differ in size."""
    root = tmp_path / "sizes"
    for folder, count in (("trainA", 3), ("trainB", 2)):
        for index in range(count):
            picture(root / folder / f"{index}.png", (24 + 4 * index + len(folder), 32 - 4 * index))
    picture(root / "trainA" / "small.png", (24, 24))
    picture(root / "trainB" / "wide.png", (60, 24))
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
    assert (
        collapse(images, [0.02 * image.flip(0) for image in images]) is None
    )  # faint, but a translation
    assert "nearly the same, with 0.0 %" in collapse(images, [one, one, one])
    assert "nearly one colour" in collapse(
        images, [torch.full_like(x, i / 9) for i, x in enumerate(images)]
    )
    assert collapse([one], [one]) is None and collapse([one, one], [one, one]) is None

    def constant(self, batch, **kwargs):
        losses = training_step(self, batch, **kwargs)
        with torch.no_grad():
            self.generator.model[-2].weight.zero_()
        return losses

    training_step = CUT.training_step
    monkeypatch.setattr(CUT, "training_step", constant)
    train(tiny(steps=2, ema_decay=0.0))
    assert (
        "translations have collapsed: each of them is nearly one colour" in capsys.readouterr().err
    )


def test_evaluation_says_that_the_path_is_the_runs(tiny, data, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "images").symlink_to(data)
    monkeypatch.chdir(tmp_path / "there")
    train(tiny(steps=1, data="images"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data=images, which .*run/config\.json names, is not there in .*--data"
    ):
        evaluate_run(tiny().out)
