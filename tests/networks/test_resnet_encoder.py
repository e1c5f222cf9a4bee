"""ResNet encoders: sizes, the field's parameter names, and one block against its equation."""

import pytest
import torch
import torch.nn.functional as F

from fastnce.networks import RESNETS, ProjectionHead, ResNetEncoder
from fastnce.networks.resnet_encoder import Bottleneck


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "published", "fc_inputs"),
    [("resnet18", 11_689_512, 512), ("resnet50", 25_557_032, 2048)],
)
def test_as_many_parameters_as_published(name, published, fc_inputs):
    """The published counts are with a linear layer to 1000 classes."""
    with torch.device("meta"):
        encoder = ResNetEncoder(*RESNETS[name])
    assert encoder.feature_dim == fc_inputs
    assert parameters(encoder) == published - 1000 * (fc_inputs + 1)


def test_the_fields_names():
    with torch.device("meta"):
        names = set(ResNetEncoder(*RESNETS["resnet50"]).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.bias",
        "layer1.2.conv3.weight",
        "layer3.5.bn3.num_batches_tracked",
        "layer4.2.bn2.weight",
    } <= names
    assert not any(name.startswith(("fc", "layer5", "layer1.1.downsample")) for name in names)
    # One convolution and norm for the stem, 3 for each of 16 blocks, one for each of 4 shortcuts; 1 + 5 entries each.
    assert len(names) == 6 * (1 + 3 * 16 + 4)


@pytest.mark.parametrize(("stem", "last"), [("cifar", 8), ("imagenet", 2)])
def test_stems(stem, last):
    encoder = ResNetEncoder((1, 1, 1), base_channels=4, image_channels=1, stem=stem)
    maps = []
    encoder.layer3.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features = encoder(torch.randn(2, 1, 32, 32))
    assert features.shape == (2, 16) == (2, encoder.feature_dim)
    assert maps[0].shape == (2, 16, last, last)
    torch.testing.assert_close(features, maps[0].mean((2, 3)))


def test_a_bottleneck_is_its_equation():
    torch.manual_seed(0)
    block = Bottleneck(8, 4, 2).eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    w, x = block.state_dict(), torch.randn(2, 8, 6, 6)

    def norm(y, name):
        parts = (w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, scale, shift = (part[:, None, None] for part in parts)
        return (y - mean) / (variance + 1e-5).sqrt() * scale + shift

    y = norm(F.conv2d(x, w["conv1.weight"]), "bn1").relu()
    y = norm(F.conv2d(y, w["conv2.weight"], stride=2, padding=1), "bn2").relu()
    y = norm(F.conv2d(y, w["conv3.weight"]), "bn3")
    shortcut = norm(F.conv2d(x, w["downsample.0.weight"], stride=2), "downsample.1")
    torch.testing.assert_close(block(x), (y + shortcut).relu())


def test_head():
    head = ProjectionHead(6, 5, 3)
    assert list(head.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(4, 6)
    expected = (x @ head[0].weight.T + head[0].bias).relu() @ head[2].weight.T + head[2].bias
    torch.testing.assert_close(head(x), expected)


def test_errors():
    with pytest.raises(ValueError, match='stem="big": use "cifar" or "imagenet"'):
        ResNetEncoder((1,), stem="big")
    with pytest.raises(ValueError, match="base_channels=0"):
        ResNetEncoder((1,), base_channels=0)
