"""The learning rate, the epochs and the end of a run."""

from dataclasses import replace

import pytest

from fastnce.errors import UserError
from fastnce.systems.schedule import LateDecay, LinearDecay, Schedule, WarmupCosine, linear_decay


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


def decay(epochs=2, decay_epochs=1, steps=None, samples_per_step=1, epoch_samples=5):
    return LinearDecay.of(
        epochs=epochs,
        decay_epochs=decay_epochs,
        steps=steps,
        samples_per_step=samples_per_step,
        epoch_samples=epoch_samples,
    )


def test_spades_decay_begins_an_epoch_later_and_ends_above_0():
    how = {"samples_per_step": 1, "epoch_samples": 1, "steps": None}
    late = LateDecay.of(epochs=2, decay_epochs=4, **how)
    assert [late.lr_factor(step) for step in range(6)] == [1, 1, 1, 0.75, 0.5, 0.25]
    constant = LateDecay.of(epochs=3, decay_epochs=0, **how)
    assert [constant.lr_factor(step) for step in range(3)] == [1, 1, 1]


def test_epochs_and_total_with_batch_1():
    schedule = decay()
    assert schedule.total_steps == 15
    assert [schedule.epoch(step) for step in (0, 4, 5, 9, 10, 14)] == [1, 1, 2, 2, 3, 3]
    assert [schedule.lr_factor(step) for step in (0, 9, 10, 14)] == [1.0, 1.0, 0.5, 0.5]


def test_steps_beyond_the_epochs():
    with pytest.raises(UserError) as error:
        decay(steps=8, samples_per_step=2)
    assert "steps=8 goes beyond the 7 steps of epochs=2 and decay_epochs=1" in str(error.value)
    assert decay(steps=4).total_steps == 4
    schedule = decay(steps=7, samples_per_step=2)  # batches may straddle epochs
    assert schedule.total_steps == 7
    assert [schedule.epoch(step) for step in range(7)] == [1, 1, 1, 2, 2, 3, 3]


def test_batch_larger_than_everything():
    with pytest.raises(UserError, match="batch_size=50 is larger than all epochs together"):
        decay(samples_per_step=50)


def test_agreement_on_the_steps_already_made():
    schedule = decay(4, 4)
    assert schedule.agrees_until(replace(schedule, total_steps=3), 40)
    longer = replace(schedule, epochs=6)
    assert schedule.agrees_until(longer, 0)
    assert schedule.agrees_until(longer, 20)  # the first 4 epochs
    assert not schedule.agrees_until(longer, 21)
    slower = replace(schedule, decay_epochs=8)
    assert schedule.agrees_until(slower, 20)
    assert not schedule.agrees_until(slower, 21)
    # Without decay the factor stays 1, but the images' scaling changes after `epochs`.
    assert not decay(4, 0).agrees_until(decay(3, 0), 20)


def test_a_constant_rate_agrees_with_any_length():
    one = Schedule(total_steps=10, samples_per_step=3, epoch_samples=5)
    assert one.agrees_until(replace(one, total_steps=20), 10)
    assert [one.epoch(step) for step in range(4)] == [1, 1, 2, 2]
    assert one.lr_factor(9) == 1.0


def test_warmup_and_cosine():
    schedule = WarmupCosine(total_steps=12, samples_per_step=1, epoch_samples=4, warmup_steps=4)
    factors = [schedule.lr_factor(step) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)  # half way down
    assert 0 < factors[11] < 0.05
    assert schedule.agrees_until(replace(schedule, total_steps=24), 5)  # the warm-up and its end
    assert not schedule.agrees_until(replace(schedule, total_steps=24), 6)
