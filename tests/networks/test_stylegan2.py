"""SinCUT's networks: facts of the published ones, the layers against plain transcriptions, gradients, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from second_derivatives import check_penalty
from torch import Tensor, nn

from fastnce.networks import StyleGAN2Discriminator, StyleGAN2Generator
from fastnce.networks.stylegan2 import (
    Blur,
    ConvLayer,
    EqualConv2d,
    EqualLinear,
    FusedLeakyReLU,
    NoiseInjection,
    ResBlock,
    UpsamplingModulatedConv2d,
)
from fastnce.systems.adversarial import r1


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_generator(**arguments) -> StyleGAN2Generator:
    torch.manual_seed(0)
    return StyleGAN2Generator(**({"base_channels": 4, "num_blocks": 2} | arguments))


def small_discriminator() -> StyleGAN2Discriminator:
    torch.manual_seed(0)
    return StyleGAN2Discriminator(base_channels=2, image_size=16, max_channels=4).double()


def test_parameter_counts_are_the_published_ones():
    """3.07 and 5.89 million, for ngf 10, ndf 8 and crops of 64 pixels."""
    with torch.device("meta"):
        networks = StyleGAN2Generator(), StyleGAN2Discriminator()
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [3_068_404, 5_885_473]


def test_shapes_at_64():
    with torch.device("meta"):
        g, d = StyleGAN2Generator(), StyleGAN2Discriminator()
        x = torch.empty(2, 3, 64, 64)
        image, features = g(x, taps=[0, 2, 4])
        maps = [x]
        for layer in d.convs:
            maps.append(layer(maps[-1]))
        logits = d(x)
    assert image.shape == x.shape
    assert [tuple(f.shape[1:]) for f in features] == [(3, 64, 64), (160, 32, 32), (160, 32, 32)]
    assert [m.shape[1] for m in maps[1:]] == [32, 64, 128, 256, 384]
    assert maps[-1].shape[2:] == (4, 4)
    assert logits.shape == (2, 1)


def test_layers_have_the_published_places():
    g, d = small_generator(num_blocks=6), small_discriminator()
    kinds = [type(layer).__name__ for layer in g.encoder.convs]
    assert kinds == ["Identity", "ConvLayer", "ResBlock", "ResBlock", "ResBlock", "ResBlock"]
    kinds = [type(layer).__name__ for layer in g.decoder.convs]
    assert kinds == [*["ResBlock"] * 3, "UpsamplingStyledConv", "ConvLayer"]
    assert {key.split(".")[0] for key in g.state_dict()} == {"encoder", "decoder"}
    assert {key.split(".")[0] for key in d.state_dict()} == {"convs", "final_conv", "final_linear"}
    state = g.state_dict()
    assert state["decoder.convs.3.conv.weight"].shape == (1, 4, 8, 3, 3)
    assert state["decoder.convs.4.1.bias"].shape == (1, 3, 1, 1)
    # The residual blocks that keep channels and size have no skip convolution.
    skips = {key.split(".skip")[0] for key in state if ".skip" in key}
    assert skips == {"encoder.convs.2"}


def test_taps_of_forward_and_encode_agree_bitwise():
    g = small_generator(in_channels=1, out_channels=4).eval()
    x = normal(2, 1, 16, 12, dtype=torch.float32)
    for taps in ([0, 2, 3], [1], [0, 1, 2, 3]):
        image, features = g(x, taps=taps)
        assert torch.equal(image, g(x)) and image.shape == (2, 4, 16, 12)
        for one, other in zip(features, g.encode(x, taps), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(g.encode(x, [0])[0], x)
    g.encoder.convs[3] = nn.Module()  # would raise when called
    assert len(g.encode(x, [0, 2])) == 2
    for taps in ([], [2, 0], [2, 2], [-1], [4]):
        for function in (g, g.encode):
            with pytest.raises(ValueError, match="taps=.* ascending, distinct .* from 0 to 3"):
                function(x, taps)


def test_variance_is_kept_at_the_start():
    """Equalised learning rate, sqrt(2) gain and / sqrt(2) of the blocks are for this: deep features neither die nor explode."""
    torch.manual_seed(0)
    block = ResBlock(64, 64)
    y = block(torch.randn(4, 64, 16, 16))
    # The conv branch has a second moment of 1 but for the border (zeros), as a leaky ReLU of slope 0.2 gives 2 * 0.52.
    assert y.square().mean().item() == pytest.approx(1.0, abs=0.1)


def test_activation_by_hand():
    layer = FusedLeakyReLU(2)
    layer.bias.data = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)
    y = layer(torch.tensor([[2.0, 0.5]]).reshape(1, 2, 1, 1))
    expected = torch.tensor([3 * math.sqrt(2), 0.2 * -0.5 * math.sqrt(2)])
    torch.testing.assert_close(y.flatten(), expected)


@pytest.mark.parametrize("layer", [EqualConv2d(8, 5, 3, padding=1), EqualLinear(72, 5)])
def test_equalised_learning_rate(layer):
    """Weights are N(0, 1) and divided by sqrt(fan_in) = sqrt(72) when used; so are their gradients."""
    layer.double()
    layer.weight.data = normal(*layer.weight.shape)
    x = normal(2, 8, 4, 4) if isinstance(layer, EqualConv2d) else normal(2, 72)
    layer(x).square().sum().backward()
    plain = (layer.weight.detach() / math.sqrt(72)).requires_grad_()
    y = F.conv2d(x, plain, padding=1) if isinstance(layer, EqualConv2d) else F.linear(x, plain)
    y.square().sum().backward()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.weight.grad, plain.grad / math.sqrt(72))


def test_weights_start_from_a_standard_normal():
    torch.manual_seed(0)
    for weight in (EqualConv2d(64, 64, 3).weight, EqualLinear(256, 128).weight):
        assert weight.mean().item() == pytest.approx(0, abs=0.02)
        assert weight.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_blur_by_hand(gain):
    x = torch.zeros(1, 2, 7, 7)
    x[0, 1, 3, 3] = 64.0
    y = Blur(padding=0, gain=gain)(x)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    assert torch.equal(y[0, 1], gain * torch.outer(row, row))
    assert y[0, 0].abs().max() == 0


def test_halving_is_blur_then_every_other_pixel():
    """The skip computes only the blurred pixels that its 1x1 convolution reads."""
    layer = ConvLayer(3, 5, 1, downsample=True, activate=False).double()
    x = normal(2, 3, 8, 6)
    blurred = Blur(padding=1).double()(x)
    expected = F.conv2d(blurred, layer[1].weight / math.sqrt(3), stride=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kernel_size", [1, 3, None])
def test_halving_and_doubling_are_centred(kernel_size):
    """The image mirrored and scaled is the scaled image mirrored: nothing shifts by half a pixel."""
    if kernel_size is None:
        layer = UpsamplingModulatedConv2d(1, 1).double()
        layer.weight.data.fill_(1.0)
    else:
        layer = ConvLayer(1, 1, kernel_size, downsample=True).double()
        layer[1].weight.data.fill_(1.0)
    x = normal(1, 1, 8, 8)
    y = layer(x)
    assert y.shape[2:] == ((4, 4) if kernel_size else (16, 16))
    for axis in (2, 3):
        torch.testing.assert_close(layer(x.flip(axis)), y.flip(axis))


def test_modulated_convolution_against_a_loop_over_channels():
    layer, x = UpsamplingModulatedConv2d(4, 2).double(), normal(3, 4, 6, 5)
    weight = layer.weight.detach()[0] / math.sqrt(4 * 9)
    for kernel in weight:
        kernel /= torch.sqrt((kernel**2).sum() + 1e-8)
    expected = layer.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
    torch.testing.assert_close(layer(x), expected)


def test_noise():
    layer = NoiseInjection()
    x = torch.zeros(2, 3, 8, 8)
    assert torch.equal(layer(x), x)  # its weight starts at 0
    layer.weight.data.fill_(0.5)
    torch.manual_seed(0)
    one, other = layer(x), layer(x)
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])
    assert torch.equal(one[:, 0], one[:, 1])  # one value for all channels
    layer.eval()
    state = torch.get_rng_state()
    fixed = layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(layer(x[:1])[0], fixed[0])
    assert fixed.std().item() == pytest.approx(0.5, abs=0.1)
    g = small_generator()
    g.decoder.convs[1].noise.weight.data.fill_(1.0)
    x = normal(2, 3, 8, 8, dtype=torch.float32)
    assert not torch.equal(g(x), g(x))
    g.eval()
    assert torch.equal(g(x), g(x))


def test_double_backward_of_r1():
    x = normal(2, 3, 16, 16).requires_grad_()
    check_penalty(small_discriminator(), lambda judge: r1(judge(x), x))


def test_logits_depend_on_their_own_image_only():
    d = small_discriminator()
    x = normal(3, 3, 16, 16)
    torch.testing.assert_close(d(x)[1:2], d(x[1:2]))


def test_errors():
    with pytest.raises(ValueError, match="num_blocks=3 is shared .* Use an even number"):
        StyleGAN2Generator(num_blocks=3)
    with pytest.raises(ValueError, match="x has 8x7 pixels.*Use even sides"):
        small_generator()(torch.zeros(1, 3, 8, 7))
    for size in (4, 48):
        with pytest.raises(ValueError, match=f"image_size={size} must be a power of two from 8 on"):
            StyleGAN2Discriminator(image_size=size)
    with pytest.raises(ValueError, match="x has 32x16 pixels, but image_size=16"):
        small_discriminator()(torch.zeros(1, 3, 32, 16))
