"""Runs of CFL judged beside the real images: by what the data bring, by the user's networks, and in an ablation."""

import json
import shutil

import pytest
import torch
from pictures import scripted
from PIL import Image
from tiny import LABELS
from torch import Tensor, nn

from fastnce import cli
from fastnce.data import LabelMaps
from fastnce.data.images import to_uint8
from fastnce.errors import UserError
from fastnce.metrics import (
    frechet_distance,
    laplacian_variance,
    load_extractor,
    sliced_wasserstein,
)
from fastnce.systems.cfl import predictions
from fastnce.training import Run, evaluate_run, train
from fastnce.training.ablation import ablate, ablations, chosen
from fastnce.training.gallery import same_images
from fastnce.training.log import read_metrics

READING = {"label_classes": 3, "dont_care": True, "instances": True, "load_size": 32}
READING |= {"crop_size": 32, "flip": False, "serial": True}


class Redder(nn.Module):
    """Class 1 where there is more red than blue, else 2; of three."""

    def forward(self, images: Tensor) -> Tensor:
        red, blue = images[:, 0].float(), images[:, 2].float()
        return torch.stack([torch.full_like(red, -300), red - blue, blue - red], 1)


class Maps(nn.Module):
    """A critic of two maps."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, images.square()[:, :, ::2, ::2]]


@pytest.fixture(scope="module")
def judged(labels, extractor, tmp_path_factory):
    """The label maps with the networks of a built-in set beside them."""
    data = shutil.copytree(labels, tmp_path_factory.mktemp("judged") / "data")
    shutil.copy(extractor, data / "judge.pt")
    scripted(Redder(), data / "segmenter.pt")
    scripted(Maps(), data / "critic.pt")
    return data


@pytest.fixture
def run_of_its_own(whole, tmp_path):
    return shutil.copytree(whole("cfl"), tmp_path / "run")


def images_of(data, split) -> Tensor:
    return torch.stack([to_uint8(s["B"]) for s in LabelMaps(data, split, **READING)])


def test_the_numbers_are_those_of_the_networks_images(run_of_its_own, judged, extractor):
    path = run_of_its_own
    run = Run(path)
    test = LabelMaps(judged, "test", **READING)
    made = torch.stack([to_uint8(image) for image, _ in predictions(run.network, run.config, test)])
    real, others = images_of(judged, "test"), images_of(judged, "train")[[0, 4]]
    result, table = evaluate_run(path, judged)
    predicted, truth, rest, grey = result["rows"]
    names = ["predicted", "real", "other real images", "a grey image"]
    assert [row["name"] for row in result["rows"]] == names
    assert result["run"]["form"] == "as published"
    assert predicted["l1"] == pytest.approx((made.int() - real).abs().double().mean() / 127.5)
    assert predicted["laplacian_variance"] == laplacian_variance(made).mean().item()
    assert (predicted["swd_fine"], predicted["swd_coarse"]) == sliced_wasserstein(made, real)
    assert (rest["swd_fine"], rest["swd_coarse"]) == sliced_wasserstein(others, real)
    colours = load_extractor(extractor)
    features = [colours(x).double() for x in (made, real)]
    assert predicted["fid"] == pytest.approx(frechet_distance(*features))
    label = torch.stack([sample["label"] for sample in test])
    read = Redder()(real).argmax(1)
    share = (read == label)[label < 3].double().mean()
    assert truth["pixel_accuracy"] == pytest.approx(share.item()) and 0 < share < 1
    assert "3 classes" in table and "judge.pt" in table
    written = json.loads((path / "metrics-data.json").read_text())
    assert written["rows"] == result["rows"]


def test_without_networks_beside_the_data_nothing_is_read(run_of_its_own, judged):
    run = run_of_its_own
    result, table = evaluate_run(run)
    assert result["rows"][0]["fid"] is None and "SWD" in table and "IoU" not in table
    given, _ = evaluate_run(run, segmenter=judged / "segmenter.pt")
    found, _ = evaluate_run(run, judged)
    assert given["rows"][0]["pixel_accuracy"] == found["rows"][0]["pixel_accuracy"]


def test_the_critic_is_no_judge(tiny, judged):
    run = train(tiny("cfl", data=judged, critic="scripted", steps=1))
    with pytest.raises(UserError, match="is the critic that the run was trained with"):
        evaluate_run(run, extractor=judged / "critic.pt")
    assert evaluate_run(run)[0]["rows"][0]["fid"] is not None


def test_measured_while_it_trains(tiny, judged):
    run = train(tiny("cfl", data=judged, steps=4, measure_every=2))
    lines = read_metrics(run / "measurements.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    result, _ = evaluate_run(run)
    names = [row["name"] for row in result["rows"][:2]]
    assert names == ["predicted", "predicted, best checkpoint"]
    last, best = result["rows"][:2]
    assert lines[1]["swd"] == pytest.approx((last["swd_fine"] + last["swd_coarse"]) / 2)
    least = min(line["swd"] for line in lines)
    assert (best["swd_fine"] + best["swd_coarse"]) / 2 == pytest.approx(least)


def test_a_segmenter_needs_label_maps_where_the_data_have_none(whole, judged, tmp_path, capsys):
    file = str(judged / "segmenter.pt")
    out = ["--out", str(tmp_path / "report")]
    assert cli.main(["evaluate", "--run", str(whole("cfl")), "--segmenter", file, *out]) == 0
    assert "pixel accuracy" in capsys.readouterr().out
    assert cli.main(["evaluate", "--run", str(whole("pix2pix")), "--segmenter", file]) != 0
    assert "Give --labels DIR" in capsys.readouterr().err
    how = ["--segmenter", file, "--labels", str(judged)]
    assert cli.main(["evaluate", "--run", str(whole("cfl")), *how]) != 0
    assert f"labels={judged} is not for a run of cfl" in capsys.readouterr().err


def test_an_ablation_stands_beside_the_real_images(judged, tmp_path):
    only = ["L1", "PatchNCE", "PatchNCE of stand-in features", "L1, GAN"]
    overrides = {name: v for name, v in LABELS.items() if name != "critic"} | {"steps": 1}
    how = {"data": judged, "out": tmp_path, "seeds": [0], "only": only, "overrides": overrides}
    result, table = ablate("cfl", **how)
    assert [c["name"] for c in result["choices"]] == only
    assert [c["against"] for c in result["choices"]] == [None, "L1", "L1", "L1"]
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert lines[2:] == [*only, "real", "other real images", "a grey image"]
    assert "pixel accuracy" in table
    critics = {name: Run(tmp_path / name / "seed-0").config for name in ("PatchNCE", "L1__GAN")}
    assert critics["PatchNCE"].critic == "pixel" and critics["PatchNCE"].lambda_gan == 0
    assert critics["L1__GAN"].lambda_gan == 1 and critics["L1__GAN"].lambda_nce == 0
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.height > 80 * (2 + len(only))
    rows = same_images({name: Run(tmp_path / name / "seed-0") for name in critics})
    assert list(rows) == ["label", "truth", "PatchNCE", "L1__GAN"]
    every = ablations()["cfl"]
    assert set(every.against) | set(every.against.values()) <= set(every.choices)


def test_choices_of_vgg19_need_its_weights(tmp_path):
    """Random weights are no VGG19."""
    options = {"data": tmp_path, "out": tmp_path}
    without = chosen("cfl", [], options, preset="photos")
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"vgg_weights": "vgg19.pth"}))
    every = chosen("cfl", [], options, preset="photos", config_file=file)
    assert every == list(ablations()["cfl"].choices)
    assert [name for name in every if name not in without] == [n for n in every if "VGG19" in n]
    assert len(every) == len(without) + 4
