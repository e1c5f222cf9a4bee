"""Runs of DCLGAN, SimDCL and CycleGAN: both directions, and published weights out and in again."""

import pytest
import torch
from pictures import noise
from same_run import checkpoint
from torch import nn

from fastnce.data import UnpairedImages, load_image
from fastnce.errors import UserError
from fastnce.systems import SYSTEMS
from fastnce.training import (
    CUTTrainConfig,
    build_config,
    load_generator,
    train,
    translate,
    translate_folder,
)
from fastnce.training.export import export_published


@pytest.mark.parametrize("variant", ["cyclegan", "simdcl"])
def test_the_trained_networks_translate(whole, variant):
    run = whole(variant)
    generators, _ = load_generator(run)
    images = torch.rand(2, 3, 13, 16) * 2 - 1
    there, back = translate(generators.a_to_b, images), translate(generators.b_to_a, images)
    assert there.shape == back.shape == images.shape
    assert torch.equal(translate(generators, images), there)
    assert not torch.allclose(there, back)
    raw, _ = load_generator(run, which="raw")
    assert not torch.equal(translate(raw, images), there)


class Shift(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x + self.by


class Shifts(nn.Module):
    """Brighter from A to B, darker from B to A."""

    def __init__(self):
        super().__init__()
        self.a_to_b, self.b_to_a = Shift(0.5), Shift(-0.5)

    def forward(self, x):
        return self.a_to_b(x)


@pytest.mark.parametrize("trained", ["AtoB", "BtoA"])
def test_directions_are_those_of_the_folders(tmp_path, trained):
    config = CUTTrainConfig(data=tmp_path, out=tmp_path, crop_size=8, direction=trained)
    noise(tmp_path / "in" / "a.png", (8, 8), low=127, high=129)
    for direction in (None, "AtoB", "BtoA"):
        translate_folder(Shifts(), config, tmp_path / "in", tmp_path / "out", direction=direction)
        brighter = load_image(tmp_path / "out" / "a.png").mean() > 0.25
        # `a_to_b` is what the training called A to B, which with BtoA begins at the folder B.
        assert brighter == (direction in (None, trained))


def test_a_sample_grid_shows_each_domain_and_its_translation(tiny, data):
    config = tiny("cyclegan")
    system = SYSTEMS[config.system]
    rows = system.preview(config, system.dataset(config))(Shifts())
    test = UnpairedImages(data, "test", load_size=16, crop_size=16, flip=False, serial=True)
    for index in range(2):
        a, b = test[index]["A"], test[index]["B"]
        expected = {"A": a, "A to B": a + 0.5, "B": b, "B to A": b - 0.5}
        assert list(rows) == list(expected)
        for label, image in expected.items():
            assert torch.equal(rows[label][index], image), label


@pytest.mark.parametrize("variant", ["cyclegan", "simdcl"])
def test_published_files_out_and_in_again(whole, tiny, tmp_path, variant):
    run = whole(variant)
    files = export_published(run, tmp_path / "files", weights="raw")
    names = ["G_A", "G_B", "D_A", "D_B"] + ["F1", "F2"] * (variant != "cyclegan")
    assert [file.name for file in files] == [f"latest_net_{name}.pth" for name in names]
    # One step that moves nothing.
    still = dict.fromkeys(["lr"] + ["lr_f"] * (variant != "cyclegan"), 1e-12)
    start = {"init_from": tmp_path / "files", "steps": 1}
    config = tiny(variant, **start, **still)
    train(config)
    before, after = checkpoint(run)["model"], checkpoint(config.out)["model"]
    for key, value in after.items():
        if not key.startswith(("heads", "pool")):
            torch.testing.assert_close(value, before[key], rtol=0, atol=1e-9)


def test_published_files_of_grey_and_rgb(tiny, tmp_path):
    grey = {"in_channels": 1, "lambda_identity": 0.0, "steps": 1}
    run = train(tiny("cyclegan", **grey))
    export_published(run, tmp_path / "files", weights="raw")
    start = {"init_from": tmp_path / "files", "lr": 1e-12}
    again = train(tiny("cyclegan", out=tmp_path / "again", **grey, **start))
    before, after = (checkpoint(folder)["model"] for folder in (run, again))
    for key in ("generators.a_to_b.model.1.weight", "generators.b_to_a.model.1.weight"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-9)
    with pytest.raises(UserError, match=r"G_A.pth: has in_channels=1, but .* in_channels=3"):
        train(tiny("cyclegan", out=tmp_path / "wrong", steps=1, **start))


def test_simdcl_is_as_published():
    config = build_config("simdcl", overrides={"data": "images", "out": "run"})
    assert (config.lambda_sim, config.lr, config.epochs + config.decay_epochs) == (10, 2e-4, 200)
    assert (config.lr_f, config.beta1_f, config.beta2_f) == (config.lr, config.beta1, config.beta2)
    dclgan = build_config("dclgan", overrides={"data": "images", "out": "run"})
    assert (dclgan.lambda_sim, dclgan.epochs, dclgan.decay_epochs) == (0, 200, 200)
