"""The commands for weights from and for elsewhere, 16-bit images end to end, and directions."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastnce.cli import main
from fastnce.data import load_image
from fastnce.errors import UserError
from fastnce.training import CUTTrainConfig, load_generator, train, translate, translate_folder


@pytest.fixture
def run(tiny):
    return train(tiny(steps=2))


def test_mistakes_in_naming_a_generator(run, data, tmp_path, capsys):
    common = ["translate", "--input", str(data / "testA"), "--out", str(tmp_path / "out")]
    assert main(common) == 2
    assert "name a generator: --run FOLDER" in capsys.readouterr().err
    assert main([*common, "--run", str(run), "--weights", "a.pth"]) == 2
    assert "two generators" in capsys.readouterr().err
    assert main([*common, "--weights", "a.pth"]) == 2
    assert "a.pth: no such file" in capsys.readouterr().err
    assert main([*common, "--run", str(run), "--direction", "BtoA"]) == 2
    assert "translates AtoB alone" in capsys.readouterr().err


class TwoWay(torch.nn.Module):
    """Brighter from A to B, darker from B to A."""

    class Shift(torch.nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = torch.nn.Parameter(torch.tensor(by))

        def forward(self, x):
            return x + self.by

    def __init__(self) -> None:
        super().__init__()
        self.a_to_b, self.b_to_a = self.Shift(0.5), self.Shift(-0.5)

    def forward(self, x):
        return self.a_to_b(x)


@pytest.mark.parametrize("trained", ["AtoB", "BtoA"])
def test_directions_are_those_of_the_folders(tmp_path, trained):
    config = CUTTrainConfig(data=tmp_path, out=tmp_path, crop_size=8, direction=trained)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(tmp_path / "in" / "a.png")
    for direction in (None, "AtoB", "BtoA"):
        translate_folder(TwoWay(), config, tmp_path / "in", tmp_path / "out", direction=direction)
        brighter = load_image(tmp_path / "out" / "a.png").mean() > 0.25
        # `a_to_b` is what the training called A to B, which with BtoA begins at the folder B.
        assert brighter == (direction in (None, trained))


def test_sixteen_bits_end_to_end(tiny, tmp_path):
    """Read with all bits, trained on, and written with all bits."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    for name in ("trainA", "trainB", "testA", "testB"):
        (data / name).mkdir(parents=True)
        for index in range(2):
            levels = rng.integers(0, 65536, (16, 16)).astype(np.uint16)
            Image.fromarray(levels).save(data / name / f"{index}.png")
    gray = {"in_channels": 1, "out_channels": 1, "bits": 16, "load_size": 16}
    run = train(tiny(data=data, steps=2, **gray))
    generator, config = load_generator(run)
    assert config.bits == 16
    assert translate_folder(generator, config, data / "testA", tmp_path / "out") == 2
    image = load_image(data / "testA" / "0.png", channels=1, bits=16)
    expected = translate(generator, image[None])[0, 0].double()
    with Image.open(tmp_path / "out" / "0.png") as result:
        assert result.mode == "I;16"
        values = np.asarray(result).astype(np.float64) / 65535 * 2 - 1
    assert np.abs(values - expected.numpy()).max() <= 1.01 / 65535
    # The low byte makes a difference to the network.
    high = Image.fromarray(np.asarray(Image.open(data / "testA" / "0.png")) & np.uint16(0xFF00))
    high.save(tmp_path / "high.png")
    coarse = load_image(tmp_path / "high.png", channels=1, bits=16)
    assert not torch.equal(translate(generator, coarse[None])[0, 0].double(), expected)
    with pytest.raises(UserError, match="bits=16 is for greyscale, got channels=3"):
        train(tiny(data=data, out=tmp_path / "rgb", bits=16))


def test_a_broken_file_stops_a_training_or_is_skipped(tiny, data, tmp_path, caplog):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "trainA" / "2.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"2\.png: cannot be read"):
        train(tiny(data=root, steps=2))
    run = train(tiny(data=root, steps=2, broken_files="skip"))
    assert (run / "checkpoints" / "last.pt").is_file()
    assert sum("2.png" in record.getMessage() for record in caplog.records) == 1
