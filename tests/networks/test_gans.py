"""What the three GAN families have in common: shapes, heads, gradients, memory format, precision, errors."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnce
from fastnce.networks import (
    BigGANDiscriminator,
    BigGANGenerator,
    DCGANDiscriminator,
    DCGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
)

FAMILIES = {
    "biggan": (BigGANGenerator, BigGANDiscriminator),
    "sngan": (SNGANGenerator, SNGANDiscriminator),
    "dcgan": (DCGANGenerator, DCGANDiscriminator),
}
LATENT = 60  # a multiple of 3, 4, 5 and 6 chunks
CLASSES = 5
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family, image_size=16, channels=1, **options):
    torch.manual_seed(0)
    g, d = FAMILIES[family]
    return (
        g(image_size, LATENT, CLASSES, 8, image_channels=channels),
        d(image_size, CLASSES, 8, image_channels=channels, **({"embed_dim": 12} | options)),
    )


def batch(g, count=4):
    z = torch.randn(count, LATENT, generator=torch.Generator().manual_seed(1))
    return z, torch.arange(count) % CLASSES


def contrastive(out, labels):
    return fastnce.conditional_contrastive(out.embedding, out.proxy, labels)


@every_family
@pytest.mark.parametrize("image_size", [16, 32, 64, 128])
def test_shapes(family, image_size):
    with torch.device("meta"):
        g, d = pair(family, image_size, channels=3)
        images = g(torch.empty(2, LATENT), torch.empty(2, dtype=torch.int64))
        out = d(images, torch.empty(2, dtype=torch.int64))
    assert (g.image_size, g.latent_dim, g.num_classes, g.image_channels) == (image_size, 60, 5, 3)
    assert (d.image_size, d.num_classes, d.image_channels) == (image_size, 5, 3)
    assert images.shape == (2, 3, image_size, image_size)
    assert out.adversarial.shape == (2,)
    assert out.features.shape == (2, d.feature_dim)
    assert out.embedding.shape == out.proxy.shape == (2, 12)
    assert out.class_logits is None


@every_family
@pytest.mark.parametrize("image_size", [20, 24, 28, 48, 96, 112, 160, 256])
def test_sizes_between_the_published_ones(family, image_size):
    """The layers of the power of two below, on a first map of 4 to 7; its weights differ in the first layer alone."""
    nominal = 1 << image_size.bit_length() - 1
    latent = 420  # a multiple of every number of chunks
    with torch.device("meta"):
        g, d = (
            network(image_size, *rest, CLASSES, 8)
            for network, rest in zip(FAMILIES[family], ((latent,), ()), strict=True)
        )
        labels = torch.empty(2, dtype=torch.int64)
        images = g(torch.empty(2, latent), labels)
        features = d(images, labels).features
        same_g = FAMILIES[family][0](nominal, latent, CLASSES, 8)
        same_d = FAMILIES[family][1](nominal, CLASSES, 8)
    assert images.shape == (2, 3, image_size, image_size)
    assert features.shape == (2, same_d.feature_dim)
    assert shapes(d) == shapes(same_d)
    differing = {name for name, shape in shapes(g).items() if shapes(same_g)[name] != shape}
    first = {"linear0.weight", "linear0.weight_orig", "linear0.weight_u", "linear0.bias"}
    assert differing <= first and bool(differing) == (image_size != nominal)
    weight = g.linear0.bias
    assert (
        weight.numel() * (4 * nominal) ** 2 == same_g.linear0.bias.numel() * (4 * image_size) ** 2
    )


def shapes(network):
    return {name: value.shape for name, value in network.state_dict().items()}


@every_family
def test_images_are_in_range_and_depend_on_their_label(family):
    g, _ = pair(family)
    z, labels = batch(g)
    g(z, labels)  # so that the running statistics are not all of the first batch's making
    g.eval()
    images = g(z, labels)
    assert images.abs().max() <= 1
    assert images.std() > 0.01
    other = g(z, (labels + (labels == 2)) % CLASSES)
    assert [torch.equal(a, b) for a, b in zip(images, other, strict=True)] == [1, 1, 0, 1]


@every_family
def test_compiles_in_one_graph(family):
    """Of which the check of the labels' values is no part. The graph runs uncompiled, which is quick."""
    g, d = pair(family)
    z, labels = batch(g)
    images = torch.compile(g.eval(), backend="eager", fullgraph=True)(z, labels)
    torch.testing.assert_close(images, g(z, labels))
    out = torch.compile(d.eval(), backend="eager", fullgraph=True)(images, labels)
    torch.testing.assert_close(out.embedding, d(images, labels).embedding)


@every_family
@pytest.mark.parametrize("conditioning", ["none", "2C", "D2DCE", "AC", "PD"])
def test_heads(family, conditioning):
    _, d = pair(family, conditioning=conditioning)
    d.eval()
    images, labels = torch.randn(3, 1, 16, 16), torch.tensor([4, 0, 4])
    adversarial, h, embedding, proxy, class_logits = d(images, labels)
    logits = F.linear(h, d.linear1.weight, d.linear1.bias)[:, 0]
    if conditioning in ("2C", "D2DCE"):
        assert d.linear2.bias is not None
        torch.testing.assert_close(embedding, F.linear(h, d.linear2.weight, d.linear2.bias))
        torch.testing.assert_close(proxy, d.embedding.weight[labels])
    else:
        assert embedding is proxy is None
    if conditioning == "AC":
        assert d.linear2.bias is None
        torch.testing.assert_close(class_logits, h @ d.linear2.weight.t())
    else:
        assert class_logits is None
    if conditioning == "PD":
        projection = torch.stack([h[i] @ d.embedding.weight[y] for i, y in enumerate(labels)])
        assert projection.abs().min() > 1e-4
        logits = logits + projection
    torch.testing.assert_close(adversarial, logits)
    heads = {name.split(".")[0] for name in d.state_dict()} - {"blocks", "layers"}
    expected = {"AC": {"linear2"}, "PD": {"embedding"}, "none": set()}
    assert heads == {"linear1"} | expected.get(conditioning, {"linear2", "embedding"})


@every_family
def test_features_are_sums_over_positions(family):
    _, d = pair(family)
    maps = []
    last = d.layers if family == "dcgan" else d.blocks[-1][0]
    last.register_forward_hook(lambda _module, _args, output: maps.append(output))
    features = d(torch.randn(2, 1, 16, 16), torch.tensor([0, 1])).features
    summed = maps[0] if family == "dcgan" else maps[0].relu()
    assert maps[0].shape[2:] == (4, 4)
    torch.testing.assert_close(features, summed.flatten(2).sum(2))


@every_family
@pytest.mark.parametrize("conditioning", ["none", "2C", "AC", "PD"])
def test_gradients_of_both_steps(family, conditioning):
    g, d = pair(family, conditioning=conditioning)
    z, labels = batch(g)
    real = torch.randn(4, 1, 16, 16)

    def class_loss(out):
        if conditioning == "2C":
            return contrastive(out, labels)
        return F.cross_entropy(out.class_logits, labels) if conditioning == "AC" else 0.0

    fake = g(z, labels)
    on_real, on_fake = d(real, labels), d(fake.detach(), labels)
    hinge = F.relu(1 - on_real.adversarial).mean() + F.relu(1 + on_fake.adversarial).mean()
    (hinge + class_loss(on_real)).backward()
    check_gradients(d)
    judged = d(fake, labels)
    (class_loss(judged) - judged.adversarial.mean()).backward()
    check_gradients(g)


def check_gradients(network):
    """Every gradient is finite, and that of no weight is 0 but those of attention behind its sigma = 0.

    Those of biases may be: before a batch norm, or where the hinge of real and fake cancel.
    """
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.endswith(("weight", "weight_orig", "sigma")) and "conv1x1" not in name:
            assert parameter.grad.any(), name


@every_family
def test_channels_last(family):
    """The same numbers, and no layer behind the first convolution falls back to the other format."""
    results, others = [], set()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        g, d = (x.double().to(memory_format=memory_format) for x in pair(family, channels=3))
        if memory_format == torch.channels_last:
            for name, module in [*g.named_modules(), *d.named_modules()]:
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                    module.register_forward_hook(functools.partial(note_format, others, name))
        z, labels = batch(g)
        images = g(z.double(), labels)
        out = d(images, labels)
        (contrastive(out, labels) - out.adversarial.sum()).backward()
        gradients = [p.grad for p in [*g.parameters(), *d.parameters()]]
        results.append((images, out.adversarial, out.features, gradients))
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    # The first norm's input comes from a linear layer.
    assert others <= {"blocks.0.0.bn1.bn"}


def note_format(others, name, _module, _args, output):
    if not output.is_contiguous(memory_format=torch.channels_last):
        others.add(name)


@every_family
def test_bf16_autocast(family):
    g, d = pair(family)
    z, labels = batch(g)
    g.eval(), d.eval()
    images = g(z, labels)
    out = d(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        images_16 = g(z, labels)
        out_16 = d(images_16, labels)
        loss = contrastive(out_16, labels) - out_16.adversarial.mean()
    assert images_16.dtype == out_16.adversarial.dtype == torch.bfloat16
    # Some ten layers of 8 bits.
    assert (images_16 - images).square().mean().sqrt() < 0.02 * images.std()
    error = (out_16.features - out.features).norm() / out.features.norm()
    assert error < 0.03
    loss.backward()
    check_gradients(g)
    g.train(), d.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert d(g(z, labels), labels).adversarial.isfinite().all()


@every_family
def test_double_backward_of_r1(family):
    """The gradient of the penalty |d D / d x|^2 against its finite difference along a random direction."""
    _, d = pair(family)
    d.double().eval()
    if family == "biggan":
        nn.init.constant_(d.blocks[1][0].sigma, 0.5)
    real = torch.randn(2, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1])

    def penalty():
        (gradient,) = torch.autograd.grad(
            d(real, labels).adversarial.sum(), real, create_graph=True
        )
        return gradient.square().sum()

    parameters = [p for name, p in d.named_parameters() if name.startswith(("blocks", "layers"))]
    gradients = torch.autograd.grad(penalty(), parameters, materialize_grads=True)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((a * b).sum() for a, b in zip(gradients, direction, strict=True)).item()
    step, values = 1e-7, []
    for sign in (1, -2):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=sign * step)
        values.append(penalty().item())
    assert abs(slope) > 1e-3
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("value", [5, 12, -1])
@every_family
def test_a_label_out_of_range(family, value):
    g, d = pair(family)
    z, labels = batch(g)
    labels[2] = value
    message = rf"labels contain {value}, expected class indices from 0 to 4 \(num_classes=5\)"
    with pytest.raises(ValueError, match=f"^{type(g).__name__}: {message}"):
        g(z, labels)
    with pytest.raises(ValueError, match=f"^{type(d).__name__}: {message}"):
        d(torch.zeros(4, 1, 16, 16), labels)


@every_family
def test_wrong_inputs(family):
    g, d = pair(family)
    z, labels = batch(g)
    images = torch.zeros(4, 1, 16, 16)
    with pytest.raises(ValueError, match=r"z must have shape \(N, latent_dim=60\), got \(4, 59\)"):
        g(z[:, 1:], labels)
    for wrong in (labels[1:], labels[:, None], labels.int(), labels.float()):
        with pytest.raises(ValueError, match=r"labels must be int64 of shape \(4,\), got torch\."):
            g(z, wrong)
        with pytest.raises(ValueError, match=r"labels must be int64 of shape \(4,\), got torch\."):
            d(images, wrong)
    for wrong in (images[..., 1:], images[0], images.expand(4, 3, 16, 16)):
        with pytest.raises(ValueError, match=r"images must have shape \(N, 1, 16, 16\), got \("):
            d(wrong, labels)


@every_family
def test_wrong_options(family):
    g, d = FAMILIES[family]
    for network, latent in ((g, [LATENT]), (d, [])):
        for size, near in ((50, "48 or 56"), (33, "32 or 40"), (8, "16"), (512, "448")):
            with pytest.raises(ValueError, match=rf"image_size={size} must be.*Use {near}\."):
                network(size, *latent, CLASSES, 8)
    with pytest.raises(ValueError, match=r"conditioning='ACGAN' must be one of \('none', '2C',"):
        d(16, CLASSES, 8, conditioning="ACGAN")


@pytest.mark.parametrize("family", ["sngan", "dcgan"])
def test_norms_of_the_discriminator(family):
    with pytest.raises(ValueError, match=r"norm='instance' must be one of \('spectral',"):
        pair(family, norm="instance")
    for norm in ("spectral", "batch", "none"):
        _, d = pair(family, norm=norm)
        layers = [m for m in d.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
        assert {hasattr(layer, "weight_orig") for layer in layers} == {norm == "spectral"}
        norms = [m for m in d.modules() if isinstance(m, nn.BatchNorm2d)]
        # DCGAN: behind 4 of 5 convolutions. SNGAN: 2 in the first block, 3 in those with a convolution in their skip.
        expected = {"dcgan": 4, "sngan": 2 + 3 + 3}[family]
        assert len(norms) == (expected if norm == "batch" else 0)
        assert all(layer.eps == 1e-4 for layer in norms)
        out = d(torch.randn(2, 1, 16, 16), torch.tensor([0, 1]))
        assert out.adversarial.isfinite().all()


def convolutions(network):
    kinds = nn.Conv2d | nn.ConvTranspose2d
    layers = [m for name, m in network.named_modules() if isinstance(m, kinds)]
    return [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in layers]


def test_layers_of_the_published_dcgan():
    """Table 3 of the SNGAN paper."""
    with torch.device("meta"):
        g, d = DCGANGenerator(32, 128, 10, 64), DCGANDiscriminator(32, 10, 64)
    assert g.linear0.weight.shape == (4 * 4 * 512, 128)
    assert convolutions(g) == [(512, 256, 4, 2), (256, 128, 4, 2), (128, 64, 4, 2), (64, 3, 3, 1)]
    assert convolutions(d) == [
        (3, 64, 3, 1),
        (64, 64, 4, 2),
        (64, 128, 3, 1),
        (128, 128, 4, 2),
        (128, 256, 3, 1),
        (256, 256, 4, 2),
        (256, 512, 3, 1),
    ]
    assert [m.negative_slope for m in d.modules() if isinstance(m, nn.LeakyReLU)] == [0.1] * 7


def test_layers_of_the_published_sngan():
    """The residual networks for CIFAR-10 and ImageNet in the SNGAN paper: channels after each block."""
    with torch.device("meta"):
        g, d = SNGANGenerator(32, 128, 10, 64), SNGANDiscriminator(32, 10, 64)
        g5, d5 = SNGANGenerator(128, 128, 1000, 64), SNGANDiscriminator(128, 1000, 64)
    assert g.linear0.weight.shape == (4 * 4 * 256, 128)
    assert g5.linear0.weight.shape == (4 * 4 * 1024, 128)
    assert widths(g) == [256] * 3
    assert widths(d) == [128] * 4
    assert widths(g5) == [1024, 512, 256, 128, 64]
    assert widths(d5) == [64, 128, 256, 512, 1024, 1024]
    assert [block.downsample for (block,) in d.blocks[1:]] == [True, False, False]
    assert [block.downsample for (block,) in d5.blocks[1:]] == [True] * 4 + [False]
    assert {m.eps for m in g.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-4}


def widths(network):
    return [block.conv2d2.out_channels for (block,) in network.blocks]


@pytest.mark.parametrize("spectral", [False, True])
def test_spectral_norm_of_the_sngan_generator(spectral):
    g = SNGANGenerator(16, 8, 3, 8, spectral_norm=spectral)
    layers = [m for m in g.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {hasattr(layer, "weight_orig") for layer in layers} == {spectral}
