"""Image files of every kind: their numbers, their orientation, their formats and channels."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

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


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array)
    if path.suffix == ".npy":
        np.save(path, array)
    elif array.dtype == np.int16:  # as unsigned, with the tag that says that there is a sign
        Image.fromarray(array.view(np.uint16)).save(path, tiffinfo={339: (2,)})
    else:
        Image.fromarray(array).save(path)
    return path


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
    back = tmp_path / "back.tif"
    save_image(image, back, value_range=(-1024, 3071))
    with Image.open(back) as again:
        np.testing.assert_allclose(np.asarray(again), CT, atol=1e-3)


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
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels).convert("RGB" if mode == "CMYK" else "RGBA").convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(np.asarray(read_image(path, channels)), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_tag_says(tmp_path, suffix, orientation):
    """Pixel for pixel as Pillow turns the same image, and `image_size` agrees without decoding it."""
    pixels = np.random.default_rng(2).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path, exif = tmp_path / f"a.{suffix}", turned(orientation)
    Image.fromarray(pixels).save(
        path, exif=exif, **({"lossless": True} if suffix == "webp" else {})
    )
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


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    write(elsewhere / "deep" / "a.png", np.zeros((4, 4), np.uint8))
    write(data / "b.png", np.zeros((4, 4), np.uint8))
    (data / "linked").symlink_to(elsewhere)
    (data / "linked again").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(data)
    found = [path.relative_to(data).as_posix() for path in list_images(data)]
    assert found == ["b.png", "linked/deep/a.png"] or found == ["b.png", "linked again/deep/a.png"]
    # A folder that is there keeps its name, whatever links to it.
    (data / "a link").symlink_to(data / "real")
    write(data / "real" / "c.png", np.zeros((4, 4), np.uint8))
    assert data / "real" / "c.png" in list_images(data)


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
    documents, films, icons, tables = (
        {".eps", ".ps", ".emf", ".wmf"},
        {".flc", ".fli", ".mpg", ".mpeg"},
        {".ico", ".cur", ".icns", ".gbr", ".blp", ".ftc", ".ftu"},
        {".fit", ".fits", ".bufr", ".grib", ".h5", ".hdf", ".iim"},
    )
    assert opened - set(EXTENSIONS) <= documents | films | icons | tables


def test_alpha_is_a_channel_of_four(tmp_path):
    """Its values, and those of the colours under it, are what they are, also when images are scaled."""
    pixels = np.random.default_rng(3).integers(0, 256, (20, 20, 4), dtype=np.uint8)
    for domain in "AB":
        write(tmp_path / f"train{domain}" / "1.png", pixels)
    path = tmp_path / "trainA" / "1.png"
    image = load_image(path, 4)
    assert np.array_equal((image * 127.5 + 127.5).round().permute(1, 2, 0).numpy(), pixels)
    save_image(image, tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), pixels)
    sample = UnpairedImages(
        tmp_path, load_size=12, crop_size=8, preprocess="resize", channels_a=4, channels_b=3
    )[0]
    for channel in range(4):
        band = Image.fromarray(pixels[:, :, channel]).resize((12, 12), Image.Resampling.BICUBIC)
        scaled = (sample["A"][channel] * 127.5 + 127.5).round().numpy()
        assert np.array_equal(scaled, np.asarray(band)) or np.array_equal(
            scaled[:, ::-1], np.asarray(band)
        )
    # Where the file has none it is opaque.
    write(tmp_path / "c.png", pixels[:, :, :3])
    assert load_image(tmp_path / "c.png", 4)[3].unique().tolist() == [1]


def test_arrays_have_any_number_of_channels(tmp_path):
    numbers = np.random.default_rng(4).integers(0, 256, (20, 20, 7), dtype=np.uint8)
    for domain in "AB":
        write(tmp_path / f"train{domain}" / "1.npy", numbers)
    path = tmp_path / "trainA" / "1.npy"
    image = load_image(path, 7)
    save_image(image, tmp_path / "b.npy")
    assert np.array_equal(np.load(tmp_path / "b.npy"), numbers)
    sample = UnpairedImages(tmp_path, load_size=12, crop_size=8, channels_a=7, channels_b=7)[0]
    assert sample["A"].shape == (7, 8, 8)
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
