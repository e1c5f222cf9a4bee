"""The loop of ReStyle, encoder bootstrapping, and the commands that use a trained encoder."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import fill_styles, sines
from pictures import folders
from PIL import Image
from safetensors import safe_open
from torch import nn

from fastnce import cli
from fastnce.data import load_image, save_image
from fastnce.errors import UserError
from fastnce.metrics.distribution import as_saved
from fastnce.networks import perceptual
from fastnce.networks.restyle_encoder import build_encoder
from fastnce.networks.style_generator import StyleGenerator
from fastnce.systems import inversion_quality
from fastnce.systems.inversion_quality import editing_consistency, evaluate_inversion
from fastnce.systems.inverting import (
    Inversion,
    Inverter,
    at_size,
    average_image,
    average_start,
    bootstrap,
    invert_folder,
    iterate,
    visualize_steps,
)
from fastnce.systems.restyle import ReStyleConfig, build_inverter
from fastnce.systems.restyle import images as images_of
from fastnce.training.export import export_published


class Pixels(nn.Module):
    """A generator whose image is its latent: two styles of 48 numbers, the mean of both as (3, 4, 4)."""

    num_styles = 2

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.register_buffer("latent_avg", torch.linspace(-1, 1, 48))
        self.noises: list[str] = []

    def forward(self, w, noise="fixed"):
        self.noises.append(noise)
        return self.gain * w.mean(1).unflatten(1, (3, 4, 4))


class Halver(nn.Module):
    """An encoder that corrects half of the difference of the image and what it sees."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x):
        y = x[:, 3:] if x.shape[1] == 6 else 0
        return (self.share[:, :3] * (x[:, :3] - y)).flatten(1)[:, None].repeat(1, 2, 1)


@pytest.fixture
def images():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_each_step_starts_from_the_one_before_and_its_graph_ends_there(images):
    encoder, generator = Halver(), Pixels()
    error = images - average_image(generator, (4, 4))
    for t, step in enumerate(iterate(encoder, generator, images, steps=3, noise="random"), 1):
        torch.testing.assert_close(images - step.seen, error * 0.5**t)
        assert step.image.shape == (2, 3, 4, 4)
        (step.seen - images).square().sum().backward()
        # d/d share of |x - y_{t-1} - share (x - y_{t-1})|^2, with y_{t-1} a constant
        expected = -2 * 0.5 * (error * 0.5 ** (t - 1)).square().sum((0, 2, 3))
        torch.testing.assert_close(encoder.share.grad[0, :3, 0, 0], expected)
        encoder.share.grad = None
    assert generator.noises == ["fixed", "fixed", "random", "random", "random"]


def test_a_start_takes_the_place_of_the_average(images):
    encoder, generator = Halver(), Pixels()
    first, second = iterate(encoder, generator, images, steps=2)
    start = (first.latent.detach(), first.seen.detach())
    (again,) = iterate(encoder, generator, images, steps=1, start=start)
    assert torch.equal(again.image, second.image)


def test_an_encoder_of_the_image_alone_makes_one_step(images):
    """The published trap: it would silently start from the average again."""
    encoder, generator = Halver(3), Pixels()
    (step,) = iterate(encoder, generator, images, steps=1)
    torch.testing.assert_close(step.seen, average_image(generator, (4, 4)) + 0.5 * images)
    with pytest.raises(ValueError, match=r"steps=2, but the encoder takes the 3 channels"):
        iterate(encoder, generator, images, steps=2)
    with pytest.raises(ValueError, match=r"takes 4 channels, and images of 3 need 6"):
        iterate(Halver(4), generator, images, steps=1)
    with pytest.raises(ValueError, match=r"expected images of \(3, 4, 4\) .* got \(1, 4, 4\)"):
        iterate(encoder, generator, images[:, :1], steps=1)


def test_an_encoder_of_other_styles_is_refused(images):
    generator = Pixels()
    generator.num_styles = 3
    with pytest.raises(ValueError, match=r"gives latents \(2, 2, 48\), .* are \(2, 3, 48\)"):
        next(iterate(Halver(), generator, images, steps=1))


def test_pooling_keeps_the_middle_of_wide_images_and_repeats_small_ones():
    rows = torch.arange(8.0)[:, None].expand(1, 1, 8, 8)
    assert at_size(rows, (2, 4))[0, 0, :, 0].tolist() == [2.5, 4.5]
    assert at_size(rows, (16, 16))[0, 0, :4, 0].tolist() == [0, 0, 1, 1]


def test_bootstrapping_goes_on_with_the_second_model(images):
    first, second = Inverter(Halver(), Pixels()), Inverter(Halver(), Pixels(gain=-1.0))
    second.generator.latent_avg.fill_(5)
    steps = list(bootstrap(first, second, images, 2))
    assert len(steps) == 3
    assert torch.equal(steps[0].image, first(images, 1)[0].image)
    torch.testing.assert_close(
        steps[1].latent, steps[0].latent + second.encoder(torch.cat([images, steps[0].seen], 1))
    )
    torch.testing.assert_close(steps[1].image, -steps[1].latent.mean(1).unflatten(1, (3, 4, 4)))
    assert len(list(bootstrap(first, second, images, 1, first_steps=3))) == 4


def golden(*values: float):
    return pytest.approx(list(values), rel=1e-4, abs=5e-6)


@pytest.fixture(scope="module")
def filled() -> Inverter:
    """The model of golden 13 and 14, whose encoder has seen one batch in training mode."""
    generator = fill_styles(StyleGenerator(16))
    for j, noise in enumerate(generator.noises.buffers()):
        noise.copy_(sines(*noise.shape, step=0.7, start=0.1 * j))
    encoder = fill_styles(build_encoder("resnet34", 6, 6))
    with torch.no_grad():
        for style in encoder.styles:
            style.linear.weight *= 0.2
        generator.latent_avg.copy_(generator.mapping(sines(64, 512, step=0.37, start=0.2)).mean(0))
        x = pictures()
        encoder.train()(torch.cat([x, average_image(generator, (64, 64)).expand_as(x)], dim=1))
    return Inverter(encoder, generator).eval().requires_grad_(False)


def pictures():
    return sines(2, 3, 64, 64, step=0.0137, start=0.3)


def test_golden_values_of_the_loop(filled):
    w, y = average_start(filled.generator, (64, 64))
    assert w[0, 5, :4].tolist() == golden(0.734790, 0.477941, -0.215541, 1.091441)
    assert [w.mean().item(), w.std().item()] == pytest.approx([0.521177, 0.914262], rel=1e-3)
    assert [y.mean().item(), y.std(correction=0).item()] == golden(0.395248, 0.941259)
    assert y[0, :, 3, 5].tolist() == golden(0.229167, -0.376025, 1.348699)
    x = pictures()
    steps = filled(x, 5)
    assert [step.image.mean().item() for step in steps] == golden(
        *(0.429259, 0.461862, 0.492593, 0.521220, 0.545195)
    )
    assert steps[0].image[1, :, 3, 5].tolist() == golden(-0.081203, 0.085315, 0.304333)
    assert steps[4].image[1, :, 3, 5].tolist() == golden(0.117476, 0.359201, 0.508206)
    assert steps[0].latent[1, 2, :3].tolist() == golden(0.775998, 0.401142, -0.191918)
    assert steps[4].latent[1, 2, :3].tolist() == golden(0.945069, 0.096666, -0.097319)
    assert [(step.seen - x).square().mean().item() for step in steps] == golden(
        *(1.557100, 1.573127, 1.584988, 1.596608, 1.605074)
    )


def test_golden_values_of_bootstrapping(filled):
    generator = copy.deepcopy(filled.generator)
    for parameter in generator.to_rgbs.parameters():  # those of to_rgb1 as they are
        parameter.neg_()
    generator.latent_avg.fill_(5)
    steps = bootstrap(filled, Inverter(filled.encoder, generator), pictures(), 2)
    assert [step.image[1, :, 3, 5].tolist() for step in steps] == [
        golden(-0.081203, 0.085315, 0.304333),
        golden(0.063557, -0.045206, 0.028471),
        golden(0.120179, 0.023962, 0.082485),
    ]


@pytest.fixture
def config(classes) -> ReStyleConfig:
    """Of a tiny run on random images, that makes two steps."""
    return ReStyleConfig(
        data=classes,
        generator_shape=(16, 8, 2, 3, 8, 8, 4),
        encoder="small",
        image_size=16,
        steps_per_batch=2,
        other_shapes="crop",
    )


def made(config, seed=0, gain=1.0) -> Inverter:
    """An untrained network, whose images are large enough to differ when they are saved."""
    torch.manual_seed(seed)
    network = build_inverter(config).eval().requires_grad_(False)
    network.generator.latent_avg.normal_()
    for to_rgb in network.generator.to_rgbs:
        to_rgb.conv.weight *= gain
    return network


@pytest.fixture
def inversion(config) -> Inversion:
    return Inversion(made(config), config)


@pytest.fixture
def folder(tmp_path):
    return folders(tmp_path / "in", {"a": 2, "b/c": 1}, size=(16, 16))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_folder_is_inverted_to_images_and_latents(inversion, folder, tmp_path, batch_size):
    out = tmp_path / "out"
    assert invert_folder(inversion, folder, out, batch_size=batch_size) == 3
    found = np.load(out / "latents.npz")
    assert found["names"].tolist() == ["a/0.png", "a/1.png", "b/c/0.png"]
    assert found["latents"].shape == (3, 2, 6, 8)
    x = torch.stack([load_image(folder / name) for name in found["names"]])
    for t, step in enumerate(inversion(x)):
        torch.testing.assert_close(torch.from_numpy(found["latents"][:, t]), step.latent)
        for name, image in zip(found["names"], step.image, strict=True):
            written = load_image(out / f"step-{t + 1}" / name)
            torch.testing.assert_close(written, as_saved(image), atol=2.1 / 255, rtol=0)
    with Image.open(out / "steps.png") as strip:  # of three images: these, the average, two steps
        assert strip.height == 4 * 100 + 4 and 300 < strip.width < 400


def test_the_latents_of_more_steps_in_another_file(config, folder, tmp_path):
    inversion = Inversion(made(config), config, steps=3)
    assert invert_folder(inversion, folder / "a" / "0.png", tmp_path, latents="safetensors") == 1
    with safe_open(tmp_path / "latents.safetensors", "np") as file:
        assert json.loads(file.metadata()["names"]) == ["0.png"]
        assert file.get_tensor("latents").shape == (1, 3, 6, 8)
    assert (tmp_path / "step-3" / "0.png").is_file()


def test_a_folder_is_bootstrapped(config, folder, tmp_path):
    first = SimpleNamespace(network=made(config), config=config)
    inversion = Inversion(made(config, seed=1), config, first=first, first_steps=2)
    assert inversion.names == ["first 1", "first 2", "step 1"]
    invert_folder(inversion, folder, tmp_path / "out")
    x = torch.stack([load_image(folder / name) for name in ("a/0.png", "a/1.png", "b/c/0.png")])
    expected = list(bootstrap(first.network, inversion.network, x, 1, first_steps=2))
    latents = np.load(tmp_path / "out" / "latents.npz")["latents"]
    for t, step in enumerate(expected):
        torch.testing.assert_close(torch.from_numpy(latents[:, t]), step.latent)
    assert (tmp_path / "out" / "first-2" / "a" / "1.png").is_file()


def test_pictures_of_the_steps(inversion, folder, tmp_path):
    maps = visualize_steps(inversion, folder, tmp_path / "out", batch_size=2)
    x = torch.stack([load_image(folder / name) for name in ("a/0.png", "a/1.png", "b/c/0.png")])
    seen = [inversion.start[1], *(step.seen for step in inversion(x))]
    for t in range(2):
        expected = (seen[t + 1] - seen[t]).square().mean((0, 1))
        torch.testing.assert_close(maps[t], expected)
    for name in ("steps.png", "changes.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_mistakes_of_an_inversion_are_named(inversion, config, folder, tmp_path):
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        Inversion(inversion.network, config, steps=0)
    with pytest.raises(UserError, match="first_steps=2 is for another run's encoder"):
        Inversion(inversion.network, config, first_steps=2)
    other = replace(config, generator_shape=(8, 8, 2, 3, 8, 8))
    first = SimpleNamespace(network=made(other), config=other)
    with pytest.raises(UserError, match="differ in the latents: 4 of 8 of the first, 6 of 8"):
        Inversion(inversion.network, config, first=first)
    wide = folders(tmp_path / "wide", {"": 1}, size=(20, 16))
    with pytest.raises(UserError, match=r"0.png: 20x16 has not the shape of 16x16"):
        strict = replace(config, other_shapes="error")
        invert_folder(Inversion(inversion.network, strict), wide, tmp_path / "out")
    assert invert_folder(inversion, wide, tmp_path / "out") == 1
    with pytest.raises(UserError, match="which is read: results would become input"):
        invert_folder(inversion, wide, wide / "out")
    with pytest.raises(UserError, match="no such folder"):
        invert_folder(inversion, wide / "none", tmp_path / "out")
    one_step = replace(config, feedback=False, steps_per_batch=1)
    with pytest.raises(UserError, match="steps=2, but the encoder takes the 3 channels"):
        invert_folder(Inversion(made(one_step), one_step, steps=2), wide, tmp_path / "out")


class Brightness(nn.Module):
    """A judge whose feature is the mean, and which reads three classes in it."""

    reads_labels = True

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), torch.ones(len(x))], dim=1)

    def class_probabilities(self, x):
        return torch.nn.functional.one_hot((x.mean((1, 2, 3)) > 0).long(), 3).double()


def test_every_step_is_measured(inversion, config, monkeypatch):
    from fastnce import demo
    from fastnce.demo import judges

    monkeypatch.setattr(demo, "generation_evaluator", lambda *_, **__: Brightness())
    monkeypatch.setattr(judges, "DIGITS", ("ant", "bee", "cat"))
    shown = images_of(config, "test")
    result, table = evaluate_inversion(inversion, shown, config.data)
    rows = {row.pop("name"): row for row in result["rows"]}
    assert list(rows) == ["average image", "step 1", "step 2", "the images", "inverted"]
    assert rows["inverted"] == rows["step 2"]
    x = torch.stack([shown.image(i) for i in range(12)])
    y = [as_saved(step.image) for step in inversion(x)]
    y.insert(0, as_saved(inversion.start[1].expand_as(x)))
    for t, name in enumerate(list(rows)[:3]):
        assert rows[name]["l2"] == pytest.approx((y[t] - x).square().mean().item())
        grey = perceptual.with_channels(y[t], 1)
        kept = (grey.mean((1, 2, 3)) > 0).long() == shown.labels
        assert rows[name]["kept"] == pytest.approx(kept.double().mean().item())
        cosine = torch.cosine_similarity(
            Brightness()(grey), Brightness()(perceptual.with_channels(x, 1))
        )
        assert rows[name]["similarity"] == pytest.approx(cosine.mean().item())
    assert rows["step 2"]["change"] == pytest.approx((y[2] - y[1]).square().mean().item())
    *_, last = inversion(x)
    distance = (last.latent - inversion.network.generator.latent_avg).flatten(1).norm(dim=1)
    assert rows["step 2"]["distance"] == pytest.approx(distance.mean().item())
    assert rows["average image"]["distance"] == 0 and "change" not in rows["average image"]
    assert rows["step 2"]["lec"] > 0 and "lec" not in rows["step 1"]
    own = (perceptual.with_channels(x, 1).mean((1, 2, 3)) > 0).long() == shown.labels
    assert rows["the images"]["l2"] == 0 and rows["the images"]["similarity"] == pytest.approx(1)
    assert rows["the images"]["kept"] == pytest.approx(own.double().mean().item())
    assert "| LEC" in table and "| class kept" in table
    monkeypatch.setattr(inversion_quality, "_BATCH", 5)
    again, _ = evaluate_inversion(inversion, shown, config.data)
    for row, (name, values) in zip(again["rows"], rows.items(), strict=True):
        assert row.pop("name") == name and row == pytest.approx(values, rel=1e-4)


def test_distances_of_networks_that_the_user_names(
    inversion, config, monkeypatch, tmp_path, capsys
):
    class Loss(nn.Module):
        def __init__(self, *files):
            super().__init__()
            self.files = files

        def features(self, x):
            return x

        def per_image(self, y, x):
            assert self.files == ("backbone", "weights")
            return (y - x).abs().mean((1, 2, 3))

    monkeypatch.setattr(perceptual, "LPIPS", Loss)
    shown = images_of(config, "test")
    inversion.config = replace(config, moco_weights=tmp_path / "gone.pth")
    how = {"lpips_backbone": "backbone", "edit": tmp_path / "d.npy"}
    np.save(tmp_path / "d.npy", np.ones((1, 8), np.float32))
    with pytest.raises(UserError, match="lpips_weights is missing: lpips needs lpips_backbone and"):
        evaluate_inversion(inversion, shown, config.data, **how)
    result, _ = evaluate_inversion(inversion, shown, config.data, lpips_weights="weights", **how)
    x = torch.stack([shown.image(i) for i in range(12)])
    *_, last = inversion(x)
    expected = (as_saved(last.image) - x).abs().mean().item()
    assert result["rows"][-1]["lpips"] == pytest.approx(expected)
    assert {"similarity", "moco"}.isdisjoint(result["rows"][-1])
    assert "gone.pth of the training, which is not there" in capsys.readouterr().err
    lec = editing_consistency(inversion, x, torch.ones(8)).mean().item()
    assert result["rows"][-1]["lec"] == pytest.approx(lec)


def test_what_the_images_should_become(inversion, config, tmp_path):
    shown, data = images_of(config, "test"), config.data
    negatives = tmp_path / "negatives"
    for path in data.rglob("*.png"):
        save_image(-load_image(path), negatives / path.relative_to(data))
    wanted = images_of(replace(config, data=negatives), "test")
    result, _ = evaluate_inversion(inversion, shown, data, targets=wanted)
    x = torch.stack([shown.image(i) for i in range(12)])
    *_, last = inversion(x)
    expected = (as_saved(last.image) + x).square().mean().item()
    assert result["rows"][-1]["l2"] == pytest.approx(expected, rel=1e-2)
    assert result["rows"][-2]["l2"] == pytest.approx((2 * x).square().mean().item(), rel=1e-2)
    (negatives / "test" / "ant" / "0.png").rename(negatives / "test" / "ant" / "a.png")
    with pytest.raises(UserError, match=r"targets: of .*0.png in .* there is"):
        evaluate_inversion(
            inversion, shown, data, targets=images_of(replace(config, data=negatives), "test")
        )


def test_consistency_of_edits_against_its_closed_form(images):
    """The encoder goes half of the way: w = a + (x - a) / 2, and back from w + 3 d it ends at a + (w + 3 d - a) / 2."""
    network = Inverter(Halver(), Pixels()).eval()
    network.generator.num_styles = 2
    told = SimpleNamespace(size=(4, 4), steps_per_batch=1)
    found = editing_consistency(Inversion(network, told), images, direction := torch.randn(48))
    offset = (images.flatten(1) - network.generator.latent_avg) / 2
    expected = (offset / 2 + 1.5 * direction).norm(dim=1) * 2**0.5  # of two equal styles
    torch.testing.assert_close(found, expected)
    network.encoder.share.data.fill_(1)
    exact = editing_consistency(Inversion(network, told), images, direction)
    assert exact.max() < 1e-5


def test_the_commands(whole, folder, classes, extractor, tmp_path, capsys):
    run = whole("restyle")
    (published,) = export_published(run, tmp_path / "published")
    first = ["--first", str(published)]
    outs = {name: tmp_path / name for name in ("invert", "published", "bootstrap", "steps")}
    reading = ["--input", str(folder), "--other-shapes", "crop", "--out"]
    for name, command in {
        "invert": ["invert", "--run", str(run), "--steps", "3"],
        "published": ["invert", "--run", str(published), "--steps", "3"],
        "bootstrap": ["bootstrap", "--run", str(run), *first, "--first-steps", "2"],
        "steps": ["visualize", "steps", "--run", str(run), *first],
    }.items():
        assert cli.main([*command, *reading, str(outs[name])]) == 0
    assert "step 1: mean squared change" in capsys.readouterr().out
    inverted = np.load(outs["invert"] / "latents.npz")
    assert np.array_equal(
        inverted["latents"], np.load(outs["published"] / "latents.npz")["latents"]
    )
    assert {path.name for path in outs["bootstrap"].iterdir()} == {
        *("first-1", "first-2", "step-1", "latents.npz", "steps.png")
    }
    assert (outs["steps"] / "changes.png").is_file()

    judged = ["--extractor", str(extractor), "--out", str(tmp_path)]
    assert cli.main(["evaluate", "--run", str(run), "--steps", "1", *judged]) == 0
    assert "| step 1 " in capsys.readouterr().out
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["run"]["steps_per_batch"] == 5 and result["images"] == 12
    own = ["--targets", str(classes)]
    assert cli.main(["evaluate", "--run", str(run), *first, *judged, *own]) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["steps"] == ["first 1", "step 1"]


def test_commands_name_what_does_not_fit(whole, folder, tmp_path, capsys):
    run, other = str(whole("restyle")), str(whole("stylegan2"))
    ends = ["--input", str(folder), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    for command, message in {
        ("invert", "--run", other, *ends): "a run of stylegan2 does not invert images",
        ("bootstrap", "--run", run, "--first", other, *ends): "stylegan2 does not invert images",
        ("evaluate", "--run", run, "--first", other): "stylegan2 does not invert images",
        ("evaluate", "--run", run, "--first-steps", "2"): "first_steps=2 is for another run",
        ("evaluate", "--run", other, "--steps", "2"): "steps=2 is not for a run of stylegan2",
        ("evaluate", "--images", run, "--edit", "x"): "--edit is for --run. Leave it out",
    }.items():
        assert cli.main([*command]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
