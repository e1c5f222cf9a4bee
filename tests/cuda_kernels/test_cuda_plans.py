"""How the passes over pairs are cut up: the blocks fill the multiprocessors of large GPUs, small problems included."""

import ctypes
import os

import pytest

LIBRARY = os.environ.get("FASTNCE_CUDA_EMULATED")
if not LIBRARY:
    pytest.skip("the plans are asked of the library for the host", allow_module_level=True)

PASSES = {"sums": 0, "sums with product": 1, "rows' product": 2, "columns' product": 3}
GPUS = {"A100": (80, 108), "4090": (89, 128), "H100": (90, 132)}


def plan(gpu: str, sizes: tuple[int, ...], which: str) -> tuple[int, int]:
    """Blocks of rows, and parts of the columns."""
    found = (ctypes.c_int64 * 2)()
    given = (ctypes.c_int64 * 4)(*sizes)
    ctypes.CDLL(LIBRARY).fastnce_plan(*GPUS[gpu], given, PASSES[which], found)
    return found[0], found[1]


@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("count", [1024, 1280, 2048, 3000, 4096, 8192, 10240, 32768])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("gpu", GPUS)
def test_multiprocessors_are_busy(gpu, which, count, depth):
    """The last wave included; of about a thousand rows, which have few tiles to share, about half of them."""
    blocks, parts = plan(gpu, (1, count, count, depth), which)
    multiprocessors = GPUS[gpu][1]
    waves = -(-blocks * parts // multiprocessors)
    assert blocks * parts >= (0.8 if count >= 2048 else 0.45) * waves * multiprocessors


@pytest.mark.parametrize("gpu", GPUS)
def test_no_more_parts_than_needed(gpu):
    """Each part writes results of its own, which are added up later."""
    assert plan(gpu, (1, 128 * 132 * 8, 65536, 128), "sums with product")[1] == 1
