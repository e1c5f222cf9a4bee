"""ResNet encoders: sizes, the field's parameter names, one block against its equation, and the guard of its shortcut."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastnce.networks import RESNETS, ProjectionHead, ResNetEncoder
from fastnce.networks.layers import StridedConv1x1
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


@pytest.mark.parametrize("size", [(12, 2, 8, 8), (3, 6, 5, 7), (4, 2, 1, 1)])
def test_few_channels_are_contiguous_on_the_cpu(size, monkeypatch):
    """Whatever the format of maps and weight, where oneDNN would write beyond its memory."""
    torch.manual_seed(0)
    last = {"memory_format": torch.channels_last}
    layer = StridedConv1x1(size[1], 4, 2).to(**last)
    x = torch.randn(size).contiguous(**last).requires_grad_()
    convolve, seen = F.conv2d, []
    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", lambda *args, **how: seen.extend(args) or convolve(*args, **how))
        y = layer(x)
    assert len(seen) == 2
    for tensor in seen:
        assert tensor.stride() == torch.empty(tensor.shape).stride()
    grad = torch.randn_like(y).contiguous(**last)
    y.backward(grad)
    exact = [t.detach().double().contiguous().requires_grad_() for t in (x, layer.weight)]
    expected = F.conv2d(*exact, stride=2)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.float())
    torch.testing.assert_close(x.grad, exact[0].grad.float())
    torch.testing.assert_close(layer.weight.grad, exact[1].grad.float())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small"])
def test_every_strided_1x1_convolution_is_guarded(name):
    with torch.device("meta"):
        layers = list(ResNetEncoder(*RESNETS[name]).modules())
    strided = [
        x
        for x in layers
        if isinstance(x, torch.nn.Conv2d) and x.kernel_size == (1, 1) and x.stride != (1, 1)
    ]
    assert strided and all(isinstance(x, StridedConv1x1) for x in strided)


TRAIN_A_SMALL_ENCODER = """
import torch
from fastnce.networks import ResNetEncoder
torch.set_num_threads(1)
last = {"memory_format": torch.channels_last}
encoder = ResNetEncoder((1, 1, 1), base_channels=2, stem="cifar").to(**last)
for _ in range(60):
    images = torch.randn(12, 3, 8, 8).contiguous(**last)
    encoder(images).square().sum().backward()
print("done")
"""


def test_small_encoders_train_without_avx512():
    """oneDNN takes its AVX2 code on any processor that has it. Unguarded, the process aborts within these steps."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", TRAIN_A_SMALL_ENCODER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


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
