"""Runs of ReStyle: where their networks come from and go to, the stage of e4e, grey images."""

import pytest
import torch
from same_run import assert_identical, checkpoint

from fastnce.errors import UserError
from fastnce.networks.restyle_encoder import build_encoder
from fastnce.networks.style_generator import StyleGenerator, save_rosinality
from fastnce.systems import SYSTEMS
from fastnce.systems.restyle import read_generator
from fastnce.training import Run, train
from fastnce.training.export import export_published
from fastnce.training.published import load_initial

SYSTEM = SYSTEMS["restyle"]


def started(config):
    """The model of a run before its first step, and what was said of its networks."""
    config = SYSTEM.settled(config, None)
    model = SYSTEM.model(config, SYSTEM.dataset(config))
    return model, load_initial(model, config)


def test_a_run_goes_on_without_the_generators_file(tiny, whole, style_file, tmp_path):
    """Its checkpoints have the weights, once: the average holds the same."""
    moved = tmp_path / "moved.pt"
    moved.write_bytes(style_file.read_bytes())
    train(tiny("restyle", steps=4, generator=moved))
    moved.unlink()
    train(tiny("restyle", generator=moved))
    one, other = checkpoint(tiny().out), checkpoint(whole("restyle"))
    for key in ("model", "average", "optimizers", "rng"):
        assert_identical(one[key], other[key], key)
    for name, x in one["average"]["module"].items():
        same = x.data_ptr() == one["model"][f"inverter.{name}"].data_ptr()
        if name.endswith(("weight", "bias")):
            assert same == name.startswith("generator."), name
    generator = read_generator(tiny().out)
    assert_identical(dict(generator.state_dict()), dict(read_generator(style_file).state_dict()))


@pytest.mark.parametrize("variant", ["restyle", "restyle-e4e", "psp"])
def test_the_published_layout_there_and_back(tiny, whole, tmp_path, variant):
    """And as the start of another run, which has a generator of its own."""
    (path,) = export_published(whole(variant), tmp_path)
    content = torch.load(path, weights_only=True)
    run, read = Run(whole(variant)), Run(path)
    k, generator = 6, run.network.generator
    assert content["latent_avg"].shape == (k, 6)
    assert content["opts"]["output_size"] == 16
    assert {name.split(".")[0] for name in content["state_dict"]} == {"encoder", "decoder"}
    assert set(generator.published_state()) == {
        name.removeprefix("decoder.") for name in content["state_dict"] if "decoder" in name
    }
    assert_identical(dict(read.network.state_dict()), dict(run.network.state_dict()))
    for name in ("generator_shape", "encoder", "head", "feedback", "steps_per_batch", "size"):
        assert getattr(read.config, name) == getattr(run.config, name), name
    (again,) = export_published(read, tmp_path, label="again")
    assert_identical(
        torch.load(again, weights_only=True)["state_dict"], content["state_dict"], "state_dict"
    )

    other = StyleGenerator(16, 6, 2, [6, 5, 4])
    other.latent_avg.normal_()
    save_rosinality(tmp_path / "other.pt", other)
    for source in (path, whole(variant)):
        config = tiny(variant, generator=tmp_path / "other.pt", init_from=source)
        model, lines = started(config)
        assert "encoder: from" in lines[0]
        assert_identical(dict(model.generator.state_dict()), dict(other.state_dict()))
        expected = run if source is path else Run(whole(variant), weights="raw")
        assert_identical(
            dict(model.encoder.state_dict()), dict(expected.network.encoder.state_dict())
        )


def test_a_checkpoint_of_the_published_program(tmp_path):
    """Of e4e on cars, before its last stage: styles that it had not learned yet are not used."""
    encoder = build_encoder("resnet34", 6, 6, "e4e", 8)
    generator = StyleGenerator(16, 8, 2, [8, 8, 4])
    state = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
    state |= {f"decoder.{name}": x for name, x in generator.published_state().items()}
    opts = {"encoder_type": "ResNetProgressiveBackboneEncoder", "dataset_type": "cars_encode"}
    opts |= {"n_iters_per_batch": 4, "progressive_steps": [0, 100, 120, 140, 160, 180]}
    content = {"state_dict": state, "opts": opts, "latent_avg": torch.ones(8), "global_step": 130}
    path = tmp_path / "iteration_130.pt"

    def run(**changes):
        torch.save(content | changes, path)
        return Run(path)

    found = run()
    assert (found.config.encoder, found.config.head) == ("resnet34", "e4e")
    assert (found.config.size, found.config.steps_per_batch) == ((192, 256), 4)
    assert found.network.encoder.stage == 2
    assert torch.equal(found.network.generator.latent_avg, torch.ones(8))
    assert run(global_step=10**6).network.encoder.stage == 5
    fewer = {name: x for name, x in state.items() if "styles.5." not in name}
    with pytest.raises(UserError, match="makes 5 styles, and its generator of 16 pixels takes 6"):
        run(state_dict=fewer)
    with pytest.raises(UserError, match="latent_avg has the shape"):
        run(latent_avg=torch.ones(7))
    with pytest.raises(UserError, match="no training run"):
        run(opts={"code": print})


def test_a_generator_of_another_size_is_named(tiny, whole, tmp_path):
    (path,) = export_published(whole("restyle"), tmp_path)
    save_rosinality(tmp_path / "large.pt", StyleGenerator(32, 6, 2, [6, 5, 4, 4]))
    config = tiny("restyle", generator=tmp_path / "large.pt", init_from=path)
    with pytest.raises(UserError, match="is for a generator of 16 pixels, and the run's has 32"):
        started(config)
    with pytest.raises(UserError, match="has head=psp.* Give the same values"):
        started(tiny("restyle-e4e", init_from=path))


def test_a_run_of_e4e_has_its_stage(whole):
    """The last of 8 steps, counted from 0, was in the third stage; all styles behind it are still the first."""
    network = Run(whole("restyle-e4e")).network
    assert network.encoder.stage == 3
    latent = network(torch.zeros(1, 3, 16, 16), 1)[0].latent - network.generator.latent_avg
    rows = [torch.equal(latent[0, i], latent[0, 0]) for i in range(6)]
    assert rows == [True, False, False, False, True, True]


def test_grey_images_keep_the_residual(tiny, tmp_path):
    """As published every step would start again from the average, as the input has not 6 channels."""
    generator = StyleGenerator(16, 6, 2, [6, 5, 4], image_channels=1)
    generator.latent_avg.normal_()
    save_rosinality(tmp_path / "grey.pt", generator)
    run = Run(train(tiny("restyle", generator=tmp_path / "grey.pt", steps=1)))
    network = run.network
    assert run.config.image_channels == 1 and network.encoder.in_channels == 2
    first, second = network(torch.rand(2, 1, 16, 16), 2)
    seen = torch.cat([torch.rand(2, 1, 16, 16), first.seen], dim=1)
    assert not torch.equal(first.latent, second.latent)
    assert second.latent.shape == network.encoder(seen).shape


def test_a_missing_mean_latent_is_estimated_and_told(style_file, tmp_path, capsys):
    content = torch.load(style_file, weights_only=True)
    path = tmp_path / "no-mean.pt"
    torch.save({"g_ema": content["g_ema"]}, path)
    found = read_generator(path)
    assert "has no latent_avg" in capsys.readouterr().err
    assert torch.equal(found.latent_avg, read_generator(path).latent_avg)
