"""All that every stream of samples promises: pure in (seed, index), whatever reads it and however much memory it has."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from fastnce.data import (
    AlignedImages,
    LabelledImages,
    SingleImagePatches,
    TwoViews,
    UnpairedImages,
)

COUNT = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """trainA and trainB with files of equal names, which are taken for two classes as well."""
    root = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for folder in ("trainA", "trainB", "train/one", "train/two"):
        (root / folder).mkdir(parents=True)
        for number in range(COUNT):
            pixels = rng.integers(0, 256, (24, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


def unpaired(root, **options):
    return UnpairedImages(root, load_size=20, crop_size=16, jitter_samples=9, **options)


def affine(root, **options):
    return unpaired(root, augment_a="affine", **options)


def aligned(root, **options):
    folders = {name: root / name for name in ("trainA", "trainB")}
    return AlignedImages(folders, load_size=20, crop_size=16, **options)


def single(root, **options):
    return SingleImagePatches(root, crop_size=16, epoch_samples=12, **options)


def labelled(root, **options):
    return LabelledImages(root, image_size=16, **options)


def balanced(root, **options):
    return labelled(root, class_balance=True, **options)


def views(root, **options):
    return TwoViews(labelled(root, **options), "simclr")


STREAMS = [unpaired, affine, aligned, single, labelled, balanced, views]
every_stream = pytest.mark.parametrize("make", STREAMS)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


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
                assert value.shape == () and value.dtype == torch.int64
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
