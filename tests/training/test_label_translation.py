"""Images made of label maps by runs of CFL."""

import shutil

import numpy as np
import pytest
from pictures import cut_short, levels, write
from PIL import Image

from fastnce.cli import main
from fastnce.data.images import to_uint8
from fastnce.errors import UserError
from fastnce.systems.cfl import label_maps, predictions
from fastnce.systems.cfl import tested as unaugmented
from fastnce.training import Run, export_shared, load_generator, translate_folder

INSTANCES = {"instances": True}


@pytest.fixture
def loaded(whole):
    return load_generator(whole("cfl"))


def written(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).transpose(2, 0, 1)


def test_files_are_the_predictions(loaded, labels, tmp_path):
    """One by one or together, of a run's folder or of a file that takes its place."""
    generator, config = loaded
    dataset = label_maps(config, "test", **unaugmented(config))
    expected = [to_uint8(image).numpy() for image, _ in predictions(generator, config, dataset)]
    how = {"instances": labels / "test_inst"}
    shared = export_shared(config.out, tmp_path / "shared")
    for size, network in ((16, generator), (1, Run(shared).network)):
        out = tmp_path / str(size)
        count = translate_folder(
            network, config, labels / "test_label", out, batch_size=size, **how
        )
        assert count == len(expected) == 2
        for index, image in enumerate(expected):
            difference = written(out / f"{index}.png").astype(int) - image
            assert np.abs(difference).max() <= 1


def test_sizes_and_formats(loaded, labels, tmp_path):
    how = {"instances": labels / "test_inst", "size": 64, "format": "webp"}
    translate_folder(*loaded, labels / "test_label", tmp_path / "out", **how)
    assert written(tmp_path / "out" / "1.webp").shape == (3, 64, 64)


def test_cityscapes_as_distributed(whole, tmp_path):
    generator, config = load_generator(whole("cfl"))
    city = tmp_path / "city" / "gtFine" / "val" / "ulm"
    for kind in ("labelIds", "instanceIds"):
        write(city / f"ulm_000000_000019_gtFine_{kind}.png", levels(32, 64, high=3))
    how = {"preprocess": "none"}
    assert translate_folder(generator, config, tmp_path / "city", tmp_path / "out", **how) == 1
    (result,) = (tmp_path / "out").rglob("*.png")
    assert written(result).shape == (3, 32, 64)


def test_a_broken_map_is_named_or_left_out(loaded, labels, tmp_path):
    shutil.copytree(labels / "test_label", tmp_path / "in")
    cut_short(tmp_path / "in" / "0.png", 60)
    how = {"instances": labels / "test_inst"}
    with pytest.raises(UserError, match=r"0\.png"):
        translate_folder(*loaded, tmp_path / "in", tmp_path / "out", **how)
    both = (tmp_path / "in", tmp_path / "out")
    assert translate_folder(*loaded, *both, broken_files="skip", **how) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]


MISTAKES = [
    ({}, "Give the folder of their maps: --instances DIR"),
    (INSTANCES | {"tile": 32}, "tile=32 is not for a run of cfl"),
    (INSTANCES | {"size": 40}, "gives 40x40, .*multiples of 32"),
    (INSTANCES | {"batch_size": 0}, "batch_size=0 must be at least 1"),
    (INSTANCES | {"input": "train_img"}, "is no label map"),
    (INSTANCES | {"input": "none"}, "none: no such folder"),
]


@pytest.mark.parametrize(("how", "message"), MISTAKES)
def test_mistakes_are_named(loaded, labels, tmp_path, how, message):
    how = dict(how)
    input = labels / how.pop("input", "test_label")
    if how.pop("instances", False):
        how["instances"] = labels / ("train_inst" if input.name == "train_img" else "test_inst")
    with pytest.raises(UserError, match=message):
        translate_folder(*loaded, input, tmp_path / "out", **how)


def test_instances_are_for_cfl_alone(whole, data, tmp_path, capsys):
    command = ["translate", "--run", whole("cut"), "--input", data / "testA", "--out", tmp_path]
    assert main([str(word) for word in [*command, "--instances", data]]) == 2
    assert "is not for a run of cut" in capsys.readouterr().err
