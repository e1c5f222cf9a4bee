"""k-NN against a loop over all pairs; linear evaluation; the features of an encoder."""

import math

import pytest
import torch
from torch import nn

from fastnce.data import LabelledImages
from fastnce.demo import write_digits
from fastnce.metrics import evaluate_encoders, knn_predict, linear_predict
from fastnce.metrics.probes import calibrate, encode, format_encoder_table


def brute_force(train, labels, test, k, temperature):
    answers = []
    for x in test:
        cosine = [torch.dot(x, t).item() / (x.norm() * t.norm()).item() for t in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosine[i])[:k]
        votes = {}
        for i in nearest:
            c = int(labels[i])
            votes[c] = votes.get(c, 0.0) + math.exp(cosine[i] / temperature)
        answers.append(max(votes, key=votes.get))
    return answers


@pytest.mark.parametrize(
    ("k", "temperature"), [(1, 0.1), (7, 0.1), (7, 2.0), (30, 0.5), (999, 0.1)]
)
def test_knn_is_brute_force(k, temperature, generator):
    train = torch.randn(30, 4, generator=generator)
    labels = torch.randint(5, (30,), generator=generator)
    test = torch.randn(50, 4, generator=generator)
    predicted = knn_predict(train, labels, test, k=k, temperature=temperature)
    assert predicted.tolist() == brute_force(train, labels, test, k, temperature)


def test_knn_of_many_images_is_made_in_blocks(generator):
    train, test = torch.randn(22_000, 2, generator=generator).split([20_000, 2_000])
    labels = torch.arange(20_000) % 4
    parts = [knn_predict(train, labels, part, k=5) for part in test.split(1_000)]
    assert torch.equal(knn_predict(train, labels, test, k=5), torch.cat(parts))


def test_knn_at_its_limits():
    """A tiny temperature does not overflow; wrong arguments are named."""
    x, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([1, 0])
    assert knn_predict(x, labels, x[:1], k=2, temperature=1e-3).tolist() == [1]
    with pytest.raises(ValueError, match=r"got \(2, 2\), \(2,\) and \(3, 4\)"):
        knn_predict(x, labels, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="k=0, temperature=0.1"):
        knn_predict(x, labels, x, k=0)
    with pytest.raises(ValueError, match="temperature=0"):
        knn_predict(x, labels, x, temperature=0)


def test_linear_separates_what_a_line_separates(generator):
    """Also where what tells the classes apart is a ten-thousandth of what does not: the penalty must not hide it."""
    x = torch.randn(200, 2, generator=generator)
    labels = (x[:, 0] > 0).long()
    x = x * torch.tensor([1e-4, 1.0])
    predicted = linear_predict(x[:100], labels[:100], x[100:])
    assert (predicted == labels[100:]).double().mean() > 0.95


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = write_digits(tmp_path_factory.mktemp("digits") / "set")
    options = {"image_size": 16, "channels": 1, "flip": False}
    return [LabelledImages(root, split, **options) for split in ("train", "test")]


def test_encode_keeps_the_order_of_the_files(digits):
    train, some = digits[0], [5, 1000, 3]
    expected = torch.stack([train.image(i) for i in some]).flatten(1)
    assert torch.equal(encode(nn.Flatten(), train, some), expected)
    assert torch.equal(encode(nn.Flatten(), train)[some], expected)


def test_raw_pixels_of_digits_and_the_table(digits):
    top_row = nn.Sequential(nn.Flatten(), nn.Linear(256, 16, bias=False))
    nn.init.eye_(top_row[1].weight)
    result = evaluate_encoders({"raw": nn.Flatten(), "one row": top_row}, *digits)
    raw, row = result["rows"]
    assert raw["knn_20"] > 0.95 and raw["linear"] > 0.95
    # The top row of an enlarged digit is nearly all black.
    assert row["knn_20"] < 0.6
    text = format_encoder_table(result)
    assert "| raw" in text and f"{raw['linear']:.3f}" in text and "602 test images" in text


def test_calibrated_statistics_are_the_data_s(digits):
    norm, train = nn.BatchNorm2d(1, affine=False), digits[0]
    assert calibrate(norm, train) is norm and not norm.training
    images = torch.stack([train.image(i) for i in range(len(train))])
    assert norm.running_mean.item() == pytest.approx(images.mean().item(), abs=0.01)
    assert norm.running_var.item() == pytest.approx(images.var().item(), abs=0.01)
    assert norm.momentum == 0.1
