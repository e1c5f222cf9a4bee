"""Shared by the ops over feature maps: whether the compiled kernels run them, and the kernels' layout.

The kernels take maps (B, H, W, C), contiguous, which is (B, C, H, W) in PyTorch's ``channels_last`` memory format; float32 or
bfloat16, C a multiple of 16. Other maps are turned into that format first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce import backends
from fastnce.backends import native

# Channels of a map are a multiple of this.
CHANNEL_STEP = 16
_DTYPES = (torch.float32, torch.bfloat16)


def supports(device_type: str, dtype: torch.dtype, *channels: int) -> str:
    """``"ok"``, or why maps of ``dtype`` with so many channels have no kernels here."""
    if native.available() != "ok":
        return native.available()
    if device_type != "cpu":
        return "the compiled kernels over maps run on cpu tensors"
    if dtype not in _DTYPES:
        return "the compiled kernels over maps take float32 and bfloat16"
    if any(count % CHANNEL_STEP for count in channels):
        return f"the compiled kernels over maps take multiples of {CHANNEL_STEP} channels, got {channels}"
    return "ok"


def has_kernels(x: Tensor, channels: Sequence[int]) -> bool:
    """Whether the compiled kernels, and not plain PyTorch, run an op on ``x`` (B, C, H, W), between maps of these channels.

    Not while a compiler or an exporter traces: what it records must run without this package. Nor under transforms such as
    ``torch.func.vmap``, nor when another backend was asked for.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if backends.requested() not in (None, "native") or x.device.type != "cpu" or x.numel() == 0:
        return False
    return supports("cpu", _autocast_dtype(x), *channels) == "ok"


def in_kernel_layout(x: Tensor, channels: int) -> Tensor:
    """An image in the memory format of the compiled kernels, if they run a network of so many channels.

    All maps made from it are then in that format, too.
    """
    if x.dim() == 4 and has_kernels(x, (channels,)):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def autocast_map(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast asks convolutions to work in."""
    return x.to(_autocast_dtype(x))


def rows_of(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous, as the kernels take maps."""
    return x.permute(0, 2, 3, 1).contiguous()


def map_of(rows: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return rows.permute(0, 3, 1, 2)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        return torch.get_autocast_dtype("cpu")
    return x.dtype
