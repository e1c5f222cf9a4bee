"""A system of one's own, whole: CONTRIBUTING.md explains it. It learns to guess the colours of an image from its grey."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from same_run import assert_same_run
from torch import nn

from fastnce import systems
from fastnce.cli import main
from fastnce.data import list_images, load_image
from fastnce.errors import UserError
from fastnce.systems import System, TrainConfig, options
from fastnce.training import Run, build_config, train
from fastnce.training.log import read_metrics


@dataclass(frozen=True, kw_only=True)
class ColourConfig(TrainConfig):
    """Training of the colouriser."""

    system: ClassVar[str] = "colours"

    width: int = 8
    """Channels of the hidden layer."""
    lr: float = 1e-2
    """Adam: learning rate."""
    lambda_l1: float = 1.0
    """Weight of the distance to the true colours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        options.at_least(self, 1, "width")
        options.above_zero(self, "lr")


class Colours(nn.Module):
    """One network G; the loss is `lambda_l1 mean |G(grey) - image|`."""

    def __init__(self, config: ColourConfig) -> None:
        super().__init__()
        self.config, self.generator = config, build_generator(config)
        self.optimizers = {"G": torch.optim.Adam(self.generator.parameters(), config.lr)}

    def training_step(self, batch: dict) -> dict:
        noise = 0.01 * torch.randn_like(batch["grey"])
        guess = self.generator(batch["grey"] + noise)
        loss = self.config.lambda_l1 * F.l1_loss(guess, batch["image"])
        self.optimizers["G"].zero_grad()
        loss.backward()
        self.optimizers["G"].step()
        return {"L1": loss.detach()}


def build_generator(config: ColourConfig) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, config.width, 1), nn.ReLU(), nn.Conv2d(config.width, 3, 1))


class Images(torch.utils.data.Dataset):
    """Sample i is a function of i alone, so that a stopped run continues bit for bit."""

    def __init__(self, folder) -> None:
        self.paths = list_images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        image = load_image(self.paths[index % len(self)])
        return {"image": image, "grey": image.mean(0, keepdim=True)}


class ColourSystem(System):
    config_class = ColourConfig
    variants = {"colours": {}, "colours-wide": {"width": 32}}
    presets = {"quick": {"steps": 2, "log_every": 1}}
    network_name = "generator"
    panels = (("L1",),)
    best = "l1"
    next_command = "fastnce visualize gallery --run {run}"

    def dataset(self, config):
        return Images(config.data / "trainA")

    def model(self, config, dataset):
        return Colours(config)

    def network(self, config):
        return build_generator(config)

    def preview(self, config, dataset):
        shown = [dataset[index] for index in range(config.sample_count)]

        def rows(generator):
            with torch.no_grad():
                guesses = [generator(sample["grey"]) for sample in shown]
            return {"image": [sample["image"] for sample in shown], "guess": guesses}

        return rows

    def measure(self, config, dataset):
        def values(model, average):
            grey = torch.rand(1, 1, 4, 4)  # may draw, and change modes
            model.eval()
            return {"l1": model.generator(grey).sub(grey).abs().mean().item()}

        return values

    def evaluate(self, config, networks, data, device):
        model = Colours(config)
        model.generator = networks["run"]
        batch = torch.stack([Images(data / "testA")[i]["image"] for i in range(2)])
        error = F.l1_loss(model.generator(batch.mean(1, keepdim=True)), batch).item()
        return {"l1": error}, f"L1 {error:.3f}\n"


@pytest.fixture
def registered():
    yield systems.register(ColourSystem())
    del systems.SYSTEMS["colours"]


@pytest.mark.usefixtures("registered")
def test_a_new_system_has_all_that_the_others_have(data, tmp_path, capsys):
    options = {"data": data, "device": "cpu", "workers": 0, "batch_size": 2, "log_every": 1}
    options |= {"sample_count": 2, "sample_every": 2, "checkpoint_every": 2}

    def config(name, steps, **others):
        changes = options | others | {"out": tmp_path / name, "steps": steps}
        return build_config("colours", overrides=changes)

    whole = train(config("whole", 4))
    train(config("parts", 2))
    parts = train(config("parts", 4))  # goes on
    assert_same_run(whole, parts)
    measured = train(config("measured", 4, measure_every=1))
    assert len(read_metrics(measured / "measurements.jsonl")) == 4
    losses, same = (
        [line["L1"] for line in read_metrics(run / "metrics.jsonl")] for run in (whole, measured)
    )
    assert losses == same  # whatever is measured
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (whole / "samples" / "step_000004.png").exists()

    assert sum(p.numel() for p in Run(whole).network.parameters()) == 8 + 8 + 8 * 3 + 3
    assert main(["evaluate", "--run", str(whole), "--data", str(data)]) == 0
    assert main(["visualize", "gallery", "--run", str(whole)]) == 0
    assert "L1 0." in capsys.readouterr().out
    preset = ["--preset", "quick", "--data", str(data), "--out", str(tmp_path / "quick")]
    assert main(["train", "colours-wide", *preset, "--device", "cpu", "--sample-count", "2"]) == 0
    assert Run(tmp_path / "quick").config.width == 32
    assert main(["train", "colurs", *preset]) == 2
    assert "Did you mean 'colours'?" in capsys.readouterr().err
    assert main(["translate", "--run", str(whole), "--input", str(data), "--out", "x"]) == 2
    assert "a run of colours does not translate images" in capsys.readouterr().err


@pytest.mark.usefixtures("registered")
def test_names_are_taken_once():
    with pytest.raises(ValueError, match="colours"):
        systems.register(ColourSystem())
    with pytest.raises(UserError, match="width=0"):
        build_config("colours", overrides={"data": "d", "out": "o", "width": 0})
    with pytest.raises(UserError, match="system=other is unknown.*colours"):
        systems.system_named("other")
