"""Golden values, sizes and keys of the networks around ReStyle's generator; the golden numbers are of the published code in fp32."""

import math

import pytest
import torch
from golden import hashed, sines
from torch import Tensor, nn

from fastnce.networks.restyle_encoder import (
    MapToStyle,
    build_encoder,
)


def golden(*values: float):
    return pytest.approx(list(values), rel=1e-4, abs=5e-6)


def moments(x: Tensor) -> list[float]:
    """Mean and population standard deviation of all elements."""
    return [x.mean().item(), x.std(correction=0).item()]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pictures(channels: int = 6) -> Tensor:
    return sines(2, 6, 64, 64, step=0.0137, start=0.3)[:, :channels]


def fill_styles(module: nn.Module) -> nn.Module:
    """Sets the j-th parameter to `hashed(k=j)`, shifted and scaled by the kind of its layer."""
    kinds = {name: type(layer).__name__ for name, layer in module.named_modules()}
    with torch.no_grad():
        for j, (name, x) in enumerate(module.named_parameters()):
            owner, _, part = name.rpartition(".")
            mean, scale = _spread(kinds[owner], owner.rpartition(".")[2], part, x)
            x.copy_(mean + scale * hashed(*x.shape, k=j))
    return module


def _spread(kind: str, owner: str, part: str, x: Tensor) -> tuple[float, float]:
    """Mean and half width."""
    if part == "bias":
        return float(owner == "modulation"), 0.1
    if kind.startswith("BatchNorm"):
        return 1.0, 0.1
    if kind == "PReLU":
        return 0.25, 0.05
    if owner == "noise":
        return 0.1, 0.05
    if kind.startswith(("Equal", "Modulated", "UpsamplingModulated", "ConstantInput")):
        return 0.0, math.sqrt(3)
    return 0.0, math.sqrt(3 * len(x) / x.numel())


def test_map_to_style():
    block = fill_styles(MapToStyle(8, 8, 16))
    found = block(sines(2, 8, 16, 16, step=0.0137, start=0.3))
    assert found[1, :4].tolist() == golden(0.194158, 0.011224, 0.174104, -0.173725)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "training", "evaluating", "last_map"),
    [
        (
            "ir-se50",
            (-0.000424, 0.074098, 0.046597, 0.004670, -0.076143, -0.106903),
            (-0.000899, 0.073871, 0.069214, 0.009035, -0.060425, -0.109434),
            (-0.019821, 1.336138),
        ),
        (
            "resnet34",
            (-0.000531, 0.076015, 0.067303, -0.065846, -0.002405, 0.070072),
            (-0.000053, 0.073379, 0.058270, -0.076520, 0.019845, 0.077288),
            None,
        ),
    ],
)
def test_encoders(kind, training, evaluating, last_map):
    encoder = fill_styles(build_encoder(kind, 3, 6))
    for mode, expected in ((True, training), (False, evaluating)):
        w = encoder.train(mode)(pictures())
        assert [*moments(w), *w[1, 2, :4].tolist()] == golden(*expected)
    if last_map:
        assert moments(encoder.maps(pictures())[-1]) == golden(*last_map)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "stages"),
    [
        (
            "ir-se50",
            {
                0: (-0.002055, 0.073218, 0.067695, 0.027878, 0.040063),
                1: (-0.001982, 0.081842),
                2: (-0.002215, 0.090633),
                3: (-0.002028, 0.097978, 0.176155, 0.042315, -0.071961),
                4: (-0.002028, 0.097978, 0.176155, 0.042315, -0.071961),
            },
        ),
        (
            "resnet34",
            {
                0: (-0.000576, 0.073071),
                1: (-0.000296, 0.082606),
                2: (-0.000472, 0.092213),
                3: (-0.001366, 0.098801, -0.152133, 0.068792, 0.023931),
            },
        ),
    ],
)
def test_stages_of_e4e(kind, stages):
    encoder = fill_styles(build_encoder(kind, 4, 6, "e4e"))
    assert encoder.stage == 4
    encoder(pictures())
    encoder.eval()
    for encoder.stage, expected in stages.items():
        w = encoder(pictures())
        assert [*moments(w), *w[1, 3, :3].tolist()][: len(expected)] == golden(*expected)
        later = w[:, encoder.stage + 1 :]
        assert torch.equal(later, w[:, :1].expand_as(later))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "tensors", "values", "of_all", "rows"),
    [
        (
            *("fpn-ir-se50", 325, 122_921_664, (-0.000453, 0.074633)),
            [(0.075249, 0.032704), (-0.078521, -0.045767), (0.042669, -0.159510)],
        ),
        (
            *("fpn-resnet34", 205, 113_256_320, (-0.000782, 0.074758)),
            [(-0.007510, -0.009309), (0.165006, 0.090261), (0.066023, -0.049044)],
        ),
    ],
)
def test_feature_pyramids(kind, tensors, values, of_all, rows):
    encoder = fill_styles(build_encoder(kind, 8, 3))
    assert (len(list(encoder.parameters())), count(encoder)) == (tensors, values)
    w = encoder(pictures(3))
    assert moments(w) == golden(*of_all)
    for index, row in zip((0, 4, 7), rows, strict=True):
        assert w[1, index, :2].tolist() == golden(*row)
