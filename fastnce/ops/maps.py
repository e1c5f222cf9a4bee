"""What the ops over feature maps share: whether the compiled kernels run them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnce import backends
from fastnce.backends import native_maps


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
    return native_maps.supports("cpu", _autocast_dtype(x), *channels) == "ok"


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


def _autocast_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        return torch.get_autocast_dtype("cpu")
    return x.dtype
