"""When a run is in which epoch, at which learning rate, and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from fastnce.errors import UserError


def linear_decay(epoch: int, epochs: int, decay_epochs: int) -> float:
    """CUT's learning-rate factor for the 1-based `epoch`: 1, then falling linearly after `epochs`.

    `1 - max(0, epoch - epochs) / (decay_epochs + 1)`, never below 0.
    """
    return max(0.0, 1.0 - max(0, epoch - epochs) / (decay_epochs + 1))


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Learning-rate factor of the 0-based `step`: rising linearly over `warmup_steps`, then half a cosine towards 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run of `total_steps` steps of `samples_per_step` samples each, at a constant learning rate.

    The samples come from an endless stream with `epoch_samples` per epoch.
    """

    total_steps: int
    samples_per_step: int
    epoch_samples: int

    def epoch(self, step: int) -> int:
        """The 1-based epoch of the first sample of the 0-based `step`."""
        return step * self.samples_per_step // self.epoch_samples + 1

    def lr_factor(self, step: int) -> float:
        """The factor of the learning rate in the 0-based `step`."""
        return 1.0

    def agrees_until(self, other: Self, steps: int) -> bool:
        """Whether the first `steps` steps are the same under both schedules."""
        return all(self.lr_factor(step) == other.lr_factor(step) for step in range(steps))


@dataclass(frozen=True, kw_only=True)
class LinearDecay(Schedule):
    """CUT's schedule: `epochs` at the full learning rate, then `decay_epochs` in which it falls linearly."""

    epochs: int
    decay_epochs: int

    @classmethod
    def of(
        cls,
        *,
        epochs: int,
        decay_epochs: int,
        steps: int | None,
        samples_per_step: int,
        epoch_samples: int,
    ) -> Self:
        """The schedule that ends with the epochs, or after `steps` if that is not None."""
        limit = (epochs + decay_epochs) * epoch_samples // samples_per_step
        if limit == 0:
            raise UserError(
                f"batch_size={samples_per_step} is larger than all epochs together, {epoch_samples} samples each. "
                "Use a smaller batch_size or more epochs."
            )
        if steps is not None and steps > limit:
            raise UserError(
                f"steps={steps} goes beyond the {limit} steps of epochs={epochs} and decay_epochs={decay_epochs}, after "
                f"which the learning rate is 0. Use steps <= {limit}, or more epochs."
            )
        return cls(
            total_steps=limit if steps is None else steps,
            samples_per_step=samples_per_step,
            epoch_samples=epoch_samples,
            epochs=epochs,
            decay_epochs=decay_epochs,
        )

    def lr_factor(self, step: int) -> float:
        return self.epoch_factor(self.epoch(step))

    def epoch_factor(self, epoch: int) -> float:
        """The factor of the learning rate in the 1-based `epoch`."""
        return linear_decay(epoch, self.epochs, self.decay_epochs)

    def agrees_until(self, other: Self, steps: int) -> bool:
        """Whether the first `steps` steps are the same: the learning rate, and the scaling of the images.

        Images are scaled to `crop_size` from the first decay epoch on.
        """
        last = self.epoch(steps - 1) if steps else 0
        return all(
            self.epoch_factor(epoch) == other.epoch_factor(epoch)
            and (epoch > self.epochs) == (epoch > other.epochs)
            for epoch in range(1, last + 1)
        )


@dataclass(frozen=True, kw_only=True)
class LateDecay(LinearDecay):
    """The schedule of SPADE: the first of the `decay_epochs` is still at the full rate, the last one at 1 / `decay_epochs` of it."""

    def epoch_factor(self, epoch: int) -> float:
        fallen = max(0, epoch - self.epochs - 1)
        return max(0.0, 1 - fallen / max(1, self.decay_epochs))


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Schedule):
    """Linear warm-up over `warmup_steps`, then half a cosine down to 0 at `total_steps`."""

    warmup_steps: int

    def lr_factor(self, step: int) -> float:
        return warmup_cosine(step, self.warmup_steps, self.total_steps)
