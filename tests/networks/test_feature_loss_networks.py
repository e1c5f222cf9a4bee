"""Golden values, shapes, parameter counts and keys of the networks of Contrastive Feature Loss.

The golden numbers come from running the published implementation in fp32 on a CPU. Ours runs in fp64, which is the same everywhere.
"""

import pytest
import torch
from golden import fill, hashed, sines
from torch import Tensor, nn

from fastnce.networks import MultiscaleDiscriminator, PatchProjector, SPADEGenerator
from fastnce.networks.critics import PixelCritic, VGG19Critic
from fastnce.networks.spade_generator import SPADE, SPADEBlock
from fastnce.systems.adversarial import discriminator_losses, generator_loss


def moments(x: Tensor) -> list[float]:
    """Mean and population standard deviation of all elements."""
    return [x.mean().item(), x.std(correction=0).item()]


def golden(*values: float, abs: float = 2e-6):
    return pytest.approx(list(values), abs=abs)


def double(module: nn.Module, first: int = 0) -> nn.Module:
    """In fp64, filled with the fp32 numbers of the golden values."""
    return fill(module, first).double()


def test_the_hash_of_the_golden_weights():
    assert hashed(4, k=0).tolist() == golden(-0.618678, 0.417896, -0.748671, -0.710526)
    assert hashed(4, k=3).tolist() == golden(-0.306958, -0.113298, 0.411765, -0.662986)
    assert hashed(1000, k=7).double().sum().item() == pytest.approx(-6.330974, abs=1e-5)


def binary_map() -> Tensor:
    return (sines(2, 3, 8, 16, step=1.1, start=0.2) > 0).double()


def test_spade():
    spade, x = double(SPADE(4, 3)), sines(2, 4, 4, 8, step=0.37, start=0.1).double()
    y = spade(x, binary_map())
    assert moments(y) == golden(-0.216435, 1.005304)
    assert y[0, :, 1, 2].tolist() == golden(-1.171689, -0.264840, -0.189340, 0.500828)
    norm = spade.param_free_norm
    assert norm.running_mean.tolist() == golden(0.000672, 0.000350, -0.000150, -0.000573)
    assert norm.running_var.tolist() == golden(0.953028, 0.949330, 0.948210, 0.951644)
    y = spade.eval()(x, binary_map())
    assert moments(y) == golden(-0.212908, 0.764157)
    assert y[0, :, 1, 2].tolist() == golden(-0.959149, -0.293481, -0.230955, 0.298270)


@pytest.mark.parametrize(
    ("channels", "training", "evaluating"),
    [
        (
            4,
            (0.214865, 1.109838, -1.542334, -1.957080, 0.937044, 2.215561),
            (0.249721, 0.959594, -0.778308, -0.972018, 1.541897, 2.340239),
        ),
        (
            6,
            (-0.027240, 0.988526, -0.800806, -1.044778, 0.199740, 0.004869),
            (0.153252, 0.680424, -0.387005, -0.454712, 0.980523, 0.679701),
        ),
    ],
)
def test_block(channels, training, evaluating):
    block = double(SPADEBlock(channels, 4, 3))
    x = sines(2, channels, 4, 8, step=0.37, start=0.1).double()
    for mode, expected in ((True, training), (False, evaluating)):
        y = block.train(mode)(x, binary_map())
        assert [*moments(y), *y[0, :, 1, 2].tolist()] == golden(*expected)


def semantic_map(height: int, width: int) -> Tensor:
    """(2, 6, height, width): five classes and an edge channel."""
    labels = ((sines(2, 1, height, width, step=0.05, start=0.3) + 1) * 2.499).long()
    edges = sines(2, 1, height, width, step=0.4, start=0.0) > 0.9
    classes = torch.zeros(2, 5, height, width).scatter_(1, labels, 1.0)
    return torch.cat([classes, edges.float()], dim=1).double()


@pytest.mark.parametrize(
    ("upsampling", "crop", "aspect", "tensors", "values", "training", "evaluating"),
    [
        (
            *("normal", 64, 2.0, 144, 1_968_783),
            (-0.004384, 0.471013, -0.604505, -0.873533, 0.811725),
            (-0.065358, 0.237402, -0.186324, -0.069907, -0.452190),
        ),
        (
            *("more", 128, 2.0, 144, 1_968_783),
            (0.019165, 0.458484, -0.346914, -0.362717, -0.483152),
            (-0.053403, 0.268724),
        ),
        ("most", 128, 1.0, 167, 2_013_029, (0.064591, 0.551485), (0.007146, 0.353298)),
    ],
)
def test_generator(upsampling, crop, aspect, tensors, values, training, evaluating):
    g = SPADEGenerator(6, 3, 4, upsampling, crop, aspect)
    assert len(list(g.parameters())) == tensors
    assert sum(p.numel() for p in g.parameters()) == values
    height, width = g.image_size
    assert (height, width) == (crop / aspect, crop)
    semantics = semantic_map(height, width)
    double(g)
    for mode, expected in ((True, training), (False, evaluating)):
        image = g.train(mode)(semantics)
        assert image.shape == (2, 3, height, width)
        found = [*moments(image), *image[0, :, 3, 5].tolist()]
        assert found[: len(expected)] == golden(*expected)


@pytest.mark.parametrize(
    ("upsampling", "crop", "total", "first"),
    [("normal", 64, 0.6528684, 0.1066052), ("more", 128, 0.2477323, None)],
)
def test_gradients_of_the_generator(upsampling, crop, total, first):
    g = double(SPADEGenerator(6, 3, 4, upsampling, crop, 2.0))
    image = g(semantic_map(crop // 2, crop))
    (image * sines(*image.shape, step=0.11, start=0.5)).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in g.parameters()]).norm().item()
    assert norm == pytest.approx(total, abs=2e-7)
    if first is not None:
        assert g.fc.weight.grad.norm().item() == pytest.approx(first, abs=2e-7)


def test_discriminator():
    d = MultiscaleDiscriminator(9, base_channels=4)
    assert sum(p.numel() for p in d.parameters()) == 23_690
    assert len(list(d.parameters())) == 14
    double(d)
    x = sines(4, 9, 32, 64, step=0.0137, start=0.3).double()
    scales = d(x)
    logits = [maps[-1] for maps in scales]
    assert [tuple(x.shape) for x in logits] == [(4, 1, 7, 11), (4, 1, 5, 7)]
    assert moments(logits[0]) == golden(0.240925, 0.519209)
    assert moments(logits[1]) == golden(0.184640, 0.435664)
    assert logits[0].flatten()[:3].tolist() == golden(0.306745, 0.510338, 0.759415)
    assert logits[1].flatten()[:3].tolist() == golden(0.142604, 0.957168, 0.146185)
    for mode, expected in {
        "hinge": (-0.206297, 1.206296, 0.804056),
        "lsgan": (0.830459, 0.243052, 0.869929),
        "vanilla": (0.619378, 0.825674, 0.620383),
        "wgangp": (-0.206297, 0.206297, -0.219268),
    }.items():
        losses = []
        for x_scale in logits:
            fake, real = x_scale.chunk(2)
            on_real, on_fake = discriminator_losses(real, fake, mode)
            losses.append(torch.stack([generator_loss(fake, mode), on_fake, on_real]))
        assert torch.stack(losses).mean(0).tolist() == golden(*expected)
    total = 0.0
    for maps in d.eval()(x):
        halves = [x.chunk(2) for x in maps[:-1]]
        total += sum((fake - real).abs().mean().item() for fake, real in halves)
    assert 10 / 2 * total == pytest.approx(28.881851, abs=2e-5)


def two_images() -> tuple[Tensor, Tensor]:
    x, y = ((0.0137, 0.3), (0.0219, 0.9))
    return tuple(sines(2, 3, 32, 64, step=a, start=b).double() for a, b in (x, y))


def test_vgg19():
    # The published mean and standard deviation are parameters 0 and 1.
    vgg, (x, y) = double(VGG19Critic(None), first=2), two_images()
    x.requires_grad_()
    of_x, of_y = vgg(x), vgg(y)
    for found, mean, std in zip(
        of_x,
        (0.291057, 0.189901, 0.093881, 0.034641, 0.028856),
        (0.416140, 0.246214, 0.146097, 0.051807, 0.042366),
        strict=True,
    ):
        assert moments(found) == golden(mean, std)
    vgg.normalize = "published"
    assert moments(vgg(x)[-1]) == golden(0.034482, 0.051924)
    distances = [(a - b).abs().mean() for a, b in zip(of_x, of_y, strict=True)]
    found = torch.stack(distances).tolist()
    assert found == golden(0.399847, 0.168999, 0.054742, 0.008759, 0.001344)
    distances = torch.stack([(x - y).abs().mean(), *distances])
    for weights, loss, norm in (
        ((0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), 0.013543, 0.000138),
        ((1, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), 0.340989, 0.003712),
        ((0, 1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5), 0.024610, 0.000223),
    ):
        total = sum(
            (1, *weights[1:])
        )  # as published, with the image's term whether it counts or not
        weighted = torch.tensor(weights).double() @ distances / total
        assert weighted.item() == pytest.approx(loss, abs=1e-6)
        (gradient,) = torch.autograd.grad(weighted, x, retain_graph=True)
        assert gradient.norm().item() == pytest.approx(norm, abs=1e-6)


def test_pixel_patches():
    patches = PixelCritic()(torch.arange(3.0 * 16 * 24).view(1, 3, 16, 24))
    assert [tuple(x.shape[1:]) for x in patches] == [(48, 7, 11), (192, 3, 5), (768, 1, 2)]
    red = [float(first + i) for first in (52, 76, 100, 124) for i in range(4)]
    expected = [value + colour for colour in (0, 384, 768) for value in red]
    assert patches[0][0, :, 1, 2].tolist() == expected


@pytest.mark.parametrize(
    ("projection", "rows"),
    [
        (
            "mlp",
            [
                (-0.164987, 0.124394, 0.099602),
                (0.396017, -0.026331, 0.094546),
                (0.524993, -0.194994, -0.403934),
            ],
        ),
        (
            "linear",
            [
                (0.348846, -0.297413, 0.440026),
                (-0.151507, 0.145103, 0.120579),
                (0.563632, -0.393607, -0.118310),
            ],
        ),
        (
            "identity",
            [
                (0.102099, 0.104700, 0.107282),
                (0.057780, 0.058998, 0.060206),
                (0.029965, 0.030527, 0.031083),
            ],
        ),
    ],
)
def test_projections(projection, rows):
    """Row (0, 1) of the rows that `patch_nce` makes of the projected patches, of length 1."""
    critic = PixelCritic()
    places = [torch.arange(0, 60, 7), torch.arange(0, 40, 5), torch.arange(0, 21, 3)]
    maps = critic(two_images()[0])
    patches = [x.flatten(2).mT[:, ids] for x, ids in zip(maps, places, strict=True)]
    project = double(PatchProjector(critic.channels, 8, projection))
    for projected, expected in zip(project(patches), rows, strict=True):
        unit = nn.functional.normalize(projected, dim=-1)
        assert unit[0, 1, :3].tolist() == golden(*expected)
