"""The class-conditional GANs: shapes, heads, gradients, formats, errors; layers and blocks against plain formulas; what was published."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from second_derivatives import check_penalty
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
from fastnce.networks.conditional_gans import (
    ConditionalBatchNorm,
    DiscriminatorBlock,
    FirstDiscriminatorBlock,
    GeneratorBlock,
    SelfAttention,
    conv2d,
    embedding,
    linear,
    upsample_conv2d,
)
from fastnce.systems.adversarial import r1

FAMILIES = {
    "biggan": (BigGANGenerator, BigGANDiscriminator),
    "sngan": (SNGANGenerator, SNGANDiscriminator),
    "dcgan": (DCGANGenerator, DCGANDiscriminator),
}
LATENT = 60  # a multiple of 3, 4, 5 and 6 chunks
CLASSES = 5
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family, image_size=16, channels=1, latent=LATENT, **options):
    torch.manual_seed(0)
    g, d = FAMILIES[family]
    return (
        g(image_size, latent, CLASSES, 8, image_channels=channels),
        d(image_size, CLASSES, 8, image_channels=channels, **({"embed_dim": 12} | options)),
    )


def batch(g, count=4):
    z = torch.randn(count, LATENT, generator=torch.Generator().manual_seed(1))
    return z, torch.arange(count) % CLASSES


def contrastive(out, labels):
    return fastnce.conditional_contrastive(out.embedding, out.proxy, labels)


def note_last_map(family, d):
    """The map in front of the heads, noted at each forward."""
    maps = []
    last = d.layers if family == "dcgan" else d.blocks[-1][0]
    last.register_forward_hook(lambda _module, _args, output: maps.append(output))
    return maps


@every_family
@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
def test_shapes(family, image_size):
    with torch.device("meta"):
        g, d = pair(family, image_size, channels=3, latent=420)
        maps = note_last_map(family, d)
        images = g(torch.empty(2, 420), torch.empty(2, dtype=torch.int64))
        out = d(images, torch.empty(2, dtype=torch.int64))
    assert (g.image_size, g.latent_dim, g.num_classes, g.image_channels) == (image_size, 420, 5, 3)
    assert (d.image_size, d.num_classes, d.image_channels) == (image_size, 5, 3)
    assert images.shape == (2, 3, image_size, image_size)
    # The published residual networks for 32 pixels end in a map of 8x8.
    side = 8 if image_size == 32 and family != "dcgan" else 4
    assert maps[0].shape == (2, d.feature_dim, side, side)
    assert out.adversarial.shape == (2,) and out.features.shape == (2, d.feature_dim)
    assert out.embedding.shape == out.proxy.shape == (2, 12)
    assert out.class_logits is None


@every_family
@pytest.mark.parametrize("image_size", [20, 48, 112])
def test_sizes_between_the_published_ones(family, image_size):
    """The layers of the power of two below, on a first map of 5 to 7; its weights differ in the first layer alone."""
    nominal = 1 << image_size.bit_length() - 1
    with torch.device("meta"):
        g, d = pair(family, image_size, channels=3, latent=420)
        labels = torch.empty(2, dtype=torch.int64)
        images = g(torch.empty(2, 420), labels)
        features = d(images, labels).features
        same_g, same_d = pair(family, nominal, channels=3, latent=420)
    assert images.shape == (2, 3, image_size, image_size)
    assert features.shape == (2, same_d.feature_dim)
    assert shapes(d) == shapes(same_d)
    differing = {name for name, shape in shapes(g).items() if shapes(same_g)[name] != shape}
    first = {"linear0.weight", "linear0.weight_orig", "linear0.weight_u", "linear0.bias"}
    assert differing and differing <= first
    ratio = g.linear0.bias.numel() / same_g.linear0.bias.numel()
    assert ratio == (image_size / nominal) ** 2


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
    last_maps = note_last_map(family, d)
    images, labels = torch.randn(3, 1, 16, 16), torch.tensor([4, 0, 4])
    adversarial, h, embedding, proxy, class_logits = d(images, labels)
    last = last_maps[0] if family == "dcgan" else last_maps[0].relu()
    torch.testing.assert_close(h, last.flatten(2).sum(2))
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
@pytest.mark.parametrize("conditioning", ["none", "2C", "AC", "PD"])
def test_every_weight_has_a_gradient(family, conditioning):
    g, d = pair(family, conditioning=conditioning)
    z, labels = batch(g)
    out = d(g(z, labels), labels)
    loss = -out.adversarial.mean()
    if conditioning == "2C":
        loss = loss + contrastive(out, labels)
    elif conditioning == "AC":
        loss = loss + F.cross_entropy(out.class_logits, labels)
    loss.backward()
    check_gradients(g)
    check_gradients(d)


def check_gradients(network):
    """Every gradient is finite, and that of no weight is 0 but those of attention behind its sigma = 0.

    Those of biases before a batch norm may be.
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


@every_family
def test_double_backward_of_r1(family):
    _, d = pair(family, conditioning="none")
    d.eval()
    if family == "biggan":
        nn.init.constant_(d.blocks[1][0].sigma, 0.5)
    real = torch.randn(2, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    check_penalty(d, lambda judge: r1(judge(real, torch.tensor([0, 1])).adversarial, real))


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


def test_wrong_options_of_biggan():
    with pytest.raises(ValueError, match="latent_dim=82 must be a multiple of 4"):
        BigGANGenerator(32, 82, 10, 8)
    for after in (-1, 4):
        with pytest.raises(ValueError, match=f"BigGANGenerator: attention_after={after}.* 1 to 3"):
            BigGANGenerator(32, 80, 10, 8, attention_after=after)
    with pytest.raises(ValueError, match="BigGANDiscriminator: attention_after=5.* to 4"):
        BigGANDiscriminator(32, 10, 8, attention_after=5)
    with pytest.raises(ValueError, match="channels=12 must be a multiple of 8"):
        SelfAttention(12, spectral=True)


@pytest.mark.parametrize("family", ["sngan", "dcgan"])
def test_norms_of_the_discriminator(family):
    with pytest.raises(ValueError, match=r"norm='instance' must be one of \('spectral',"):
        pair(family, norm="instance")
    for norm in ("spectral", "batch", "none"):
        _, d = pair(family, norm=norm)
        assert {hasattr(x, "weight_orig") for x in weighted(d)} == {norm == "spectral"}
        norms = [m for m in d.modules() if isinstance(m, nn.BatchNorm2d)]
        # DCGAN: behind 4 of 5 convolutions. SNGAN: 2 in the first block, 3 in those with a convolution in their skip.
        expected = {"dcgan": 4, "sngan": 2 + 3 + 3}[family]
        assert len(norms) == (expected if norm == "batch" else 0)
        assert all(layer.eps == 1e-4 for layer in norms)
        out = d(torch.randn(2, 1, 16, 16), torch.tensor([0, 1]))
        assert out.adversarial.isfinite().all()


def weighted(network):
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]


def test_norms_of_the_generators_and_of_biggan():
    for spectral in (False, True):
        g = SNGANGenerator(16, 8, 3, 8, spectral_norm=spectral)
        assert {hasattr(x, "weight_orig") for x in weighted(g)} == {spectral}
    g, d = pair("biggan", 32)
    plain = [x for network in (g, d) for x in weighted(network) if not hasattr(x, "weight_orig")]
    assert plain == [g.shared]
    norms = [m for m in g.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-4, 0.1)}
    assert [m.affine for m in norms] == [False] * 6 + [True]


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


@pytest.mark.parametrize(
    ("generator", "discriminator", "expected"),
    [
        ((32, 80, 10, 96, 128, 2), (32, 10, 96, 1, "2C", 512), (9_416_196, 2_517_186)),
        ((64, 100, 200, 80, 128, 3), (64, 200, 80, 1, "2C", 768), (17_335_204, 31_678_130)),
        ((128, 120, 1000, 96, 128, 4), (128, 1000, 96, 1, "2C", 1536), (70_433_988, 90_343_202)),
    ],
    ids=["cifar10", "tiny-imagenet", "imagenet"],
)
def test_published_parameter_counts_of_biggan(generator, discriminator, expected):
    with torch.device("meta"):
        networks = BigGANGenerator(*generator), BigGANDiscriminator(*discriminator)
    assert tuple(sum(p.numel() for p in x.parameters()) for x in networks) == expected


SN = ("weight_orig", "weight_u", "weight_v")
NORM = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
NORM |= {f"{part}.{name}" for part in ("gain", "bias") for name in SN}
ATTENTION = {f"conv1x1_{name}.{part}" for name in ("theta", "phi", "g", "attn") for part in SN}


def below(prefix, names):
    return {f"{prefix}.{name}" for name in names}


def test_biggans_keys():
    conv = (*SN, "bias")
    block = set().union(*(below(f"conv2d{i}", conv) for i in range(3)))
    norms = below("bn1", NORM) | below("bn2", NORM)
    expected = below("linear0", conv) | {"shared.weight"}
    for index in (0, 1, 3):
        expected |= below(f"blocks.{index}.0", block | norms)
    expected |= below("blocks.2.0", ATTENTION | {"sigma"})
    bn4 = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= below("bn4", bn4) | below("conv2d5", conv)
    assert set(BigGANGenerator(32, 80, 10, 8).state_dict()) == expected

    expected = below("blocks.1.0", ATTENTION | {"sigma"})
    for index in (0, 2, 3, 4):
        # The blocks that keep channels and size have no convolution in their skip.
        skip = below("conv2d0", conv) if index > 2 else set()
        expected |= below(f"blocks.{index}.0", block - skip)
    expected |= below("linear1", conv) | below("linear2", conv) | below("embedding", SN)
    assert set(BigGANDiscriminator(32, 10, 8).state_dict()) == expected


def test_chunks_of_z_and_the_ends_of_the_generator():
    g = BigGANGenerator(16, 30, 4, 8, attention_after=0)
    nn.init.normal_(g.bn4.bias)
    first, conditions, last = [], [], []
    for (block,) in g.blocks:
        block.register_forward_pre_hook(lambda _module, args: conditions.append(args[1]))
    g.blocks[0][0].register_forward_pre_hook(lambda _module, args: first.append(args[0]))
    g.blocks[-1][0].register_forward_hook(lambda _module, _args, output: last.append(output))
    z, labels = torch.randn(3, 30), torch.tensor([0, 1, 3])
    images = g(z, labels)
    mapped = F.linear(z[:, :10], g.linear0.weight, g.linear0.bias)
    torch.testing.assert_close(first[0], mapped.reshape(3, 32, 4, 4))
    for chunk, condition in zip(z.split(10, 1)[1:], conditions, strict=True):
        assert torch.equal(condition, torch.cat([g.shared.weight[labels], chunk], dim=1))
    h = F.relu(F.batch_norm(last[0], None, None, g.bn4.weight, g.bn4.bias, True, eps=1e-4))
    expected = F.conv2d(h, g.conv2d5.weight, g.conv2d5.bias, padding=1).tanh()
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_place_of_attention(after):
    with torch.device("meta"):
        networks = (
            BigGANGenerator(64, 100, 10, 8, attention_after=after),
            BigGANDiscriminator(64, 10, 8, attention_after=after),
        )
    for network, width in zip(networks, ((8, 4, 2), (1, 2, 4)), strict=True):
        places = [
            i for i, (layer,) in enumerate(network.blocks) if isinstance(layer, SelfAttention)
        ]
        assert places == ([after] if after else [])
        if after:
            attention = network.blocks[after][0]
            assert attention.conv1x1_theta.in_channels == 8 * width[after - 1]


@pytest.fixture
def fp64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


in_fp64 = pytest.mark.usefixtures("fp64")


@in_fp64
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: conv2d(3, 8, 3, spectral=True), torch.zeros(2, 3, 5, 5)),
        (lambda: linear(6, 4, spectral=True), torch.zeros(2, 6)),
        (lambda: embedding(7, 5, spectral=True), torch.tensor([3, 6])),
    ],
)
def test_a_fresh_layer_is_normalised_in_eval_mode(layer, x):
    """Orthogonal weights have singular values of 1; random u and v would say about 0."""
    layer = layer()
    copy.deepcopy(layer)
    layer.eval()(x.to(layer.weight_orig.dtype) if x.is_floating_point() else x)
    torch.testing.assert_close(layer.weight, layer.weight_orig.data)


@in_fp64
def test_initialisation():
    layers = [
        conv2d(2, 18, 3, spectral=False),
        conv2d(4, 18, 3, spectral=False),
        linear(6, 4, spectral=False),
        embedding(3, 5, spectral=False),
        upsample_conv2d(2, 3),
    ]
    for layer in layers:
        matrix = layer.weight.flatten(1)
        small = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
        torch.testing.assert_close(small, torch.eye(len(small)))
        assert getattr(layer, "bias", None) is None or not layer.bias.any()


@in_fp64
@pytest.mark.parametrize("spectral", [False, True])
def test_conditional_batch_norm(spectral):
    norm = ConditionalBatchNorm(3, 4, spectral=spectral)
    x, condition = torch.randn(2, 3, 5, 4) * 0.01 + 2, torch.randn(2, 4)
    y = norm(x, condition)
    gain = torch.einsum("nk,ck->nc", condition, norm.gain.weight)[:, :, None, None]
    bias = torch.einsum("nk,ck->nc", condition, norm.bias.weight)[:, :, None, None]
    # The variance is as small as the eps: another eps would show.
    normed = F.batch_norm(x, None, None, training=True, eps=1e-4)
    torch.testing.assert_close(y, normed * (1 + gain) + bias)
    torch.testing.assert_close(norm.bn.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))
    torch.testing.assert_close(norm.bn.running_mean, 0.1 * x.mean((0, 2, 3)))
    keys = {"weight_orig", "weight_u", "weight_v"} if spectral else {"weight"}
    assert set(norm.gain.state_dict()) == set(norm.bias.state_dict()) == keys


@in_fp64
def test_self_attention():
    attention = SelfAttention(16, spectral=True)
    x = torch.randn(2, 16, 4, 6)
    torch.testing.assert_close(attention(x), x)  # sigma is 0
    nn.init.constant_(attention.sigma, 0.7)
    y = attention(x)
    conv = {name: child.weight[:, :, 0, 0] for name, child in attention.named_children()}
    theta, phi, g = (conv[f"conv1x1_{name}"] @ x.flatten(2) for name in ("theta", "phi", "g"))
    phi, g = (F.max_pool2d(t.unflatten(2, (4, 6)), 2).flatten(2) for t in (phi, g))
    attended = F.scaled_dot_product_attention(theta.mT, phi.mT, g.mT, scale=1.0).mT
    assert attended.shape == (2, 8, 24)
    expected = (conv["conv1x1_attn"] @ attended).unflatten(2, (4, 6))
    torch.testing.assert_close(y, x + 0.7 * expected)


def with_random_vectors(block):
    """The block with biases and norms that are not 0 and 1."""
    for parameter in block.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return block


def convolved(layer, x):
    """The layer with its weight of the last forward, without another power iteration."""
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.padding)


def normed(layer, x):
    """Batch norm; without weights the layer stands for none."""
    if isinstance(layer, nn.Identity):
        return x
    return F.batch_norm(x, None, None, layer.weight, layer.bias, training=True, eps=1e-4)


@in_fp64
@pytest.mark.parametrize("kind", ["spectral", "none", "batch"])
@pytest.mark.parametrize(("in_channels", "downsample"), [(4, False), (4, True), (6, False)])
def test_discriminator_block(kind, in_channels, downsample):
    """It skips the ReLU of its input; with batch norm the input itself."""
    block = with_random_vectors(DiscriminatorBlock(in_channels, 4, kind, downsample=downsample))
    x = torch.randn(2, in_channels, 6, 6)
    before = x.clone()
    y = block(x)
    h = convolved(block.conv2d1, F.relu(normed(block.bn1, x)))
    expected = convolved(block.conv2d2, F.relu(normed(block.bn2, h)))
    skipped = x if kind == "batch" else F.relu(x)
    has_conv = downsample or in_channels != 4
    expected += convolved(block.conv2d0, normed(block.bn0, skipped)) if has_conv else skipped
    assert hasattr(block, "conv2d0") == has_conv
    torch.testing.assert_close(y, F.avg_pool2d(expected, 2) if downsample else expected)
    assert torch.equal(x, before)


@in_fp64
@pytest.mark.parametrize("kind", ["spectral", "batch"])
def test_first_discriminator_block_skips_its_input(kind):
    block = with_random_vectors(FirstDiscriminatorBlock(3, 4, kind))
    x = torch.randn(2, 3, 6, 6)
    y = block(x)
    h = normed(block.bn1, convolved(block.conv2d1, x))
    skip = normed(block.bn0, F.avg_pool2d(x, 2))
    expected = F.avg_pool2d(convolved(block.conv2d2, F.relu(h)), 2) + convolved(block.conv2d0, skip)
    torch.testing.assert_close(y, expected)


@in_fp64
def test_generator_block():
    block = with_random_vectors(GeneratorBlock(6, 4, 5, spectral=True))
    x, condition = torch.randn(2, 6, 3, 4), torch.randn(2, 5)
    y = block(x, condition)
    block.eval()  # keeps the singular vectors where they are
    for layer in (block.bn1.bn, block.bn2.bn):
        layer.train()
    doubled = F.relu(block.bn1(x, condition)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    h = F.relu(block.bn2(convolved(block.conv2d1, doubled), condition))
    skip = convolved(block.conv2d0, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(y, convolved(block.conv2d2, h) + skip)
