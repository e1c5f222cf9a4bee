"""Weights files of the published repositories: in, out, and what is said about others.

The stand-ins are made from the list of keys and shapes of the published networks, not from ours.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pictures import cut_short
from same_run import assert_identical
from torch import Tensor

from fastnce.errors import UserError
from fastnce.models import CFL
from fastnce.training import (
    Run,
    export_published,
    export_shared,
    load_generator,
    train,
    translate,
)
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.published import load_initial, read_published, recognise


def fill(shapes: dict[str, tuple[int, ...]], filters: dict[str, int]) -> dict[str, Tensor]:
    """Random weights of these shapes, and the resampling filters of these channels by key."""
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, channels in filters.items():
        up = int(name.split(".")[1]) > 11
        row = torch.tensor([1.0, 3.0, 3.0, 1.0] if up else [1.0, 2.0, 1.0])
        kernel = torch.outer(row, row) / 16
        state[name] = kernel.expand(channels, 1, -1, -1).clone()
    return state


def convolution(name: str, out: int, into: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)}


def official_generator(
    c=2, blocks=1, into=3, out=3, antialias=True, transposed=False
) -> dict[str, Tensor]:
    """`transposed`: of the older repository, with strided convolutions down and transposed ones up."""
    antialias = antialias and not transposed
    first = 12 if antialias else 10
    convs = convolution("model.1", c, into, 7) | convolution("model.4", 2 * c, c, 3)
    convs |= convolution("model.8" if antialias else "model.7", 4 * c, 2 * c, 3)
    for block in range(first, first + blocks):
        for index in (1, 5):
            convs |= convolution(f"model.{block}.conv_block.{index}", 4 * c, 4 * c, 3)
    up = first + blocks
    if transposed:
        one, other, last = up, up + 3, up + 7
        filters = {}
    else:
        one, other, last = up + 1, up + 5, up + 9
        filters = {f"model.{up}.filt": 4 * c, f"model.{up + 4}.filt": 2 * c}
    if antialias:
        filters |= {"model.7.filt": 2 * c, "model.11.filt": 4 * c}
    for index, width in ((one, 2 * c), (other, c)):
        convs |= convolution(f"model.{index}", width, 2 * width, 3)
        if transposed:  # the weight begins with its input's channels
            convs[f"model.{index}.weight"] = (2 * width, width, 3, 3)
    return fill(convs | convolution(f"model.{last}", out, c, 7), filters)


def official_discriminator(c=2) -> dict[str, Tensor]:
    widths = [3, c, 2 * c, 4 * c, 8 * c, 1]
    convs = {}
    for index, layer in enumerate((0, 3, 7, 11, 14)):
        convs |= convolution(f"model.{layer}", widths[index + 1], widths[index], 4)
    filters = {"model.2.filt": c, "model.6.filt": 2 * c, "model.10.filt": 4 * c}
    return fill(convs, filters)


def official_projector(channels=(4, 8, 8), dim=8) -> dict[str, Tensor]:
    shapes = {}
    for index, into in enumerate(channels):
        shapes |= {f"mlp_{index}.0.weight": (dim, into), f"mlp_{index}.0.bias": (dim,)}
        shapes |= {f"mlp_{index}.2.weight": (dim, dim), f"mlp_{index}.2.bias": (dim,)}
    return fill(shapes, {})


def batch_norm(name: str, width: int) -> dict[str, Tensor]:
    state = fill({f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean")}, {})
    return state | {
        f"{name}.running_var": torch.ones(width),
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def official_unet(c=2, levels=5, into=3, out=3) -> dict[str, Tensor]:
    """The U-Net of pix2pix with batch norm: level by level inside one another."""
    widths = [c * min(2**level, 8) for level in range(levels)]
    shapes = {"model.model.0.weight": (c, into, 4, 4), "model.model.3.weight": (2 * c, out, 4, 4)}
    shapes["model.model.3.bias"] = (out,)
    norms, prefix = {}, "model.model.1.model"
    for level in range(1, levels):
        innermost = level == levels - 1
        up = 3 if innermost else 5
        below = widths[level] * (1 if innermost else 2)
        shapes[f"{prefix}.1.weight"] = (widths[level], widths[level - 1], 4, 4)
        shapes[f"{prefix}.{up}.weight"] = (below, widths[level - 1], 4, 4)
        norms |= batch_norm(f"{prefix}.{up + 1}", widths[level - 1])
        if not innermost:
            norms |= batch_norm(f"{prefix}.2", widths[level])
        prefix += ".3.model"
    return fill(shapes, {}) | norms


def official_pix2pix_discriminator(c=2) -> dict[str, Tensor]:
    """Of input and output side by side, with batch norm."""
    convs, norms = convolution("model.0", c, 6, 4) | convolution("model.11", 1, 8 * c, 4), {}
    for index, width in ((2, 2 * c), (5, 4 * c), (8, 8 * c)):
        convs[f"model.{index}.weight"] = (width, width // 2, 4, 4)
        norms |= batch_norm(f"model.{index + 1}", width)
    return fill(convs, {}) | norms


def spectral(name: str, out: int, into: int, size: int, bias: bool = True) -> dict[str, tuple]:
    """A convolution under the classic spectral norm, in the order of its keys."""
    biases = {f"{name}.bias": (out,)} if bias else {}
    vectors = {f"{name}.weight_u": (out,), f"{name}.weight_v": (into * size * size,)}
    return biases | {f"{name}.weight_orig": (out, into, size, size)} | vectors


def official_spade(c=2, n=5, hidden=4, most=False) -> dict[str, Tensor]:
    """Of `n` channels of semantics; "normal" and "more" upsampling have the same weights."""
    shapes = convolution("fc", 16 * c, n, 3)
    widths = [16 * c, 16 * c, 16 * c, 16 * c, 8 * c, 4 * c, 2 * c, c, c // 2]
    names = ["head_0", "G_middle_0", "G_middle_1", "up_0", "up_1", "up_2", "up_3", "up_4"]
    for name, into, out in list(zip(names, widths, widths[1:], strict=False))[: 8 if most else 7]:
        middle = min(into, out)
        shapes |= spectral(f"{name}.conv_0", middle, into, 3)
        shapes |= spectral(f"{name}.conv_1", out, middle, 3)
        norms = {"norm_0": into, "norm_1": middle}
        if into != out:
            shapes |= spectral(f"{name}.conv_s", out, into, 1, bias=False)
            norms["norm_s"] = into
        for norm, width in norms.items():
            shapes |= {
                f"{name}.{norm}.param_free_norm.running_{x}": (width,) for x in ("mean", "var")
            }
            shapes |= {f"{name}.{norm}.param_free_norm.num_batches_tracked": ()}
            shapes |= convolution(f"{name}.{norm}.mlp_shared.0", hidden, n, 3)
            shapes |= convolution(f"{name}.{norm}.mlp_gamma", width, hidden, 3)
            shapes |= convolution(f"{name}.{norm}.mlp_beta", width, hidden, 3)
    last = c // 2 if most else c
    state = fill(shapes | convolution("conv_img", 3, last, 3), {})
    for name, x in state.items():
        if name.endswith("running_var"):
            x.abs_()
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
    return state


def official_two_scales(c=2, n=5) -> dict[str, Tensor]:
    widths, shapes = [c, 2 * c, 4 * c, 8 * c], {}
    for scale in ("discriminator_0", "discriminator_1"):
        shapes |= convolution(f"{scale}.model0.0", c, n + 3, 4)
        for index in (1, 2, 3):
            name = f"{scale}.model{index}.0.0"
            shapes |= spectral(name, widths[index], widths[index - 1], 4, bias=False)
        shapes |= convolution(f"{scale}.model4.0", 1, 8 * c, 4)
    return fill(shapes, {})


def official_features(channels=(48, 192, 768), dim=8, linear=False) -> dict[str, Tensor]:
    """F_q of the pixel critic, which has no weights of its own."""
    shapes = {}
    for index, into in enumerate(channels):
        name = f"projection.mlps.{index}"
        for layer, width in ((".0", into), (".2", dim)) if not linear else (("", into),):
            shapes |= {f"{name}{layer}.weight": (dim, width), f"{name}{layer}.bias": (dim,)}
    return fill(shapes, {})


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


OFFICIAL = {
    "generator": official_generator(),
    "discriminator": official_discriminator(),
    "projector": official_projector(),
}


def trained(run: Path) -> dict[str, Tensor]:
    return load_checkpoint(run / "checkpoints" / "last.pt")["model"]


def assert_starts_from(run: Path, networks: dict[str, dict[str, Tensor]]) -> None:
    """After one tiny step; the statistics of batch norm have moved."""
    model = trained(run)
    for attribute, expected in networks.items():
        for name, tensor in expected.items():
            if "running" not in name and "num_batches" not in name:
                found = model[f"{attribute}.{name}"]
                torch.testing.assert_close(found, tensor, rtol=0, atol=1e-6)


@pytest.fixture
def published(tmp_path) -> Path:
    """Files as the published training on a CPU leaves them: `module.` before every key."""
    folder = tmp_path / "checkpoints" / "horses"
    folder.mkdir(parents=True)
    for label in ("latest", "5"):
        for name, state in zip("GDF", OFFICIAL.values(), strict=True):
            torch.save(prefixed(state), folder / f"{label}_net_{name}.pth")
    return folder


# The tiny configuration of these stand-ins.
SAME = {"disc_layers": 3, "crop_size": 32, "load_size": 36}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"c": 64, "blocks": 9},
        {"blocks": 6, "into": 1},
        {"blocks": 2, "out": 1, "antialias": False},
    ],
)
def test_a_published_generator_is_recognised_and_loads_bit_for_bit(tmp_path, shape, prefix):
    state = official_generator(**shape)
    torch.save(prefixed(state) if prefix else state, tmp_path / "latest_net_G.pth")
    generator, config = load_generator(tmp_path / "latest_net_G.pth")
    own = generator.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in state)
    defaults = {"c": 2, "into": 3, "out": 3, "antialias": True}
    expected = defaults | shape
    assert config.base_channels == expected["c"] and config.num_blocks == expected["blocks"]
    assert config.in_channels == expected["into"] and config.out_channels == expected["out"]
    assert config.antialias is expected["antialias"]


def test_the_published_defaults_are_our_defaults():
    """11.378M, 2.765M and 0.560M parameters, as published."""
    states = (
        official_generator(64, 9),
        official_discriminator(64),
        official_projector((3, 128, 256, 256, 256), 256),
    )
    for state, millions in zip(states, (11.378, 2.765, 0.560), strict=True):
        count = sum(v.numel() for k, v in state.items() if not k.endswith("filt"))
        assert round(count / 1e6, 3) == millions
    options = {k: v for state in states for k, v in recognise(state, Path("x")).options.items()}
    assert options == {
        "in_channels": 3,
        "out_channels": 3,
        "base_channels": 64,
        "num_blocks": 9,
        "antialias": True,
        "antialias_up": True,
        "disc_channels": 64,
        "disc_layers": 3,
        "disc_antialias": True,
        "projection_dim": 256,
    }


@pytest.mark.parametrize("blocks", [1, 6])
def test_a_generator_of_the_older_repository_is_its_function(tmp_path, blocks):
    state = official_generator(blocks=blocks, transposed=True)
    torch.save(state, tmp_path / "latest_net_G.pth")
    generator, config = load_generator(tmp_path / "latest_net_G.pth")
    assert (config.antialias, config.antialias_up, config.num_blocks) == (False, False, blocks)
    image = torch.rand(2, 3, 24, 32) * 2 - 1

    def conv(x, index, **options):
        return F.conv2d(x, state[f"model.{index}.weight"], state[f"model.{index}.bias"], **options)

    def reflected(x, index, padding):
        return conv(F.pad(x, (padding,) * 4, mode="reflect"), index)

    x = F.relu(F.instance_norm(reflected(image, 1, 3)))
    for index in (4, 7):
        x = F.relu(F.instance_norm(conv(x, index, stride=2, padding=1)))
    for block in range(10, 10 + blocks):
        y = F.relu(F.instance_norm(reflected(x, f"{block}.conv_block.1", 1)))
        x = x + F.instance_norm(reflected(y, f"{block}.conv_block.5", 1))
    for index in (10 + blocks, 13 + blocks):
        weight, bias = state[f"model.{index}.weight"], state[f"model.{index}.bias"]
        x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1)
        x = F.relu(F.instance_norm(x))
    expected = torch.tanh(reflected(x, 17 + blocks, 3))
    torch.testing.assert_close(generator(image), expected, rtol=0, atol=1e-5)
    # And in tiles.
    torch.testing.assert_close(translate(generator, image, tile=16), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_published_unet_is_recognised_and_loads_bit_for_bit(tmp_path, levels):
    state = official_unet(levels=levels, into=1)
    torch.save(prefixed(state), tmp_path / "latest_net_G.pth")
    generator, config = load_generator(tmp_path / "latest_net_G.pth")
    assert (config.system, config.num_downs, config.base_channels) == ("pix2pix", levels, 2)
    assert (config.in_channels, config.out_channels) == (1, 3)
    own = generator.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


def test_pix2pix_starts_from_published_weights(tiny, tmp_path):
    files = {"generator": official_unet(), "discriminator": official_pix2pix_discriminator()}
    for name, state in zip("GD", files.values(), strict=True):
        torch.save(without_counts(state), tmp_path / f"latest_net_{name}.pth")
    sizes = {"num_downs": 5, "disc_layers": 3, "load_size": 32, "crop_size": 32}
    run = train(tiny("pix2pix", **sizes, init_from=tmp_path, lr=1e-12, steps=1))
    assert_starts_from(run, files)


@pytest.mark.parametrize("linear", [False, True])
def test_cfl_starts_from_published_weights_and_gives_them_back(tiny, tmp_path, linear):
    """With the vectors of spectral norm: bit for bit, and at once, since nothing is trained at this learning rate."""
    files = {"G": official_spade(), "D": official_two_scales(), "F_q": official_features()}
    if linear:
        files["F_q"] = official_features(linear=True)
    for name, state in files.items():
        torch.save(state, tmp_path / f"latest_net_{name}.pth")
    options = {"disc_layers": 4, "projector": "linear" if linear else "mlp", "init_from": tmp_path}
    config = tiny("cfl", **options, lr=1e-12, steps=1)
    run = train(config)
    networks = {"generator": files["G"], "discriminator": files["D"], "features": files["F_q"]}
    still = {
        k: {n: x for n, x in s.items() if n[-2:] not in ("_u", "_v")} for k, s in networks.items()
    }
    assert_starts_from(run, still)
    written = export_published(run, tmp_path / "out", weights="raw")
    assert {path.name for path in written} == {f"latest_net_{name}.pth" for name in files}
    model = trained(run)
    for path in written:
        saved, official = torch.load(path, weights_only=True), files[path.stem[11:]]
        assert list(saved) == list(official)
        assert all(saved[name].shape == x.shape for name, x in official.items())
    again = CFL(config)
    load_initial(again, replace(config, init_from=tmp_path / "out"))
    assert_identical(dict(again.state_dict()), dict(model))
    with pytest.raises(
        UserError, match="has label_classes=4, .*label_classes=3. Add --label-classes 4"
    ):
        load_initial(again, replace(config, instances=False))
    with pytest.raises(UserError, match="disc_layers=4.*Add --disc-layers 4"):
        load_initial(again, replace(config, disc_layers=2))
    other = replace(config, projection_dim=4, init_from=tmp_path / "out")
    with pytest.raises(UserError, match="projection_dim=8.*Add --projection-dim 8"):
        load_initial(again, other)


@pytest.mark.parametrize(
    ("n", "most", "upsampling"), [(5, True, "most"), (36, False, "more"), (151, False, "normal")]
)
def test_a_published_spade_generator_is_recognised(tmp_path, n, most, upsampling):
    """Cityscapes' and ADE20K's by the channels of their input."""
    state = official_spade(n=n, most=most)
    torch.save(prefixed(state), tmp_path / "latest_net_G.pth")
    generator, config = load_generator(tmp_path / "latest_net_G.pth")
    assert (config.system, config.semantic_channels, config.upsampling) == ("cfl", n, upsampling)
    assert config.instances == (n == 36) and config.dont_care == (n == 151)
    own = generator.state_dict()
    assert own.keys() == state.keys() and all(torch.equal(own[k], state[k]) for k in own)


def without_counts(state):
    """As before PyTorch 0.4.1."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def without_biases(state):
    return {k: v for k, v in state.items() if not k.endswith(".bias")}


def without_batch_norm(state):
    """As the U-Net of a CycleGAN, whose instance norm has no weights."""
    return {k: v for k, v in state.items() if v.ndim == 4}


def with_batch_norm(state):
    norm = {
        f"model.2.{k}": torch.ones(2) for k in ("weight", "bias", "running_mean", "running_var")
    }
    return state | norm


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (official_discriminator(), "holds a patch discriminator, expected a generator"),
        (official_projector(), "holds a patch projector .*, expected a generator"),
        (with_batch_norm(official_generator()), "batch norm"),
        (without_biases(official_generator()), "convolutions without bias"),
        (official_generator() | {"model.12.conv_block.6.weight": torch.ones(1)}, "dropout"),
        (without_batch_norm(official_unet()), "not trained with batch norm"),
        ({"encoder.convs.1.weight": torch.ones(1)}, "StyleGAN2-style generator"),
        ({"fc.weight": torch.ones(1)}, r"no network that is known here \(keys fc.weight"),
        ({}, "holds nothing"),
        ([1, 2], "holds list"),
        ({"state_dict": {}, "epoch": 3}, "got other values under state_dict, epoch"),
        ({"format": 1, "model": {}}, "is a checkpoint of fastnce training"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, state, message):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message) as info:
        load_generator(tmp_path / "a.pth")
    assert "\n" not in str(info.value) and str(info.value).startswith(str(tmp_path / "a.pth"))


def test_files_that_run_code_or_are_damaged_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    torch.save(official_generator(), tmp_path / "cut.pth")
    cut_short(tmp_path / "cut.pth", 2000)
    for name in ("module.pth", "cut.pth"):
        with pytest.raises(UserError, match="is damaged or no PyTorch file of plain weights"):
            load_generator(tmp_path / name)
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        load_generator(tmp_path / "none.pth")


def test_a_missing_or_misshapen_weight_is_named(tmp_path):
    state = official_generator(blocks=2)
    del state["model.13.conv_block.5.weight"], state["model.13.conv_block.5.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"lacks weight model\.13\.conv_block\.5\.weight"):
        load_generator(tmp_path / "a.pth")


@pytest.mark.parametrize("epoch", ["", "5"])
def test_training_starts_from_published_weights(published, tiny, capsys, epoch):
    config = tiny(**SAME, init_from=published / epoch, lr=1e-12, steps=1)
    run = train(config)
    assert_starts_from(run, OFFICIAL)
    printed = capsys.readouterr().out
    assert all(f"/{epoch or 'latest'}_net_{name}.pth" in printed for name in "GDF")
    assert Run(run).config.init_from == published / epoch
    # It goes on without them; a network without a file starts anew.
    published.rename(published.with_name("gone"))
    train(tiny(**SAME, init_from=published / epoch, lr=1e-12, steps=2))
    (published.with_name("gone") / "latest_net_F.pth").unlink()
    again = published.with_name("again")
    train(tiny(**SAME, init_from=published.with_name("gone"), steps=1, out=again))
    assert "F: " in (printed := capsys.readouterr().out) and "starts anew" in printed


def test_the_options_that_weights_ask_for_are_told(published, tiny):
    with pytest.raises(UserError, match=r"base_channels=2, but .*base_channels=4. Add --base-ch"):
        train(tiny(**SAME, init_from=published, base_channels=4))
    with pytest.raises(UserError, match="Add --disc-antialias"):
        train(tiny(**SAME, init_from=published, disc_antialias=False))
    with pytest.raises(UserError, match=r"channels, but nce_layers=\[4, 8\] gives \[4, 8\]"):
        train(tiny(**SAME, init_from=published, nce_layers=[4, 8]))
    with pytest.raises(UserError, match=r"200_net_G\.pth: no such file; found 5, latest"):
        train(tiny(**SAME, init_from=published / "200"))
    assert not tiny().out.exists()


@pytest.mark.parametrize("module_prefix", [False, True])
def test_exported_files_are_the_published_ones_bit_for_bit(
    published, tiny, tmp_path, module_prefix
):
    run = train(tiny(**SAME, init_from=published, steps=2))
    files = export_published(run, tmp_path / "out", module_prefix=module_prefix, weights="raw")
    assert [path.name for path in files] == [f"latest_net_{name}.pth" for name in "GDF"]
    model = trained(run)
    for path, (attribute, official) in zip(files, OFFICIAL.items(), strict=True):
        saved = torch.load(path, weights_only=True)
        assert saved.keys() == (prefixed(official) if module_prefix else official).keys()
        for name, tensor in read_published(path).items():
            assert torch.equal(tensor, model[f"{attribute}.{name}"])
            assert tensor.shape == official[name].shape
    # And back in.
    start = {"init_from": tmp_path / "out", "lr": 1e-12, "steps": 1}
    again = trained(train(tiny(**SAME, **start, out=tmp_path / "again")))
    for name, tensor in model.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_what_is_exported_of_a_run(whole, tmp_path, which):
    run = whole("cut")
    path = export_shared(run, tmp_path / "out", weights=which)
    (published, *_) = export_published(run, tmp_path, label="200", weights=which)
    assert published.name == "200_net_G.pth"
    expected, config = load_generator(run, which=which)
    for file in (path, published):
        generator, shared = load_generator(file)
        assert_identical(dict(generator.state_dict()), dict(expected.state_dict()))
        assert shared.num_blocks == config.num_blocks
    # Nothing of the machine it was trained on.
    assert str(config.data).encode() not in path.read_bytes()


def test_safetensors_files_of_others(tmp_path, tiny):
    import safetensors.torch

    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(official_generator(blocks=2), plain)
    generator, config = load_generator(plain)
    assert config.num_blocks == 2 and len(generator.model) == len(range(12 + 2 + 11))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(plain.read_bytes()[:500])
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        load_generator(broken)
    with pytest.raises(UserError, match="no such file"):
        load_generator(tmp_path / "none.safetensors")
    newer = tmp_path / "newer.safetensors"
    metadata = {"fastnce.config": json.dumps({"system": "cut", "unheard_of": 1})}
    safetensors.torch.save_file(official_generator(), newer, metadata)
    with pytest.raises(UserError, match="unheard_of"):
        load_generator(newer)
