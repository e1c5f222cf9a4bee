"""Runs of DCLGAN, SimDCL and CycleGAN: what they leave, resuming, and what is done with the trained networks."""

import pytest
import torch
from PIL import Image
from same_run import assert_same_run, checkpoint
from torch import nn

from fastnce.data import UnpairedImages
from fastnce.errors import UserError
from fastnce.models import DCLGAN, CycleGAN
from fastnce.systems import SYSTEMS
from fastnce.training import build_config, load_generator, train, translate
from fastnce.training.export import export_published
from fastnce.training.log import read_metrics

TINY = {
    "base_channels": 2,
    "num_blocks": 1,
    "disc_channels": 2,
    "disc_layers": 1,
    "batch_size": 2,
    "load_size": 20,
    "crop_size": 16,
    "workers": 0,
    "device": "cpu",
    "steps": 4,
    "log_every": 2,
    "sample_every": 4,
    "sample_count": 2,
    "checkpoint_every": 4,
}
PATCHES = {"nce_layers": [4, 8, 12], "num_patches": 8, "projection_dim": 8}
ADVERSARIAL = {"G", "G_A", "G_B", "D_A", "D_B", "idt_A", "idt_B"}
LOSSES = {
    "cyclegan": ADVERSARIAL | {"cycle_A", "cycle_B"},
    "dclgan": ADVERSARIAL | {"NCE1", "NCE2"},
    "simdcl": ADVERSARIAL | {"NCE1", "NCE2", "sim_A", "sim_B"},
}


def tiny(variant, data, out, **changes):
    # A small pool, so that it is full, and draws, before and after the stop.
    own = {"pool_size": 2} if variant == "cyclegan" else PATCHES
    paths = {"data": data, "out": out}
    return build_config(variant, overrides=paths | TINY | own | changes)


@pytest.fixture(scope="module", params=LOSSES)
def whole(request, data, tmp_path_factory):
    """The variant, and a run of it that was never stopped."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, train(tiny(request.param, data, out))


def test_what_a_run_leaves(whole):
    variant, run = whole
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]) == LOSSES[variant] | {"step", "epoch", "lr_factor", "seconds"}
    assert (
        Image.open(run / "samples" / "step_000004.png").height > 4 * 80
    )  # A and B, both translated
    assert (run / "loss.png").exists()


def test_a_stopped_run_continues_bit_for_bit(whole, data, tmp_path):
    variant, run = whole
    out = tmp_path / "run"
    train(tiny(variant, data, out, steps=2, sample_every=2, checkpoint_every=2))
    torch.rand(3)  # whatever happened to the generators in between must not matter
    train(tiny(variant, data, out))
    (out / "samples" / "step_000002.png").unlink()
    state = checkpoint(out)
    if variant == "cyclegan":
        assert len(state["model"]["pool_a._extra_state"]) == 2
    assert_same_run(out, run, free=("sample_every", "checkpoint_every"))


def test_the_trained_networks_translate(whole):
    _, run = whole
    generators, _ = load_generator(run)
    images = torch.rand(2, 3, 13, 16) * 2 - 1
    there, back = translate(generators.a_to_b, images), translate(generators.b_to_a, images)
    assert there.shape == back.shape == images.shape
    assert torch.equal(translate(generators, images), there)
    assert not torch.allclose(there, back)
    raw, _ = load_generator(run, which="raw")
    assert not torch.equal(translate(raw, images), there)


def test_a_sample_grid_shows_each_domain_and_its_translation(data, tmp_path):
    config = tiny("cyclegan", data, tmp_path / "run")
    system = SYSTEMS[config.system]
    marked = nn.Module()
    marked.a_to_b, marked.b_to_a = _Shift(0.25), _Shift(-0.5)
    rows = system.preview(config, system.dataset(config))(marked)
    test = UnpairedImages(data, "test", load_size=16, crop_size=16, flip=False, serial=True)
    for index in range(2):
        a, b = test[index]["A"], test[index]["B"]
        expected = {"A": a, "A to B": a + 0.25, "B": b, "B to A": b - 0.5}
        assert list(rows) == list(expected)
        for label, image in expected.items():
            assert torch.equal(rows[label][index], image), label


class _Shift(nn.Module):
    """A translation that can be recognised."""

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        return x + self.shift


def test_published_files_out_and_in_again(whole, data, tmp_path):
    variant, run = whole
    files = export_published(run, tmp_path / "files", weights="raw")
    names = ["G_A", "G_B", "D_A", "D_B"] + ["F1", "F2"] * (variant != "cyclegan")
    assert [file.name for file in files] == [f"latest_net_{name}.pth" for name in names]
    # One step that moves nothing.
    still = dict.fromkeys(["lr"] + ["lr_f"] * (variant != "cyclegan"), 1e-12)
    start = {"init_from": tmp_path / "files", "steps": 1}
    config = tiny(variant, data, tmp_path / "run", **start, **still)
    train(config)
    before, after = checkpoint(run)["model"], checkpoint(config.out)["model"]
    for key, value in after.items():
        if not key.startswith(("heads", "pool")):
            torch.testing.assert_close(value, before[key], rtol=0, atol=1e-9)


def test_the_other_direction(data, tmp_path):
    config = tiny("cyclegan", data, tmp_path / "run", direction="BtoA", steps=1)
    train(config)
    assert read_metrics(config.out / "metrics.jsonl") == []


def test_what_trains_what(data, tmp_path):
    kinds = {"cyclegan": CycleGAN, "dclgan": DCLGAN, "simdcl": DCLGAN}
    for variant, kind in kinds.items():
        config = tiny(variant, data, tmp_path)
        system = SYSTEMS[config.system]
        assert type(system.model(config, system.dataset(config))) is kind


def test_published_files_of_grey_and_rgb(data, tmp_path):
    grey = {"in_channels": 1, "lambda_identity": 0.0, "steps": 1}
    run = train(tiny("cyclegan", data, tmp_path / "run", **grey))
    export_published(run, tmp_path / "files", weights="raw")
    start = {"init_from": tmp_path / "files", "lr": 1e-12}
    again = train(tiny("cyclegan", data, tmp_path / "again", **grey, **start))
    before, after = (checkpoint(folder)["model"] for folder in (run, again))
    for key in ("generators.a_to_b.model.1.weight", "generators.b_to_a.model.1.weight"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-9)
    with pytest.raises(
        UserError, match=r"G_A.pth: has in_channels=1, but the options say in_channels=3"
    ):
        train(tiny("cyclegan", data, tmp_path / "wrong", steps=1, **start))


def test_simdcl_is_as_published():
    config = build_config("simdcl", overrides={"data": "images", "out": "run"})
    assert (config.lambda_sim, config.lr, config.epochs + config.decay_epochs) == (10, 2e-4, 200)
    assert (config.lr_f, config.beta1_f, config.beta2_f) == (config.lr, config.beta1, config.beta2)
    dclgan = build_config("dclgan", overrides={"data": "images", "out": "run"})
    assert (dclgan.lambda_sim, dclgan.epochs, dclgan.decay_epochs) == (0, 200, 200)


def test_too_many_patches(data, tmp_path):
    with pytest.raises(UserError, match="num_patches=100 exceeds"):
        train(tiny("dclgan", data, tmp_path / "run", num_patches=100))
