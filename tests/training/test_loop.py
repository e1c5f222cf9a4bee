"""The training loop: what it writes, resuming bit for bit, stopping, and mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from same_run import assert_same_run, checkpoint

from fastnce.errors import UserError
from fastnce.models import CUT
from fastnce.training import train
from fastnce.training.config import to_dict
from fastnce.training.log import MetricLog, drop_lines_after, read_metrics


def test_more_steps_continue_bit_for_bit(tiny, whole):
    train(tiny(steps=4))
    train(tiny(steps=8))
    assert_same_run(tiny().out, whole("cut"))


def test_a_crash_continues_from_the_last_checkpoint(tiny, whole, monkeypatch):
    def crash(self, batch, **kwargs):
        if self.crashes_in == 0:
            raise RuntimeError("power cut")
        self.crashes_in -= 1
        return training_step(self, batch, **kwargs)

    training_step = CUT.training_step
    monkeypatch.setattr(CUT, "crashes_in", 7, raising=False)
    monkeypatch.setattr(CUT, "training_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny())
    # Steps 5 and 6 are in the log but not in the checkpoint: they are made, and logged, again.
    assert [line["step"] for line in read_metrics(tiny().out / "metrics.jsonl")] == [3, 6]
    assert checkpoint(tiny().out)["step"] == 4
    monkeypatch.undo()
    train(tiny())
    assert_same_run(tiny().out, whole("cut"))


def test_a_finished_run_says_so(tiny, capsys):
    train(tiny(steps=2))
    before = {p: p.stat().st_mtime_ns for p in tiny().out.rglob("*")}
    capsys.readouterr()
    assert train(tiny(steps=2)) == tiny().out
    assert "has finished its 2 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tiny().out.rglob("*")} == before


def test_another_run_in_the_folder(tiny):
    train(tiny(steps=1))
    with pytest.raises(UserError) as error:
        train(tiny(steps=1, lr=0.5, nce_layers=[4], workers=3))
    other = "holds another run, with lr=0.0002 (now 0.5), nce_layers=[4, 8, 12] (now [4])."
    assert other in str(error.value) and "Name another folder" in str(error.value)


def test_a_run_from_before_an_option_was_there(tiny):
    """Options that its configuration lacks had their defaults."""
    train(tiny(steps=1))
    path = tiny().out / "checkpoints" / "last.pt"
    state = checkpoint(tiny().out)
    del state["config"]["ema_start"], state["config"]["measure_every"], state["best"]
    torch.save(state, path)
    train(tiny(steps=2))
    assert checkpoint(tiny().out)["step"] == 2
    torch.save(state, path)
    with pytest.raises(UserError, match=r"ema_start=null \(now 3\)"):
        train(tiny(steps=2, ema_start=3))


def test_a_folder_without_a_checkpoint_is_free(tiny):
    """A first attempt that failed at once must not stand in the way of the corrected one."""
    out = tiny().out
    out.mkdir()
    (out / "config.json").write_text(json.dumps(to_dict(tiny(lr=1.0))))
    (out / "metrics.jsonl").write_text('{"step": 3}\n')
    train(tiny(steps=3))
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [3]
    assert len(read_metrics(out / "metrics.jsonl")[0]) > 1


def test_epochs_that_would_change_the_past(tiny):
    train(tiny(steps=8, epochs=2, decay_epochs=2))
    with pytest.raises(UserError, match="first 8 steps would have been others with .*epochs=9"):
        train(tiny(steps=9, epochs=9, decay_epochs=2))


def test_decay_epochs_lower_the_learning_rate_and_stop_the_jitter(tiny):
    config = tiny(steps=None, epochs=1, decay_epochs=1, log_every=1)
    train(config)
    lines = read_metrics(config.out / "metrics.jsonl")
    assert [line["lr_factor"] for line in lines] == [1.0, 1.0, 1.0, 0.5, 0.5]
    state = checkpoint(config.out)["optimizers"]["G"]
    assert state["param_groups"][0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_divergence_stops_before_it_is_saved(tiny, monkeypatch, value):
    training_step = CUT.training_step

    def diverging(self, batch, **kwargs):
        losses = training_step(self, batch, **kwargs)
        return losses | {"G": losses["G"] * float(value)}

    monkeypatch.setattr(CUT, "training_step", diverging)
    with pytest.raises(UserError, match=f"the training has diverged: loss G is {value}"):
        train(tiny())
    assert not (tiny().out / "checkpoints").exists()


def test_metrics_cut_short_are_read_up_to_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "G": 0.5}\n{"step": 2, "G"')
    assert read_metrics(path) == [{"step": 1, "G": 0.5}]
    log = MetricLog(path)
    drop_lines_after(path, 1)
    log.add({"G": torch.tensor(2.0)})
    log.add({"G": torch.tensor(4.0)})
    log.write(step=3)
    assert read_metrics(path) == [{"step": 1, "G": 0.5}, {"step": 3, "G": 3.0}]


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_in_a_process_of_its_own(tiny, workers, tmp_path):
    """A real Ctrl-C reaches the whole process group, the data workers too."""
    config = tiny(steps=None, workers=workers)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    script = (
        "import sys\nfrom fastnce.training import build_config, train\n"
        "train(build_config('cut', config_file=sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = config.out / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not read_metrics(log) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Run the same command again to go on." in output
    assert "Traceback" not in errors
    assert checkpoint(config.out)["step"] >= 3


def test_the_projectors_rate_does_not_fall_with_the_others(tiny):
    run = train(tiny("cfl", epochs=1, decay_epochs=3, steps=10, lr=2e-4))
    rates = {k: o["param_groups"][0]["lr"] for k, o in checkpoint(run)["optimizers"].items()}
    assert rates == pytest.approx({"G": 2e-4 / 3, "F": 2e-4, "D": 2e-4 / 3}, rel=1e-9)
