"""StyleGAN2: golden values, counts and keys of the published networks, the layers against plain transcriptions, files, errors.

The golden numbers are those of the ReStyle sheet, of the published code in fp32 on a CPU (allow 1e-4 relative). Ours runs in fp64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import fill_styles, sines
from torch import Tensor

from fastnce.networks import StyleDiscriminator, StyleGenerator
from fastnce.networks.style_generator import ModulatedConv2d, Upsample
from fastnce.networks.stylegan2 import Blur
from fastnce.systems.adversarial import r1


def golden(*values: float):
    return pytest.approx(list(values), rel=1e-5, abs=2e-6)


def moments(x: Tensor) -> list[float]:
    return [x.mean().item(), x.std(correction=0).item()]


def wave(*shape: int, step: float, start: float) -> Tensor:
    return sines(*shape, step=step, start=start).double()


def test_resampling():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert Upsample()(x).flatten().tolist() == [
        *(0, 0.1875, 0.5625, 0.5625, 0.375, 0.75, 1.25, 1.125),
        *(1.125, 1.75, 2.25, 1.875, 1.125, 1.6875, 2.0625, 1.6875),
    ]
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Blur(padding=1, stride=2)(x).flatten().tolist() == [2.734375, 3.9375, 7.546875, 8.75]


@pytest.mark.parametrize(
    ("kernel", "options", "expected"),
    [
        (3, {}, (-0.023425, 0.655301, -0.139343, -0.662411, -0.659675)),
        (3, {"upsample": True}, (-0.034354, 0.509285, -0.272722, 0.191331, 0.226982)),
        (1, {"demodulate": False}, (0.032165, 1.014566, -0.909135, -1.239594, 1.879988)),
    ],
)
def test_modulated_convolution(kernel, options, expected):
    """Golden, and against a convolution with weights of its own for each image."""
    layer = fill_styles(ModulatedConv2d(3, 5, kernel, 4, **options)).double()
    x, w = wave(2, 3, 4, 4, step=0.37, start=0.1), wave(2, 4, step=0.9, start=0.3)
    y = layer(x, w)
    assert [*moments(y), *y[1, :3, 1, 2].tolist()] == golden(*expected)
    for image, style, made in zip(x, layer.modulation(w), y, strict=True):
        weight = layer.weight[0] / math.sqrt(3 * kernel**2) * style[:, None, None]
        if layer.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        if layer.blur is None:
            plain = F.conv2d(image[None], weight, padding=kernel // 2)
        else:
            plain = layer.blur(F.conv_transpose2d(image[None], weight.transpose(0, 1), stride=2))
        torch.testing.assert_close(made, plain[0])


@pytest.fixture(scope="module")
def filled() -> StyleGenerator:
    """16 x 16 at the published widths, with the sheet's numbers, in fp64."""
    g = fill_styles(StyleGenerator(16))
    for j in range(5):
        noise = g.noises.get_buffer(f"noise_{j}")
        noise.copy_(sines(*noise.shape, step=0.7, start=0.1 * j))
    return g.double()


def test_generator(filled):
    parameters = list(filled.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (54, 16_014_350)
    with torch.no_grad():
        w = filled.mapping(wave(2, 512, step=0.37, start=0.2))
        assert moments(w) == golden(0.511708, 1.104194)
        assert w[0, :4].tolist() == golden(0.671100, 0.058660, -0.259736, -0.079418)
        image = filled(w)
        assert moments(image) == golden(0.224703, 1.204640)
        assert image[0, :, 3, 5].tolist() == golden(-1.100184, 1.645170, 0.470974)
        filled.latent_avg.copy_(w.mean(0))
        assert moments(filled(filled.truncate(w, 0.5))) == golden(0.276444, 1.082094)
        assert moments(filled(filled.mix(w[:1], w[1:], at=3))) == golden(0.451510, 1.127432)
    wide = (w[:, None] + 0.3 * wave(2, 6, 512, step=0.11, start=0.4)).requires_grad_()
    image = filled(wide)
    assert moments(image) == golden(0.257312, 1.351704)
    assert image[0, :, 3, 5].tolist() == golden(-0.900873, 0.853491, 0.470833)
    noise = wave(*image.shape, step=0.23, start=0.7) / 16
    (slopes,) = torch.autograd.grad((image * noise).sum(), wide)
    lengths = slopes.square().sum(2).mean(1).sqrt()
    # At the kink of the leaky ReLU a slope in fp32 falls on either side, so only the sheet's own 1e-4 can be asked for.
    assert lengths.tolist() == pytest.approx([0.259239, 0.261916], rel=1e-4)


def test_discriminator():
    d = fill_styles(StyleDiscriminator(16)).double()
    parameters = list(d.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (18, 16_525_313)
    x = wave(8, 3, 16, 16, step=0.0137, start=0.3).requires_grad_()
    logits = d(x)
    assert logits.flatten().tolist() == golden(
        *(0.489534, 0.053232, 0.844380, 0.525301, 0.048500, 0.754573, 0.552213, 0.072144)
    )
    assert d(x[:4]).flatten().tolist() == golden(0.489542, 0.053231, 0.844396, 0.525300)
    assert r1(logits, x).item() == pytest.approx(0.01122652, rel=1e-5)
    loss = (F.softplus(-logits) + F.softplus(logits)).mean()
    assert loss.item() == pytest.approx(1.451006, abs=2e-6)


@pytest.mark.parametrize(
    ("size", "values", "entries"),
    [
        (1024, 30_370_060, 171),
        (512, 30_276_583, 153),
        (256, 30_034_338, 135),
        (64, 27_032_600, 99),
        (32, 21_523_475, 81),
    ],
)
def test_published_counts(size, values, entries):
    with torch.device("meta"):
        g = StyleGenerator(size)
        counts = [sum(p.numel() for p in StyleDiscriminator(s).parameters()) for s in (256, 32)]
    assert sum(p.numel() for p in g.parameters()) == values
    assert len(g.published_state()) == entries
    assert g.num_styles == 2 * int(math.log2(size)) - 2
    assert counts == [28_864_129, 21_507_073]
