"""Devices, generators and signals."""

import os
import signal
import time

import pytest
import torch

from fastnce.errors import UserError
from fastnce.training.runtime import (
    StopOnSignal,
    resolve_device,
    rng_state,
    seed_everything,
    set_rng_state,
)


def test_devices_that_are_there():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_devices_that_do_not_exist(name):
    with pytest.raises(UserError, match=f"device={name} is .* Use auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_gpu_that_is_not_there():
    name = "cuda" if not torch.cuda.is_available() else f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UserError, match=f"device={name} is not there: .*Use "):
        resolve_device(name)


def test_rng_state():
    seed_everything(3)
    state = rng_state()
    first = torch.rand(5)
    set_rng_state(state)
    assert torch.equal(first, torch.rand(5))
    seed_everything(3)
    assert torch.equal(first, torch.rand(5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


@pytest.fixture
def interruptible():
    """As a program in the foreground; a shell lets those in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_acts():
    # With threads about, a signal may arrive a moment later, and two that wait count as one.
    with pytest.raises(KeyboardInterrupt), StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.requested:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
