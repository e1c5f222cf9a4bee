"""Starting kernels, and what they need to know about the machine."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

# Set before this package is imported, it makes Triton run the kernels on the host, on CPU tensors: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Of kernels that have no tile.
_OPTIONS = {"num_warps": 4, "num_stages": 2}


def launch(
    kernel, grid: Sequence[int], options: dict[str, int] = _OPTIONS, /, **arguments: object
) -> None:
    """Runs ``kernel`` on the device of its tensors, in the current stream, with ``num_warps`` and ``num_stages`` as options."""
    _start(kernel, tuple(grid), arguments, {**options, "enable_fp_fusion": True})


@triton.jit
def _nothing_kernel():
    pass


def start_nothing(index: int) -> None:
    """Raises where Triton cannot compile or start a kernel on a GPU."""
    with torch.cuda.device(index):
        launch(_nothing_kernel, (1,))


def _start(kernel, grid: tuple[int, ...], arguments: dict, options: dict) -> None:
    with _device_of(arguments):
        kernel[grid](**arguments, **options)


def _device_of(arguments: dict[str, object]) -> contextlib.AbstractContextManager:
    for x in arguments.values():
        x = x[0] if isinstance(x, tuple) else x
        if isinstance(x, Tensor):
            return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if INTERPRETED and device.type == "cpu" else 132


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return 228 * 1024


@functools.cache
def tensor_memory(device: torch.device) -> bool:
    """Whether products accumulate in tensor memory, as they do from compute capability 10.0 to 11."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (10, 11)


def temperature_arguments(temperature: float | Tensor) -> dict[str, object]:
    """A float goes to the kernels by value, a tensor by address: neither makes the host wait or compiles anew."""
    return {"temperature": temperature, "TENSOR": isinstance(temperature, Tensor)}


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return triton.cdiv(a, b)
