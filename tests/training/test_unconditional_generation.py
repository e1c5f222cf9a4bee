"""Training of StyleGAN2 on the loop: what is measured, fine-tuning from a run and from files of rosinality, these files out."""

import pytest
import torch
from same_run import checkpoint

from fastnce.cli import main
from fastnce.errors import UserError
from fastnce.networks.style_generator import save_rosinality
from fastnce.systems.stylegan2 import build_generator
from fastnce.training import Run, evaluate_run, train
from fastnce.training.log import read_metrics


@pytest.fixture
def tiny(tiny):
    return lambda **changes: tiny("stylegan2", **changes)


@pytest.fixture
def run(whole):
    return whole("stylegan2")


def test_what_is_measured(tiny, extractor):
    run = train(tiny(steps=4, measure_every=2, extractor=extractor))
    for line in read_metrics(run / "measurements.jsonl"):
        assert line.keys() == {"step", "fid", "recall", "coverage", "spread"}  # nothing of classes
    result, table = evaluate_run(run)
    names = [row["name"] for row in result["rows"]]
    assert names == ["other real images", "generated", "untrained generator"]
    assert result["count"] == 12 and "class" not in table


def test_a_run_starts_from_the_average_of_another(tiny, run, tmp_path):
    averaged = Run(run).network.state_dict()
    fine = train(tiny(out=tmp_path / "fine", init_from=run, freeze=8, lr=1e-3, steps=2))
    kept = [name for name in averaged if name.startswith(("style", "input", "conv1", "convs.0"))]
    assert averaged["latent_avg"].any()
    for which in ("ema", "raw"):
        weights = Run(fine, weights=which).network.state_dict()
        for name in ("latent_avg", *kept):
            assert torch.equal(weights[name], averaged[name]), name
        moved = (weights["to_rgb1.bias"] - averaged["to_rgb1.bias"]).abs().max()
        assert 0 < moved < 0.01
    began = checkpoint(run)["model"]["discriminator.convs.0.0.weight"]
    now = checkpoint(fine)["model"]["discriminator.convs.0.0.weight"]
    assert 0 < (now - began).abs().max() < 0.01


def test_rosinalitys_files_take_a_runs_place(tiny, run, tmp_path, capsys):
    options = ["--run", str(run), "--out", str(tmp_path), "--format", "published"]
    assert main(["export", *options]) == 0
    file, own = tmp_path / "latest.pt", Run(run).network.state_dict()
    content = torch.load(file, weights_only=True)
    assert set(content) == {"g_ema", "latent_avg"}
    loaded = Run(file).network.state_dict()
    assert all(torch.equal(x, own[name]) for name, x in loaded.items())
    for name in (run, file):
        assert (
            main(["generate", "--run", str(name), "--out", str(tmp_path / "a"), "--seed", "3"]) == 0
        )
        (tmp_path / "a").rename(tmp_path / name.stem)
    images = [tmp_path / name / "images" / "0007.png" for name in (run.stem, file.stem)]
    assert images[0].read_bytes() == images[1].read_bytes()
    train(tiny(init_from=file, steps=1, lr=1e-3))
    assert "discriminator: starts anew, the file has none" in capsys.readouterr().out
    now = checkpoint(tiny().out)["model"]["generator.conv1.conv.weight"]
    assert 0 < (now - own["conv1.conv.weight"]).abs().max() < 0.01


def test_a_checkpoint_of_rosinality_has_both_networks(tiny, tmp_path, capsys):
    from fastnce.models import StyleGAN2

    config = tiny(init_from=tmp_path / "both.pt", steps=1, lr=1e-3)
    torch.manual_seed(5)
    other = StyleGAN2(config)
    save_rosinality(tmp_path / "both.pt", other.generator, other.discriminator)
    train(config)
    model = checkpoint(config.out)["model"]
    for name, x in other.state_dict().items():
        if name.endswith("conv.weight"):
            assert (model[name] - x).abs().max() < 0.01, name
    assert "generator and discriminator: from" in capsys.readouterr().out


def test_mistakes(tiny, run, tmp_path):
    save_rosinality(tmp_path / "g.pt", build_generator(tiny()))
    message = r"g\.pt: has channels=\(6, 5, 4\)\. Give the same values"
    with pytest.raises(UserError, match=message):
        train(tiny(init_from=tmp_path / "g.pt", channels=[6, 4, 4]))
    with pytest.raises(UserError, match=r"last\.pt is no training run, and no file of a published"):
        Run(run / "checkpoints" / "last.pt")
    command = ["generate", "--run", str(run), "--out", str(tmp_path / "x"), "--class", "3"]
    assert main(command) == 2 and not (tmp_path / "x").exists()
