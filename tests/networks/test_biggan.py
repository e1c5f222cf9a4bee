"""BigGAN as published: parameter counts, keys, the way of z, the place of attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnce.networks import BigGANDiscriminator, BigGANGenerator
from fastnce.networks.conditional import SelfAttention


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("generator", "discriminator", "expected"),
    [
        ((32, 80, 10, 96, 128, 2), (32, 10, 96, 1, "2C", 512), (9_416_196, 2_517_186)),
        ((64, 100, 200, 80, 128, 3), (64, 200, 80, 1, "2C", 768), (17_335_204, 31_678_130)),
        ((128, 120, 1000, 96, 128, 4), (128, 1000, 96, 1, "2C", 1536), (70_433_988, 90_343_202)),
    ],
    ids=["cifar10", "tiny-imagenet", "imagenet"],
)
def test_published_parameter_counts(generator, discriminator, expected):
    with torch.device("meta"):
        g, d = BigGANGenerator(*generator), BigGANDiscriminator(*discriminator)
    assert (count(g), count(d)) == expected


def test_downsampling_blocks():
    with torch.device("meta"):
        by_size = {size: BigGANDiscriminator(size, 10, 8) for size in (16, 32, 64, 128, 256)}
    pattern = {
        size: "".join(
            "-T"[block.downsample]
            for (block,) in d.blocks
            if not isinstance(block, SelfAttention) and hasattr(block, "downsample")
        )
        for size, d in by_size.items()
    }
    assert pattern == {
        16: "T-",
        32: "T--",
        64: "TTT-",
        128: "TTTT-",
        256: "TTTTT-",
    }  # after the first, which does


SN = ("weight_orig", "weight_u", "weight_v")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
ATTENTION = {f"conv1x1_{name}.{part}" for name in ("theta", "phi", "g", "attn") for part in SN}


def below(prefix, names):
    return {f"{prefix}.{name}" for name in names}


def test_generator_keys():
    conv = (*SN, "bias")
    block = set().union(*(below(f"conv2d{i}", conv) for i in range(3)))
    for bn in ("bn1", "bn2"):
        block |= below(f"{bn}.bn", STATISTICS) | below(f"{bn}.gain", SN) | below(f"{bn}.bias", SN)
    expected = below("linear0", conv) | {"shared.weight"}
    for index in (0, 1, 3):
        expected |= below(f"blocks.{index}.0", block)
    expected |= below("blocks.2.0", ATTENTION | {"sigma"})
    expected |= below("bn4", ("weight", "bias", *STATISTICS)) | below("conv2d5", conv)
    assert set(BigGANGenerator(32, 80, 10, 8).state_dict()) == expected


def test_discriminator_keys():
    conv = (*SN, "bias")
    block = below("conv2d1", conv) | below("conv2d2", conv)
    expected = below("blocks.0.0", block | below("conv2d0", conv))
    expected |= below("blocks.1.0", ATTENTION | {"sigma"})
    expected |= below("blocks.2.0", block | below("conv2d0", conv))
    expected |= below("blocks.3.0", block) | below("blocks.4.0", block)
    expected |= below("linear1", conv) | below("linear2", conv) | below("embedding", SN)
    assert set(BigGANDiscriminator(32, 10, 8).state_dict()) == expected


def test_chunks_of_z():
    g = BigGANGenerator(32, 80, 10, 8)
    seen = []

    def keep(_module, args):
        seen.append(args[-1])

    g.linear0.register_forward_pre_hook(keep)
    for index in (0, 1, 3):
        g.blocks[index][0].register_forward_pre_hook(keep)
    z, labels = torch.randn(3, 80), torch.tensor([4, 9, 0])
    g(z, labels)
    assert torch.equal(seen[0], z[:, :20])
    for index in (1, 2, 3):
        condition = torch.cat([g.shared.weight[labels], z[:, 20 * index : 20 * index + 20]], dim=1)
        assert torch.equal(seen[index], condition)
    assert len(seen) == 4


def test_ends_of_the_generator():
    g = BigGANGenerator(16, 30, 4, 8)
    nn.init.normal_(g.bn4.bias)
    first, last = [], []
    g.blocks[0][0].register_forward_pre_hook(lambda _module, args: first.append(args[0]))
    g.blocks[-1][0].register_forward_hook(lambda _module, _args, output: last.append(output))
    z, labels = torch.randn(3, 30), torch.tensor([0, 1, 3])
    images = g(z, labels)
    mapped = F.linear(z[:, :10], g.linear0.weight, g.linear0.bias)
    torch.testing.assert_close(first[0], mapped.reshape(3, 32, 4, 4))
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


@pytest.mark.parametrize("after", [-1, 4])
def test_no_such_place(after):
    message = rf"attention_after={after} must be the number of a block, from 1 to 3, or 0"
    with pytest.raises(ValueError, match=f"BigGANGenerator: {message}"):
        BigGANGenerator(32, 80, 10, 8, attention_after=after)
    with pytest.raises(ValueError, match=r"BigGANDiscriminator: attention_after=5 must be .* to 4"):
        BigGANDiscriminator(32, 10, 8, attention_after=5)


def test_latent_dim_that_does_not_divide():
    with pytest.raises(ValueError, match=r"latent_dim=82 must be a multiple of 4, the number of"):
        BigGANGenerator(32, 82, 10, 8)


def test_norms():
    g, d = BigGANGenerator(32, 80, 10, 8), BigGANDiscriminator(32, 10, 8)
    layers = [
        (name, m)
        for network in (g, d)
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)
    ]
    assert [name for name, m in layers if not hasattr(m, "weight_orig")] == ["shared"]
    norms = [m for m in g.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-4, 0.1)}
    assert [m.affine for m in norms] == [False] * 6 + [True]
    hooks = [h for _, m in layers for h in m._forward_pre_hooks.values()]
    assert {h.eps for h in hooks} == {1e-6}
