"""StyleGAN2: golden values, counts and keys of the published networks, the layers against plain transcriptions, files, errors.

The golden numbers are those of the ReStyle sheet, of the published code in fp32 on a CPU (allow 1e-4 relative). Ours runs in fp64.
"""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from golden import fill_styles, sines
from second_derivatives import check_penalty
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import StyleDiscriminator, StyleGenerator
from fastnce.networks.style_generator import (
    ModulatedConv2d,
    Upsample,
    load_rosinality,
    minibatch_stddev,
    save_rosinality,
)
from fastnce.networks.stylegan2 import Blur
from fastnce.systems.adversarial import r1
from fastnce.systems.stylegan2 import path_lengths


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
    lengths = path_lengths(image, wide, noise)
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


def small(**options) -> StyleGenerator:
    torch.manual_seed(0)
    return StyleGenerator(
        16, **({"latent_dim": 5, "mapping_layers": 2, "channels": [4, 6, 3]} | options)
    )


def test_keys_are_the_published_ones():
    g = small()
    shapes = {name: tuple(x.shape) for name, x in g.published_state().items()}
    styled = lambda at, out, into: {  # noqa: E731
        f"{at}.conv.weight": (1, out, into, 3, 3),
        f"{at}.conv.modulation.weight": (into, 5),
        f"{at}.conv.modulation.bias": (into,),
        f"{at}.noise.weight": (1,),
        f"{at}.activate.bias": (out,),
    }
    rgb = lambda at, into: {  # noqa: E731
        f"{at}.bias": (1, 3, 1, 1),
        f"{at}.conv.weight": (1, 3, into, 1, 1),
        f"{at}.conv.modulation.weight": (into, 5),
        f"{at}.conv.modulation.bias": (into,),
    }
    kernels = ["convs.0.conv.blur", "convs.2.conv.blur", "to_rgbs.0.upsample", "to_rgbs.1.upsample"]
    sides = (4, 8, 8, 16, 16)
    assert shapes == {
        **{f"style.{i}.weight": (5, 5) for i in (1, 2)},
        **{f"style.{i}.bias": (5,) for i in (1, 2)},
        "input.input": (1, 4, 4, 4),
        **(styled("conv1", 4, 4) | styled("convs.0", 6, 4) | styled("convs.1", 6, 6)),
        **(styled("convs.2", 3, 6) | styled("convs.3", 3, 3)),
        **(rgb("to_rgb1", 4) | rgb("to_rgbs.0", 6) | rgb("to_rgbs.1", 3)),
        **{f"{name}.kernel": (4, 4) for name in kernels},
        **{f"noises.noise_{j}": (1, 1, side, side) for j, side in enumerate(sides)},
    }
    assert all(g.state_dict()[f"{name}.kernel"].sum() == 4 for name in kernels)


def test_noise_is_fixed_or_each_image_has_its_own():
    g, w = small(), torch.randn(2, 5)
    for layer in (g.conv1, *g.convs):
        layer.noise.weight.data.fill_(1.0)
    for mode in (True, False):
        g.train(mode)
        assert torch.equal(g(w), g(w))
        torch.testing.assert_close(g(w[1:]), g(w)[1:])
        torch.manual_seed(3)
        image = g(w[:1].repeat(2, 1), noise="random")
        assert not torch.equal(image[0], image[1])
        torch.manual_seed(3)
        assert torch.equal(g(w[:1].repeat(2, 1), noise="random"), image)


def test_each_style_enters_at_its_place():
    """A change of style i changes no earlier convolution's output, and the image."""
    g = small()
    w = torch.randn(1, g.num_styles, 5)
    seen: list[Tensor] = []
    for layer in (g.conv1, *g.convs):
        layer.register_forward_hook(lambda layer, inputs, y: seen.append(y))
    image, before = g(w), list(seen)
    for i in range(g.num_styles):
        other = w.clone()
        other[:, i] += 1
        seen.clear()
        assert not torch.equal(g(other), image)
        same = [torch.equal(a, b) for a, b in zip(seen, before, strict=True)]
        assert same == [j < i for j in range(5)]


def test_second_derivatives():
    """Of the path length by the generator's weights, and of R1 by the discriminator's."""
    g, w = small().double(), wave(2, 6, 5, step=0.7, start=0.1).requires_grad_()
    noise = wave(2, 3, 16, 16, step=0.23, start=0.7) / 16

    def path_length(judge) -> Tensor:
        (slopes,) = torch.autograd.grad((judge(w) * noise).sum(), w, create_graph=True)
        return slopes.square().sum(2).mean(1).sqrt().mean()

    # The last bias and the mapping have no part in it.
    for unused in (g.style, g.to_rgb1.bias, *(rgb.bias for rgb in g.to_rgbs)):
        unused.requires_grad_(False)
    check_penalty(g, path_length)
    x = wave(4, 3, 16, 16, step=0.0137, start=0.3).requires_grad_()
    torch.manual_seed(0)
    check_penalty(StyleDiscriminator(16, channels=[4, 3, 2]), lambda judge: r1(judge(x), x))


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (6, 3), (5, 1)])
def test_minibatch_deviation_against_a_loop(batch, group):
    x = wave(batch, 3, 4, 4, step=0.37, start=0.1)
    for b, found in enumerate(minibatch_stddev(x)):
        others = x[b % (batch // group) :: batch // group]
        variance = ((others - others.mean(0)) ** 2).sum(0) / group
        torch.testing.assert_close(found, (variance + 1e-8).sqrt().mean().expand(1, 4, 4))


def test_files_of_rosinality(tmp_path, capsys):
    """Written and read, with and without D and mean latent; sizes come from the file."""
    g, d = small(image_channels=1), StyleDiscriminator(16, [4, 6, 3], image_channels=1)
    g.latent_avg.copy_(torch.arange(5.0))
    save_rosinality(tmp_path / "both.pt", g, d)
    content = torch.load(tmp_path / "both.pt", weights_only=True)
    assert set(content) == {"g_ema", "latent_avg", "d"} and "latent_avg" not in content["g_ema"]
    found = load_rosinality(tmp_path / "both.pt")
    for one, other in zip((g, d), found, strict=True):
        for name, x in one.state_dict().items():
            assert torch.equal(x, other.state_dict()[name])
    save_rosinality(tmp_path / "alone.pt", g)
    assert load_rosinality(tmp_path / "alone.pt")[1] is None
    # A checkpoint of rosinality's training.
    training = {"g": content["g_ema"], "d": content["d"], "g_ema": content["g_ema"]}
    training |= {"args": argparse.Namespace(size=16, lr=0.002), "ada_aug_p": 0}
    torch.save(training, tmp_path / "training.pt")
    capsys.readouterr()
    read = [load_rosinality(tmp_path / "training.pt")[0] for _ in range(2)]
    assert (
        "has no latent_avg; the mean of 100000 mapped samples is taken" in capsys.readouterr().err
    )
    assert torch.equal(read[0].latent_avg, read[1].latent_avg)
    z = torch.randn(100_000, 5, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(read[0].latent_avg, g.mapping(z).mean(0), atol=0.02, rtol=0)


def test_errors_of_files(tmp_path):
    path, g = tmp_path / "g.pt", small()
    state = g.published_state()

    def refused(content: object, match: str) -> None:
        torch.save(content, path)
        with pytest.raises(UserError, match=match):
            load_rosinality(path)

    with pytest.raises(UserError, match=r"no such file. Expected rosinality's layout"):
        load_rosinality(path)
    for content in (state, {"g_ema": {"a": torch.zeros(1)}}, torch.zeros(3)):
        refused(content, "has no StyleGAN2 generator under g_ema. Expected rosinality's layout")
    refused(
        {"g_ema": {k: x for k, x in state.items() if "noises" not in k}},
        "lacks weight noises.noise_0",
    )
    refused(
        {"g_ema": state, "latent_avg": torch.zeros(6)},
        r"latent_avg has the shape \(6,\), expected \(5,\)",
    )
    refused(
        {"g_ema": state, "other": nn.Linear(1, 1)}, "is damaged or no PyTorch file of plain weights"
    )


def test_errors():
    for network in (StyleGenerator, StyleDiscriminator):
        for size in (4, 48):
            with pytest.raises(
                ValueError, match=f"image_size={size} must be a power of two from 8"
            ):
                network(size)
        with pytest.raises(ValueError, match=r"channels=\(4, 4\) has 2 widths.*Give 3 widths"):
            network(16, channels=[4, 4])
    g = small()
    for shape in ((2, 4), (2, 5, 5), (5,)):
        with pytest.raises(ValueError, match=r"w has the shape .*expected \(B, 5\) or \(B, 6, 5\)"):
            g(torch.zeros(shape))
    with pytest.raises(ValueError, match="noise='none'. Use 'fixed' or 'random'"):
        g(torch.zeros(1, 5), noise="none")
    with pytest.raises(ValueError, match="at=7. Use 0 to 6"):
        g.mix(torch.zeros(1, 5), torch.zeros(1, 5), at=7)
    with pytest.raises(
        ValueError, match=r"x has the shape \(1, 3, 8, 8\), expected \(B, 3, 16, 16\)"
    ):
        StyleDiscriminator(16, [4, 4, 4])(torch.zeros(1, 3, 8, 8))
