"""The classifier of the digits set, trained in a small configuration."""

import pytest
import torch

from fastnce.data import LabelledImages, read_labels, write_digits, write_photos
from fastnce.errors import UserError
from fastnce.metrics import (
    DigitClassifier,
    class_accuracy,
    load_digit_classifier,
)

TINY = {"steps": 3, "batch_size": 16, "base_channels": 4, "num_features": 16}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("demo") / "digits", 16)


def load(digits, cache, **settings):
    return load_digit_classifier(digits, cache=cache, progress=False, **(TINY | settings))


def images_of(root, split):
    """(N, 1, S, S) float32 in [-1, 1], and digits (N,)."""
    size = read_labels(root)["recipe"]["size"]
    images, labels = LabelledImages(root, split, image_size=size, channels=1).all_images()
    return images / 127.5 - 1, labels


def test_it_learns_to_read_digits_it_has_not_seen(digits, tmp_path):
    network = load(digits, tmp_path, steps=100, batch_size=64, base_channels=16)
    images, labels = images_of(digits, "test")
    probabilities = network.class_probabilities(images)
    assert class_accuracy(probabilities, labels) > 0.95
    assert probabilities.sum(1).tolist() == pytest.approx([1] * len(labels), abs=1e-5)
    features = network(images_of(digits, "train")[0])
    assert features.shape == (1195, 16) and features.min() >= 0
    assert features.var(0).mean().item() == pytest.approx(1, rel=1e-4)


def test_it_is_trained_once_and_repeatably(digits, tmp_path, monkeypatch):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, other = load(digits, tmp_path / "a"), load(digits, tmp_path / "b")
    assert torch.rand(1) == expected
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    digest = one.name.rsplit("-", 1)[1]
    assert [x.name for x in (tmp_path / "a").iterdir()] == [f"digit-classifier-{digest}.pt"]

    monkeypatch.setattr("fastnce.metrics.digit_classifier.fit", None)  # would fail if called
    again = load(digits, tmp_path / "a")
    images = images_of(digits, "test")[0][:5]
    assert torch.equal(again(images), one(images))
    with pytest.raises(TypeError):
        load(digits, tmp_path / "a", seed=1)  # another network, which is not there yet


def test_other_training_images_make_another_classifier(digits, tmp_path):
    other = write_digits(tmp_path / "digits", 16, seed=1)
    assert load(digits, tmp_path).name != load(other, tmp_path).name


def test_images_of_32_pixels(tmp_path):
    large = write_digits(tmp_path / "digits", 32)
    network = load(large, tmp_path)
    assert network(images_of(large, "test")[0][:3]).shape == (3, 16)
    with pytest.raises(ValueError, match=r"expected \(N, 1, 32, 32\).*got \(3, 1, 16, 16\)"):
        network(torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match="image_size=28: expected 16 or 32"):
        DigitClassifier(28)


def test_other_sets_are_refused(tmp_path):
    root = write_photos(tmp_path / "photos", 16, train_count=1, test_count=1)
    with pytest.raises(UserError, match='is a "photos" set.*fastnce data digits'):
        load_digit_classifier(root, cache=tmp_path)
