"""Endless streams of samples, each a pure function of the seed and its number."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset


def counter_rng(seed: int, stream: int, index: int) -> np.random.Generator:
    """A generator of its own for each (seed, stream, index); making one takes microseconds.

    Philox is counter-based: `seed` and `stream` are its key, `index` the high half of its counter,
    so no two of these sequences overlap.
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, index, 0], dtype=np.uint64))
    )


class Stream(Dataset):
    """Samples 0, 1, ... without an end, of which `len` are an epoch.

    Sample i is a pure function of (seed, i) and the dataset's arguments, so samples can be read in any order, by any number of
    workers, and from the middle on. A dataset implements `sample`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """One epoch; without this a plain `for` would never end, as every index is valid."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`sample(index)`; IndexError for a negative one."""
        if index < 0:
            name = type(self).__name__
            raise IndexError(f"{name}: sample {index} does not exist. Samples start at 0.")
        return self.sample(index)

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def permutation(self, stream: int, number: int, length: int, slot: int = 0) -> np.ndarray:
        """Permutation `number` of a stream of random numbers; the last one of each slot is kept."""
        kept, order = self._orders.get((stream, slot), (-1, np.empty(0)))
        if kept != number:
            order = counter_rng(self.seed, stream, number).permutation(length)
            self._orders[stream, slot] = number, order
        return order
