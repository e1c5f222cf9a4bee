"""Segmentation scores against scikit-learn, label maps of every kind, and segmenters from files."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, precision_score, recall_score
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.metrics.segmentation import (
    ScriptedSegmenter,
    confusion_matrix,
    evaluate_segmentation,
    format_segmentation_table,
    label_files,
    label_key,
    read_label_map,
    segmentation_scores,
)

ROAD, SKY, CAR = (128, 64, 128), (70, 130, 180), (0, 0, 142)
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


class Halves(nn.Module):
    """Takes what is dark for road and the rest for sky, at half the size."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        light = images[:, 0, ::2, ::2].float() / 255
        logits = torch.zeros(images.shape[0], 19, light.shape[1], light.shape[2])
        logits[:, 0] = 1 - light
        logits[:, 10] = light
        return logits


class Ids(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.where(images[:, 0] > 127, 10, 0)


class Wrong(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(array, dtype=np.uint8)).save(path, quality=100)
    return path


@pytest.mark.parametrize("missing", [(), (3, 17)])
def test_the_scores_are_those_of_scikit_learn(missing):
    random = np.random.default_rng(0)
    labels = random.integers(0, 19, (4, 30, 20))
    for number in missing:  # neither asked for nor predicted
        labels[labels == number] = 0
    predicted = np.where(random.random(labels.shape) < 0.6, labels, random.permuted(labels, axis=0))
    labels[random.random(labels.shape) < 0.2] = 255
    given, true = predicted[labels != 255], labels[labels != 255]
    pairs = zip(torch.tensor(predicted), torch.tensor(labels), strict=True)
    scores = segmentation_scores(sum(confusion_matrix(*pair) for pair in pairs))
    present = [number for number in range(19) if number not in missing]
    how = {"labels": present, "average": None, "zero_division": 0}
    recall, iou = recall_score(true, given, **how), jaccard_score(true, given, **how)
    for mine, theirs in ((scores.accuracies, recall), (scores.ious, iou)):
        assert [mine[number] for number in present] == pytest.approx(list(theirs), rel=1e-12)
        assert all(math.isnan(mine[number]) for number in missing)
    means = (accuracy_score(true, given), recall.mean(), iou.mean())
    means += (precision_score(true, given, **how).mean(),)
    mine = (scores.pixel_accuracy, scores.class_accuracy, scores.mean_iou, scores.mean_precision)
    assert mine == pytest.approx(means, abs=1e-12)


def test_a_class_that_is_only_predicted_has_no_accuracy_and_an_iou_of_zero():
    scores = segmentation_scores(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3))
    assert scores.ious[:2] == (0.5, 0.0) and math.isnan(scores.ious[2])
    assert scores.accuracies[0] == 0.5 and math.isnan(scores.accuracies[1])
    assert scores.mean_iou == 0.25 and scores.class_accuracy == 0.5


@pytest.mark.parametrize(
    "predicted, labels, message",
    [
        ([0, 0, 0, 0], [0, 0], "one shape"),
        ([0, 0, 0, 0], [0, 33, 255, 1], "labels: expected 0 to 18, got 0 to 33"),
        ([0, 19, 0, 0], [0, 0, 0, 0], "predicted: expected 0 to 18, got 0 to 19"),
    ],
)
def test_values_out_of_range(predicted, labels, message):
    maps = torch.tensor(predicted), torch.tensor(labels)
    with pytest.raises(ValueError, match=message):
        confusion_matrix(*maps)
    # Where nothing is labelled any prediction will do.
    assert confusion_matrix(torch.tensor([0, 19, 0]), torch.tensor([0, 255, 0])).sum() == 2


def test_label_maps_of_every_kind_are_the_same_map(tmp_path):
    train_ids = [[0, 10, 13], [255, 0, 255]]
    ids = [[7, 23, 26], [0, 7, 9]]  # 9: parking, which is not evaluated
    colours = [[ROAD, SKY, CAR], [(0, 0, 0), ROAD, (250, 170, 160)]]
    for kind, array in (("train-ids", train_ids), ("ids", ids), ("colours", colours)):
        read = read_label_map(save(array, tmp_path / f"{kind}.png"), kind)
        assert read.dtype == torch.int64 and read.tolist() == train_ids
    every = read_label_map(save([IDS], tmp_path / "every.png"), "ids")
    assert every.tolist() == [list(range(19))]


def test_colours_are_read_from_a_jpeg(tmp_path):
    """Up to the borders between colours, over which JPEG smears: the published preparation writes JPEG files."""
    colours = np.array([ROAD, SKY, CAR, (220, 20, 60), (250, 170, 30)])
    image = np.kron(colours[None], np.ones((16, 16, 1), dtype=np.uint8))
    read = read_label_map(save(image, tmp_path / "x.jpg"), "colours")
    inside = read.view(16, 5, 16)[:, :, 2:-2]
    assert torch.equal(inside, torch.tensor([0, 10, 13, 11, 6])[:, None].expand(inside.shape))


@pytest.mark.parametrize(
    "array, kind, message",
    [
        ([[7, 26]], "train-ids", "26 is no train id.*--label-kind ids"),
        ([[ROAD, SKY]], "ids", "is of mode RGB.*--label-kind colours"),
        (np.full((4, 4, 3), (0, 255, 0)), "colours", "most of its pixels have none"),
        (None, "ids", "is not a readable image"),
    ],
)
def test_files_that_are_no_label_maps(array, kind, message, tmp_path):
    path = tmp_path / "x.png"
    path.write_text("no image") if array is None else save(array, path)
    with pytest.raises(UserError, match=rf"x\.png: {message}"):
        read_label_map(path, kind)


def test_label_maps_are_found_by_the_scenes_name(tmp_path):
    for ending in ("gtFine_color", "gtFine_labelIds", "gtFine_labelTrainIds", "gtFine_instanceIds"):
        save([[0]], tmp_path / "own" / "ulm" / f"ulm_000001_000019_{ending}.png")
    for kind, ending in (("colours", "color"), ("ids", "labelIds"), ("train-ids", "labelTrainIds")):
        assert {k: v.name for k, v in label_files(tmp_path / "own", kind).items()} == {
            "ulm_000001_000019": f"ulm_000001_000019_gtFine_{ending}.png"
        }
    photo = tmp_path / "ulm_000001_000019_leftImg8bit.png"
    assert label_key(photo) == "ulm_000001_000019"
    assert label_key(photo.with_name("ulm_A.png")) == "ulm_A"  # a name, not a number
    save([[0]], tmp_path / "prepared" / "7_B.jpg")
    assert list(label_files(tmp_path / "prepared", "colours")) == ["7"]
    save([[0]], tmp_path / "prepared" / "7.png")
    with pytest.raises(UserError, match="are label maps of one scene"):
        label_files(tmp_path / "prepared", "colours")


@pytest.mark.parametrize("module", [Halves(), Ids()])
def test_segmentations_are_compared_at_the_size_of_the_label_maps(module, scripted, tmp_path):
    image = torch.full((3, 16, 16), -1.0)
    image[:, :8] = 1  # sky above, road below
    labels = np.zeros((32, 32))
    labels[:16] = 10
    labels[16:20, :16] = 255  # void
    labels[28:, 24:] = 13  # a car that nobody sees
    maps = {"x": save(labels, tmp_path / "labels" / "x.png")}
    segmenter = ScriptedSegmenter(scripted(module, "segmenter.pt"))
    result = evaluate_segmentation([(tmp_path / "x.jpg", image)], maps, segmenter, "train-ids")
    counted, car = 32 * 32 - 4 * 16, 4 * 8
    rows = {row["name"]: row for row in result["classes"]}
    assert rows["sky"]["accuracy"] == rows["sky"]["iou"] == 1
    assert rows["road"]["iou"] == pytest.approx((counted - 512 - car) / (counted - 512))
    assert rows["car"] == {"name": "car", "accuracy": 0, "iou": 0}
    assert rows["truck"] == {"name": "truck", "accuracy": None, "iou": None}
    assert result["pixel_accuracy"] == pytest.approx(1 - car / counted)
    assert result["class_accuracy"] == pytest.approx(2 / 3) and result["count"] == 1
    assert result["segmenter"].startswith("segmenter.pt-")
    table = format_segmentation_table(result)
    assert "| car           | 0.000" in table and "| truck         | -" in table


def test_an_image_without_a_label_map_and_a_network_of_another_kind(scripted, tmp_path):
    labels = {"y": save([[0]], tmp_path / "y.png")}
    segmenter = ScriptedSegmenter(scripted(Ids(), "ids.pt"))
    image = torch.zeros(3, 4, 4)
    with pytest.raises(UserError, match=r"x\.png: has no label map.*such as y\.png"):
        evaluate_segmentation([(tmp_path / "x.png", image)], labels, segmenter, "ids")
    wrong = ScriptedSegmenter(scripted(Wrong(), "wrong.pt"))
    with pytest.raises(UserError, match=r"segmenter wrong\.pt.*expected logits \(N, 19, h, w\)"):
        wrong(image, (4, 4))
    with pytest.raises(UserError, match=r"segmenter .*none\.pt: no such file"):
        ScriptedSegmenter(tmp_path / "none.pt")
