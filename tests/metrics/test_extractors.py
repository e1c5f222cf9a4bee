"""Extractors from TorchScript files."""

import pytest
import torch
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.metrics import ScriptedExtractor
from fastnce.metrics.extractors import load_extractor


class Colours(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.float().mean((2, 3))


class LikeInception(nn.Module):
    """Called as the file of 2015-12-05 is."""

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = img.float().mean((2, 3))
        if return_features:
            return features
        return (features + (0.0 if no_output_bias else 100.0)).softmax(1)


@pytest.fixture
def images() -> Tensor:
    levels = torch.tensor([[0, 128, 255], [255, 1, 2]])[:, :, None, None].expand(2, 3, 4, 4)
    return levels / 127.5 - 1


def test_the_module_sees_the_bytes_of_the_images(images, scripted):
    extractor = ScriptedExtractor(scripted(Colours(), "colours.pt"))
    assert extractor(images).tolist() == [[0, 128, 255], [255, 1, 2]]
    assert extractor(images[:, :1]).tolist() == [[0, 0, 0], [255, 255, 255]]  # greyscale
    assert extractor.class_probabilities(images) is None
    assert not extractor.reads_labels


def test_the_name_tells_the_file_and_its_content(scripted):
    one = ScriptedExtractor(scripted(Colours(), "net.pt"))
    other = ScriptedExtractor(scripted(LikeInception(), "net.pt"))
    assert one.name.startswith("net.pt-") and len(one.name) == len("net.pt-") + 12
    assert other.name.startswith("net.pt-") and other.name != one.name


def test_a_module_with_the_arguments_of_inception(images, scripted):
    extractor = ScriptedExtractor(scripted(LikeInception(), "inception.pt"))
    features = extractor(images)
    assert features.tolist() == [[0, 128, 255], [255, 1, 2]]
    assert torch.equal(extractor.class_probabilities(images), features.softmax(1))


def test_files_that_are_no_module_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        ScriptedExtractor(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("not a network")
    for name in ("state.pt", "text.pt"):
        with pytest.raises(UserError, match=rf"{name}: not a TorchScript module.*torch\.jit\.save"):
            ScriptedExtractor(tmp_path / name)


def test_the_inception_of_torch_fidelity(images, monkeypatch):
    """The package is not a dependency: here a stand-in for torchmetrics' class over it."""
    import torchmetrics.image.fid

    class Inception(nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048"])

        def forward(self, images: Tensor) -> Tensor:
            assert images.dtype == torch.uint8
            return images.float().mean((2, 3))

    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", Inception)
    extractor = load_extractor("torch-fidelity")
    assert extractor(images).tolist() == [[0, 128, 255], [255, 1, 2]]
    assert extractor(images[:, :1]).tolist() == [[0, 0, 0], [255, 255, 255]]
    assert extractor.name == "torch-fidelity-inception-v3-compat-2048"

    def missing(*_):
        raise ModuleNotFoundError("no such module", name="torch_fidelity")

    def offline(*_):
        raise OSError("no route to host")

    for failing, message in ((missing, "torch_fidelity is not installed"), (offline, "no route")):
        monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", failing)
        with pytest.raises(UserError, match=message):
            load_extractor("torch-fidelity")
