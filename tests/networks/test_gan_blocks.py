"""The residual blocks of BigGAN and SNGAN against plain formulas, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.networks.residual_gans import (
    DiscriminatorBlock,
    FirstDiscriminatorBlock,
    GeneratorBlock,
)


@pytest.fixture(autouse=True)
def fp64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def with_random_vectors(block):
    """The block with biases and norms that are not 0 and 1."""
    for parameter in block.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return block


def conv(layer, x):
    """The layer with its weight of the last forward, without another power iteration."""
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def norm(layer, x):
    mean, variance = x.mean((0, 2, 3), True), x.var((0, 2, 3), correction=0, keepdim=True)
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    return (x - mean) / (variance + 1e-4).sqrt() * weight + bias


@pytest.mark.parametrize("kind", ["spectral", "none"])
@pytest.mark.parametrize(("in_channels", "downsample"), [(4, False), (4, True), (6, False)])
def test_discriminator_block_skips_the_relu_of_its_input(kind, in_channels, downsample):
    block = with_random_vectors(DiscriminatorBlock(in_channels, 4, kind, downsample=downsample))
    x = torch.randn(2, in_channels, 6, 6)
    before = x.clone()
    y = block(x)
    expected = conv(block.conv2d2, F.relu(conv(block.conv2d1, F.relu(x))))
    has_conv = downsample or in_channels != 4
    expected += conv(block.conv2d0, F.relu(x)) if has_conv else F.relu(x)
    assert hasattr(block, "conv2d0") == has_conv
    torch.testing.assert_close(y, F.avg_pool2d(expected, 2) if downsample else expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("downsample", [False, True])
def test_discriminator_block_with_batch_norm_skips_its_input(downsample):
    block = with_random_vectors(DiscriminatorBlock(4, 4, "batch", downsample=downsample))
    x = torch.randn(2, 4, 6, 6)
    y = block(x)
    h = conv(block.conv2d1, F.relu(norm(block.bn1, x)))
    expected = conv(block.conv2d2, F.relu(norm(block.bn2, h)))
    expected += conv(block.conv2d0, norm(block.bn0, x)) if downsample else x
    torch.testing.assert_close(y, F.avg_pool2d(expected, 2) if downsample else expected)


@pytest.mark.parametrize("kind", ["spectral", "batch"])
def test_first_discriminator_block_skips_its_input(kind):
    block = with_random_vectors(FirstDiscriminatorBlock(3, 4, kind))
    x = torch.randn(2, 3, 6, 6)
    y = block(x)
    h, skip = conv(block.conv2d1, x), F.avg_pool2d(x, 2)
    if kind == "batch":
        h, skip = norm(block.bn1, h), norm(block.bn0, skip)
    expected = F.avg_pool2d(conv(block.conv2d2, F.relu(h)), 2) + conv(block.conv2d0, skip)
    torch.testing.assert_close(y, expected)


def test_generator_block():
    block = with_random_vectors(GeneratorBlock(6, 4, 5, spectral=True))
    x, condition = torch.randn(2, 6, 3, 4), torch.randn(2, 5)
    y = block(x, condition)
    block.eval()  # keeps the singular vectors where they are
    for layer in (block.bn1.bn, block.bn2.bn):
        layer.train()
    doubled = F.relu(block.bn1(x, condition)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = F.relu(block.bn2(conv(block.conv2d1, doubled), condition))
    skip = conv(block.conv2d0, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(y, conv(block.conv2d2, h) + skip)
