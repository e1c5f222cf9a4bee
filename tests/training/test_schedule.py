"""The learning rate, the epochs and the end of a run."""

from dataclasses import replace

import pytest

from fastnce.errors import UserError
from fastnce.training.schedule import Schedule, linear_decay


@pytest.mark.parametrize(
    ("epoch", "epochs", "decay_epochs", "expected"),
    [
        (1, 200, 200, 2e-4),
        (200, 200, 200, 2e-4),
        (201, 200, 200, 1.990050e-4),
        (400, 200, 200, 9.950249e-7),
        (151, 150, 50, 1.960784e-4),
        (200, 150, 50, 3.921569e-6),
    ],
)
def test_published_learning_rates(epoch, epochs, decay_epochs, expected):
    assert 2e-4 * linear_decay(epoch, epochs, decay_epochs) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_is_never_negative():
    assert linear_decay(10, 2, 3) == 0.0


def test_epochs_and_total_with_batch_1():
    schedule = Schedule(2, 1, None, batch_size=1, epoch_samples=5)
    assert schedule.total_steps == 15
    assert [schedule.epoch(step) for step in (0, 4, 5, 9, 10, 14)] == [1, 1, 2, 2, 3, 3]
    assert [schedule.lr_factor(step) for step in (0, 9, 10, 14)] == [1.0, 1.0, 0.5, 0.5]


def test_batches_may_straddle_epochs():
    schedule = Schedule(2, 1, None, batch_size=2, epoch_samples=5)
    assert schedule.total_steps == 7
    assert [schedule.epoch(step) for step in range(7)] == [1, 1, 1, 2, 2, 3, 3]


def test_steps_win():
    assert Schedule(2, 1, 4, batch_size=1, epoch_samples=5).total_steps == 4


def test_steps_beyond_the_epochs(tiny):
    with pytest.raises(UserError) as error:
        Schedule.of(tiny(epochs=2, decay_epochs=1, steps=8), 5)
    assert "steps=8 goes beyond the 7 steps of epochs=2 and decay_epochs=1" in str(error.value)
    assert Schedule.of(tiny(epochs=2, decay_epochs=1, steps=7), 5).total_steps == 7


def test_batch_larger_than_everything(tiny):
    with pytest.raises(UserError, match="batch_size=50 is larger than all epochs together"):
        Schedule.of(tiny(epochs=2, decay_epochs=1, batch_size=50), 5)


def test_agreement_on_the_steps_already_made():
    schedule = Schedule(4, 4, None, batch_size=1, epoch_samples=5)
    assert schedule.agrees_until(replace(schedule, steps=3), 40)
    longer = replace(schedule, epochs=6)
    assert schedule.agrees_until(longer, 0)
    assert schedule.agrees_until(longer, 20)  # the first 4 epochs
    assert not schedule.agrees_until(longer, 21)
    slower = replace(schedule, decay_epochs=8)
    assert schedule.agrees_until(slower, 20)
    assert not schedule.agrees_until(slower, 21)
    # Without decay the factor stays 1, but the images' scaling changes after `epochs`.
    assert not Schedule(4, 0, None, 1, 5).agrees_until(Schedule(3, 0, None, 1, 5), 20)
