"""Directions in the latent space of a style generator: what they maximise, files, the pictures of `fastnce edit`, mistakes."""

import importlib.util
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from fastnce.cli import main
from fastnce.data.images import to_uint8
from fastnce.errors import UserError
from fastnce.networks.style_generator import StyleGenerator, save_rosinality
from fastnce.systems import directions
from fastnce.systems.directions import (
    boundary_direction,
    class_direction,
    edited,
    principal_directions,
    read_direction,
    read_latents,
    sample_latents,
    sefa,
)

DIM = 6


@pytest.fixture
def generator() -> StyleGenerator:
    torch.manual_seed(0)
    g = StyleGenerator(8, latent_dim=DIM, mapping_layers=2, channels=[4, 5])
    g.latent_avg.copy_(g.mean_latent(1_000))
    return g


def test_sefa_moves_the_styles_most(generator):
    """No other direction of length 1 changes the styles of the convolutions more; ToRGB does not count."""
    found = sefa(generator, DIM)
    torch.testing.assert_close(found @ found.T, torch.eye(DIM))
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()

    def change(d: Tensor, layers: list) -> Tensor:
        return sum((d @ layer.conv.modulation.weight.T).square().sum(-1) for layer in layers)

    layers = [generator.conv1, *generator.convs]
    others = torch.nn.functional.normalize(torch.randn(500, DIM))
    for styles in ((), (1, 2), (0,)):
        chosen = [layers[i] for i in styles] or layers
        directions = sefa(generator, min(DIM, 4), styles)
        changes = change(directions, chosen)
        assert (change(others, chosen) <= changes[0] * (1 + 1e-5)).all()
        assert (changes.diff() <= 1e-6).all()
    generator.to_rgb1.conv.modulation.weight.data.mul_(100)
    assert torch.equal(sefa(generator, DIM), found)
    with pytest.raises(
        UserError, match=r"styles=\(3,\) drive no convolution. Use places from 0 to 2"
    ):
        sefa(generator, 1, (3,))


def test_principal_directions(generator):
    """Orthogonal, and as long as the samples' standard deviation along each, which is largest along the first."""
    found = principal_directions(generator, DIM, samples=500, seed=3)
    w = sample_latents(generator, 500, seed=3)
    lengths = found.norm(dim=1)
    units = found / lengths[:, None]
    torch.testing.assert_close(units @ units.T, torch.eye(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close((w @ units.T).std(0), lengths, rtol=1e-4, atol=1e-6)
    assert (lengths.diff() <= 0).all()
    others = torch.nn.functional.normalize(torch.randn(500, DIM))
    assert ((w @ others.T).std(0) <= lengths[0] * (1 + 1e-5)).all()


class Brightness(nn.Module):
    """Class 1 if the image is brighter than its corner, else 0; written to TorchScript."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) - x[:, :, :4, :4].mean((1, 2, 3))
        return torch.stack([-bright, bright], 1)


def test_class_directions(generator):
    judge = Brightness()
    found = class_direction(generator, lambda x: judge(x).argmax(1), 0, 1, samples=200, seed=2)
    groups: dict[int, list[Tensor]] = {0: [], 1: []}
    for w in sample_latents(generator, 200, seed=2):
        with torch.no_grad():
            groups[judge(generator(w[None])).argmax().item()].append(w)
    assert all(groups.values())
    means = [torch.stack(group).mean(0) for group in groups.values()]
    torch.testing.assert_close(found, means[1] - means[0])
    with pytest.raises(UserError, match="none of 50 samples is of class 7, only of 0, 1"):
        class_direction(generator, lambda x: judge(x).argmax(1), 0, 7, samples=50)


def test_the_normal_between_classes(generator, monkeypatch):
    """That of the plane by which a linear rule sorts the samples, towards the second class, and as long as they spread along it."""
    w = sample_latents(generator, 400, seed=2)
    rule = torch.nn.functional.normalize(torch.randn(DIM), dim=0)
    places = (w @ rule) > (w @ rule).quantile(0.3)
    monkeypatch.setattr(directions, "images_of", lambda generator, part: part)

    def classify(part: Tensor) -> Tensor:
        return ((part @ rule) > (w @ rule).quantile(0.3)).long()

    for start, end in ((0, 1), (1, 0)):
        found = boundary_direction(generator, classify, start, end, samples=400, seed=2)
        sign = 1 if end else -1
        along = w @ (sign * found)
        assert along[places].mean() > along[~places].mean()
        torch.testing.assert_close((w @ found).std() / found.norm(), found.norm())
        right = max(
            ((along > cut) == places).float().mean() for cut in (along[places].min() - 1e-6, *along)
        )
        assert right > 0.97
    means = class_direction(generator, classify, 0, 1, samples=400, seed=2)
    assert torch.cosine_similarity(means, rule, 0) < torch.cosine_similarity(-found, rule, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="direction=svm needs scikit-learn, which is not installed"):
        boundary_direction(generator, classify, 0, 1)


def test_edited_images(generator):
    w, d = sample_latents(generator, 2, seed=0), torch.randn(DIM)
    with torch.no_grad():
        found = edited(generator, w, d, [-1.0, 0.0, 2.0])
        assert found.shape == (2, 3, 3, 8, 8)
        torch.testing.assert_close(found[:, 1], generator(w))
        torch.testing.assert_close(found[:, 2], generator(w + 2 * d))
        part = edited(generator, w, d, [2.0], styles=(2, 3))[:, 0]
        torch.testing.assert_close(part, generator(generator.mix(w, w + 2 * d, at=2)))
        each = torch.randn(4, DIM)
        wide = edited(generator, w, each, [1.0])[:, 0]
        torch.testing.assert_close(wide, generator(generator.spread(w) + each))


def test_files(generator, tmp_path):
    d, wide = torch.randn(DIM), torch.randn(4, DIM)
    np.save(tmp_path / "d.npy", d[None].numpy())
    torch.save(wide[None], tmp_path / "wide.pt")
    assert torch.equal(read_direction(tmp_path / "d.npy", generator), d)
    assert torch.equal(read_direction(tmp_path / "wide.pt", generator), wide)
    torch.save({"a": d}, tmp_path / "dict.pt")
    np.save(tmp_path / "long.npy", np.zeros(7, np.float32))
    (tmp_path / "no.npy").write_bytes(b"no numbers")
    for name, match in (
        ("dict.pt", "holds dict, expected one tensor"),
        ("long.npy", r"holds numbers of shape \(7,\), expected \(6,\) or \(4, 6\)"),
        ("no.npy", "is damaged, or not as fastnce writes it"),
        ("none.npy", "no such file"),
        ("d.txt", "is neither sefa, pca, classes, svm nor a file that ends in .npy, .pt or .pth"),
    ):
        with pytest.raises(UserError, match=match):
            read_direction(tmp_path / name, generator)
    latents = torch.randn(2, 5, 4, DIM)
    path = tmp_path / "latents.npz"
    np.savez(path, latents=latents.numpy(), names=np.array(["a.png", "b/c.png"]))
    names, last = read_latents(path, generator)
    assert names == ["a.png", "b/c.png"] and torch.equal(last, latents[:, -1])
    tensors = tmp_path / "latents.safetensors"
    safetensors.torch.save_file(
        {"latents": latents[:, 0].clone()}, tensors, {"names": json.dumps(names)}
    )
    assert read_latents(tensors, generator)[0] == names
    assert torch.equal(read_latents(tensors, generator)[1], latents[:, 0])
    tensors.write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged, or not as fastnce writes it"):
        read_latents(tensors, generator)
    np.savez(path, latents=np.zeros((2, 6, DIM)), names=np.array(["a", "b"]))
    with pytest.raises(UserError, match=r"have the shape \(2, 6, 6\), expected \(N, 4, 6\)"):
        read_latents(path, generator)
    with pytest.raises(UserError, match="expected a .npz or .safetensors of `fastnce invert`"):
        read_latents(tmp_path / "d.npy", generator)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_command(generator, tmp_path, capsys):
    save_rosinality(tmp_path / "g.pt", generator)
    torch.jit.save(torch.jit.script(Brightness()), tmp_path / "judge.pt")
    command = ["edit", "--run", str(tmp_path / "g.pt"), "--out", str(tmp_path / "out")]

    def called(*options: str) -> str:
        code = main([*command, *options])
        printed = capsys.readouterr()
        assert (code == 0) == ("Edited" in printed.out)
        return printed.out + printed.err

    called("--direction", "pca", "--index", "1", "--count", "2", "--columns", "3", "--reach", "2")
    made = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").glob("*/*")
    )
    assert made == [f"000{i}/0{j}.png" for i in range(2) for j in range(3)]
    d = torch.from_numpy(np.load(tmp_path / "out" / "direction.npy"))
    torch.testing.assert_close(d, principal_directions(generator, 2)[1])
    w = generator.truncate(sample_latents(generator, 2, seed=0), 0.7)
    image = edited(generator, w, d, [2.0])[1, 0]
    written = torch.from_numpy(np.array(Image.open(tmp_path / "out/0001/02.png"))).permute(2, 0, 1)
    assert torch.equal(written, to_uint8(image))
    assert (tmp_path / "out" / "edit.png").is_file()
    called("--direction", str(tmp_path / "out" / "direction.npy"), "--styles", "0", "1")
    judge = ("--classifier", str(tmp_path / "judge.pt"))
    for method in ("classes", "svm"):
        called("--direction", method, "--classes", "0", "1", *judge)
    for options, message in (
        (("--direction", "classes"), "needs two classes. Give --classes FROM TO"),
        (("--direction", "classes", "--classes", "0", "1"), "classes need --classifier FILE"),
        (("--index", "6"), "7 directions are asked for, and there are 6. Use fewer"),
        (("--direction", "classes", "--classes", "1", "1", *judge), "name two that differ"),
        (("--data", str(tmp_path), "--out", str(tmp_path / "train")), "results would become input"),
        (("--styles", "4"), "use places from 0 to 3"),
        (("--columns", "1"), "columns=1 is too small. Use columns >= 2"),
    ):
        assert message in called(*options)
