"""Every error that a caller of an op can see is raised here.

Each message names the op, the argument, what was expected, what was given and how to put it right. No check reads a value from
an accelerator, so none makes the host wait for it.
"""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_of(x: Tensor) -> str:
    """``(8, 256)``."""
    return str(tuple(x.shape))


def expect_float_tensor(
    op: str,
    name: str,
    x: object,
    dims: tuple[int, ...],
    shape: object,
    may_be_empty: bool = False,
) -> None:
    """``x`` is a floating-point tensor with one of ``dims`` dimensions, none of them empty, or the first alone."""
    expect_tensor(op, name, x, shape)
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(
            f"{op}: {name} must be a dense tensor of shape {shape}, got "
            f"{'a nested one' if x.is_nested else x.layout}. Use e.g. {name}.to_dense()."
        )
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}. Convert it, e.g. {name}.float()."
        )
    if x.dim() not in dims:
        raise ValueError(f"{op}: {name} must have the shape {shape}, got {shape_of(x)}.")
    if 0 in x.shape[1 if may_be_empty else 0 :]:
        raise ValueError(
            f"{op}: {name} is empty: its shape is {shape_of(x)}. Every size of {shape} must be at least 1."
        )


def expect_rows(
    op: str,
    name: str,
    x: object,
    *,
    may_be_empty: bool = False,
    like: Tensor | None = None,
    like_name: str = "",
    why: str = "",
) -> None:
    """``x`` is a floating-point tensor (N, D), and as ``like`` is, if given; ``why`` it has that shape.

    N may be 0 only if ``may_be_empty``: among several ranks, one may have no rows.
    """
    expect_float_tensor(op, name, x, (2,), "(N, D)", may_be_empty)
    if like is not None:
        expect_shape(op, name, x, tuple(like.shape), why or f"the shape of {like_name}")
        expect_alike(op, name, x, like_name, like)


def expect_tensor(op: str, name: str, x: object, shape: object) -> None:
    """``x`` is a tensor; ``shape``, words or a tuple, is for the error alone (see ``expect_shape``)."""
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
    """``x`` is on the device of ``like`` and has its dtype; both are of one process, or both are not."""
    expect_beside(op, name, x, like_name, like)
    if x.dtype != like.dtype:
        raise TypeError(
            f"{op}: {name} is {x.dtype} but {like_name} is {like.dtype}. Convert one, e.g. {name}.to({like_name}.dtype)."
        )


def expect_beside(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """``x`` is on the device of ``like``; both are of one process, or both are not."""
    _expect_as_local(op, name, x, like_name, like)
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {x.device} but {like_name} is on {like.device}. "
            f"Move it with {name}.to({like_name}.device)."
        )


def expect_labels(
    op: str,
    labels: object,
    like: Tensor,
    like_name: str,
    name: str = "labels",
    shape: tuple[int, ...] | None = None,
) -> Tensor:
    """``labels`` as int64 of this shape, by default (N,), on the device of ``like`` (N, D)."""
    expect_tensor(op, name, labels, "(N,)" if shape is None else shape)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"{op}: {name} must be integers (int64), got {labels.dtype}. Convert them with {name}.long()."
        )
    _expect_as_local(op, name, labels, like_name, like)
    one_each = (
        "one for each key"
        if shape and shape != tuple(like.shape[:-1])
        else f"one per row of {like_name}"
    )
    expect_shape(op, name, labels, (like.shape[0],) if shape is None else shape, one_each)
    if labels.device != like.device:
        raise ValueError(
            f"{op}: {name} are on {labels.device} but {like_name} is on {like.device}. "
            f"Move them with {name}.to({like_name}.device)."
        )
    return labels.long()


def expect_temperature(op: str, temperature: object, like: Tensor) -> float | Tensor:
    """``temperature`` as a positive float, or as a 0-d tensor on the device of ``like`` and in the dtype of its sums.

    A number that lies on the host is checked. One on an accelerator, or that a compiler traces, is not read: NaN takes its place
    unless it is positive, and makes the loss NaN.
    """
    if not isinstance(temperature, Tensor):
        number = _expect_number(op, "temperature", temperature, "Usual values are 0.05 to 1.")
        return _variable(number, like) if torch.compiler.is_compiling() else number
    temperature = _as_number(op, "temperature", temperature, like)
    number = _on_host(temperature)
    if number is not None:
        _expect_number(op, "temperature", number, "Usual values are 0.05 to 1.")
        if like.device.type == "cpu":
            return temperature
        if not (temperature.requires_grad and torch.is_grad_enabled()):
            return number
    temperature = _beside(temperature, like)
    return temperature if number is not None else F.threshold(temperature, 0.0, math.nan)


def expect_bias(op: str, bias: object, like: Tensor) -> Tensor:
    """``bias``, finite, as a 0-d tensor on the device of ``like`` and in the dtype of its sums.

    As a temperature's, a number on an accelerator, or that a compiler traces, is not read.
    """
    number = bias
    if isinstance(bias, Tensor):
        bias = _as_number(op, "bias", bias, like)
        number = _on_host(bias)
    elif isinstance(bias, bool) or not isinstance(bias, (float, int, numbers.Real)):
        raise TypeError(
            f"{op}: bias must be a float or a tensor of one element, got {type(bias).__name__}."
        )
    if number is not None and not -math.inf < number < math.inf:
        raise ValueError(f"{op}: bias must be finite, got {number}.")
    if isinstance(bias, Tensor):
        return _beside(bias, like)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.ones((), dtype=dtype, device=like.device) * float(bias)


def expect_numbers(
    op: str,
    name: str,
    x: object,
    shape: tuple[int, ...],
    like: Tensor,
    *,
    why: str = "one for each row",
    sign: str = "",
    hint: str = "",
) -> Tensor:
    """``x`` of finite floats, of this shape, in the dtype of the sums of ``like``; ``sign``: "positive" or "not negative".

    ``why`` it has that shape; ``hint``, how to put a wrong number right. As a temperature's, numbers on an accelerator, or that a compiler traces, are not read: NaN takes the place of a wrong one.
    """
    expect_tensor(op, name, x, shape)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floats, got {x.dtype}. Use {name}.float().")
    expect_shape(op, name, x, shape, why)
    expect_beside(op, name, x, "query", like)
    x = x.to(torch.promote_types(like.dtype, torch.float32))
    wrong = ~x.isfinite()
    if sign:
        wrong = wrong | (x <= 0 if sign == "positive" else x < 0)
    if not is_on_host(x):
        return x.masked_fill(wrong, math.nan)
    if wrong.any():
        must = f"{sign} and finite" if sign else "finite"
        raise ValueError(f"{op}: {name} must be {must}, got {x[wrong][0].item()}. {hint}".rstrip())
    return x


def expect_number_within(op: str, name: str, number: object, low: float, high: float) -> float:
    """``number`` as a float from ``low`` to ``high``."""
    if isinstance(number, bool) or not isinstance(number, (float, int, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a float, got {type(number).__name__}.")
    if not low <= number <= high:
        raise ValueError(f"{op}: {name} must be from {low:g} to {high:g}, got {number}.")
    return float(number)


def expect_scale(op: str, scale: object, like: Tensor, name: str = "logit_scale") -> float | Tensor:
    """The temperature whose inverse is ``scale``, positive and finite: a float, or a tensor of at least float32."""
    hint = "CLIP trains its logarithm: pass log_scale.exp()."
    if not isinstance(scale, Tensor):
        return 1 / _expect_number(op, name, scale, hint)
    _expect_one_number(op, name, scale, like)
    wide = torch.promote_types(torch.promote_types(scale.dtype, torch.float32), like.dtype)
    scale = scale.to(wide)
    number = _on_host(scale)
    if number is not None:
        _expect_number(op, name, number, hint)
    return 1 / scale


def _expect_number(op: str, name: str, number: object, hint: str) -> float:
    """``number`` (also of NumPy), positive and finite, as a float."""
    if isinstance(number, bool) or not isinstance(number, (float, int, numbers.Real)):
        raise TypeError(
            f"{op}: {name} must be a float or a tensor of one element, got {type(number).__name__}."
        )
    if not 0 < number < math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {number}. {hint}")
    return float(number)


def _expect_one_number(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """``x`` is a tensor of one element, of any shape: parameters that are sharded cannot be 0-d."""
    if _is_dtensor(x) and not _is_dtensor(like):
        raise TypeError(f"{op}: {name} is a DTensor. Pass {name}.full_tensor().")
    if x.numel() != 1:
        raise ValueError(
            f"{op}: {name} must be a float or a tensor of one element, got a tensor of shape {shape_of(x)}."
        )


def _as_number(op: str, name: str, x: Tensor, like: Tensor) -> Tensor:
    """``x`` of one element as a 0-d tensor in the dtype of the sums of ``like``, where it is."""
    _expect_one_number(op, name, x, like)
    if not x.is_floating_point():
        raise TypeError(
            f"{op}: {name} must be a float or a floating-point tensor of one element, got {x.dtype}. Use {name}.float()."
        )
    x = x.reshape(()) if x.dim() > 0 else x
    return x.to(torch.promote_types(like.dtype, torch.float32))


def _beside(x: Tensor, like: Tensor) -> Tensor:
    """The 0-d ``x`` on the device of ``like``."""
    if x.device == like.device:
        return x
    if x.device.type == "cpu":
        # A kernel takes a number of the host as an argument: unlike a copy, it makes nobody wait.
        return x * torch.ones((), dtype=x.dtype, device=like.device)
    return x.to(like.device)


def _on_host(x: Tensor) -> float | None:
    """The number in ``x``, if it can be read."""
    return x.item() if is_on_host(x) else None


def is_on_host(x: Tensor) -> bool:
    """Whether ``x`` lies on the host, and no compiler, transform or fake tensor stands for it."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    if x.device.type != "cpu" or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return _get_current_dispatch_mode() is None


def _expect_as_local(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Of ``x`` and ``like`` both are tensors of one process, or both of several."""
    if type(x) is not type(like) and _is_dtensor(x) != _is_dtensor(like):
        name, other = (name, like_name) if _is_dtensor(x) else (like_name, name)
        raise TypeError(f"{op}: {name} is a DTensor but {other} is not. Pass {name}.full_tensor().")


def _is_dtensor(x: Tensor) -> bool:
    return type(x) is not Tensor and not torch.compiler.is_compiling() and hasattr(x, "full_tensor")


def _variable(number: float, like: Tensor) -> float | Tensor:
    """A number that the compiler keeps variable as a tensor: given to an operator, it would be a constant, and compiled anew."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # heavy

    if has_static_value(number):
        return number
    # As the kernels take numbers: in double on the host, in single precision on a GPU.
    dtype = (
        torch.float64
        if like.device.type == "cpu"
        else torch.promote_types(like.dtype, torch.float32)
    )
    return torch.ones((), dtype=dtype, device=like.device) * number


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


def expect_fusable(op: str, rows: Tensor) -> None:
    """The fused kernels know no functorch transform, which the ``torch`` backend supports, and no tensor of several ranks."""
    if torch.compiler.is_compiling():
        return
    if _is_dtensor(rows):
        raise TypeError(
            f"{op}: the fused kernels take no DTensor. Pass full_tensor() of all rows; of a loss over ranks, to_local() to "
            f"fastnce.distributed."
        )
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
