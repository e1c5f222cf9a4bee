"""The compiled kernels over feature maps: 3x3 convolutions, instance norm and resampling, for the networks of image translation.

A map is (B, C, H, W) in PyTorch's ``channels_last`` memory format, float32 or bfloat16, C a multiple of 16. Other maps are
turned into that format first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnce.backends import fakes, native

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


def conv3x3_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reflect: bool) -> Tensor:
    """(B, C, H, W), (K, C, 3, 3), (K,) -> (B, K, H, W) in the dtype of ``x``; weight and bias in float32."""
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    return _map(torch.ops.fastnce.conv3x3_forward(_rows(x), weight, bias, reflect))


def conv3x3_input_gradient(grad: Tensor, weight: Tensor, reflect: bool) -> Tensor:
    """The gradient of ``x`` from that of the result."""
    rows = torch.ops.fastnce.conv3x3_input_gradient(_rows(grad), weight.contiguous(), reflect)
    return _map(rows)


def conv3x3_weight_gradient(grad: Tensor, x: Tensor, reflect: bool) -> Tensor:
    """The gradient of ``weight``, in float32."""
    return torch.ops.fastnce.conv3x3_weight_gradient(_rows(grad), _rows(x), reflect)


def instance_norm_forward(
    x: Tensor, residual: Tensor | None, eps: float, slope: float
) -> tuple[Tensor, Tensor]:
    """``leaky_relu(instance_norm(x), slope) + residual``, and the moments that the backward needs."""
    other = None if residual is None else _rows(residual)
    y, moments = torch.ops.fastnce.instance_norm_forward(_rows(x), other, eps, slope)
    return _map(y), moments


def instance_norm_backward(grad: Tensor, x: Tensor, moments: Tensor, slope: float) -> Tensor:
    """The gradient of ``x``; that of ``residual`` is ``grad``."""
    rows = torch.ops.fastnce.instance_norm_backward(_rows(grad), _rows(x), moments, slope)
    return _map(rows)


def blur_resample(x: Tensor, *, halve: bool, size: tuple[int, int], adjoint: bool) -> Tensor:
    """Half or twice the size of ``x``; or, adjoint, a gradient of that size back to one of the map's. ``size``: of the result."""
    return _map(torch.ops.fastnce.blur_resample(_rows(x), halve, adjoint, *size))


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _map(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


# What the ops return, in shapes and dtypes alone.


def _fake_conv3x3_forward(x, weight, bias, reflect):
    return x.new_empty((*x.shape[:3], weight.shape[0]))


def _fake_conv3x3_input_gradient(grad, weight, reflect):
    return grad.new_empty((*grad.shape[:3], weight.shape[1]))


def _fake_conv3x3_weight_gradient(grad, x, reflect):
    return x.new_empty((grad.shape[3], x.shape[3], 3, 3), dtype=torch.float32)


def _fake_instance_norm_forward(x, residual, eps, slope):
    moments = x.new_empty((2, x.shape[0], x.shape[3]), dtype=torch.float32)
    return x.new_empty(x.shape), moments


def _fake_instance_norm_backward(grad, x, moments, slope):
    return x.new_empty(x.shape)


def _fake_blur_resample(x, halve, adjoint, height, width):
    return x.new_empty((x.shape[0], height, width, x.shape[3]))


FAKES: dict[str, Callable] = {
    "conv3x3_forward": _fake_conv3x3_forward,
    "conv3x3_input_gradient": _fake_conv3x3_input_gradient,
    "conv3x3_weight_gradient": _fake_conv3x3_weight_gradient,
    "instance_norm_forward": _fake_instance_norm_forward,
    "instance_norm_backward": _fake_instance_norm_backward,
    "blur_resample": _fake_blur_resample,
}
if native.available() == "ok":
    fakes.register("fastnce", FAKES)
