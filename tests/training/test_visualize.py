"""Similarity maps and the main components of features."""

import dataclasses

import pytest
import torch
from pictures import noise
from PIL import Image

from fastnce import cli
from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.training import load_generator
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.patch_views import (
    PatchEncoder,
    distinct_points,
    main_components,
    similarity_maps,
    visualize_features,
    visualize_similarity,
)


@pytest.fixture
def encoder(tiny) -> PatchEncoder:
    """A random one that compares layers of all three sizes, and the padded image."""
    torch.manual_seed(0)
    config = tiny(nce_layers=[0, 4, 8, 12], init_gain=None, base_channels=8)
    model = CUT(config).eval().requires_grad_(False)
    return PatchEncoder(model.generator, model.projector, config, 3)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_patch_is_most_similar_to_itself(encoder, image):
    maps = similarity_maps(encoder, image, image, [(8, 16), (37, 3)])
    assert list(maps) == [(8, 16), (37, 3)]
    sizes = [(38, 46), (32, 40), (16, 20), (8, 10)]
    for layers in maps.values():
        assert [m.layer for m in layers] == [0, 4, 8, 12]
        assert [tuple(m.cosine.shape) for m in layers] == sizes
        for m in layers:
            assert m.own_cosine == pytest.approx(1, abs=1e-5)
            assert m.rank == 1
    assert [m.position for m in maps[8, 16]] == [(19, 11), (16, 8), (8, 4), (4, 2)]
    # The last column looks at pixel 36, and 37 is nearest to that.
    assert [m.position for m in maps[37, 3]] == [(6, 40), (3, 37), (2, 19), (1, 9)]


def test_a_patch_is_found_where_it_was_moved_from(encoder, image):
    """The output is the input moved right by 8 pixels and down by 4; the similar place is found at its pixel in each layer."""
    moved = image.roll((4, 8), dims=(1, 2))
    maps = similarity_maps(encoder, image, moved, [(24, 16)])[24, 16]
    for m in maps:
        row, column = divmod(int(m.cosine.argmax()), m.cosine.shape[1])
        assert (m.grid.pixel(column), m.grid.pixel(row)) == (16, 12), f"layer {m.layer}"
        assert m.rank > 1


def test_similarity_is_that_of_the_loss(encoder, image):
    m = similarity_maps(encoder, image, -image, [(8, 8)], layers=[8])[8, 8][0]
    features = encoder.generator.encode(torch.stack([image, -image]), (0, 4, 8, 12))
    project = encoder.projector.get_submodule("mlp_2")
    keys, queries = (project(x.flatten(1).T) for x in features[2])
    cosine = torch.cosine_similarity(queries[4 * 20 + 4][None], keys)
    torch.testing.assert_close(m.cosine.flatten(), cosine)
    expected = (cosine / 0.07).exp()
    torch.testing.assert_close(m.values().flatten(), expected / expected.max())
    scaled = m.values("cosine")
    assert scaled.min() == 0 and scaled.max() == 1
    assert m.rank == 1 + (cosine > cosine[4 * 20 + 4]).sum()


def test_mistakes_are_named(encoder, image):
    with pytest.raises(UserError, match="points: 40,2 is outside the image, which is 40x32"):
        similarity_maps(encoder, image, image, [(40, 2)])
    with pytest.raises(UserError, match="layers=5: the run compares the layers 0 4 8 12 only"):
        similarity_maps(encoder, image, image, [(1, 2)], layers=[5])
    config = dataclasses.replace(encoder.config, lambda_nce=0.0)
    blind = dataclasses.replace(encoder, config=config)
    with pytest.raises(UserError, match="without the contrastive loss"):
        similarity_maps(blind, image, image, [(1, 2)])


def test_chosen_points_differ(encoder):
    """Three of four quarters are alike: with two points, one lies in the quarter that is not."""
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    stripes = torch.arange(24) % 4 < 2
    image[:, 36:60, 36:60] += stripes
    points = distinct_points(encoder, image, 2)
    assert len(set(points)) == 2
    assert sum(34 <= x < 62 and 34 <= y < 62 for x, y in points) == 1
    assert all(4 <= x < 60 and 4 <= y < 60 for x, y in points)
    assert points == distinct_points(encoder, image, 2)
    assert len(distinct_points(encoder, image[:, :16, :16], 10**6)) < 16 * 16


def test_main_components_of_known_features():
    """Three sources of falling strength in five channels: each component is one of them."""
    random = torch.Generator().manual_seed(0)
    sources = torch.rand(3, 2, 8, 8, generator=random, dtype=torch.double) - 0.5
    directions = torch.linalg.qr(torch.randn(5, 3, generator=random, dtype=torch.double)).Q
    maps = torch.einsum("cs,snhw->nchw", directions * torch.tensor([9.0, 3.0, 1.0]), sources)
    colours, explained = main_components(list(maps.float()))
    assert colours.shape == (2, 8, 8, 3)
    assert sum(explained) == pytest.approx(1)
    assert explained[0] > 0.8 and explained[0] > explained[1] > explained[2]
    for component in range(3):
        pair = torch.stack([colours[..., component].flatten(), sources[component].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95


def test_features_with_few_channels_and_constant_ones():
    colours, explained = main_components([torch.randn(1, 4, 4)])
    assert len(explained) == 1
    assert (colours[..., 1:] == 0.5).all()
    assert colours[..., 0].min() == 0 and colours[..., 0].max() == 1
    assert main_components([torch.zeros(3, 4, 4)])[0].isfinite().all()


def test_from_a_run(whole, tmp_path):
    run = whole("cut")
    raw, average = PatchEncoder.of(run), PatchEncoder.of(run, weights="ema")
    state = load_checkpoint(run / "checkpoints" / "last.pt")["model"]
    for encoder in (raw, average):  # there is one F only
        assert torch.equal(encoder.projector.mlp_1[2].bias, state["projector.mlp_1.2.bias"])
    weight = raw.generator.model[1].weight
    assert torch.equal(weight, state["generator.model.1.weight"])
    assert not torch.equal(weight, average.generator.model[1].weight)
    assert torch.equal(average.generator.model[1].weight, load_generator(run)[0].model[1].weight)

    noise(tmp_path / "in" / "a.png", (30, 18))
    noise(tmp_path / "in" / "b.png", (16, 16))
    path = visualize_similarity(raw, tmp_path / "in" / "a.png", tmp_path / "out", points=[(3, 4)])
    with Image.open(path) as picture:
        assert picture.width > 500
    with Image.open(tmp_path / "out" / "output.png") as picture:
        assert picture.size == (16, 16)  # as in training
    paths = visualize_features(raw, tmp_path / "in", tmp_path / "out")
    assert [p.name for p in paths] == ["pca-encoder.png", "pca-projected.png"]
    assert all(Image.open(p).height > 400 for p in paths)


def test_dclgan_compares_with_the_other_directions_encoder(whole, tmp_path):
    run = whole("dclgan")
    encoder = PatchEncoder.of(run)
    state = load_checkpoint(run / "checkpoints" / "last.pt")["model"]
    other = encoder.of_output
    assert other is not encoder
    assert torch.equal(encoder.projector.mlp_0[0].weight, state["projector_a.mlp_0.0.weight"])
    assert torch.equal(other.projector.mlp_0[0].weight, state["projector_b.mlp_0.0.weight"])
    image = torch.rand(3, 16, 16) * 2 - 1
    m = similarity_maps(encoder, image, image, [(8, 8)])[8, 8][0]
    key, query = (part.project(part.encode(image))[0][0] for part in (encoder, other))
    assert m.own_cosine == pytest.approx((key[:, 8, 8] @ query[:, 8, 8]).item(), abs=1e-5)
    assert m.own_cosine < 0.999
    noise(tmp_path / "a.png", (16, 16))
    assert len(visualize_features(encoder, tmp_path / "a.png", tmp_path / "out")) == 2


def test_the_command_line_names_a_bad_point(capsys, tmp_path):
    options = ["--run", "r", "--input", "i", "--out", str(tmp_path)]
    assert cli.main(["visualize", "similarity", *options, "--points", "3;4"]) == 2
    assert "'3;4' is no point. Write whole numbers X,Y" in capsys.readouterr().err
