"""Golden values, shapes, parameter counts and keys of the networks of Contrastive Feature Loss.

The golden numbers come from running the published implementation in fp32 on a CPU. Ours runs in fp64, which is the same everywhere.
"""

import pytest
import torch
from golden import fill, hashed, sines
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastnce.errors import UserError
from fastnce.networks import MultiscaleDiscriminator, PatchProjector, SPADEGenerator
from fastnce.networks.critics import (
    ConvEncoderCritic,
    PixelCritic,
    ResNetCritic,
    ScriptedCritic,
    VGG19Critic,
)
from fastnce.networks.spade_generator import SPADE, SPADEBlock
from fastnce.systems.adversarial import discriminator_losses, generator_loss


def moments(x: Tensor) -> list[float]:
    """Mean and population standard deviation of all elements."""
    return [x.mean().item(), x.std(correction=0).item()]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


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
    ("upsampling", "crop", "aspect", "tensors", "values", "training", "gradients", "evaluating"),
    [
        (
            *("normal", 64, 2.0, 144, 1_968_783),
            (-0.004384, 0.471013, -0.604505, -0.873533, 0.811725),
            (0.6528684, 0.1066052),
            (-0.065358, 0.237402, -0.186324, -0.069907, -0.452190),
        ),
        (
            *("more", 128, 2.0, 144, 1_968_783),
            (0.019165, 0.458484, -0.346914, -0.362717, -0.483152),
            (0.2477323,),
            (-0.053403, 0.268724),
        ),
        ("most", 128, 1.0, 167, 2_013_029, (0.064591, 0.551485), (), (0.007146, 0.353298)),
    ],
)
def test_generator(upsampling, crop, aspect, tensors, values, training, gradients, evaluating):
    """Moments and a pixel of the image; norms of the gradient of all parameters and of `fc.weight`."""
    g = SPADEGenerator(6, 3, 4, upsampling, crop, aspect)
    assert (len(list(g.parameters())), count(g)) == (tensors, values)
    height, width = g.image_size
    assert (height, width) == (crop / aspect, crop)
    semantics = semantic_map(height, width)
    double(g)

    def found(image: Tensor) -> list[float]:
        assert image.shape == (2, 3, height, width)
        return [*moments(image), *image[0, :, 3, 5].tolist()]

    image = g(semantics)
    assert found(image)[: len(training)] == golden(*training)
    if gradients:
        (image * sines(*image.shape, step=0.11, start=0.5)).mean().backward()
        total = torch.cat([p.grad.flatten() for p in g.parameters()]).norm().item()
        norms = [total, g.fc.weight.grad.norm().item()]
        assert norms[: len(gradients)] == golden(*gradients, abs=2e-7)
    with torch.no_grad():
        image = g.eval()(semantics)
    assert found(image)[: len(evaluating)] == golden(*evaluating)


def test_single_precision():
    """With the compiled kernels where they are, which fp64 does not have: image and gradients as in fp64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        g = fill(SPADEGenerator(6, 3, 4, "normal", 64, 2.0)).to(dtype)
        image = g(semantic_map(32, 64).to(dtype))
        image.square().mean().backward()
        results.append([image.detach(), g.fc.weight.grad, g.up_3.norm_1.mlp_beta.weight.grad])
    for single, true in zip(*results, strict=True):
        assert (single - true).norm() < 2e-5 * true.norm()


def test_discriminator():
    d = MultiscaleDiscriminator(9, base_channels=4)
    assert (len(list(d.parameters())), count(d)) == (14, 23_690)
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


def multiply_adds(network: nn.Module, *x: Tensor) -> float:
    """Of a pass without gradient, in 1e9."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*x)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("channels", "upsampling", "crop", "aspect", "parameters", "work"),
    [
        (36, "more", 512, 2.0, (93_048_003, 5_601_410), (281.3, 10.5, 47.3)),  # Cityscapes
        (151, "normal", 256, 1.0, (96_492_483, 5_836_930), (181.2, 7.8, 23.7)),  # ADE20K
        (184, "normal", 256, 1.0, (97_480_899, 5_904_514), None),  # COCO
    ],
)
def test_published_sizes(channels, upsampling, crop, aspect, parameters, work):
    """Parameters of generator and discriminator; multiply-adds of an image in them and in VGG19."""
    with torch.device("meta"):
        g = SPADEGenerator(channels, 3, 64, upsampling, crop, aspect)
        d = MultiscaleDiscriminator(channels + 3)
        vgg = VGG19Critic(None)
        image = torch.empty(1, 3, *g.image_size)
        semantics = torch.empty(1, channels, *g.image_size)
    assert (count(g), count(d)) == parameters
    assert len(g.state_dict()) == 234
    if work is not None:
        found = [
            multiply_adds(g, semantics),
            multiply_adds(d, torch.cat([semantics, image], dim=1)),
            multiply_adds(vgg, image),
        ]
        assert found == golden(*work, abs=0.051)


def test_parameter_counts_of_critics_and_projectors():
    with torch.device("meta"):
        vgg, pixel = VGG19Critic(None), PixelCritic()
        counts = [
            PatchProjector(vgg.channels[1:]),
            PatchProjector(vgg.channels),
            PatchProjector(pixel.channels),
            PatchProjector(pixel.channels, projection="linear"),
        ]
    assert count(vgg) + vgg.mean.numel() + vgg.std.numel() == 12_944_960 + 6
    assert list(map(count, counts)) == [624_640, 707_072, 456_192, 258_816]


def with_parts(names, parts):
    return {f"{name}.{part}" for name in names for part in parts}


VECTORS = ("weight_orig", "weight_u", "weight_v")


def published_keys_of_the_generator() -> set[str]:
    keys = with_parts(["fc", "conv_img"], ["weight", "bias"])
    learnt = ["up_0", "up_1", "up_2", "up_3"]
    for block in ["head_0", "G_middle_0", "G_middle_1", *learnt]:
        keys |= with_parts([f"{block}.conv_0", f"{block}.conv_1"], ["bias", *VECTORS])
        norms = [f"{block}.norm_0", f"{block}.norm_1"]
        if block in learnt:
            keys |= with_parts([f"{block}.conv_s"], VECTORS)
            norms.append(f"{block}.norm_s")
        statistics = ["running_mean", "running_var", "num_batches_tracked"]
        keys |= with_parts(norms, [f"param_free_norm.{name}" for name in statistics])
        layers = with_parts(norms, ["mlp_shared.0", "mlp_gamma", "mlp_beta"])
        keys |= with_parts(layers, ["weight", "bias"])
    return keys


def test_keys_are_the_published_ones():
    with torch.device("meta"):
        g, d = SPADEGenerator(36, base_channels=4), MultiscaleDiscriminator(39)
        vgg = VGG19Critic(None)
    assert set(g.state_dict()) == published_keys_of_the_generator()
    assert g.state_dict()["up_0.conv_s.weight_u"].shape == (32,)
    assert g.state_dict()["up_0.conv_0.weight_v"].shape == (64 * 9,)
    of_d = set()
    for scale in ("discriminator_0", "discriminator_1"):
        ends = [f"{scale}.model0.0", f"{scale}.model4.0"]
        middle = [f"{scale}.model{index}.0.0" for index in (1, 2, 3)]
        of_d |= with_parts(ends, ["weight", "bias"]) | with_parts(middle, VECTORS)
    assert set(d.state_dict()) == of_d
    slices = ["1.0", "2.2", "2.5", "3.7", "3.10", "4.12", "4.14", "4.16", "4.19"]
    slices += ["5.21", "5.23", "5.25", "5.28"]
    of_vgg = with_parts([f"slice{name}" for name in slices], ["weight", "bias"])
    assert set(vgg.state_dict()) == {"mean", "std"} | of_vgg


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_eval_mode_leaves_the_spectral_vectors_alone(network):
    if network == "generator":
        network, x = SPADEGenerator(3, base_channels=2, hidden_channels=4), (2, 3, 64, 32)
    else:
        network, x = MultiscaleDiscriminator(3, base_channels=2), (2, 3, 32, 32)

    def vectors_after_a_pass() -> Tensor:
        network(torch.zeros(x))
        state = network.state_dict().items()
        return torch.cat([v for name, v in state if name.endswith(("weight_u", "weight_v"))])

    before, after = vectors_after_a_pass(), vectors_after_a_pass()
    assert not torch.equal(before, after)
    network.eval()
    assert torch.equal(after, vectors_after_a_pass())


@pytest.mark.parametrize(
    ("init", "spectral", "others", "bias"),
    [
        ("published", 0.0241, 0.00096, 0),
        ("xavier", 0.00096, 0.00096, 0),
        ("default", 0.0241, None, 1),
    ],
)
def test_initialisation(init, spectral, others, bias):
    """Standard deviations of 3x3 convolutions from 64 channels to 32: 1 / sqrt(3 * 576), and 0.02 * sqrt(2 / (576 + 288))."""
    torch.manual_seed(0)
    g = SPADEGenerator(64, base_channels=4, hidden_channels=32, init=init)
    conv = g.up_0.conv_0
    assert conv.weight_orig.std().item() == pytest.approx(spectral, rel=0.03)
    if others is not None:
        shared = g.up_0.norm_0.mlp_shared[0].weight
        assert shared.std().item() == pytest.approx(others, rel=0.03)
    assert (conv.bias.abs().max().item() > 0) == bias
    # The vectors are those of the weight that is there: after an iteration they are near, which random ones are not.
    sigma = conv.weight_u @ conv.weight_orig.flatten(1) @ conv.weight_v
    assert sigma > 0.5 * torch.linalg.matrix_norm(conv.weight_orig.flatten(1), 2)


def test_errors_of_sizes():
    with pytest.raises(ValueError, match="first map of 0x1, .* Use a crop_size of 64 or more"):
        SPADEGenerator(3, crop_size=32, aspect_ratio=2.0)
    with pytest.raises(ValueError, match="first map of 0x0, .* Use a crop_size of 128 or more"):
        SPADEGenerator(3, crop_size=100, upsampling="most")
    with pytest.raises(ValueError, match="upsampling='least' must be one of"):
        SPADEGenerator(3, upsampling="least")
    with pytest.raises(ValueError, match="base_channels=1 must be at least 1, and 2 with"):
        SPADEGenerator(3, base_channels=1, upsampling="most")
    with pytest.raises(ValueError, match="init='zeros' must be one of"):
        MultiscaleDiscriminator(3, 2, init="zeros")
    g = SPADEGenerator(3, base_channels=2, hidden_channels=4)
    with pytest.raises(
        ValueError, match=r"semantics must have shape \(B, in_channels=3, H, W\), got"
    ):
        g(torch.zeros(1, 4, 64, 64))
    with pytest.raises(ValueError, match="must be multiples of 32, got 64x50"):
        g(torch.zeros(1, 3, 64, 50))
    with pytest.raises(ValueError, match="first map of one position"):
        g(torch.zeros(1, 3, 32, 32))
    assert g.eval()(torch.zeros(1, 3, 32, 96)).shape == (1, 3, 32, 96)
    with pytest.raises(ValueError, match="num_scales=0: expected numbers of at least 1"):
        MultiscaleDiscriminator(3, num_scales=0)
    with pytest.raises(ValueError, match="at least 16 pixels on a side, got 15x32"):
        PixelCritic()(torch.zeros(1, 3, 15, 32))
    with pytest.raises(ValueError, match="projection='cubic' must be one of"):
        PatchProjector([3], projection="cubic")


@pytest.fixture(scope="module")
def vgg() -> VGG19Critic:
    torch.manual_seed(0)
    return VGG19Critic(None)


def torchvision_layout(vgg: VGG19Critic) -> dict[str, Tensor]:
    """With the last convolutions and the classifier, which are not needed."""
    weights = {name.partition(".")[2]: x for name, x in vgg.state_dict().items() if "." in name}
    further = {f"features.{index}.weight": torch.zeros(1) for index in (30, 32, 34)}
    return {
        **{f"features.{name}": x for name, x in weights.items()},
        **further,
        "classifier.0.weight": torch.zeros(1),
    }


@pytest.mark.parametrize("layout", ["torchvision", "published"])
def test_vgg19_from_a_file(vgg, layout, tmp_path):
    state = torchvision_layout(vgg)
    if layout == "published":
        state = {f"encoder.{name}": x for name, x in vgg.state_dict().items()}
        state["projection.mlps.0.0.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "weights.pth")
    loaded = VGG19Critic(tmp_path / "weights.pth")
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, x in vgg.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)


def test_errors_of_weights_files(vgg, tmp_path):
    path = tmp_path / "weights.pth"
    help_of_vgg = r"Expected torchvision's .* vgg19-dcbb9e9d.pth from https://.* such as pixel\.$"
    with pytest.raises(UserError, match=f"{path}: no such file. {help_of_vgg}"):
        VGG19Critic(path)
    state = torchvision_layout(vgg)
    del state["features.19.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match=f"lacks weight slice4.19.bias. {help_of_vgg}"):
        VGG19Critic(path)
    torch.save(torchvision_layout(vgg) | {"features.1.weight": torch.zeros(64)}, path)
    with pytest.raises(UserError, match="unknown weight features.1.weight"):
        VGG19Critic(path)
    torch.save(torchvision_layout(vgg) | {"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(
        UserError, match=r"slice1.0.weight has the shape \(64, 1, 3, 3\) in the file"
    ):
        VGG19Critic(path)
    path.write_bytes(b"no weights")
    for critic in (VGG19Critic, lambda path: ResNetCritic("resnet18", path)):
        with pytest.raises(UserError, match=f"{path}: is damaged or no PyTorch file"):
            critic(path)
    with pytest.raises(UserError, match=f"critic {path}: not a TorchScript module"):
        ScriptedCritic(path)
    with pytest.raises(ValueError, match="name='small' must be one of resnet18, resnet34"):
        ResNetCritic("small")


def test_a_resnet_from_a_file(tmp_path):
    torch.manual_seed(0)
    one = ResNetCritic("resnet18")
    state = {**one.encoder.state_dict(), "fc.weight": torch.zeros(1000, 512)}
    torch.save(state, tmp_path / "weights.pth")
    other = ResNetCritic("resnet18", tmp_path / "weights.pth")
    x = torch.rand(1, 3, 40, 60) * 2 - 1
    found = other(x)
    assert [x.shape[1] for x in found] == other.channels == [3, 64, 64, 128, 256, 512]
    assert [x.shape[2] for x in found] == [224, 56, 56, 28, 14, 7]
    assert torch.equal(found[-1], one(x)[-1])
    corners = found[0][..., [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, x[..., [0, 0, -1, -1], [0, -1, 0, -1]])


class Doubled(nn.Module):
    """For a TorchScript file."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x * self.scale, x[:, :2, ::2, ::2]]


def scripted(tmp_path, module: nn.Module):
    torch.jit.save(torch.jit.script(module), tmp_path / "network.pt")
    return tmp_path / "network.pt"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_critic(tmp_path):
    critic = ScriptedCritic(scripted(tmp_path, Doubled()))
    assert critic.channels == [3, 2] and critic.names == ("map0", "map1")
    x = torch.rand(1, 3, 6, 6, requires_grad=True)
    critic(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    with pytest.raises(UserError, match="gives Tensor, expected a list of maps"):
        ScriptedCritic(scripted(tmp_path, nn.ReLU()))
    with pytest.raises(UserError, match=r"fails on images of shape \(1, 3, 64, 64\)"):
        ScriptedCritic(scripted(tmp_path, nn.Conv2d(4, 2, 1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda frozen: ResNetCritic("resnet18", frozen=frozen),
        lambda frozen: ConvEncoderCritic(4, 64, frozen=frozen),
    ],
)
def test_a_frozen_critic_gives_the_same_maps_for_ever(make):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    frozen, trained = nn.Sequential(make(True)).train(), nn.Sequential(make(False)).train()
    assert not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(frozen(x)[-1], frozen(x)[-1])
    before = {name: v.clone() for name, v in trained.state_dict().items()}
    trained(x)
    moved = [name for name, v in trained.state_dict().items() if not torch.equal(v, before[name])]
    assert moved  # running statistics, or spectral vectors
    sum(m.mean() for m in trained(x)).backward()
    assert all(p.grad is not None for p in trained.parameters())


@pytest.mark.parametrize(
    "make", [PixelCritic, lambda: VGG19Critic(None), lambda: ConvEncoderCritic(4, 64)]
)
def test_maps_of_less_depth(make):
    torch.manual_seed(0)
    critic, x = make(), torch.rand(1, 3, 32, 48)
    whole = critic(x)
    assert len(whole) == len(critic.names) == len(critic.channels)
    assert [m.shape[1] for m in whole] == critic.channels
    assert len(critic(x, depth=2)) == 2 and torch.equal(critic(x, depth=2)[1], whole[1])
