"""Training of conditional generators on the loop: what a run leaves, resuming, generating, evaluating, mistakes."""

import dataclasses
import json
import shutil

import pytest
import torch
from pictures import folders
from same_run import assert_same_run
from tiny import CLASSES, GENERATION

from fastnce.data import list_images
from fastnce.demo.judges import DigitClassifier
from fastnce.errors import UserError
from fastnce.systems import SYSTEMS
from fastnce.systems.contragan import latent
from fastnce.systems.generating import interpolate, judge_of
from fastnce.systems.system import Ablation
from fastnce.training import evaluate_run, export_shared, generate_folder, load_generator, train
from fastnce.training.ablation import ablate, ablations, compare, format_ablation
from fastnce.training.checkpoint import load_checkpoint
from fastnce.training.log import read_metrics


@pytest.fixture
def tiny(tiny):
    return lambda variant="contragan", **changes: tiny(variant, **changes)


@pytest.fixture
def run(whole):
    return whole("contragan")


@pytest.mark.parametrize("judged", [True, False])
def test_what_is_measured(tiny, extractor, capsys, judged):
    run = train(tiny(steps=4, measure_every=2, extractor=extractor if judged else None))
    assert ("Measuring without FID" in capsys.readouterr().err) != judged
    lines = read_metrics(run / "measurements.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert ("fid" in line) == judged
        for kind in ("real, trained on", "real, held out", "generated"):
            assert 0 <= line[f"D accuracy/{kind}"] <= 1
        assert line["singular value/linear1"] > 0
        assert line["spread"] > 0
    assert (run / "checkpoints" / "best.pt").exists() == judged


def test_the_average_starts_late(whole):
    averaged, raw = (
        load_generator(whole("contragan", steps=2), which=which)[0].state_dict()
        for which in ("ema", "raw")
    )
    assert all(torch.equal(value, raw[name]) for name, value in averaged.items())


def test_collapse_is_said(tiny, capsys, monkeypatch):
    monkeypatch.setattr(
        "fastnce.systems.contragan.sample_images",
        lambda g, z, labels, size=256: torch.zeros(len(z), 3, 16, 16),
    )
    train(tiny(steps=2, measure_every=2))
    assert "The samples have collapsed: their pixels have 0.0 %" in capsys.readouterr().err
    (line,) = read_metrics(tiny().out / "measurements.jsonl")
    assert line["spread"] == 0.0


def test_generate(run, tmp_path):
    generator, config = load_generator(run)
    count = generate_folder(
        generator, config, tmp_path / "one", classes=["bee", "2"], count=3, interpolation=4
    )
    assert count == 6
    names = {str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*.png")}
    images = {f"{name}/{i:04d}.png" for name in ("bee", "cat") for i in range(3)}
    assert names == images | {"grid.png", "interpolation.png"}
    # The images do not depend on what else is asked for, and do on the seed.
    generate_folder(generator, config, tmp_path / "two", count=3, batch_size=2)
    assert len(list((tmp_path / "two").rglob("0*.png"))) == 9
    name = "cat/0002.png"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    generate_folder(generator, config, tmp_path / "three", count=3, seed=1)
    assert (tmp_path / "one" / name).read_bytes() != (tmp_path / "three" / name).read_bytes()


def test_generate_without_the_data(run, classes, tmp_path):
    generator, config = load_generator(run)
    gone = dataclasses.replace(config, data=tmp_path / "gone")
    generate_folder(generator, gone, tmp_path / "out", count=1)
    assert (tmp_path / "out" / "cat" / "0000.png").exists()
    old = dataclasses.replace(gone, class_names=())
    generate_folder(generator, old, tmp_path / "out", count=1)
    assert (tmp_path / "out" / "2" / "0000.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["dog"]}, "class=dog is unknown. .* from 0 to 2, or a name such as ant"),
        ({"classes": ["3"]}, "class=3 is unknown"),
        ({"count": 0}, "count=0 is too small"),
        ({"truncation": 0.0}, "truncation=0.0 must be positive"),
        ({"interpolation": 1}, "interpolation=1 must be 0 for none, or at least 2"),
    ],
)
def test_generate_mistakes(run, tmp_path, options, message):
    generator, config = load_generator(run)
    with pytest.raises(UserError, match=message):
        generate_folder(generator, config, tmp_path, **options)


def test_a_run_keeps_its_classes(tiny, whole, classes, tmp_path, caplog):
    """Whatever becomes of the data: a class that comes before the others would shift their labels."""
    data = tmp_path / "data"
    shutil.copytree(classes, data)
    run = train(tiny(data=data, steps=4))
    assert json.loads((run / "config.json").read_text())["class_names"] == list(CLASSES)
    assert load_checkpoint(run / "checkpoints" / "last.pt")["config"]["class_names"] == [*CLASSES]
    shared = export_shared(run, tmp_path)
    assert load_generator(shared)[1].class_names == CLASSES
    generate_folder(*load_generator(run), tmp_path / "before", classes=["cat"], count=2)
    for split in ("train", "test"):
        shutil.copytree(data / split / "bee", data / split / "aphid")
    for source in (run, shared):
        generate_folder(*load_generator(source), tmp_path / "after", classes=["cat"], count=2)
        for name in ("cat/0000.png", "cat/0001.png"):
            before, after = (tmp_path / folder / name for folder in ("before", "after"))
            assert after.read_bytes() == before.read_bytes()
    train(tiny(data=data))
    assert "images of aphid are left out" in caplog.text
    assert_same_run(run, whole("contragan"), free=("data",))
    data = data.rename(tmp_path / "moved")
    train(tiny(data=data))
    shutil.copy(data / "train" / "bee" / "0.png", data / "train" / "bee" / "9.png")
    with pytest.raises(UserError, match=r"moved is not what .* made with: train/bee/9\.png is new"):
        train(tiny(data=data, steps=9))
    shutil.rmtree(data / "train" / "bee")
    with pytest.raises(UserError, match="has no class bee. It has ant, aphid, cat"):
        train(tiny(data=data, steps=9))
    with pytest.raises(UserError, match="class_names"):
        train(tiny(data=data, steps=9, class_names=("aphid", "ant", "cat")))


def keep_one(folder):
    for path in list_images(folder)[1:]:
        path.unlink()


def test_classes_with_one_or_no_test_image(tiny, classes, extractor, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(classes, data)
    shutil.rmtree(data / "test" / "bee")
    keep_one(data / "test" / "cat")
    run = train(tiny(data=data, steps=2, measure_every=2, extractor=extractor))
    (line,) = read_metrics(run / "measurements.jsonl")
    assert line["fid"] > 0 and line["intra_class_fid"] > 0
    result, table = evaluate_run(run)
    assert result["count"] == 5 and result["k"] == 4
    assert [list(row["intra_class_fid_of"]) for row in result["rows"]] == [["0"]] * 3
    assert all(row["fid"] is not None and row["recall"] is not None for row in result["rows"])
    keep_one(data / "test" / "ant")
    assert "intra-class FID" not in evaluate_run(run)[1]
    shutil.rmtree(data / "test" / "ant")
    with pytest.raises(UserError, match="one test image is too few"):
        evaluate_run(run)


def test_the_judge_of_digits_reads_all_ten_in_their_order_only(tiny, monkeypatch):
    monkeypatch.setattr("fastnce.demo.generation_evaluator", lambda *_, **__: DigitClassifier(16))
    data, grey = tiny().data, tiny(image_channels=1)
    assert judge_of(grey, data, None).reads_labels
    for names, reads in (("0123456789", True), ("73", False), ("1023456789", False)):
        config = dataclasses.replace(grey, class_names=tuple(names))
        assert judge_of(config, data, None).reads_labels == reads
    for changes in ({"image_size": 24}, {"image_channels": 3}):
        with pytest.raises(UserError, match="reads 16x16 grey digits.*Give --extractor"):
            judge_of(dataclasses.replace(grey, **changes), data, None)


@pytest.mark.parametrize("layout", [".", "train"])
def test_without_classes(tiny, extractor, tmp_path, capsys, layout):
    """`num_classes`, by default 10, follows from the data."""
    data = folders(tmp_path / "data", {layout: 8}, size=(16, 16))
    options = {"data": data, "num_classes": 10, "measure_every": 3, "extractor": extractor}
    with pytest.raises(UserError, match="Images without classes are for .*conditioning=none"):
        train(tiny(**options))
    for steps in (3, 6):
        run = train(tiny(conditioning="none", steps=steps, **options))
    said = "has no test images: samples are compared with the training images"
    assert said in capsys.readouterr().err
    assert [line["fid"] > 0 for line in read_metrics(run / "measurements.jsonl")] == [True] * 2
    generator, config = load_generator(run)
    assert config.num_classes == 1
    assert generate_folder(generator, config, tmp_path / "out", count=2) == 2
    assert (tmp_path / "out" / "images" / "0001.png").is_file()
    rows = [row["name"] for row in evaluate_run(run)[0]["rows"]]
    assert rows == ["generated", "untrained generator"]


def test_class_balance(tiny, classes, tmp_path):
    shutil.copytree(classes, tmp_path / "data")
    keep_one(tmp_path / "data" / "train" / "cat")
    config = tiny(data=tmp_path / "data", class_balance=True)
    stream = SYSTEMS["contragan"].dataset(config)
    assert torch.stack([stream[k]["label"] for k in range(33)]).bincount().tolist() == [11] * 3


def test_truncated_noise_and_lines():
    random = torch.Generator().manual_seed(0)
    assert latent(1000, 4, generator=random).abs().max() > 3
    cut = latent(1000, 4, truncation=0.5, generator=random)
    assert 0.45 < cut.abs().max() <= 0.5
    line = interpolate(torch.zeros(2), torch.tensor([2.0, 4.0]), 3)
    assert line.tolist() == [[0, 0], [1, 2], [2, 4]]


def test_ablation(classes, extractor, tmp_path, capsys, monkeypatch):
    options = GENERATION | {"steps": 2, "extractor": extractor}
    only = ["projection (ProjGAN)", "2C, published"]
    settings = {"data": classes, "out": tmp_path, "only": only, "overrides": options}
    shown = {"fid": ("FID", ".2f"), "recall": ("recall", ".2f")}
    colours = Ablation(
        ablations()["contragan"].choices,
        shown | {"none": ("what no run has", ".2f")},
        "generated",
        longer={only[1]: 1.5},
    )
    monkeypatch.setattr(SYSTEMS["contragan"], "ablations", {"contragan": colours})
    one, _ = ablate("contragan", seeds=[0], **settings)
    both, table = ablate("contragan", seeds=[0, 1], **settings)
    assert [choice["name"] for choice in both["choices"]] == only
    assert one["choices"][0]["fid"]["spread"] is None
    values = both["choices"][1]["fid"]["values"]
    assert values[0] == one["choices"][1]["fid"]["values"][0]
    assert len(values) == 2 and values[0] != values[1]
    assert (tmp_path / "ablation.md").read_text() == table
    assert json.loads((tmp_path / "ablation.json").read_text())["choices"]
    assert (tmp_path / "ablation.png").exists()
    assert both["measures"] == [*shown]
    said = capsys.readouterr().out
    for steps in (2, 3):
        assert f"has finished its {steps} steps" in said  # kept, not trained again


def test_what_exceeds_the_spread():
    ablation = Ablation({}, {"fid": ("FID", ".1f")}, "generated")
    values = {"base": [1.0, 3.0], "near": [3.0, 5.0], "far": [9.0, 11.0]}
    result = compare({name: {"fid": v} for name, v in values.items()}, ablation, [0, 1])
    spread = 2**0.5
    assert [c["fid"]["mean"] for c in result["choices"]] == [2.0, 4.0, 10.0]
    assert all(c["fid"]["spread"] == pytest.approx(spread) for c in result["choices"])
    # The difference of 2 equals sqrt(2 + 2): not beyond.
    assert [c["fid"]["beyond_spread"] for c in result["choices"]] == [None, False, True]
    table = format_ablation(result, ablation)
    assert table.count("*") == 2  # of the far one, and of the note
    assert "10.0 +- 1.4 *" in table
    # Held against another than the first, and beside the data's own numbers.
    changed = ablation._replace(against={"far": "near"}, beside=("real",))
    result = compare({n: {"fid": v} for n, v in values.items()}, changed, [0, 1])
    assert [c["against"] for c in result["choices"]] == [None, "base", "near"]
    near = compare({n: {"fid": [9.0, 11.0]} for n in ("near", "far")}, changed, [0, 1])
    assert near["choices"][1]["fid"]["beyond_spread"] is False
    result["beside"] = [{"name": "real", "fid": 0.25}]
    table = format_ablation(result, changed)
    assert table.splitlines()[5].split() == ["|", "real", "|", "0.2", "|"]
    assert table.endswith("together; from 'near': far.\n")
