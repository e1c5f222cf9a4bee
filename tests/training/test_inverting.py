"""The loop of ReStyle, encoder bootstrapping, and the commands that use a trained encoder."""

import copy

import pytest
import torch
from golden import fill_styles, sines
from torch import nn

from fastnce.networks.restyle_encoder import build_encoder
from fastnce.networks.style_generator import StyleGenerator
from fastnce.systems.inverting import (
    Inverter,
    at_size,
    average_image,
    average_start,
    bootstrap,
    iterate,
)


class Pixels(nn.Module):
    """A generator whose image is its latent: two styles of 48 numbers, the mean of both as (3, 4, 4)."""

    num_styles = 2

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.register_buffer("latent_avg", torch.linspace(-1, 1, 48))
        self.noises: list[str] = []

    def forward(self, w, noise="fixed"):
        self.noises.append(noise)
        return self.gain * w.mean(1).unflatten(1, (3, 4, 4))


class Halver(nn.Module):
    """An encoder that corrects half of the difference of the image and what it sees."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x):
        y = x[:, 3:] if x.shape[1] == 6 else 0
        return (self.share[:, :3] * (x[:, :3] - y)).flatten(1)[:, None].repeat(1, 2, 1)


@pytest.fixture
def images():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_each_step_starts_from_the_one_before_and_its_graph_ends_there(images):
    encoder, generator = Halver(), Pixels()
    error = images - average_image(generator, (4, 4))
    for t, step in enumerate(iterate(encoder, generator, images, steps=3, noise="random"), 1):
        torch.testing.assert_close(images - step.seen, error * 0.5**t)
        assert step.image.shape == (2, 3, 4, 4)
        (step.seen - images).square().sum().backward()
        # d/d share of |x - y_{t-1} - share (x - y_{t-1})|^2, with y_{t-1} a constant
        expected = -2 * 0.5 * (error * 0.5 ** (t - 1)).square().sum((0, 2, 3))
        torch.testing.assert_close(encoder.share.grad[0, :3, 0, 0], expected)
        encoder.share.grad = None
    assert generator.noises == ["fixed", "fixed", "random", "random", "random"]


def test_a_start_takes_the_place_of_the_average(images):
    encoder, generator = Halver(), Pixels()
    first, second = iterate(encoder, generator, images, steps=2)
    start = (first.latent.detach(), first.seen.detach())
    (again,) = iterate(encoder, generator, images, steps=1, start=start)
    assert torch.equal(again.image, second.image)


def test_an_encoder_of_the_image_alone_makes_one_step(images):
    """The published trap: it would silently start from the average again."""
    encoder, generator = Halver(3), Pixels()
    (step,) = iterate(encoder, generator, images, steps=1)
    torch.testing.assert_close(step.seen, average_image(generator, (4, 4)) + 0.5 * images)
    with pytest.raises(ValueError, match=r"steps=2, but the encoder takes the 3 channels"):
        iterate(encoder, generator, images, steps=2)
    with pytest.raises(ValueError, match=r"takes 4 channels, and images of 3 need 6"):
        iterate(Halver(4), generator, images, steps=1)
    with pytest.raises(ValueError, match=r"expected images of \(3, 4, 4\) .* got \(1, 4, 4\)"):
        iterate(encoder, generator, images[:, :1], steps=1)


def test_an_encoder_of_other_styles_is_refused(images):
    generator = Pixels()
    generator.num_styles = 3
    with pytest.raises(ValueError, match=r"gives latents \(2, 2, 48\), .* are \(2, 3, 48\)"):
        next(iterate(Halver(), generator, images, steps=1))


def test_pooling_keeps_the_middle_of_wide_images_and_repeats_small_ones():
    rows = torch.arange(8.0)[:, None].expand(1, 1, 8, 8)
    assert at_size(rows, (2, 4))[0, 0, :, 0].tolist() == [2.5, 4.5]
    assert at_size(rows, (16, 16))[0, 0, :4, 0].tolist() == [0, 0, 1, 1]


def test_bootstrapping_goes_on_with_the_second_model(images):
    first, second = Inverter(Halver(), Pixels()), Inverter(Halver(), Pixels(gain=-1.0))
    second.generator.latent_avg.fill_(5)
    steps = list(bootstrap(first, second, images, 2))
    assert len(steps) == 3
    assert torch.equal(steps[0].image, first(images, 1)[0].image)
    torch.testing.assert_close(
        steps[1].latent, steps[0].latent + second.encoder(torch.cat([images, steps[0].seen], 1))
    )
    torch.testing.assert_close(steps[1].image, -steps[1].latent.mean(1).unflatten(1, (3, 4, 4)))
    assert len(list(bootstrap(first, second, images, 1, first_steps=3))) == 4


def golden(*values: float):
    return pytest.approx(list(values), rel=1e-4, abs=5e-6)


@pytest.fixture(scope="module")
def filled() -> Inverter:
    """The model of golden 13 and 14, whose encoder has seen one batch in training mode."""
    generator = fill_styles(StyleGenerator(16))
    for j, noise in enumerate(generator.noises.buffers()):
        noise.copy_(sines(*noise.shape, step=0.7, start=0.1 * j))
    encoder = fill_styles(build_encoder("resnet34", 6, 6))
    with torch.no_grad():
        for style in encoder.styles:
            style.linear.weight *= 0.2
        generator.latent_avg.copy_(generator.mapping(sines(64, 512, step=0.37, start=0.2)).mean(0))
        x = pictures()
        encoder.train()(torch.cat([x, average_image(generator, (64, 64)).expand_as(x)], dim=1))
    return Inverter(encoder, generator).eval().requires_grad_(False)


def pictures():
    return sines(2, 3, 64, 64, step=0.0137, start=0.3)


def test_golden_values_of_the_loop(filled):
    w, y = average_start(filled.generator, (64, 64))
    assert w[0, 5, :4].tolist() == golden(0.734790, 0.477941, -0.215541, 1.091441)
    assert [w.mean().item(), w.std().item()] == pytest.approx([0.521177, 0.914262], rel=1e-3)
    assert [y.mean().item(), y.std(correction=0).item()] == golden(0.395248, 0.941259)
    assert y[0, :, 3, 5].tolist() == golden(0.229167, -0.376025, 1.348699)
    x = pictures()
    steps = filled(x, 5)
    assert [step.image.mean().item() for step in steps] == golden(
        *(0.429259, 0.461862, 0.492593, 0.521220, 0.545195)
    )
    assert steps[0].image[1, :, 3, 5].tolist() == golden(-0.081203, 0.085315, 0.304333)
    assert steps[4].image[1, :, 3, 5].tolist() == golden(0.117476, 0.359201, 0.508206)
    assert steps[0].latent[1, 2, :3].tolist() == golden(0.775998, 0.401142, -0.191918)
    assert steps[4].latent[1, 2, :3].tolist() == golden(0.945069, 0.096666, -0.097319)
    assert [(step.seen - x).square().mean().item() for step in steps] == golden(
        *(1.557100, 1.573127, 1.584988, 1.596608, 1.605074)
    )


def test_golden_values_of_bootstrapping(filled):
    generator = copy.deepcopy(filled.generator)
    for parameter in generator.to_rgbs.parameters():  # those of to_rgb1 as they are
        parameter.neg_()
    generator.latent_avg.fill_(5)
    steps = bootstrap(filled, Inverter(filled.encoder, generator), pictures(), 2)
    assert [step.image[1, :, 3, 5].tolist() for step in steps] == [
        golden(-0.081203, 0.085315, 0.304333),
        golden(0.063557, -0.045206, 0.028471),
        golden(0.120179, 0.023962, 0.082485),
    ]
