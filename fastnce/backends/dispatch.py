"""Which backend is the quickest on a GPU: as measured there, by ``make gpu-report``, which prints a table to be pasted here.

A generation is a compute capability, "sm_90". What has not been measured is not in the table, and does not change the choice.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch


@dataclasses.dataclass(frozen=True)
class Point:
    """The times of an op's forward and backward at some sizes.

    Args:
        dtype: of the inputs, "bfloat16".
        sizes: of the tensor by which an op's backend is chosen (query, features, ...): (D,) to (N, D), (B, N, D), (B, C, H, W).
        microseconds: backend -> median.
    """

    dtype: str
    sizes: tuple[int, ...]
    microseconds: dict[str, float]

    @property
    def order(self) -> tuple[str, ...]:
        """The backends, the quickest first."""
        return tuple(sorted(self.microseconds, key=self.microseconds.__getitem__))


# Generation -> op -> points.
MEASURED: dict[str, dict[str, tuple[Point, ...]]] = {}


def quickest(op: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """The backends measured for ``op``, the quickest first, at the sizes nearest to those of ``tensor``; () without any.

    Args:
        op: the op.
        tensor: the one by which its backend is chosen.
    """
    if not MEASURED:
        return ()
    dtype = str(tensor.dtype).removeprefix("torch.")
    sizes = tuple(tensor.shape)
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # heavy

        # A size that may vary is a symbol, of which there is no nearest.
        if not all(has_static_value(size) for size in sizes):
            return ()
    return _nearest(op, str(tensor.device), dtype, sizes)


# Nothing in here depends on values of tensors: a compiler need not look into it.
@torch.compiler.assume_constant_result
def _nearest(op: str, device: str, dtype: str, sizes: tuple[int, ...]) -> tuple[str, ...]:
    points = MEASURED.get(generation(torch.device(device)) or "", {}).get(op, ())
    points = tuple(point for point in points if point.dtype == dtype)
    return min(points, key=lambda point: _distance(point.sizes, sizes)).order if points else ()


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """By how many factors of e the sizes differ, all together; missing leading sizes are 1."""
    length = max(len(a), len(b))
    a, b = ((1,) * (length - len(x)) + x for x in (a, b))
    return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))


@functools.cache
def generation(device: torch.device) -> str | None:
    """The compute capability of a GPU, such as "sm_90"; None of what is not an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
