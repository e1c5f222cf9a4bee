"""The training loop: one for all systems."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastnce import viz
from fastnce.data.files import write_json
from fastnce.errors import UserError
from fastnce.training import runtime
from fastnce.training.checkpoint import load_checkpoint, save_checkpoint
from fastnce.training.config import TrainConfig, differing_fields, to_dict
from fastnce.training.ema import WeightAverage
from fastnce.training.log import MetricLog, read_metrics
from fastnce.training.schedule import Schedule
from fastnce.training.systems import SYSTEMS


class Interrupted(SystemExit):
    """Training was stopped by Ctrl-C or SIGTERM and has saved; as a `SystemExit` it ends the process with 130."""

    def __init__(self) -> None:
        super().__init__(130)


def train(config: TrainConfig) -> Path:
    """Trains a system, or continues the run that is in `config.out`.

    A run that was stopped and continued is on a CPU bit for bit the run that was never stopped. The folder gets
    `config.json`, `metrics.jsonl`, `loss.png`, `samples/step_XXXXXX.png` and `checkpoints/last.pt`.

    Returns:
        `config.out`.

    Raises:
        UserError: a mistake in the configuration or the data, another run in `config.out`, a damaged checkpoint, a full disk,
            or a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    device = runtime.resolve_device(config.device)
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out={config.out} is a file. Name a folder for the run.")
    checkpoint = _checkpoint_to_continue(config)
    if config.deterministic:
        runtime.use_deterministic_algorithms()
    dataset = SYSTEMS[config.system].dataset(config)
    schedule = Schedule.of(config, len(dataset))
    run = _Run(config, device, dataset, schedule)
    if checkpoint is not None:
        run.restore(checkpoint)
        if run.step >= schedule.total_steps:
            print(
                f"{config.out} has finished its {run.step} steps. To train longer, ask for more steps."
            )
            return config.out
        print(f"{config.out}: going on after step {run.step} of {schedule.total_steps}")
    else:
        run.metrics.drop_after(0)
    write_json(to_dict(config), config.out / "config.json")
    with runtime.StopOnSignal() as stop:
        run.go(stop)
    if stop.requested and run.step < schedule.total_steps:
        print(
            f"Stopped after step {run.step} of {schedule.total_steps}, saved in {run.checkpoint_path}. "
            "Run the same command again to go on."
        )
        raise Interrupted
    return config.out


def _checkpoint_to_continue(config: TrainConfig) -> dict | None:
    """The checkpoint in `config.out`, if there is one; raises `UserError` if it belongs to another configuration."""
    path = config.out / "checkpoints" / "last.pt"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    ours, theirs = to_dict(config), state["config"]
    names = differing_fields(ours, theirs)
    if names:
        shown = ", ".join(
            f"{name}={json.dumps(theirs.get(name))} (now {json.dumps(ours.get(name))})"
            for name in names
        )
        raise UserError(
            f"out={config.out} holds another run, with {shown}. Name another folder, or give the same values to go on."
        )
    return state


class _Run:
    """A run under way: everything that a checkpoint holds, and the step from one state to the next."""

    def __init__(
        self, config: TrainConfig, device: torch.device, dataset: Dataset, schedule: Schedule
    ) -> None:
        self.config, self.device, self.dataset, self.schedule = config, device, dataset, schedule
        self.system = SYSTEMS[config.system]
        self.checkpoint_path = config.out / "checkpoints" / "last.pt"
        runtime.seed_everything(config.seed)
        self.model = self.system.model(config, dataset[0]).to(device)
        self.average = WeightAverage(self.model.generator, config.ema_decay)
        self.metrics = MetricLog(config.out / "metrics.jsonl")
        self.preview_inputs = self.system.preview_inputs(config)
        self.step = 0
        self.seconds = 0.0

    def restore(self, state: dict) -> None:
        """Takes over a checkpoint's state."""
        theirs = state["config"]
        before = Schedule(
            theirs["epochs"],
            theirs["decay_epochs"],
            theirs["steps"],
            theirs["batch_size"],
            state["epoch_samples"],
        )
        if state["epoch_samples"] != len(self.dataset):
            raise UserError(
                f"data={self.config.data} now has {len(self.dataset)} images per epoch, but the run in {self.config.out} was "
                f"made with {state['epoch_samples']}. Restore the folder, or train anew with another out."
            )
        if not self.schedule.agrees_until(before, state["step"]):
            raise UserError(
                f"out={self.config.out} holds a run with epochs={before.epochs} and decay_epochs={before.decay_epochs}, and its "
                f"first {state['step']} steps would have been others with epochs={self.config.epochs} and "
                f"decay_epochs={self.config.decay_epochs}. Name another folder, or give the same values to go on."
            )
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.model.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.average.load_state_dict(state["average"])
        self.metrics.load_state_dict(state["metrics"], self.device)
        self.metrics.drop_after(state["step"])
        self.step, self.seconds = state["step"], state["seconds"]
        runtime.set_rng_state(state["rng"])

    def save(self) -> None:
        """Writes the checkpoint; refuses to if a loss is not finite."""
        self.metrics.means()
        save_checkpoint(
            {
                "step": self.step,
                "seconds": self.seconds,
                "config": to_dict(self.config),
                "epoch_samples": len(self.dataset),
                "model": self.model.state_dict(),
                "optimizers": {
                    name: optimizer.state_dict()
                    for name, optimizer in self.model.optimizers.items()
                },
                "average": self.average.state_dict(),
                "metrics": self.metrics.state_dict(),
                "rng": runtime.rng_state(),
            },
            self.checkpoint_path,
        )

    def go(self, stop: runtime.StopOnSignal) -> None:
        """Steps to the end of the schedule, or until `stop.requested`; ends with a checkpoint."""
        config, total = self.config, self.schedule.total_steps
        bar = tqdm(total=total, initial=self.step, desc=config.out.name, unit="step", disable=None)
        with bar:
            for batch in self._batches():
                self._one_step(batch)
                bar.update()
                done = self.step == total or stop.requested
                if self.step % config.log_every == 0:
                    self._log(bar)
                if self.step % config.sample_every == 0 or self.step == total:
                    self._show()
                if done or self.step % config.checkpoint_every == 0:
                    self.save()
                if done:
                    break

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches from the current step on; reading ahead, in any number of workers."""
        config = self.config
        samples = range(
            self.step * config.batch_size, self.schedule.total_steps * config.batch_size
        )
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            self.dataset,
            config.batch_size,
            sampler=samples,
            num_workers=config.workers,
            pin_memory=on_gpu,
            worker_init_fn=runtime.ignore_interrupt,
            # Its own generator: the loader draws from it, and torch's default one belongs to the training.
            generator=torch.Generator(),
        )
        for batch in loader:
            yield {k: v.to(self.device, non_blocking=on_gpu) for k, v in batch.items()}

    def _one_step(self, batch: dict[str, Tensor]) -> None:
        started = time.perf_counter()
        factor = self.schedule.lr_factor(self.step)
        for optimizer in self.model.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.metrics.add(self.model.training_step(batch))
        self.average.update(self.model.generator)
        self.step += 1
        self.seconds += time.perf_counter() - started

    def _log(self, bar: tqdm) -> None:
        means = self.metrics.write(
            step=self.step,
            epoch=self.schedule.epoch(self.step - 1),
            lr_factor=self.schedule.lr_factor(self.step - 1),
            seconds=round(self.seconds, 3),
        )
        shown = {name: f"{value:.3f}" for name, value in means.items()}
        if bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self.step}/{self.schedule.total_steps}  {text}", file=sys.stderr)
        else:
            bar.set_postfix(shown, refresh=False)

    def _show(self) -> None:
        """Writes the sample grid and the loss plot."""
        rows = self.system.preview(self.average.module, self.preview_inputs)
        viz.save_sample_grid(rows, self.config.out / "samples" / f"step_{self.step:06d}.png")
        viz.save_loss_plot(read_metrics(self.metrics.path), self.config.out / "loss.png")
