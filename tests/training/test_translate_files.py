"""Translating files: one or a folder, formats, names, alpha, halves, broken files, huge ones."""

import dataclasses

import numpy as np
import pytest
import torch
from pictures import cut_short, folders, noise
from PIL import Image

from fastnce.cli import main
from fastnce.data import load_image
from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator
from fastnce.training import CUTTrainConfig, translate, translate_folder


@pytest.fixture
def generator():
    """One whose results have contrast."""
    torch.manual_seed(0)
    generator = ResnetGenerator(base_channels=8, num_blocks=1).eval().requires_grad_(False)
    for parameter in generator.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    return generator


@pytest.fixture
def config(tmp_path):
    return CUTTrainConfig(data=tmp_path, out=tmp_path, preprocess="none")


SIZE = (20, 16)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def expected(generator, path):
    return translate(generator, load_image(path))


def test_one_image_into_a_folder_or_a_file(generator, config, tmp_path):
    image = noise(tmp_path / "in" / "one.png", SIZE)
    result = expected(generator, image)
    for out, written in ((tmp_path / "d", "d/one.png"), (tmp_path / "e" / "x.tif", "e/x.tif")):
        assert translate_folder(generator, config, image, out) == 1
        assert (load_image(tmp_path / written) - result).abs().max() <= 2 / 255
    with pytest.raises(UserError, match=r"out=.*one\.png would overwrite"):
        translate_folder(generator, config, image, image)
    with pytest.raises(UserError, match=r"x\.png is the name of a file, but input=.*in a folder"):
        translate_folder(generator, config, image.parent, tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.bmp: results are written as png, jpg, tiff, webp"):
        translate_folder(generator, config, image, tmp_path / "x.bmp")
    with pytest.raises(UserError, match=r"x\.png and format=jpg are two formats"):
        translate_folder(generator, config, image, tmp_path / "x.png", format="jpg")
    for name, value in {"batch_size": 0, "size": 0, "tile": 10}.items():
        with pytest.raises(UserError, match=f"{name}={value}"):
            translate_folder(generator, config, image, tmp_path / "d", **{name: value})
    with pytest.raises(UserError, match=r"none\.png: no such file or folder"):
        translate_folder(generator, config, tmp_path / "none.png", tmp_path / "d")


@pytest.mark.parametrize(
    ("format", "kind", "off"),
    [("png", "PNG", 0.6), ("jpg", "JPEG", 20), ("tiff", "TIFF", 0.6), ("webp", "WEBP", 20)],
)
def test_formats(generator, config, tmp_path, format, kind, off):
    """`off`: levels, in the mean; jpg and webp lose colours at half resolution."""
    image = noise(tmp_path / "in" / "sub" / "a.png", SIZE)
    translate_folder(generator, config, image.parents[1], tmp_path / "out", format=format)
    assert names(tmp_path / "out") == [f"sub/a.{format}"]
    with Image.open(tmp_path / "out" / "sub" / f"a.{format}") as opened:
        assert opened.format == kind
        levels = np.asarray(opened).astype(float)
    whole = ((expected(generator, image) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert whole.std() > 50
    assert np.abs(levels - whole).mean() <= off
    with pytest.raises(UserError, match="format=gif is unknown"):
        translate_folder(generator, config, image, tmp_path / "out", format="gif")


def test_names_that_differ_in_the_extension(generator, config, tmp_path):
    folder = tmp_path / "in"
    for seed, name in enumerate(("a.png", "a.jpg", "b.bmp", "b.tif", "c.jpg", "sub/a.jpg")):
        noise(folder / name, SIZE, seed=seed)
    assert translate_folder(generator, config, folder, tmp_path / "out") == 6
    expected_names = ["a.jpg.png", "a.png", "b.bmp.png", "b.tif.png", "c.png", "sub/a.png"]
    assert names(tmp_path / "out") == expected_names
    for source, result in (("a.jpg", "a.jpg.png"), ("a.png", "a.png"), ("b.tif", "b.tif.png")):
        off = load_image(tmp_path / "out" / result) - expected(generator, folder / source)
        assert off.abs().max() <= 2 / 255
    noise(folder / "a.jpg.bmp", SIZE)
    with pytest.raises(UserError, match=r"would both be written to .*a\.jpg\.png. Rename one"):
        translate_folder(generator, config, folder, tmp_path / "out")


def test_alpha_is_kept_or_said(generator, config, tmp_path, capsys):
    image = noise(tmp_path / "in" / "a.png", SIZE, channels=4)
    with Image.open(image) as opened:
        alpha = opened.getchannel("A")
    for format in ("png", "tiff", "webp"):
        translate_folder(generator, config, image, tmp_path / "out", format=format)
        with Image.open(tmp_path / "out" / f"a.{format}") as result:
            assert result.mode == "RGBA"
            assert np.array_equal(result.getchannel("A"), alpha)
    assert "alpha" not in capsys.readouterr().err
    # Scaled as the image is.
    translate_folder(generator, config, image, tmp_path / "small", preprocess="resize", size=8)
    with Image.open(tmp_path / "small" / "a.png") as result:
        smaller = alpha.resize((8, 8), Image.Resampling.BICUBIC)
        assert np.array_equal(result.getchannel("A"), smaller)
    translate_folder(generator, config, image, tmp_path / "out", format="jpg")
    assert "Alpha channels left out: 1." in capsys.readouterr().err
    # Turned as the image is.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image).save(tmp_path / "in" / "turned.png", exif=exif)
    translate_folder(generator, config, tmp_path / "in" / "turned.png", tmp_path / "out")
    with Image.open(tmp_path / "out" / "turned.png") as result:
        turned = alpha.transpose(Image.Transpose.ROTATE_270)
        assert result.size == (16, 20) and np.array_equal(result.getchannel("A"), turned)
    # A colour of a palette that is transparent.
    palette = Image.new("P", (20, 16), 1)
    palette.paste(0, (0, 0, 7, 16))
    palette.save(tmp_path / "in" / "p.png", transparency=0)
    translate_folder(generator, config, tmp_path / "in" / "p.png", tmp_path / "out")
    with Image.open(tmp_path / "out" / "p.png") as result:
        values = np.asarray(result.getchannel("A"))
    assert (values[:, :7] == 0).all() and (values[:, 7:] == 255).all()


@pytest.mark.parametrize("preprocess", ["none", "fixsize"])
def test_one_bad_file_among_many(generator, config, tmp_path, caplog, preprocess):
    config = dataclasses.replace(config, preprocess=preprocess)
    folders(tmp_path, {"in": 5})
    bad = cut_short(tmp_path / "in" / "3.png")
    with pytest.raises(UserError, match=r"3\.png: cannot be read .*--broken-files skip"):
        translate_folder(generator, config, bad.parent, tmp_path / "out")
    assert names(tmp_path / "out") == ["0.png", "1.png", "2.png"]  # read before, and not lost
    both = (bad.parent, tmp_path / "all")
    assert translate_folder(generator, config, *both, broken_files="skip") == 4
    assert names(tmp_path / "all") == ["0.png", "1.png", "2.png", "4.png"]
    assert sum("3.png" in record.message for record in caplog.records) == 1
    with pytest.raises(UserError, match="none of its 1 files can be read"):
        translate_folder(generator, config, bad, tmp_path / "out", broken_files="skip")


def test_huge_images_are_read_with_tiles(generator, config, tmp_path, monkeypatch):
    image = noise(tmp_path / "in" / "a.png", size=(48, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 40 // 2 - 1)  # Pillow allows twice that
    with pytest.raises(UserError, match=r"a\.png: is larger than what is read .*--tile 512"):
        translate_folder(generator, config, image, tmp_path / "out")
    assert translate_folder(generator, config, image, tmp_path / "out", tile=16) == 1
    assert Image.MAX_IMAGE_PIXELS == 48 * 40 // 2 - 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    result = load_image(tmp_path / "out" / "a.png")
    assert (result - expected(generator, image)).abs().max() <= 2 / 255


def test_the_options_of_the_command(whole, tmp_path, capsys):
    noise(tmp_path / "in" / "a.png", size=(16, 16))
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    command = ["translate", "--run", whole("cut"), "--device", "cpu", "--input", tmp_path / "in"]
    assert main([*map(str, command), "--out", str(tmp_path / "out")]) == 2
    assert "--broken-files skip" in capsys.readouterr().err
    options = [
        "--format",
        "jpg",
        "--broken-files",
        "skip",
        "--part",
        "left",
        "--preprocess",
        "none",
    ]
    assert main([*map(str, command), "--out", str(tmp_path / "new"), *options]) == 0
    assert "Translated 1 image into" in capsys.readouterr().out
    assert names(tmp_path / "new") == ["a.jpg"]
    assert Image.open(tmp_path / "new" / "a.jpg").size == (8, 16)
