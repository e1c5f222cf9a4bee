"""All that every stream of samples promises: pure in (seed, index), whatever reads it and however much memory it has."""

import numpy as np
import pictures
import pytest
import torch
from pictures import equal
from torch.utils.data import DataLoader, Subset

from fastnce.data import (
    AlignedImages,
    LabelledImages,
    LabelMaps,
    SingleImagePatches,
    TwoViews,
    UnpairedImages,
)
from fastnce.errors import UserError

COUNT = 6
UNCHANGED = {"preprocess": "none", "flip": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """trainA and trainB with files of equal names, which are taken for two classes as well."""
    folders = ("trainA", "trainB", "train/one", "train/two")
    root = tmp_path_factory.mktemp("set")
    pictures.folders(root, {"numbers": COUNT}, size=(28, 24), channels=1, high=5)
    return pictures.folders(root, dict.fromkeys(folders, COUNT), size=(28, 24))


def unpaired(root, **options):
    sizes = {"load_size": 20, "crop_size": 16, "jitter_samples": 9}
    return UnpairedImages(root, **sizes | options)


def affine(root, **options):
    return unpaired(root, augment_a="affine", **options)


def aligned(root, **options):
    folders = {name: root / name for name in ("trainA", "trainB")}
    return AlignedImages(folders, load_size=20, crop_size=16, **options)


def label_maps(root, **options):
    folders = {"train_label": root / "numbers", "train_img": root / "trainB"}
    return LabelMaps(folders, label_classes=5, load_size=20, crop_size=16, **options)


def single(root, **options):
    return SingleImagePatches(root, **{"crop_size": 16, "epoch_samples": 12} | options)


def labelled(root, **options):
    return LabelledImages(root, **{"image_size": 16} | options)


def balanced(root, **options):
    return labelled(root, class_balance=True, **options)


def views(root, **options):
    return TwoViews(labelled(root, **options), "simclr")


STREAMS = [unpaired, affine, aligned, label_maps, single, labelled, balanced, views]
every_stream = pytest.mark.parametrize("make", STREAMS)


@every_stream
def test_a_sample_depends_on_seed_and_index_only(make, root):
    first, again, other = make(root), make(root), make(root, seed=1)
    samples = {index: first[index] for index in range(40)}
    for index in np.random.default_rng(0).permutation(40).tolist():
        assert equal(samples[index], again[index])
    assert not all(equal(samples[index], other[index]) for index in samples)
    for sample in samples.values():
        for name, value in sample.items():
            if name == "label":
                assert value.shape == ((16, 16) if make is label_maps else ())
                assert value.dtype == torch.int64
                continue
            assert value.shape == (3, 16, 16) and value.dtype == torch.float32
            assert value.min() >= -1 and value.max() <= 1


@every_stream
def test_workers_read_the_same_stream_from_the_middle_on(make, root):
    part = Subset(make(root), range(100_003, 100_015))
    one, two = (list(DataLoader(part, batch_size=4, num_workers=n)) for n in (0, 2))
    assert len(one) == len(two) == 3
    assert all(equal(*pair) for pair in zip(one, two, strict=True))


@every_stream
def test_global_generators_neither_matter_nor_move(make, root):
    dataset = make(root)
    torch.manual_seed(1)
    np.random.seed(1)
    expected_torch, expected_numpy = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    sample = dataset[7]
    assert torch.rand(1) == expected_torch and np.random.rand() == expected_numpy
    assert equal(sample, dataset[7])


@every_stream
def test_a_plain_loop_ends_after_an_epoch(make, root):
    dataset = make(root)
    assert len(list(dataset)) == len(dataset)
    with pytest.raises(IndexError, match="sample -1 does not exist"):
        dataset[-1]


@pytest.mark.parametrize("make", [x for x in STREAMS if x is not single])
@pytest.mark.parametrize("cache_bytes", [0, 3000])
def test_memory_does_not_change_the_samples(make, cache_bytes, root):
    small, large = make(root, cache_bytes=cache_bytes), make(root)
    for index in (0, 3, 12, 2, 11, 3):
        assert equal(small[index], large[index])


@pytest.mark.parametrize(
    ("make", "key", "options"),
    [(unpaired, "A", UNCHANGED), (aligned, "A", UNCHANGED), (labelled, "image", {"flip": False})],
)
def test_an_epoch_is_every_image_in_a_new_order(make, key, options, root):
    dataset = make(root, **options)
    assert len(dataset) == (2 * COUNT if make is labelled else COUNT)
    shown = [dataset[index][key].numpy().tobytes() for index in range(6 * len(dataset))]
    orders = {tuple(shown[k : k + len(dataset)]) for k in range(0, len(shown), len(dataset))}
    assert len(orders) == 6
    assert all(set(order) == set(shown) and len(set(order)) == len(order) for order in orders)


@pytest.mark.parametrize(
    ("make", "options", "ways"),
    [
        (unpaired, {"preprocess": "none", "serial": True}, 4),  # A and B apart
        (aligned, {"preprocess": "none"}, 2),  # both or none of a pair
        (single, {"crop_size": 24, "max_zoom_out": 1.0}, 4),
        (labelled, {}, 2),
    ],
)
def test_half_of_the_samples_are_mirrored_left_to_right(make, options, ways, root):
    flipped, plain = make(root, **options), make(root, **options, flip=False)
    images = [key for key in plain[0] if key != "label"]
    mirrored, seen = [], set()
    for index in range(400):
        sample, original = flipped[index], plain[index]
        way = [torch.equal(sample[key], original[key].flip(2)) for key in images]
        for key, turned in zip(images, way, strict=True):
            assert turned or torch.equal(sample[key], original[key])
            seen.add((original[key].numpy().tobytes(), turned))
        mirrored.append(way)
    counts = np.sum(mirrored, axis=0)
    assert (abs(counts - 200) < 50).all()  # five standard deviations of a fair coin
    assert len(set(map(tuple, mirrored))) == ways
    # Each image is shown both ways, for it is drawn anew each time.
    assert len(seen) == 2 * len({image for image, _ in seen})


@pytest.mark.parametrize("make", [unpaired, aligned])
def test_direction_swaps_the_domains_and_channels_are_the_samples(make, root):
    forth, back = (make(root, **UNCHANGED, serial=True, direction=d) for d in ("AtoB", "BtoA"))
    assert torch.equal(forth[1]["A"], back[1]["B"])
    assert torch.equal(forth[1]["B"], back[1]["A"])
    sample = make(root, channels_a=1, direction="BtoA")[0]
    assert sample["A"].shape == (1, 16, 16) and sample["B"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (unpaired, {"split": "test"}, "testA or valA"),
        (
            unpaired,
            {"preprocess": "crop", "crop_size": 26},
            r"0\.png: 28x24 is smaller than the crop of 26x26",
        ),
        (unpaired, {"augment_a": "afine"}, 'augment_a="afine": expected none or affine'),
        (unpaired, {"direction": "AB"}, 'direction="AB": expected AtoB or BtoA'),
        (unpaired, {"channels_a": 0}, "channels=0"),
        (unpaired, {"channels_a": 1, "bits": 16}, "bits=16 is for greyscale, got channels=3"),
        (single, {"crop_size": 25}, r"0\.png: 28x24 is smaller than .* 25x25.*at most 24"),
        (single, {"crop_size": 0}, "crop_size=0 is too small"),
        (single, {"max_zoom_out": 0.5}, "max_zoom_out=0.5 is too small"),
        (single, {"epoch_samples": 0}, "epoch_samples=0 is too small"),
        (single, {"direction": "AB"}, 'direction="AB": expected AtoB or BtoA'),
        (single, {"split": "test"}, "holds no folder testA or valA"),
        (single, {"channels_a": 2}, "channels=2"),
        (labelled, {"image_size": 0}, "image_size=0"),
        (labelled, {"channels": 4}, "channels=4.*Use 1 or 3"),
    ],
)
def test_mistakes_stop_before_the_first_sample(make, options, message, root):
    with pytest.raises(UserError, match=message) as info:
        make(root, **options)
    assert "\n" not in str(info.value)
