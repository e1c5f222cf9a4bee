"""The training loop: one for all systems."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastnce import backends
from fastnce.errors import UserError
from fastnce.files import Files, changed_files, expect_apart, remove_leftovers, write_json
from fastnce.systems import TrainConfig, system_named
from fastnce.systems.schedule import Schedule
from fastnce.systems.system import rng_kept
from fastnce.training import runtime
from fastnce.training.checkpoint import load_checkpoint, previous_path, save_checkpoint
from fastnce.training.config import (
    DATA_FIELDS,
    SCHEDULE_FIELDS,
    differing_fields,
    from_dict,
    to_dict,
)
from fastnce.training.cost import write_cost
from fastnce.training.ema import WeightAverage
from fastnce.training.lock import locked
from fastnce.training.log import MetricLog, append_line, drop_lines_after, read_metrics
from fastnce.training.published import load_initial
from fastnce.training.ranks import Ranks, joined_from_environment
from fastnce.verification import verify_once
from fastnce.viz import plots

# Options that name a place, which may be spelled in several ways.
_PATHS = DATA_FIELDS | {"init_from", "vgg_weights", "critic_file", "generator", "face_weights"}
_PATHS |= {"backbone_weights", "moco_weights", "lpips_backbone", "lpips_weights", "similarity"}
# What a user looks at in a finished run.
_RESULTS = ("samples", "loss.png", "measurements.png", "checkpoints/best.pt", "checkpoints/last.pt")
# The seeds of two ranks differ by this.
_SEEDS_APART = 7919


class Interrupted(SystemExit):
    """Training was stopped by Ctrl-C or SIGTERM and has saved; as a `SystemExit` it ends the process with 130."""

    def __init__(self) -> None:
        super().__init__(130)


def train(config: TrainConfig, *, verify: bool = True) -> Path:
    """Trains a system, or continues the run that is in `config.out`.

    Started by `torchrun --nproc-per-node N -m fastnce train ...`, N processes share each batch, one GPU each if there are any.

    A run that was stopped and continued is on a CPU bit for bit the run that was never stopped. The folder gets
    `config.json`, `metrics.jsonl`, `loss.png`, `samples/step_XXXXXX.png`, `cost.json` and `checkpoints/last.pt`; with `measure_every` also
    `measurements.jsonl`, `measurements.png` and `checkpoints/best.pt`; with `keep_every` also `checkpoints/step_XXXXXX.pt`.

    After an error the state before it is saved, if it is whole: not when a training step or a log line was under way.

    Args:
        config: of the run.
        verify: on a GPU whose kernels never were verified, do so first (see `fastnce.verify`).

    Returns:
        `config.out`.

    Raises:
        UserError: a mistake in the configuration or the data, another run in `config.out` or another process that trains it, a
            damaged checkpoint, a full disk, or a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    device = joined_from_environment(runtime.resolve_device(config.device))
    ranks = Ranks()
    if config.batch_size % ranks.size:
        raise UserError(
            f"batch_size={config.batch_size} is shared by {ranks.size} processes. Use a multiple of {ranks.size}."
        )
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out={config.out} is a file. Name a folder for the run.")
    expect_apart(config.out, system_named(config.system).folders_read(config))
    with locked(config.out) if ranks.is_first else contextlib.nullcontext():
        if verify and device.type == "cuda" and backends.requested() is None:
            verify_once(device)
        return _train(config, device, ranks)


def _train(config: TrainConfig, device: torch.device, ranks: Ranks) -> Path:
    checkpoint = _checkpoint_to_continue(config)
    system = system_named(config.system)
    config = system.settled(config, from_dict(checkpoint["config"]) if checkpoint else None)
    if config.deterministic:
        runtime.use_deterministic_algorithms()
    dataset = system.dataset(config)
    config = system.of_data(config, dataset)
    schedule = system.schedule(config, len(dataset))
    run = _Run(config, device, dataset, schedule, ranks, is_new=checkpoint is None)
    if checkpoint is not None:
        run.restore(checkpoint)
        if run.step >= schedule.total_steps:
            run.say(
                f"{config.out} has finished its {run.step} steps. To train longer, ask for more steps."
            )
            return config.out
        run.say(f"{config.out}: going on after step {run.step} of {schedule.total_steps}")
    if ranks.is_first:
        for line in getattr(dataset, "describe", list)():
            run.say(line)
    run.begin_folder()
    with runtime.StopOnSignal() as stop:
        run.go(stop)
    if run.step < schedule.total_steps:  # stopped on some rank
        run.say(
            f"Stopped after step {run.step} of {schedule.total_steps}, saved in {run.checkpoint_path}. "
            "Run the same command again to go on."
        )
        raise Interrupted
    kept = ", ".join(name for name in _RESULTS if (config.out / name).exists())
    run.say(f"Done: {run.step} steps. Look at {kept} in {config.out}.")
    run.say(f"Next: {system.next_command.format(run=config.out)}")
    return config.out


def _checkpoint_to_continue(config: TrainConfig) -> dict | None:
    """The checkpoint in `config.out`, if there is one; raises `UserError` if it belongs to another configuration."""
    path = config.out / "checkpoints" / "last.pt"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    # Where the training images are does not matter, if the run knows their names and sizes: `_Run.restore` compares them.
    free = DATA_FIELDS if state.get("files") else frozenset()
    _expect_same_run(config, state, free)
    return state


def _expect_same_run(config: TrainConfig, state: dict, free: frozenset[str]) -> None:
    """Raises `UserError` if a checkpoint's configuration differs in more than what a run may change, or the fields in `free`."""
    # Through the configuration, so that options that are newer than the run have their defaults.
    before = from_dict(state["config"])
    if before.system == config.system:
        config = system_named(config.system).settled(config, before)
    ours, theirs = to_dict(config), to_dict(before)
    if not theirs.get("class_names"):  # a run from before runs kept them
        free |= {"class_names"}
    names = [
        name
        for name in differing_fields(ours, theirs)
        if name not in free
        and not (name in _PATHS and _same_place(ours.get(name), theirs.get(name)))
    ]
    if "system" in names:  # whose other options say nothing
        names = ["system"]
    if names:
        shown = ", ".join(
            f"{name}={json.dumps(theirs.get(name))} (now {json.dumps(ours.get(name))})"
            for name in names
        )
        raise UserError(
            f"out={config.out} holds another run, with {shown}. Name another folder, or give the same values to go on. A new run "
            f"starts from its weights with --init-from {config.out}."
        )


def _same_place(one: object, other: object) -> bool:
    """Whether two paths, or None, are one place, however they are spelled."""
    if one is None or other is None:
        return one is other
    return Path(str(one)).resolve() == Path(str(other)).resolve()


def _places(config: TrainConfig) -> str:
    """The folders of the training data, for an error."""
    places = [getattr(config, name, None) for name in ("data", "data_a", "data_b")]
    return " and ".join(str(place) for place in places if place is not None)


def _fitting(shown: dict[str, str], bar: tqdm) -> dict[str, str]:
    """The first of the losses, as many as a line of the terminal holds beside the progress."""
    room = shutil.get_terminal_size().columns - len(
        bar.format_meter(**bar.format_dict | {"postfix": ""})
    )
    fitting: dict[str, str] = {}
    for name, value in shown.items():
        room -= len(f", {name}={value}")
        if room > 0:
            fitting[name] = value
    return fitting


class _Run:
    """A run under way: everything that a checkpoint holds, and the step from one state to the next."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        dataset: Dataset,
        schedule: Schedule,
        ranks: Ranks,
        *,
        is_new: bool,
    ) -> None:
        self.config, self.device, self.dataset, self.schedule = config, device, dataset, schedule
        self.ranks = ranks
        self.system = system_named(config.system)
        self.checkpoint_path = config.out / "checkpoints" / "last.pt"
        runtime.seed_everything(config.seed)
        self.model = self.system.model(config, dataset).to(device)
        if is_new and config.init_from is not None:
            for line in load_initial(self.model, config):
                self.say(line)
        ranks.average_gradients_before(self.model.optimizers.values())
        if not ranks.is_first:  # the same weights, but other noise and patches
            runtime.seed_everything(config.seed + _SEEDS_APART * ranks.rank)
        self.average = WeightAverage(self.network, config.ema_decay, config.ema_start)
        self.metrics = MetricLog(config.out / "metrics.jsonl")
        self.measurements_path = config.out / "measurements.jsonl"
        self.preview = self.measure = None
        if ranks.is_first:
            self.preview = self.system.preview(config, dataset)
        if ranks.is_first and config.measure_every:
            self.measure = self.system.measure(config, dataset)
        self.step = self.saved_step = 0
        self.seconds = 0.0
        self.best = math.inf
        # Whether the state is that between two steps.
        self.is_whole = True

    @property
    def network(self) -> nn.Module:
        """The network that is used after the training."""
        return getattr(self.model, self.system.network_name)

    def files(self) -> Files | None:
        """The training files with their sizes; None if the dataset does not tell."""
        files = getattr(self.dataset, "files", None)
        return None if files is None else files()

    def say(self, text: str) -> None:
        """Prints, once for all ranks."""
        if self.ranks.is_first:
            print(text, flush=True)  # before data workers are forked, who would print it again

    def begin_folder(self) -> None:
        """Writes the configuration, and removes what an interrupted run left half written or logged after its checkpoint."""
        if self.ranks.is_first:
            for name in ("", "checkpoints", "samples"):
                remove_leftovers(self.config.out / name)
            drop_lines_after(self.metrics.path, self.step)
            drop_lines_after(self.measurements_path, self.step)
            write_json(to_dict(self.config), self.config.out / "config.json")

    def restore(self, state: dict) -> None:
        """Takes over a checkpoint's state."""
        self._expect_same_files(state)
        if state["epoch_samples"] != len(self.dataset):
            raise UserError(
                f"data={_places(self.config)} now has {len(self.dataset)} images per epoch, but the run in {self.config.out} was "
                f"made with {state['epoch_samples']}. Restore the folder, or train anew with another out."
            )
        theirs = from_dict(state["config"])
        before = self.system.schedule(theirs, state["epoch_samples"])
        if not self.schedule.agrees_until(before, state["step"]):
            names = [field.name for field in fields(theirs) if field.name in SCHEDULE_FIELDS]
            was, now = (
                ", ".join(f"{name}={getattr(config, name)}" for name in names)
                for config in (theirs, self.config)
            )
            raise UserError(
                f"out={self.config.out} holds a run with {was}, and its first {state['step']} steps would have been others "
                f"with {now}. Name another folder, or give the same values to go on."
            )
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.model.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.average.load_state_dict(state["average"])
        self.metrics.load_state_dict(state["metrics"], self.device)
        self.step = self.saved_step = state["step"]
        self.seconds, self.best = state["seconds"], state.get("best", math.inf)
        states = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]
        if len(states) != self.ranks.size:
            self.say(
                f"{self.config.out} was made by {len(states)} processes and goes on with {self.ranks.size}: "
                "it will not be the run that was never stopped."
            )
        if self.ranks.rank < len(states):
            runtime.set_rng_state(states[self.ranks.rank])
        # Checkpoints from before there were these have those of the first rank alone, in the model's state.
        if self.ranks.rank < len(apart := state.get("apart", [])):
            for name, own in apart[self.ranks.rank].items():
                self.model.get_submodule(name).set_extra_state(own)

    def _expect_same_files(self, state: dict) -> None:
        """Raises `UserError` if the training files are others than those of a checkpoint, by names and sizes."""
        before, now = state.get("files"), self.files()
        if not before or now is None:  # of a run that did not keep them
            _expect_same_run(self.config, state, frozenset())
            return
        changed = changed_files(before, now)
        if changed:
            more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"data={_places(self.config)} is not what the run in {self.config.out} was made with: {', '.join(changed[:3])}{more}. "
                f"Restore the files, or start a new run from its weights: another out and --init-from {self.config.out}."
            )

    def save(self, name: str = "last") -> None:
        """Writes a checkpoint; refuses to if a loss is not finite."""
        self.metrics.means()
        rng = self.ranks.gathered(runtime.rng_state())
        apart = self.ranks.gathered({} if self.ranks.is_first else self._apart())
        if not self.ranks.is_first:
            return
        save_checkpoint(
            {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "config": to_dict(self.config),
                "epoch_samples": len(self.dataset),
                "files": self.files(),
                "model": self.model.state_dict(),
                "optimizers": {n: o.state_dict() for n, o in self.model.optimizers.items()},
                "average": self.average.state_dict(),
                "metrics": self.metrics.state_dict(),
                "rng": rng,
                "apart": apart,
            },
            self.checkpoint_path.with_name(f"{name}.pt"),
        )
        if name == "last":
            self.saved_step = self.step
        write_cost(self.config.out, self.device)

    def _apart(self) -> dict[str, object]:
        """The extra states of modules, by their names, that are of this rank alone."""
        modules = self.model.named_modules()
        return {n: m.get_extra_state() for n, m in modules if getattr(m, "differs_by_rank", False)}

    def _save_after_error(self) -> None:
        """Saves the last step before an error, if it was completed and its numbers are finite."""
        # Several ranks would have to save together, and the others know nothing of the error.
        if not self.is_whole or self.step == self.saved_step or self.ranks.size > 1:
            return
        tensors = [t for t in self.model.state_dict().values() if isinstance(t, Tensor)]
        if not all(bool(t.isfinite().all()) for t in tensors):
            return
        # If this fails too, the first error is what is to be said.
        with contextlib.suppress(UserError):
            self.save()
            print(
                f"Stopped by an error after step {self.step} of {self.schedule.total_steps}, saved in {self.checkpoint_path}. "
                "Once its cause is mended, the same command goes on from there.",
                file=sys.stderr,
            )

    def go(self, stop: runtime.StopOnSignal) -> None:
        """Steps to the end of the schedule, or until `stop.requested`; ends with a checkpoint, after an error too if it can."""
        try:
            self._go(stop)
        except Exception:
            self._save_after_error()
            raise

    def _go(self, stop: runtime.StopOnSignal) -> None:
        config, total = self.config, self.schedule.total_steps
        bar = tqdm(
            total=total,
            initial=self.step,
            desc=config.out.name,
            unit="step",
            disable=None if self.ranks.is_first else True,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        with bar:
            started = time.perf_counter()
            for batch in self._batches():
                self.is_whole = False
                self._one_step(batch)
                if self.step % config.log_every == 0:
                    runtime.wait_for(self.device)
                self.seconds += time.perf_counter() - started
                bar.update()
                done = self.step == total or self.ranks.any(stop.requested)
                if self.step % config.log_every == 0:
                    self._log(bar)
                self.is_whole = True
                if self.preview and (self.step % config.sample_every == 0 or self.step == total):
                    self._show()
                if config.measure_every and (
                    self.step % config.measure_every == 0 or self.step == total
                ):
                    is_best = self.measure is not None and self._measure()
                    if self.ranks.any(is_best):
                        self.save("best")
                if config.keep_every and self.step % config.keep_every == 0:
                    self._keep()
                if done or self.step % config.checkpoint_every == 0:
                    self.save()
                if done:
                    break
                started = time.perf_counter()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches from the current step on; reading ahead, in any number of workers."""
        config = self.config
        per_step = config.samples_per_step
        samples = range(self.step * per_step, self.schedule.total_steps * per_step)
        ranks = self.ranks
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            self.dataset,
            per_step // ranks.size,
            sampler=ranks.share(samples, per_step),
            num_workers=config.workers,
            pin_memory=on_gpu,
            worker_init_fn=runtime.ignore_interrupt,
            # Its own generator: the loader draws from it, and torch's default one belongs to the training.
            generator=torch.Generator(),
        )
        for batch in loader:
            yield {k: v.to(self.device, non_blocking=on_gpu) for k, v in batch.items()}

    def _one_step(self, batch: dict[str, Tensor]) -> None:
        factor = self.schedule.lr_factor(self.step)
        for optimizer in self.model.optimizers.values():
            for group in optimizer.param_groups:
                initial = group.setdefault("initial_lr", group["lr"])
                group["lr"] = initial * factor if group.get("decays", True) else initial
        self.metrics.add(self.ranks.mean(self.model.training_step(batch)))
        self.ranks.average_buffers(self.model)
        self.average.update(self.network)
        self.step += 1

    def _keep(self) -> None:
        """Writes a checkpoint that no later one replaces."""
        name = f"step_{self.step:06d}"
        self.save(name)
        if self.ranks.is_first:  # that of an earlier attempt at this step
            previous_path(self.checkpoint_path.with_name(f"{name}.pt")).unlink(missing_ok=True)

    def _log(self, bar: tqdm) -> None:
        if not self.ranks.is_first:
            self.metrics.take()
            return
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
            bar.set_postfix(_fitting(shown, bar), refresh=False)

    def _show(self) -> None:
        """Writes the sample grid and the loss plot."""
        with rng_kept():
            rows = self.preview(self.average.module)
        plots.save_sample_grid(rows, self.config.out / "samples" / f"step_{self.step:06d}.png")
        metrics = read_metrics(self.metrics.path)
        plots.save_loss_plot(metrics, self.system.panels, self.config.out / "loss.png")

    def _measure(self) -> bool:
        """Appends a line to measurements.jsonl and plots it. Returns whether this is the best step so far."""
        with rng_kept():
            values = self.measure(self.model, self.average.module)
        self.model.train()
        append_line(self.measurements_path, {"step": self.step} | values)
        plots.save_measurement_plot(
            read_metrics(self.measurements_path), self.config.out / "measurements.png"
        )
        value = values.get(self.system.best, math.nan)
        is_best = value < self.best  # never with NaN
        if is_best:
            self.best = value
        return is_best
