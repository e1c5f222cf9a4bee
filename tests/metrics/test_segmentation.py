"""Segmentation scores against scikit-learn, label maps of every kind, and segmenters from files."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, precision_score, recall_score
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.metrics.label_maps import _CLASSES, label_files, label_key, read_label_map
from fastnce.metrics.segmentation import (
    ScriptedSegmenter,
    confusion_matrix,
    evaluate_segmentation,
    format_segmentation_table,
    segmentation_scores,
)

ROAD, SKY, CAR = (128, 64, 128), (70, 130, 180), (0, 0, 142)


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


def script(module: nn.Module, path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


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
    counted = labels != 255
    scores = segmentation_scores(
        sum(
            confusion_matrix(torch.tensor(p), torch.tensor(y))
            for p, y in zip(predicted, labels, strict=True)
        )
    )
    given, true = predicted[counted], labels[counted]
    present = [number for number in range(19) if number not in missing]
    how = {"labels": present, "average": None, "zero_division": 0}
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(true, given), abs=1e-12)
    for mine, theirs in (
        (scores.accuracies, recall_score(true, given, **how)),
        (scores.ious, jaccard_score(true, given, **how)),
    ):
        np.testing.assert_allclose([mine[number] for number in present], theirs, rtol=1e-12)
        assert all(math.isnan(mine[number]) for number in missing)
    assert scores.mean_iou == pytest.approx(jaccard_score(true, given, **how).mean(), abs=1e-12)
    assert scores.class_accuracy == pytest.approx(
        recall_score(true, given, **how).mean(), abs=1e-12
    )
    assert scores.mean_precision == pytest.approx(
        precision_score(true, given, **how).mean(), abs=1e-12
    )


def test_a_class_that_is_only_predicted_has_no_accuracy_and_an_iou_of_zero():
    scores = segmentation_scores(confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 3))
    assert scores.ious[:2] == (0.5, 0.0) and math.isnan(scores.ious[2])
    assert scores.accuracies[0] == 0.5 and math.isnan(scores.accuracies[1])
    assert scores.mean_iou == 0.25 and scores.class_accuracy == 0.5


def test_what_no_confusion_matrix_can_be_made_of():
    ids = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="one shape"):
        confusion_matrix(ids, ids[:2])
    with pytest.raises(ValueError, match="labels: expected 0 to 18, got 0 to 33"):
        confusion_matrix(ids, torch.tensor([0, 33, 255, 1]))
    with pytest.raises(ValueError, match="predicted: expected 0 to 18, got 0 to 19"):
        confusion_matrix(torch.tensor([0, 19, 0, 0]), ids)
    # What is predicted where nothing is labelled does not matter.
    confusion_matrix(torch.tensor([0, 19, 0, 0]), torch.tensor([0, 255, 0, 0]))


def test_label_maps_of_every_kind_are_the_same_map(tmp_path):
    train_ids = [[0, 10, 13], [255, 0, 255]]
    ids = [[7, 23, 26], [0, 7, 9]]  # 9: parking, which is not evaluated
    colours = [[ROAD, SKY, CAR], [(0, 0, 0), ROAD, (250, 170, 160)]]
    maps = [
        read_label_map(save(train_ids, tmp_path / "a.png"), "train-ids"),
        read_label_map(save(ids, tmp_path / "b.png"), "ids"),
        read_label_map(save(colours, tmp_path / "c.png"), "colours"),
    ]
    for map_ in maps:
        assert map_.dtype == torch.int64 and map_.tolist() == train_ids


def test_every_class_keeps_its_colour_in_a_jpeg(tmp_path):
    """Up to the borders between colours, over which JPEG smears: the published preparation writes JPEG files."""
    colours = np.array([colour for _, _, colour in _CLASSES], dtype=np.uint8)
    image = np.kron(colours[None], np.ones((16, 16, 1), dtype=np.uint8))
    read = read_label_map(save(image, tmp_path / "x.jpg"), "colours")
    inside = read.view(16, 19, 16)[:, :, 2:-2]
    assert torch.equal(inside, torch.arange(19)[:, None].expand(inside.shape))


def test_files_that_are_no_label_maps(tmp_path):
    ids = save([[7, 26]], tmp_path / "ids.png")
    with pytest.raises(UserError, match=r"ids\.png: 26 is no train id.*--label-kind ids"):
        read_label_map(ids, "train-ids")
    colours = save([[ROAD, SKY]], tmp_path / "colours.png")
    with pytest.raises(UserError, match=r"colours\.png: is of mode RGB.*--label-kind colours"):
        read_label_map(colours, "ids")
    photo = save(np.full((4, 4, 3), (0, 255, 0)), tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo\.png: most of its pixels have none"):
        read_label_map(photo, "colours")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: is not a readable image"):
        read_label_map(tmp_path / "text.png", "ids")


def test_label_maps_are_found_by_the_scenes_name(tmp_path):
    for ending in ("gtFine_color", "gtFine_labelIds", "gtFine_labelTrainIds", "gtFine_instanceIds"):
        save([[0]], tmp_path / "own" / "ulm" / f"ulm_000001_000019_{ending}.png")
    for kind, ending in (("colours", "color"), ("ids", "labelIds"), ("train-ids", "labelTrainIds")):
        assert {k: v.name for k, v in label_files(tmp_path / "own", kind).items()} == {
            "ulm_000001_000019": f"ulm_000001_000019_gtFine_{ending}.png"
        }
    photo = tmp_path / "ulm_000001_000019_leftImg8bit.png"
    assert label_key(photo) == "ulm_000001_000019"
    save([[0]], tmp_path / "prepared" / "7_B.jpg")
    assert list(label_files(tmp_path / "prepared", "colours")) == ["7"]
    assert label_key(photo.with_name("ulm_A.png")) == "ulm_A"  # a name, not a number
    save([[0]], tmp_path / "prepared" / "7.png")
    with pytest.raises(UserError, match="are label maps of one scene"):
        label_files(tmp_path / "prepared", "colours")


def test_segmentations_are_compared_at_the_size_of_the_label_maps(tmp_path):
    image = torch.full((3, 16, 16), -1.0)
    image[:, :8] = 1  # sky above, road below
    labels = np.zeros((32, 32))
    labels[:16] = 10
    labels[16:20, :16] = 255  # void
    labels[28:, 24:] = 13  # a car that nobody sees
    path = save(labels, tmp_path / "labels" / "x.png")
    for module in (Halves(), Ids()):
        segmenter = ScriptedSegmenter(script(module, tmp_path / "segmenter.pt"))
        result = evaluate_segmentation(
            [(tmp_path / "x.jpg", image)], {"x": path}, segmenter, "train-ids"
        )
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


def test_an_image_without_a_label_map_and_a_network_of_another_kind(tmp_path):
    labels = {"y": save([[0]], tmp_path / "y.png")}
    segmenter = ScriptedSegmenter(script(Ids(), tmp_path / "ids.pt"))
    image = torch.zeros(3, 4, 4)
    with pytest.raises(UserError, match=r"x\.png: has no label map.*such as y\.png"):
        evaluate_segmentation([(tmp_path / "x.png", image)], labels, segmenter, "ids")
    wrong = ScriptedSegmenter(script(Wrong(), tmp_path / "wrong.pt"))
    with pytest.raises(UserError, match=r"segmenter wrong\.pt.*expected logits \(N, 19, h, w\)"):
        wrong(image, (4, 4))
    with pytest.raises(UserError, match=r"segmenter .*none\.pt: no such file"):
        ScriptedSegmenter(tmp_path / "none.pt")
