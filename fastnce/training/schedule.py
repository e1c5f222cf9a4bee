"""When a run is in which epoch, at which learning rate, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

from fastnce.errors import UserError
from fastnce.training.config import TrainConfig


def linear_decay(epoch: int, epochs: int, decay_epochs: int) -> float:
    """CUT's learning-rate factor for the 1-based `epoch`: 1, then falling linearly after `epochs`.

    `1 - max(0, epoch - epochs) / (decay_epochs + 1)`, never below 0.
    """
    return max(0.0, 1.0 - max(0, epoch - epochs) / (decay_epochs + 1))


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run of `batch_size` samples a step on an endless stream with `epoch_samples` per epoch."""

    epochs: int
    decay_epochs: int
    steps: int | None
    batch_size: int
    epoch_samples: int

    @classmethod
    def of(cls, config: TrainConfig, epoch_samples: int) -> Schedule:
        """The schedule of `config`.

        Raises:
            UserError: `steps` reach beyond the epochs, or a batch is larger than all of them.
        """
        schedule = cls(
            config.epochs, config.decay_epochs, config.steps, config.batch_size, epoch_samples
        )
        limit = schedule._steps_of_all_epochs
        if limit == 0:
            raise UserError(
                f"batch_size={config.batch_size} is larger than all epochs together, {epoch_samples} samples each. "
                "Use a smaller batch_size or more epochs."
            )
        if config.steps is not None and config.steps > limit:
            raise UserError(
                f"steps={config.steps} goes beyond the {limit} steps of epochs={config.epochs} and "
                f"decay_epochs={config.decay_epochs}, after which the learning rate is 0. "
                f"Use steps <= {limit}, or more epochs."
            )
        return schedule

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps if self.steps is not None else self._steps_of_all_epochs

    @property
    def _steps_of_all_epochs(self) -> int:
        return (self.epochs + self.decay_epochs) * self.epoch_samples // self.batch_size

    def epoch(self, step: int) -> int:
        """The 1-based epoch of the first sample of the 0-based `step`."""
        return step * self.batch_size // self.epoch_samples + 1

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by in the 0-based `step`."""
        return linear_decay(self.epoch(step), self.epochs, self.decay_epochs)

    def agrees_until(self, other: Schedule, steps: int) -> bool:
        """Whether the first `steps` steps are the same under both: learning rate, and scaling of the images.

        Images are scaled to `crop_size` from the first decay epoch on.
        """
        last = self.epoch(steps - 1) if steps else 0
        return all(
            linear_decay(epoch, self.epochs, self.decay_epochs)
            == linear_decay(epoch, other.epochs, other.decay_epochs)
            and (epoch > self.epochs) == (epoch > other.epochs)
            for epoch in range(1, last + 1)
        )
