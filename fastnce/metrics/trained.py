"""Small networks that judge images: trained once, then read from a cache."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastnce.data.files import atomic_path
from fastnce.errors import UserError

Network = TypeVar("Network", bound=nn.Module)


def recipe_digest(recipe: object) -> str:
    """Twelve hexadecimal digits that stand for a recipe, a dataclass of plain values."""
    text = json.dumps(asdict(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_or_train(
    file_name: str,
    build: Callable[[], Network],
    train: Callable[[Network], None],
    *,
    cache: Path | str | None = None,
) -> Network:
    """The trained network: from the cache if it is there, else trained and put there.

    Args:
        file_name: Its file in the cache; holds the digest of all that the weights depend on.
        build: Makes the network, untrained.
        train: Trains it in place.
        cache: Folder of the cache; by default `FASTNCE_CACHE` or `~/.cache/fastnce`.

    Returns:
        The network in eval mode, its parameters frozen, on the CPU.
    """
    folder = Path(cache or os.environ.get("FASTNCE_CACHE") or Path.home() / ".cache" / "fastnce")
    path = folder / file_name
    network = build()
    if path.is_file():
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return _frozen(network)
        except Exception as error:  # whatever a damaged file makes torch raise
            warnings.warn(f"{path}: not readable ({error}); training again.", stacklevel=3)
            network = build()
    train(network)
    try:
        with atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
    except UserError as error:
        warnings.warn(f"The network will be trained anew each time: {error}", stacklevel=3)
    return _frozen(network)


def fit(
    network: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    *,
    progress: bool = True,
) -> None:
    """Trains in place: AdamW on `loss(step)`, the learning rate rising and falling once.

    Runs on one thread: so the weights do not depend on the number of cores, and a busy machine
    does not make a small network wait for its second thread.

    Args:
        network: What to train.
        loss: The loss of one step, a function of its number.
        steps: Optimiser steps.
        learning_rate: The peak, reached after 30 % of the steps.
        name: What the progress bar calls it.
        progress: Shows the bar.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        network.train()
        for step in tqdm(range(steps), name, disable=not progress, dynamic_ncols=True):
            value = loss(step)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)


def random_affine(images: Tensor, rng: np.random.Generator, max_shift: float = 2) -> np.ndarray:
    """Turns by up to 10 degrees, scales by up to 10 %, shifts by up to `max_shift` pixels.

    Args:
        images: (N, H, W) float32, 0 where nothing is: that is what moves in at the edges.
        rng: Where the choices are drawn from.
        max_shift: In pixels.

    Returns:
        (N, H, W) float32.
    """
    u = torch.from_numpy(2 * rng.random((len(images), 4), dtype=np.float32) - 1)
    angle, scale = u[:, 0] * np.deg2rad(10), 1 + 0.1 * u[:, 1]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = u[:, 2:] * (2 * max_shift / images.shape[-1])
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, (len(images), 1, *images.shape[1:]), align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0].numpy()


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """A convolution that keeps the size but for its stride, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _frozen(network: Network) -> Network:
    return network.eval().requires_grad_(False)
