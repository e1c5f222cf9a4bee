"""Graphs of trained networks: run by others, at sizes that the export did not see, they give the network's results."""

import json

import numpy as np
import pytest
import torch

from fastnce.cli import main
from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator
from fastnce.systems import SYSTEMS
from fastnce.training import build_config, load_generator
from fastnce.training.export import export_graph
from fastnce.training.shared import write_shared

_TRANSLATION = {"base_channels": 16, "num_blocks": 2}
_GENERATION = {"backbone": "sngan", "image_size": 16, "latent_dim": 8}
_GENERATION |= {"gen_channels": 4, "disc_channels": 4}
_RUNS = {
    "cut": ("cut", _TRANSLATION),
    "sincut": ("sincut", {"base_channels": 4, "num_blocks": 2, "nce_layers": (0, 2)}),
    "cyclegan": ("cyclegan", _TRANSLATION | {"in_channels": 1, "lambda_identity": 0.0}),
    "pix2pix": ("pix2pix", {"base_channels": 4, "num_downs": 4}),
    "cfl": ("cfl", {"base_channels": 2, "hidden_channels": 4, "label_classes": 4}),
    "contragan": ("contragan", _GENERATION),
    "stylegan2": ("stylegan2", {"image_size": 16, "latent_dim": 8, "channels": (6, 5, 4)}),
    "simclr": ("simclr", {"encoder": "small", "encoder_channels": 4, "image_size": 16}),
}
_IMAGES = {"image": (1, 3, 36, 48)}
_INPUTS = {
    "pix2pix": {"image": (1, 3, 32, 48)},
    "cfl": {"semantics": (1, 4, 64, 96)},
    "contragan": {"z": (5, 8), "label": (5,)},
    "stylegan2": {"z": (5, 8)},
    "simclr": {"image": (5, 3, 16, 16)},
    "cyclegan": {"image": (1, 3, 36, 48)},  # from B, of three channels
}


def made(name, folder):
    """A network of a system with random weights, as `fastnce export` shares it."""
    torch.manual_seed(0)
    variant, values = _RUNS[name]
    config = build_config(variant, overrides={"data": "data", "out": "out"} | values)
    path = folder / f"{name}.safetensors"
    network = SYSTEMS[config.system].network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    write_shared(network, config, path)
    return path


def inputs_of(name):
    random = torch.Generator().manual_seed(1)
    shapes = _INPUTS.get(name, _IMAGES)
    return {
        key: torch.randint(10, shape, generator=random)
        if key == "label"
        else torch.rand(shape, generator=random)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("name", ["cut", "sincut", "contragan", "stylegan2"])
def test_onnx(name, tmp_path, capsys):
    import onnxruntime

    run = made(name, tmp_path)
    assert main(["export", "--run", str(run), "--out", str(tmp_path), "--format", "onnx"]) == 0
    assert "checked by running it in onnxruntime" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = inputs_of(name)
    (found,) = session.run(None, {key: x.numpy() for key, x in inputs.items()})
    assert np.abs(found - expected(run, inputs)).max() < 2e-5
    assert json.loads(session.get_modelmeta().custom_metadata_map["fastnce.config"])["system"]


def expected(run, inputs, direction=None):
    network, _ = load_generator(run)
    network = getattr(network, direction) if direction else network
    if hasattr(network, "mapping"):  # whose noise is fixed, and exported
        return network(network.mapping(inputs["z"])).detach().numpy()
    for layer in network.modules():
        if type(layer).__name__ == "NoiseInjection":
            torch.nn.init.zeros_(layer.weight)
    return network(*inputs.values()).detach().numpy()


@pytest.mark.parametrize("name", list(_RUNS))
def test_torchscript(name, tmp_path):
    run = made(name, tmp_path)
    direction = "BtoA" if name == "cyclegan" else None
    path, _ = export_graph(run, tmp_path, "torchscript", direction=direction)
    inputs = inputs_of(name)
    texts = {"fastnce.config": ""}
    found = torch.jit.load(path, _extra_files=texts)(*inputs.values()).numpy()
    assert np.abs(found - expected(run, inputs, direction and "b_to_a")).max() < 2e-5
    assert json.loads(texts["fastnce.config"])["system"]


def test_an_untrained_generator_can_be_traced():
    """As users do it: with parameters that require gradients, and one image."""
    torch.manual_seed(0)
    generator = ResnetGenerator(base_channels=16, num_blocks=1)
    traced = torch.jit.trace(generator, torch.zeros(1, 3, 16, 16), check_trace=False)
    images = torch.rand(1, 3, 24, 32)
    torch.testing.assert_close(traced(images), generator(images), rtol=0, atol=1e-6)


def test_a_direction_that_is_not_there(tmp_path):
    for name in ("cut", "contragan"):
        with pytest.raises(UserError, match="direction=BtoA"):
            export_graph(made(name, tmp_path), tmp_path, "onnx", direction="BtoA")
