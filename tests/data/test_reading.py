"""Image files of every kind: their numbers, orientation, formats and channels; and how they are written."""

import errno
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import levels, write
from PIL import ExifTags, Image, ImageOps

from fastnce import files
from fastnce.data import AlignedImages, SingleImagePatches, UnpairedImages, list_images
from fastnce.data.images import (
    EXTENSIONS,
    fitting_suffixes,
    image_size,
    load_image,
    read_image,
    save_image,
)
from fastnce.errors import UserError

CT = np.random.default_rng(0).integers(-1024, 3072, (12, 10))


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("ct.tif", np.int16, "16-bit integers with a sign"),
        ("ct.tif", np.int32, "32-bit integers"),
        ("ct.tif", np.float32, "32-bit floating-point numbers"),
        ("ct.pfm", np.float32, "32-bit floating-point numbers"),
        ("ct.npy", np.int16, "int16"),
        ("ct.npy", np.float64, "float64"),
    ],
)
def test_numbers_that_are_no_levels_of_grey_need_a_range(tmp_path, name, dtype, kind):
    path = write(tmp_path / name, CT.astype(dtype))
    for bits in (8, 16):
        with pytest.raises(UserError) as info:
            load_image(path, 1, bits)
        for part in (str(path), kind, f"{CT.min()} to {CT.max()}", "--value-range"):
            assert part in str(info.value)
    image = load_image(path, 1, value_range=(-1024, 3071))
    expected = (CT.astype(np.float64) + 1024) / 4095 * 2 - 1
    assert image.dtype == torch.float32
    np.testing.assert_allclose(image[0].numpy(), expected, atol=1e-7)
    assert torch.equal(load_image(path, 3, value_range=(-1024, 3071)), image.expand(3, -1, -1))


def test_numbers_beyond_the_range_are_clipped_and_others_refused(tmp_path):
    path = write(tmp_path / "a.tif", np.array([[-9, 0, 0.5, 1, 9]], dtype=np.float32))
    assert load_image(path, 1, value_range=(0, 1)).flatten().tolist() == [-1, -1, 0, 1, 1]
    write(path, np.array([[0, np.nan]], dtype=np.float32))
    with pytest.raises(UserError, match=r"a\.tif: .*not finite"):
        load_image(path, 1, value_range=(0, 1))
    for wrong in ((1, 0), (1, 1), (0, np.inf), (0,)):
        with pytest.raises(UserError, match="value_range="):
            load_image(path, 1, value_range=wrong)


def png_of_16_bits(levels):
    """By hand: Pillow writes none in colour."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_numbers_that_pillow_scales_are_not_taken_for_the_files(tmp_path):
    colours = np.arange(48).reshape(4, 4, 3) * 1000
    (tmp_path / "colour.png").write_bytes(png_of_16_bits(colours))
    (tmp_path / "colour.ppm").write_bytes(b"P6 4 4 65535\n" + colours.astype(">u2").tobytes())
    grey = np.arange(16).reshape(4, 4) * 273
    (tmp_path / "grey.pgm").write_bytes(b"P5 4 4 4095\n" + grey.astype(">u2").tobytes())
    for name, options in (
        ("colour.png", {"value_range": (0, 65535)}),
        ("colour.png", {"channels": 1, "bits": 16}),
        ("colour.ppm", {"value_range": (0, 65535)}),
        ("grey.pgm", {"value_range": (0, 4095)}),
    ):
        with pytest.raises(UserError, match=rf"{name}: holds other numbers .* \.npy"):
            load_image(tmp_path / name, **options)
    for name in ("colour.png", "colour.ppm"):
        shown = load_image(tmp_path / name).permute(1, 2, 0).numpy() * 127.5 + 127.5
        np.testing.assert_allclose(shown, colours / 257, atol=1)
    # The greatest number of a PGM says what is white.
    assert load_image(tmp_path / "grey.pgm", 1, 16).max() == 1


@pytest.mark.parametrize(
    ("value_range", "channels", "suffix", "dtype"),
    [
        ((0, 4095), 1, ".png", np.uint16),
        ((0, 255), 3, ".png", np.uint8),
        ((0, 1), 1, ".tif", np.float32),  # as integers they would be black and white
        ((-1024, 3071), 1, ".tif", np.float32),
        ((0.5, 1000), 1, ".tif", np.float32),
        ((0, 4095), 3, ".npy", np.uint16),
    ],
)
def test_the_way_back_to_the_numbers(tmp_path, value_range, channels, suffix, dtype):
    low, high = value_range
    numbers = np.linspace(low, high, 16 * channels).reshape(4, 4, channels)
    numbers = (numbers if dtype == np.float32 else numbers.round()).astype(dtype)
    source, result = write(tmp_path / "a.npy", numbers), tmp_path / f"b{suffix}"
    assert fitting_suffixes(channels, 8, value_range)[0] == suffix
    save_image(load_image(source, channels, 8, value_range), result, 8, value_range)
    again = np.load(result) if suffix == ".npy" else np.asarray(Image.open(result))
    assert again.dtype == dtype
    np.testing.assert_allclose(
        again.reshape(numbers.shape), numbers, rtol=1e-6, atol=1e-7 * (high - low)
    )
    if suffix != ".png" or dtype == np.uint16:
        with pytest.raises(UserError, match=r"c\.jpg: cannot be written"):
            save_image(torch.zeros(channels, 4, 4), tmp_path / "c.jpg", 8, value_range)


def ramp_folders(root, suffix=".tif", dtype=np.float32, last=1.0):
    ramp = np.linspace(0, last, 40 * 40).reshape(40, 40).astype(dtype)
    for domain in "AB":
        write(root / f"train{domain}" / f"1{suffix}", ramp)
    return ramp


@pytest.mark.parametrize(
    "suffix, dtype, last, how",
    [
        (".tif", np.float32, 1.0, {"value_range": (0.0, 1.0)}),
        (".png", np.uint16, 65535, {"bits": 16}),
    ],
)
def test_scaling_and_cutting_keep_the_numbers(tmp_path, suffix, dtype, last, how):
    ramp = ramp_folders(tmp_path, suffix, dtype, last)
    options = {"channels_a": 1, "channels_b": 1, "flip": False, "crop_size": 24} | how
    sample = UnpairedImages(tmp_path, load_size=32, preprocess="resize", **options)[0]["A"]
    scaled = Image.fromarray(ramp.astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = (np.asarray(scaled) / last * 2 - 1).clip(-1, 1)
    np.testing.assert_allclose(sample[0].numpy(), expected, atol=2e-5)
    for dataset in (
        UnpairedImages(tmp_path, load_size=32, augment_a="affine", **options),
        AlignedImages(tmp_path, load_size=32, **options),
        SingleImagePatches(tmp_path, **options),
    ):
        images = dataset[0]
        assert images["A"].shape == images["B"].shape == (1, 24, 24)
        # 8 bits would leave at most 256.
        assert len(images["B"].unique()) > 400
        assert images["A"].min() >= -1 and images["A"].max() <= 1


def test_other_numbers_stop_a_run_even_where_broken_files_are_skipped(tmp_path):
    ramp_folders(tmp_path)
    for dataset in (UnpairedImages, AlignedImages, SingleImagePatches):
        with pytest.raises(UserError, match=r"1\.tif: .*--value-range"):
            dataset(tmp_path, crop_size=24, channels_a=1, channels_b=1, broken_files="skip")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_eight_bits_are_read_as_they_always_were(tmp_path, mode, channels):
    pixels = levels(9, 7, 4)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(np.asarray(read_image(path, channels)), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_tag_says(tmp_path, suffix, orientation):
    """Pixel for pixel as Pillow turns the same image, and `image_size` agrees without decoding it."""
    pixels, options = levels(6, 9, 3), {"lossless": True} if suffix == "webp" else {}
    path = write(tmp_path / f"a.{suffix}", pixels, exif=turned(orientation), **options)
    plain = Image.fromarray(pixels)
    plain.getexif()[ExifTags.Base.Orientation] = orientation
    expected = ImageOps.exif_transpose(plain)
    image = read_image(path, 3)
    assert image_size(path) == image.size == expected.size
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_tag_turns_nothing_and_metadata_of_a_tiff_do(tmp_path):
    for content in (b"Exif\0\0no tags", b"Exif\0\0II*\0\xff\xff\xff\xff", turned(77).tobytes()):
        Image.new("RGB", (9, 6)).save(tmp_path / "a.jpg", exif=content)
        assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg", 3).size == (9, 6)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("L", (9, 6)).save(tmp_path / "a.tif", tiffinfo={700: xmp})
    assert image_size(tmp_path / "a.tif") == read_image(tmp_path / "a.tif", 1).size == (6, 9)


@pytest.mark.parametrize("suffix", ["webp", "gif", "avif", "jp2", "tga", "pgm", "npy"])
def test_formats_beside_the_usual_ones_are_read(tmp_path, suffix):
    if suffix == "avif":
        pytest.importorskip("PIL._avif")
    path = write(tmp_path / f"a.{suffix}", np.full((6, 9), 200, np.uint8))
    assert list_images(tmp_path) == [path]
    assert image_size(path) == (9, 6)
    assert (load_image(path, 1) * 127.5 + 127.5).round().unique().tolist() == [200]


def test_all_that_pillow_opens_is_found_but_for_what_is_no_picture():
    Image.init()
    opened = {
        name for name, format in Image.registered_extensions().items() if format in Image.OPEN
    }
    documents, films = {".eps", ".ps", ".emf", ".wmf"}, {".flc", ".fli", ".mpg", ".mpeg"}
    icons = {".ico", ".cur", ".icns", ".gbr", ".blp", ".ftc", ".ftu"}
    tables = {".fit", ".fits", ".bufr", ".grib", ".h5", ".hdf", ".iim"}
    assert opened - set(EXTENSIONS) <= documents | films | icons | tables


def test_alpha_is_a_channel_of_four(tmp_path):
    """Its values, and those of the colours under it, are what they are, also when images are scaled."""
    pixels = levels(20, 20, 4)
    for domain in "BA":
        path = write(tmp_path / f"train{domain}" / "1.png", pixels)
    image = load_image(path, 4)
    assert np.array_equal((image * 127.5 + 127.5).round().permute(1, 2, 0).numpy(), pixels)
    save_image(image, tmp_path / "new" / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "b.png")), pixels)
    options = {"load_size": 12, "crop_size": 8, "preprocess": "resize", "flip": False}
    sample = UnpairedImages(tmp_path, channels_a=4, channels_b=3, **options)[0]
    for channel in range(4):
        band = Image.fromarray(pixels[:, :, channel]).resize((12, 12), Image.Resampling.BICUBIC)
        scaled = (sample["A"][channel] * 127.5 + 127.5).round().numpy()
        assert np.array_equal(scaled, np.asarray(band))
    # Where the file has none it is opaque.
    write(tmp_path / "c.png", pixels[:, :, :3])
    assert load_image(tmp_path / "c.png", 4)[3].unique().tolist() == [1]


def test_arrays_have_any_number_of_channels(tmp_path):
    numbers = levels(20, 20, 7)
    path = write(tmp_path / "1.npy", numbers)
    save_image(load_image(path, 7), tmp_path / "b.npy")
    assert np.array_equal(np.load(tmp_path / "b.npy"), numbers)
    with pytest.raises(UserError, match=r"channels=5: .*1\.npy has 7"):
        load_image(path, 5)
    with pytest.raises(UserError, match="channels=7"):
        load_image(write(tmp_path / "c.png", numbers[:, :, :3]), 7)
    for wrong in (np.zeros((2, 3, 4, 5)), np.zeros((4, 4), dtype=complex), np.zeros((0, 4))):
        write(tmp_path / "d.npy", wrong)
        with pytest.raises(UserError, match=r"d\.npy: cannot be read"):
            load_image(tmp_path / "d.npy", 1, value_range=(0, 1))
    (tmp_path / "e.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"e\.npy: cannot be read"):
        image_size(tmp_path / "e.npy")
    np.save(tmp_path / "e.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"e\.npy: cannot be read"):
        load_image(tmp_path / "e.npy", 1)


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
def test_a_broken_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "truncated":
        content = write(path, levels(64, 64, 3)).read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.png: cannot be read as an image") as info:
        load_image(path)
    assert "\n" not in str(info.value)


def test_sixteen_bits_survive_reading_and_writing(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    write(tmp_path / "a.png", levels)
    image = load_image(tmp_path / "a.png", channels=1, bits=16)
    assert image.shape == (1, 256, 256) and image.dtype == torch.float32
    assert image.min() == -1 and image.max() == 1
    assert len(image.unique()) == 65536
    for name in ("b.png", "b.tif"):
        save_image(image, tmp_path / name, bits=16)
        with Image.open(tmp_path / name) as again:
            assert again.mode == "I;16"
            assert np.array_equal(np.asarray(again), levels)
    # Read as 8 bits they are scaled and not clipped; and 8 bits read as 16 keep their brightness.
    narrow = load_image(tmp_path / "a.png", channels=1)
    torch.testing.assert_close(narrow, image, rtol=0, atol=2 / 255)
    write(tmp_path / "c.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    wide, narrow = (load_image(tmp_path / "c.png", channels=1, bits=bits) for bits in (16, 8))
    torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-6)


def test_sixteen_bits_are_for_greyscale(tmp_path):
    path = write(tmp_path / "a.png", levels(8, 8, 3))
    for channels, bits, message in (
        (3, 16, "bits=16 is for greyscale, got channels=3"),
        (1, 12, "bits=12: images have 8 or 16"),
    ):
        with pytest.raises(UserError, match=message):
            load_image(path, channels, bits)
        with pytest.raises(UserError, match=message):
            save_image(torch.zeros(channels, 4, 4), tmp_path / "b.png", bits)


def test_images_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"c\.jpg: cannot be written"):
        save_image(torch.zeros(1, 4, 4), tmp_path / "c.jpg", bits=16)
    (tmp_path / "file").touch()  # in the way of a folder
    with pytest.raises(UserError, match="cannot be written"):
        save_image(torch.ones(3, 4, 4), tmp_path / "file" / "b.png")
    with pytest.raises(ValueError, match=r"\(C, H, W\).*got \(2, 3, 4, 4\)"):
        save_image(torch.zeros(2, 3, 4, 4), tmp_path / "b.png")


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(torch.ones(3, 4, 4), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left"):
        save_image(-torch.ones(3, 4, 4), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_saved_files_follow_the_umask(tmp_path):
    save_image(torch.ones(3, 4, 4), tmp_path / "a.png")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode
