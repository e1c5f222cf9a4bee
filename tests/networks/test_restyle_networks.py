"""Golden values, sizes and keys of the networks around ReStyle's generator; the golden numbers are of the published code in fp32."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import fill_styles, sines
from pictures import scripted
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import RESNETS, ResNetEncoder
from fastnce.networks.perceptual import (
    LPIPS,
    AlexNetCritic,
    IdentityLoss,
    MoCoLoss,
    ScriptedSimilarity,
    w_norm,
)
from fastnce.networks.restyle_encoder import (
    LatentDiscriminator,
    MapToStyle,
    build_encoder,
    grouped_styles,
)


def golden(*values: float):
    return pytest.approx(list(values), rel=1e-4, abs=5e-6)


def near(value: float):
    return pytest.approx(value, rel=1e-4)


def moments(x: Tensor) -> list[float]:
    """Mean and population standard deviation of all elements."""
    return [x.mean().item(), x.std(correction=0).item()]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def pictures(channels: int = 6) -> Tensor:
    return sines(2, 6, 64, 64, step=0.0137, start=0.3)[:, :channels]


def test_map_to_style():
    block = fill_styles(MapToStyle(8, 8, 16))
    found = block(sines(2, 8, 16, 16, step=0.0137, start=0.3))
    assert found[1, :4].tolist() == golden(0.194158, 0.011224, 0.174104, -0.173725)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "training", "evaluating", "last_map", "stages"),
    [
        (
            "ir-se50",
            (-0.000424, 0.074098, 0.046597, 0.004670, -0.076143, -0.106903),
            (-0.000899, 0.073871, 0.069214, 0.009035, -0.060425, -0.109434),
            (-0.019821, 1.336138),
            {
                0: (-0.002055, 0.073218, 0.067695, 0.027878, 0.040063),
                1: (-0.001982, 0.081842),
                2: (-0.002215, 0.090633),
                3: (-0.002028, 0.097978, 0.176155, 0.042315, -0.071961),
                4: (-0.002028, 0.097978, 0.176155, 0.042315, -0.071961),
            },
        ),
        (
            "resnet34",
            (-0.000531, 0.076015, 0.067303, -0.065846, -0.002405, 0.070072),
            (-0.000053, 0.073379, 0.058270, -0.076520, 0.019845, 0.077288),
            None,
            {
                0: (-0.000576, 0.073071),
                1: (-0.000296, 0.082606),
                2: (-0.000472, 0.092213),
                3: (-0.001366, 0.098801, -0.152133, 0.068792, 0.023931),
            },
        ),
    ],
)
def test_encoders(kind, training, evaluating, last_map, stages):
    """An encoder of four styles; its first three make the psp one of the golden values."""
    encoder = fill_styles(build_encoder(kind, 4, 6, "e4e"))
    assert encoder.stage == 4
    encoder.head, encoder.num_styles = "psp", 3
    for mode, expected in ((True, training), (False, evaluating)):
        w = encoder.train(mode)(pictures())
        assert [*moments(w), *w[1, 2, :4].tolist()] == golden(*expected)
    if last_map:
        assert moments(encoder.maps(pictures())[-1]) == golden(*last_map)
    encoder.head, encoder.num_styles = "e4e", 4
    for encoder.stage, expected in stages.items():
        w = encoder(pictures())
        assert [*moments(w), *w[1, 3, :3].tolist()][: len(expected)] == golden(*expected)
        later = w[:, encoder.stage + 1 :]
        assert torch.equal(later, w[:, :1].expand_as(later))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "tensors", "values", "of_all", "rows"),
    [
        (
            *("fpn-ir-se50", 325, 122_921_664, (-0.000453, 0.074633)),
            [(0.075249, 0.032704), (-0.078521, -0.045767), (0.042669, -0.159510)],
        ),
        (
            *("fpn-resnet34", 205, 113_256_320, (-0.000782, 0.074758)),
            [(-0.007510, -0.009309), (0.165006, 0.090261), (0.066023, -0.049044)],
        ),
    ],
)
def test_feature_pyramids(kind, tensors, values, of_all, rows):
    encoder = fill_styles(build_encoder(kind, 8, 3))
    assert (len(list(encoder.parameters())), count(encoder)) == (tensors, values)
    w = encoder(pictures(3))
    assert moments(w) == golden(*of_all)
    for index, row in zip((0, 4, 7), rows, strict=True):
        assert w[1, index, :2].tolist() == golden(*row)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("ir-se50", {18: 205_585_792, 14: 166_778_240, 8: 108_566_912}),
        ("resnet34", {18: 195_928_128, 16: 176_524_352, 14: 157_120_576, 8: 98_909_248}),
        ("fpn-ir-se50", {18: 267_136_704}),
        ("fpn-resnet34", {16: 228_628_352}),
    ],
)
def test_published_sizes(kind, counts):
    with torch.device("meta"):
        assert {
            k: count(build_encoder(kind, k, 3 if "fpn" in kind else 6)) for k in counts
        } == counts


def layers(prefix: str, parts: str) -> set[str]:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = (f"{prefix}{part}" for part in parts.split())
    return {
        full
        for name in names
        for full in (
            [f"{name[:-1]}.{n}" for n in norm] if name.endswith("*") else [f"{name}.weight"]
        )
    }


def test_published_keys():
    with torch.device("meta"):
        faces, others = build_encoder("ir-se50", 2, 6), build_encoder("resnet34", 2, 6)
        pyramid = build_encoder("fpn-resnet34", 9, 3)
        face_network = IdentityLoss(None).network
    styles = {
        f"styles.{i}.{layer}.{part}"
        for i in range(2)
        for layer in ("convs.0", "convs.2", "convs.4", "convs.6", "linear")
        for part in ("weight", "bias")
    }
    body = layers("input_layer.", "0 1* 2")
    for unit in range(24):
        body |= layers(f"body.{unit}.res_layer.", "0* 1 2 3 4* 5.fc1 5.fc2")
        if unit in (3, 7, 21):
            body |= layers(f"body.{unit}.shortcut_layer.", "0 1*")
    assert set(faces.state_dict()) == body | styles
    head = layers("output_layer.", "0* 4*") | {
        f"output_layer.3.{part}" for part in ("weight", "bias")
    }
    assert set(face_network.state_dict()) == body | head
    body = layers("", "conv1 bn1* relu")
    for block in range(16):
        body |= layers(f"body.{block}.", "conv1 bn1* conv2 bn2*")
        if block in (3, 7, 13):
            body |= layers(f"body.{block}.", "downsample.0 downsample.1*")
    assert set(others.state_dict()) == body | styles
    further = {f"latlayer{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert further | {
        "styles.2.convs.6.bias",
        "styles.6.convs.8.bias",
        "styles.8.convs.10.bias",
    } <= set(pyramid.state_dict())
    names = {f"mlp.{i}.{part}" for i in (0, 2, 4, 6) for part in ("weight", "bias")}
    assert set(LatentDiscriminator(8).state_dict()) == names


def test_grouped_styles_are_the_single_ones():
    """Values and gradients, in fp64; blocks that do not run get no gradient."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(MapToStyle(5, 4, 8) for _ in range(3)).double()
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 3, 4, dtype=torch.float64)
    single = torch.stack([block(x) for block in blocks], dim=1)
    grouped = grouped_styles(list(blocks), x)
    torch.testing.assert_close(grouped, single)
    into = [x, *blocks.parameters()]
    for one, other in zip(
        torch.autograd.grad(grouped, into, cotangent),
        torch.autograd.grad(single, into, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    encoder = build_encoder("small", 6, 6, "e4e", latent_dim=8)
    encoder.stage = 2
    encoder(torch.randn(2, 6, 16, 16)).sum().backward()
    learns = [style.linear.weight.grad is not None for style in encoder.styles]
    assert learns == [True] * 3 + [False] * 3


def test_a_body_from_a_file(tmp_path):
    path = tmp_path / "weights.pth"
    torch.manual_seed(0)
    resnet = ResNetEncoder(*RESNETS["resnet34"])
    torch.save(resnet.state_dict() | {"fc.weight": torch.zeros(2, 512)}, path)
    encoder = build_encoder("resnet34", 1, 6, latent_dim=8)
    before = encoder.styles[0].linear.weight.clone()
    encoder.load_body(path)
    for name, loaded in (
        ("layer1.2.conv1", encoder.body[2].conv1),
        ("layer2.0.downsample.0", encoder.body[3].downsample[0]),
        ("layer4.2.bn2", encoder.body[15].bn2),
    ):
        assert torch.equal(loaded.weight, resnet.get_submodule(name).weight)
    assert torch.equal(encoder.conv1.weight[:, :3], resnet.conv1.weight)
    assert encoder.conv1.weight[:, 3:].std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(encoder.styles[0].linear.weight, before)
    encoder.load_body(path, "zeros")
    assert encoder.conv1.weight[:, 3:].abs().max() == 0
    # Published, a face encoder took this file without a word and started at random.
    with torch.device("meta"):
        faces = build_encoder("ir-se50", 1, 6, latent_dim=8)
    with pytest.raises(UserError, match=r"lacks weight input_layer.0.weight. Expected ArcFace's"):
        faces.load_body(path)
    with pytest.raises(UserError, match="small of 6 input channels has no published weights"):
        build_encoder("small", 1, 6).load_body(path)


def test_errors_of_encoders():
    with pytest.raises(ValueError, match="kind='vgg' must be one of"):
        build_encoder("vgg", 6, 6)
    with pytest.raises(ValueError, match="num_styles=0, in_channels=6.*at least 1"):
        build_encoder("small", 0, 6)
    encoder = build_encoder("small", 6, 6, latent_dim=8)
    with pytest.raises(ValueError, match=r"\(B, in_channels=6, H, W\), got \(2, 3, 16, 16\)"):
        encoder(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="have 2x2 positions, expected one"):
        MapToStyle(2, 2, 4)(torch.zeros(1, 2, 8, 8))


def test_w_norm():
    w = sines(2, 6, 512, step=0.37, start=0.1)
    assert w_norm(w, sines(6, 512, step=0.2, start=0.5)).item() == pytest.approx(55.398079)
    assert w_norm(w, 0.0).item() == pytest.approx(39.193222)


def alexnet_file(path, critic: AlexNetCritic):
    torch.save(critic.state_dict() | {"classifier.1.weight": torch.zeros(1)}, path)
    return path


def test_lpips(tmp_path):
    backbone = alexnet_file(tmp_path / "alexnet.pth", fill_styles(AlexNetCritic(None)))
    x = sines(2, 3, 64, 64, step=0.0137, start=0.3).requires_grad_()
    y = sines(2, 3, 64, 64, step=0.0219, start=0.9)
    ones = LPIPS(backbone, None)
    assert ones(x, ones.features(y)).item() == near(2.616540)
    # The published linear layers, in another package that has them.
    package = Path(importlib.util.find_spec("torchmetrics").origin).parent
    loss = LPIPS(backbone, package / "functional/image/lpips_models/alex.pth")
    features = loss.features(y)
    value = loss(x, features)
    value.backward()
    assert [value.item(), x.grad.norm().item()] == golden(0.159319, 0.010438)
    layers = [each[0].item() for each in loss.per_layer(x, features)]
    assert layers == golden(0.040545, 0.047636, 0.023834, 0.027177, 0.017866)
    grey = torch.zeros(2, 1, 31, 31, requires_grad=True)
    loss(grey, loss.features(grey.expand(-1, 3, -1, -1) + 1)).backward()
    assert grey.grad.isfinite().all()
    with pytest.raises(
        ValueError, match="at least 31 pixels on a side, got 30x40. Leave LPIPS out"
    ):
        loss.features(torch.zeros(1, 3, 30, 40))


def two_faces() -> tuple[Tensor, Tensor]:
    return (
        sines(2, 3, 256, 256, step=0.00137, start=0.3),
        sines(2, 3, 256, 256, step=0.00219, start=0.9),
    )


@torch.no_grad()
def test_identity():
    loss = IdentityLoss(None)
    assert (len(list(loss.parameters())), count(loss)) == (235, 43_797_696)
    network = loss.network
    # In the published network the layers behind the body are registered before it.
    order = ("input_layer", "output_layer", "body")
    fill_styles(nn.ModuleDict({name: network.get_submodule(name) for name in order}))
    network.output_layer[1].p = 0.0
    network.train()(sines(4, 3, 112, 112, step=0.0111, start=0.2))
    loss.train()  # which leaves it in eval mode
    x, y = two_faces()
    features = loss.features(y)
    assert loss(x, features).item() == near(0.664226)
    assert 1 - loss.per_image(x, features)[0].item() == near(0.295781)
    assert loss.features(x)[0, :3].tolist() == golden(0.075183, -0.020650, 0.008133)


@torch.no_grad()
def test_moco(tmp_path):
    loss = MoCoLoss(None)
    fill_styles(loss.network).train()
    batch = sines(4, 3, 256, 256, step=0.00111, start=0.2)
    loss.network(F.interpolate(batch, (224, 224)))
    path = tmp_path / "moco_v2.pth.tar"
    keys = {f"module.encoder_q.{name}": v for name, v in loss.network.state_dict().items()}
    others = {"module.encoder_q.fc.0.weight": torch.zeros(1), "module.queue": torch.zeros(2)}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": keys | others}, path)
    loss = MoCoLoss(path)
    x, y = two_faces()
    assert loss(x, loss.features(y)).item() == near(0.053132)
    assert loss.features(x)[0, :3].tolist() == golden(0.011362, 0.012318, 0.007652)
    assert loss(x[:1], loss.features(x[:1])).item() == pytest.approx(0, abs=1e-6)


def test_moco_of_our_own_run(tmp_path):
    encoder = ResNetEncoder(*RESNETS["small"], base_channels=4, image_channels=1, stem="cifar")
    config = {"system": "representation", "encoder": "small", "encoder_channels": 4}
    config |= {"image_channels": 1, "stem": "cifar", "image_size": 16}
    path = tmp_path / "checkpoints" / "last.pt"
    path.parent.mkdir()
    torch.save({"config": config, "average": {"module": encoder.state_dict()}}, path)
    loss = MoCoLoss(tmp_path)
    assert loss.expects == 16
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    target = torch.rand(2, 1, 16, 16)
    expected = F.normalize(encoder.eval()(target))
    torch.testing.assert_close(loss.features(target), expected)
    loss(x, expected.detach()).backward()
    assert x.grad.abs().amax((2, 3)).min() > 0
    assert not any(p.requires_grad for p in loss.parameters())
    torch.save({"config": {"system": "cut"}}, path)
    with pytest.raises(UserError, match="is a run of cut, which has no encoder of whole images"):
        MoCoLoss(tmp_path)


class Levels(nn.Module):
    """Features of images of 8 bits, without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).float()


def test_a_scripted_similarity(tmp_path):
    loss = ScriptedSimilarity(scripted(nn.Conv2d(3, 2, 3), tmp_path / "network.pt"))
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    loss(x, loss.features(torch.rand(2, 3, 8, 8))).backward()
    assert x.grad.abs().max() > 0
    assert loss(x, loss.features(x)).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match=r"fails on images of shape \(2, 1, 8, 8\)"):
        loss.features(torch.rand(2, 1, 8, 8))
    loss = ScriptedSimilarity(scripted(Levels(), tmp_path / "levels.pt"))
    with pytest.raises(UserError, match="its features have no gradient. Save a network of float"):
        loss(x, loss.features(x))
