"""What holds for a run of every system: its files, going on bit for bit, and what is done with its network."""

import json
import signal

import pytest
import torch
from PIL import Image
from same_run import assert_identical, assert_same_run, checkpoint
from tiny import OPTIONS

from fastnce.cli import main
from fastnce.data import list_images
from fastnce.errors import UserError
from fastnce.systems import SYSTEMS, variants
from fastnce.training import Run, build_config, evaluate_run, export_shared, train
from fastnce.training.config import from_dict, to_dict
from fastnce.training.log import read_metrics

TWO_WAY = {"G", "G_A", "G_B", "D_A", "D_B", "idt_A", "idt_B"}
STEPS = {"L2", *(f"loss_{t}" for t in range(1, 6))}
LOSSES = {
    "cut": {"G_GAN", "D_real", "D_fake", "G", "NCE", "NCE_Y"},
    "fastcut": {"G_GAN", "D_real", "D_fake", "G", "NCE"},
    "sincut": {"G_GAN", "D_real", "D_fake", "D_r1", "G", "NCE", "NCE_Y", "idt"},
    "dclgan": TWO_WAY | {"NCE1", "NCE2"},
    "simdcl": TWO_WAY | {"NCE1", "NCE2", "sim_A", "sim_B"},
    "cyclegan": TWO_WAY | {"cycle_A", "cycle_B"},
    "pix2pix": {"G", "G_GAN", "G_L1", "D_real", "D_fake"},
    "cfl": {"G", "G_GAN", "NCE", "D_real", "D_fake"},
    "cfl-clean": {"G", "G_GAN", "NCE", "D_real", "D_fake"},
    "contragan": {"D_real", "D_fake", "D_class", "G_GAN", "G_class"},
    "acgan": {"D_real", "D_fake", "D_class", "G_GAN", "G_class"},
    "projgan": {"D_real", "D_fake", "G_GAN"},
    "reacgan": {"D_real", "D_fake", "D_class", "G_GAN", "G_class"},
    "stylegan2": {"D_real", "D_fake", "D_r1", "G_GAN", "G_path", "path_length"},
    "restyle": STEPS,
    "restyle-e4e": STEPS | {"delta", "E_adv", "D_real", "D_fake", "D_r1"},
    "psp": {"loss_1", "L2"},
    "e4e": {"loss_1", "L2", "delta", "E_adv", "D_real", "D_fake", "D_r1"},
    "simclr": {"loss", "positive_cosine"},
    "moco": {"loss", "positive_cosine"},
    "supcon": {"loss", "positive_cosine"},
}
# Those whose steps differ in more than a loss.
APART = ["cut", "sincut", "simdcl", "cyclegan", "pix2pix", "cfl"]
APART += ["contragan", "stylegan2", "restyle-e4e", "simclr", "moco"]


def test_every_variant_is_tried():
    assert set(OPTIONS) == set(LOSSES) == set(variants())


@pytest.mark.parametrize("variant", OPTIONS)
def test_what_a_run_leaves(whole, variant):
    run = whole(variant)
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names - {"metrics.json", "metrics.md", "gallery.html"} == {
        "config.json",
        "cost.json",
        "metrics.jsonl",
        "loss.png",
        "samples/step_000004.png",
        "samples/step_000008.png",
        "checkpoints/last.pt",
        "checkpoints/last.prev.pt",
    }
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6]
    assert set(lines[0]) == LOSSES[variant] | {"step", "epoch", "lr_factor", "seconds"}
    values = json.loads((run / "config.json").read_text())
    assert to_dict(from_dict(values)) == values
    # Every network learned, and the average is not the last weights.
    one, other = (torch.load(run / "checkpoints" / f"last{x}.pt")["model"] for x in (".prev", ""))
    for name in {key.split(".")[0] for key in one if key.endswith("weight")}:
        keys = [key for key in one if key.startswith(name) and one[key].is_floating_point()]
        assert any(not torch.equal(one[key], other[key]) for key in keys), name
    if Run(run).config.ema_decay:
        averaged, raw = (Run(run, weights=which).network.state_dict() for which in ("ema", "raw"))
        assert any(not torch.equal(value, raw[key]) for key, value in averaged.items())


def test_sample_grids_have_their_rows(whole):
    for variant, rows in (
        ("cut", 2),
        ("cyclegan", 4),
        ("pix2pix", 3),
        ("cfl", 3),
        ("contragan", 3),
        ("stylegan2", 3),
        ("restyle-e4e", 6),
    ):
        with Image.open(whole(variant) / "samples" / "step_000008.png") as grid:
            assert rows * 80 < grid.height < (rows + 1) * 110, variant


@pytest.mark.parametrize(
    ("variant", "step", "number"),
    [("cut", 1, signal.SIGTERM), ("cut", 4, signal.SIGINT)]
    + [(variant, 5, signal.SIGINT) for variant in APART],
)
def test_a_stopped_run_continues_bit_for_bit(tiny, whole, stopped, capsys, variant, step, number):
    config = tiny(variant)
    stopped(config, step, number)
    assert f"Stopped after step {step} of 8" in capsys.readouterr().out
    assert checkpoint(config.out)["step"] == step
    torch.rand(step)  # whatever happened to the generators in between must not matter
    train(config)
    assert_same_run(config.out, whole(variant))


@pytest.mark.parametrize("variant", ["cut", "sincut", "contragan", "moco"])
def test_workers_do_not_change_the_run(tiny, whole, variant):
    train(tiny(variant, workers=2))
    assert_same_run(tiny().out, whole(variant))


@pytest.mark.parametrize("variant", [name for name in APART if name != "sincut"])
def test_measuring_leaves_no_trace(tiny, whole, extractor, variant):
    judge = {} if variant in ("restyle-e4e", "simclr", "moco") else {"extractor": extractor}
    config = tiny(variant, measure_every=4, **judge)
    train(config)
    one, other = checkpoint(config.out), checkpoint(whole(variant))
    for key in ("model", "average", "optimizers", "rng"):
        assert_identical(one[key], other[key], key)
    lines = read_metrics(config.out / "measurements.jsonl")
    best = {
        "pix2pix": "l1",
        "restyle-e4e": "l2",
        **dict.fromkeys(("cut", "contragan", "stylegan2"), "fid"),
    }
    assert [line["step"] for line in lines] == [4, 8]
    assert (config.out / "measurements.png").exists()
    if name := best.get(variant):
        saved = torch.load(config.out / "checkpoints" / "best.pt")
        least = min(lines, key=lambda line: line[name])
        assert (saved["step"], saved["best"]) == (least["step"], least[name])


COMMANDS = {
    "translate": ("--input", "IMAGES", "--out", "OUT"),
    "generate": ("--out", "OUT", "--count", "2"),
    "features": ("--input", "IMAGES", "--out", "OUT.npz"),
    "invert": ("--input", "IMAGES", "--out", "OUT"),
}
USE = {"contragan": "generate", "stylegan2": "generate", "simclr": "features", "moco": "features"}
USE["restyle-e4e"] = "invert"


@pytest.mark.parametrize("variant", APART)
def test_its_network_is_for_one_command_and_the_others_name_it(
    whole, data, labels, tmp_path, capsys, variant
):
    run = whole(variant)
    for name, options in COMMANDS.items():
        words = {"IMAGES": data / "testA", "OUT": tmp_path / name, "OUT.npz": tmp_path / "x.npz"}
        if (variant, name) == ("cfl", "translate"):
            words["IMAGES"] = labels / "test_label"
            options += ("--instances", labels / "test_inst")
        command = [name, "--run", run, *(words.get(option, option) for option in options)]
        code = main([str(word) for word in command])
        shown = capsys.readouterr()
        if name == USE.get(variant, "translate"):
            assert code == 0 and str(run) in shown.out
        else:
            assert code == 2
            assert f"What to do with it: fastnce {USE.get(variant, 'translate')}" in shown.err
    if variant not in USE:
        assert [path.name for path in list_images(tmp_path / "translate")] == ["0.png", "1.png"]


@pytest.mark.parametrize("variant", APART)
def test_a_shared_file_takes_the_runs_place(whole, tmp_path, variant):
    run = whole(variant)
    shared = Run(export_shared(run, tmp_path))
    own = Run(run).network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in shared.network.state_dict().items())
    values = to_dict(shared.config)
    for name in ("data", "out", "device", "init_from"):  # of the machine of the training
        assert values.pop(name, None) != to_dict(Run(run).config)[name] or name == "init_from"


@pytest.mark.parametrize(
    "variant",
    ["cut", "cyclegan", "pix2pix", "cfl", "contragan", "stylegan2", "moco", "restyle-e4e"],
)
def test_evaluation_is_written_beside_the_run(whole, extractor, tmp_path, capsys, variant):
    run, judge = whole(variant), [] if variant == "moco" else ["--extractor", str(extractor)]
    assert main(["evaluate", "--run", str(run), "--device", "cpu", *judge]) == 0
    shown = capsys.readouterr().out
    result = json.loads((run / "metrics.json").read_text())
    assert (run / "metrics.md").read_text().strip() in shown
    assert result["run"]["checkpoint"] == "last" and result["rows"]
    assert main(["visualize", "gallery", "--run", str(run), "--out", str(tmp_path / "g.html")]) == 0
    system = SYSTEMS[Run(run).config.system]
    for setting in {"without_nce", "extractor", "direction", "value_range"} - system.judged_by:
        with pytest.raises(UserError, match=f"{setting}=x is not for a run of {system.name}"):
            evaluate_run(run, **{setting: "x"})


MISTAKES = [
    ("cut", {"num_patches": 100}, "num_patches=100 exceeds the 8x8 = 64 positions"),
    ("cut", {"backend": "cudnn"}, "backend=cudnn is unknown"),
    ("cut", {"crop_size": 20, "disc_layers": 3}, "20x20, too small for the disc.*needs 24x24"),
    ("dclgan", {"num_patches": 100}, "num_patches=100 exceeds"),
    ("sincut", {"crop_size": 32}, r"trainA/photo\.png: 44x30 is smaller than the crop of 32x32"),
    ("sincut", {"crop_size": 24}, "stylegan2 judges squares of a power of two .* 24x24"),
    ("sincut", {"nce_layers": [0, 4]}, r"nce_layers=\(0, 4\).*from 0 to 3"),
    ("sincut", {"max_zoom_out": 0.5}, "max_zoom_out=0.5"),
    ("sincut", {"dataset": "movie"}, "dataset=movie .*folders, single-image"),
    ("pix2pix", {"num_downs": 8}, "16x16 cannot be halved num_downs=8 times"),
    ("pix2pix", {"augment_a": "affine"}, "augment_a=affine"),
    ("cfl", {"crop_size": 40, "load_size": 40}, "gives 40x40, .* multiples of 32"),
    ("cfl", {"batch_size": 1}, "batch_size=1 of 32x32 leaves batch norm one position"),
    ("cfl", {"label_classes": 2, "dont_care": False}, "label .*label_classes=2"),
    ("cfl", {"layout": "cityscapes"}, "gtFine"),
    ("cfl", {"critic": "vgg19"}, "vgg19 needs its weights"),
    ("contragan", {"num_classes": 7}, "num_classes=7, but .* has 3 classes"),
    ("contragan", {"micro_batches": 4}, "micro_batches=4 .*batch_size=3"),
    ("contragan", {"image_size": 33}, "image_size=33 .*32 or 40"),
    ("stylegan2", {"image_size": 24}, "image_size=24 must be a power of two"),
    ("stylegan2", {"freeze": 8}, "freeze=8 would keep layers as they were drawn"),
    ("restyle", {"generator": None}, "generator is missing"),
    ("restyle", {"lambda_lpips": 0.8}, "lambda_lpips=0.8 .* lpips_backbone is missing"),
    ("restyle", {"lambda_moco": 0.5}, "lambda_moco=0.5 .* moco_weights is missing"),
    ("restyle", {"image_height": 12}, r"0\.png: 16x16 has not the shape of 16x12"),
    ("restyle", {"lambda_id": 0.1, "lambda_moco": 0.5}, "lambda_id=0.1 is for faces"),
    ("psp", {"steps_per_batch": 5}, "steps_per_batch=5, but without feedback"),
    ("simclr", {"batch_size": 1}, "batch_size=1 leaves method=simclr no negatives"),
    ("simclr", {"views": "simclear"}, "views=simclear is unknown.*simclr, moco-v2"),
    ("simclr", {"steps": 3}, "warmup_epochs=1 takes 3 steps"),
    ("simclr", {"steps": None, "epochs": 1, "batch_size": 16}, "batch_size=16 .*15 images"),
    ("moco", {"norm_splits": 9}, "norm_splits=9 .*batch_size=4"),
    ("moco", {"class_balance": True}, "class_balance .*method=moco"),
    ("moco", {"loss": "pair"}, "loss=pair"),
]


@pytest.mark.parametrize(("variant", "changes", "message"), MISTAKES)
def test_mistakes_leave_no_run_behind(tiny, variant, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny(variant, **changes))
    assert not (tiny().out / "config.json").exists()


@pytest.mark.parametrize(
    ("variant", "preset"),
    [(variant, name) for variant, system in variants().items() for name in (None, *system.presets)],
)
def test_every_preset_and_every_choice_of_an_ablation_is_valid(variant, preset):
    paths = {"data": "d", "out": "o"}
    system = variants()[variant]
    config = build_config(variant, preset=preset, overrides=paths)
    for name, value in (system.presets[preset] if preset else system.variants[variant]).items():
        assert getattr(config, name) == value
    if "method" in system.variants[variant]:  # a preset must not change what was asked for
        assert config.method == variant
    for values in system.ablations[variant].choices.values() if variant in system.ablations else ():
        build_config(variant, preset=preset, overrides=paths | values)
