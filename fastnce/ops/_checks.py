"""Every error that a caller of an op can see is raised here.

Each message names the op, the argument, what was expected, what was given and how to put it right. No check reads a value from
an accelerator, so none makes the host wait for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(x: Tensor) -> str:
    """``(8, 256)``."""
    return str(tuple(x.shape))


def expect_float_tensor(op: str, name: str, x: object, dims: tuple[int, ...], shape: str) -> None:
    """``x`` is a floating-point tensor with one of ``dims`` dimensions, none of them empty."""
    expect_tensor(op, name, x, shape)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}. Convert it, e.g. {name}.float()."
        )
    if x.dim() not in dims:
        raise ValueError(f"{op}: {name} must have the shape {shape}, got {shape_of(x)}.")
    if 0 in x.shape:
        raise ValueError(
            f"{op}: {name} is empty: its shape is {shape_of(x)}. Every size of {shape} must be at least 1."
        )


def expect_tensor(op: str, name: str, x: object, shape: str) -> None:
    """``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor of shape {shape}, got {type(x).__name__}.")


def expect_shape(
    op: str, name: str, x: Tensor, expected: tuple[int, ...], why: str, like: Tensor | None = None
) -> None:
    """``x`` has exactly the ``expected`` shape; ``why``, followed by the shape of ``like``, says where that comes from.

    The text is put together only for an error: ``torch.compile`` cannot print a shape that it keeps variable.
    """
    if tuple(x.shape) != expected:
        why = why if like is None else f"{why} {shape_of(like)}"
        raise ValueError(f"{op}: {name} must have the shape {expected} ({why}), got {shape_of(x)}.")


def expect_alike(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """``x`` is on the device of ``like`` and has its dtype."""
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {x.device} but {like_name} is on {like.device}. "
            f"Move it with {name}.to({like_name}.device)."
        )
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} is {x.dtype} but {like_name} is {like.dtype}. Convert one, e.g. {name}.to({like_name}.dtype)."
        )


def expect_labels(op: str, labels: object, like: Tensor, like_name: str) -> Tensor:
    """``labels`` as (N,) int64 on the device of ``like`` (N, D)."""
    expect_tensor(op, "labels", labels, "(N,)")
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"{op}: labels must be integers (int64), got {labels.dtype}. Convert them with labels.long()."
        )
    expect_shape(op, "labels", labels, (like.shape[0],), f"one per row of {like_name}")
    if labels.device != like.device:
        raise ValueError(
            f"{op}: labels are on {labels.device} but {like_name} is on {like.device}. "
            f"Move them with labels.to({like_name}.device)."
        )
    return labels.long()


def expect_temperature(op: str, temperature: object, like: Tensor) -> float | Tensor:
    """``temperature`` as a positive float, or as a 0-d floating-point tensor on the device of ``like``."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(
                f"{op}: temperature must be a float or a 0-d floating-point tensor, got a tensor of shape "
                f"{shape_of(temperature)} and dtype {temperature.dtype}. Use temperature.squeeze(), or a float."
            )
        # A copy to an accelerator does not make the host wait.
        return temperature.to(
            device=like.device,
            dtype=torch.float64 if like.dtype == torch.float64 else torch.float32,
        )
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{op}: temperature must be a float or a 0-d tensor, got {type(temperature).__name__}."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{op}: temperature must be positive and finite, got {temperature}. Usual values are 0.05 to 1."
        )
    if torch.compiler.is_compiling():
        return _variable(float(temperature), like)
    return float(temperature)


def _variable(number: float, like: Tensor) -> float | Tensor:
    """A number that the compiler keeps variable as a tensor: given to an operator, it would be a constant, and compiled anew."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # heavy

    if has_static_value(number):
        return number
    return torch.ones((), dtype=torch.float64, device=like.device) * number


def expect_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(
            f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
        )


def expect_int_at_least(op: str, name: str, value: object, least: int) -> None:
    """``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}.")


def expect_no_functorch(op: str) -> None:
    """The fused kernels know no functorch transform; the ``torch`` backend supports all of them."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{op}: the fused kernels do not support torch.func transforms (grad, vmap, jvp ...). Use backend='torch'."
        )


def same_dtype_under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, inputs of different dtypes are promoted to the widest; otherwise they are left for the checks."""
    present = [x for x in tensors if isinstance(x, Tensor) and x.is_floating_point()]
    device = present[0].device.type if present else "meta"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = present[0].dtype
    for x in present[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors
    )
