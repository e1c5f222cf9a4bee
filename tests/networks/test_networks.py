"""Golden values, shapes, parameter counts, state-dict keys and taps of CUT's networks.

The golden numbers come from running the published implementation in fp32 on a CPU. Sums of sines cancel: single values of
the output differ by up to 4e-5 between two processors' fp32 convolutions. So ours run in fp64, which is the same everywhere,
and single values are compared to 2e-5, twice the error that the golden ones have.
"""

import pytest
import torch
from golden import sines
from torch import Tensor, nn

from fastnce.networks import PatchDiscriminator, PatchProjector, ResnetGenerator
from fastnce.networks.layers import Downsample, InstanceNorm, Upsample


def fill_with_sines(module: nn.Module) -> nn.Module:
    """Sets the j-th parameter to 0.05 * sines(step 0.7131, start 0.1 j)."""
    with torch.no_grad():
        for j, parameter in enumerate(module.parameters()):
            parameter.copy_(0.05 * sines(*parameter.shape, step=0.7131, start=0.1 * j))
    return module


def arange_image(size: int) -> Tensor:
    return torch.arange(float(size * size)).reshape(1, 1, size, size)


@pytest.mark.parametrize(
    ("size", "expected"), [(4, [2.5, 4, 8.5, 10]), (5, [3, 4.5, 6, 10.5, 12, 13.5, 18, 19.5, 21])]
)
def test_downsample_golden(size, expected):
    assert Downsample(1)(arange_image(size)).flatten().tolist() == expected


def test_upsample_golden():
    expected = [0, 0.25, 0.75, 1, 0.5, 0.75, 1.25, 1.5, 1.5, 1.75, 2.25, 2.5, 2, 2.25, 2.75, 3]
    assert Upsample(1)(arange_image(2)).flatten().tolist() == expected


@pytest.mark.parametrize("layer", [Downsample, Upsample])
def test_resampling_keeps_channels_apart(layer):
    x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([layer(1)(channel) for channel in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(layer(3)(x), alone)


def test_generator_golden():
    g = fill_with_sines(ResnetGenerator()).double()
    x = sines(1, 3, 64, 64, step=0.0137, start=0.3).double()
    with torch.no_grad():
        image, features = g(x, taps=[0, 4, 8, 12, 16])
    assert image.mean().item() == pytest.approx(-0.026105, abs=2e-6)
    assert image.std().item() == pytest.approx(0.206036, abs=2e-6)
    assert image[0, :, 10, 20].tolist() == pytest.approx([0.022712, 0.309359, 0.490316], abs=2e-5)
    golden = [
        (0.017592, 0.707949),
        (0.001489, 0.127465),
        (6.216e-5, 0.282113),
        (0.403966, 1.027085),
        (0.403966, 0.918496),
    ]
    for feature, (mean, std) in zip(features, golden, strict=True):
        assert feature.mean().item() == pytest.approx(mean, abs=2e-6)
        assert feature.std().item() == pytest.approx(std, abs=2e-6)


def test_discriminator_golden():
    d = fill_with_sines(PatchDiscriminator()).double()
    with torch.no_grad():
        logits = d(sines(1, 3, 64, 64, step=0.0137, start=0.3).double())
    assert logits.shape == (1, 1, 6, 6)
    assert logits.mean().item() == pytest.approx(0.052784, abs=2e-6)
    assert logits.std().item() == pytest.approx(0.224473, abs=2e-6)
    expected = [-0.147654, -0.065996, -0.007613]
    assert logits[0, 0, 0, :3].tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    "network, expected",
    [
        (ResnetGenerator(), 11_378_179),
        (PatchDiscriminator(), 2_764_737),
        (PatchProjector([3, 128, 256, 256, 256]), 560_384),
        (ResnetGenerator(base_channels=16, num_blocks=4), 346_371),
        (PatchDiscriminator(base_channels=32, num_layers=2, norm="none"), 167_649),
        (PatchDiscriminator(6, antialias=False, norm="batch"), 2_768_705),  # pix2pix's
    ],
)
def test_parameter_counts(network, expected):
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def keys(prefix, indices, parts=("weight", "bias")):
    return {f"{prefix}.{index}.{part}" for index in indices for part in parts}


def test_keys_are_the_published_ones():
    expected = keys("model", (1, 4, 8, 22, 26, 30)) | keys("model", (7, 11, 21, 25), ["filt"])
    for block in range(12, 21):
        expected |= keys(f"model.{block}.conv_block", (1, 5))
    assert set(ResnetGenerator().state_dict()) == expected
    plain = keys("model", (1, 4, 7, 12, 16, 20)) | keys("model", (11, 15), ["filt"])
    plain |= keys("model.10.conv_block", (1, 5))
    assert set(ResnetGenerator(antialias=False, num_blocks=1).state_dict()) == plain
    blurred = keys("model", (0, 3, 7, 11, 14)) | keys("model", (2, 6, 10), ["filt"])
    for norm in ("instance", "none"):
        assert set(PatchDiscriminator(norm=norm).state_dict()) == blurred
    pix2pix = PatchDiscriminator(6, antialias=False, norm="batch").state_dict()
    assert {key for key in pix2pix if key.endswith("bias")} == keys(
        "model", (0, 3, 6, 9, 11), ["bias"]
    )
    mlps = keys("mlp_0", (0, 2)) | keys("mlp_1", (0, 2))
    assert set(PatchProjector([3, 8]).state_dict()) == mlps


@pytest.mark.parametrize("antialias", [True, False])
def test_taps_of_forward_and_encode_agree_bitwise(antialias):
    torch.manual_seed(0)
    g = ResnetGenerator(base_channels=4, num_blocks=3, antialias=antialias)
    x = torch.randn(2, 3, 16, 16)
    for taps in ([0, 4, 8, 12], [2, 5, 8], [8], list(range(14))):
        image, features = g(x, taps=taps)
        assert torch.equal(image, g(x))
        encoded = g.encode(x, taps)
        assert len(features) == len(encoded) == len(taps)
        for one, other in zip(features, encoded, strict=True):
            assert torch.equal(one, other)


def test_taps_beside_a_norm_and_the_last_one():
    """That of a convolution is before its norm; that of a norm is after the ReLU; nothing is computed behind the last."""
    g = ResnetGenerator(base_channels=4, num_blocks=2)
    g.model[4].bias.data.fill_(3.0)
    (feature,) = g.encode(torch.zeros(1, 3, 16, 16), [4])
    assert torch.equal(feature, torch.full_like(feature, 3.0))
    g.model[13] = nn.Module()  # would raise when called
    assert len(g.encode(torch.zeros(1, 3, 16, 16), [0, 12])) == 2
    torch.manual_seed(0)
    plain = ResnetGenerator(base_channels=4, num_blocks=1, antialias=False)
    (feature,) = plain.encode(torch.randn(1, 3, 16, 16), [8])
    assert isinstance(plain.model[8], InstanceNorm) and feature.min() == 0


def test_errors():
    g = ResnetGenerator(base_channels=4, num_blocks=1)
    for taps in ([], [4, 0], [4, 4], [-1], [99]):
        with pytest.raises(ValueError, match="taps=.* ascending, distinct layer indices from 0 to"):
            g.encode(torch.zeros(1, 3, 16, 16), taps)
    with pytest.raises(ValueError, match="patches of 1 feature maps, expected 2"):
        PatchProjector([3, 8])([torch.zeros(1, 2, 3)])
    with pytest.raises(ValueError, match="norm='group' must be one of"):
        PatchDiscriminator(norm="group")
