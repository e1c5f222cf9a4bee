"""L2 normalisation of rows, safe for zero, tiny and huge rows; and their rounding to eight bits."""

import torch
from torch import Tensor

from fastnce.registry import accumulation_dtype

__all__ = ["accumulation_dtype", "normalize_rows", "over_temperature", "rounded_unit_rows"]


def normalize_rows(x: Tensor) -> Tensor:
    """``x / ||x||`` over the last dimension; an all-zero row stays zero and gets a zero gradient.

    Each row is divided by its largest magnitude first (which leaves the result as it is), so that the sum of squares neither
    overflows nor underflows.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    is_zero = largest == 0
    x = x / largest.masked_fill(is_zero, 1)
    norm = x.square().sum(dim=-1, keepdim=True).masked_fill(is_zero, 1).sqrt()
    return (x / norm).masked_fill(is_zero, 0)


def over_temperature(similarity: Tensor, temperature: float | Tensor) -> Tensor:
    """``z = s / t``, where the gradient of t is computed as ``-sum(G z) / t``.

    PyTorch's own of ``s / t`` is ``-sum(G s / t / t)``: of the smallest temperatures the summands overflow, also where G is 0.
    """
    if not isinstance(temperature, Tensor):
        return similarity / temperature
    constant = temperature.detach()
    return similarity / constant * (constant / temperature)  # times 1


@torch.no_grad()
def rounded_unit_rows(x: Tensor) -> Tensor:
    """The rows ``x / ||x||`` rounded to e4m3 (:data:`torch.float8_e4m3fn`: four significant bits), in the dtype of ``x``.

    Each row is scaled so that its largest magnitude is 448, e4m3's largest number, rounded to the nearest, and scaled back.
    Elements of at least ``2^-6 / 448`` of the largest keep a relative error of at most ``2^-4``; smaller ones become multiples
    of ``2^-9 / 448`` of it. The norm is that of the row before rounding.
    """
    top = torch.finfo(torch.float8_e4m3fn).max
    largest = x.abs().amax(dim=-1, keepdim=True)
    is_zero = largest == 0
    # The power of two keeps every number below in range. Multiplied before it is divided, a number of a half precision that
    # lies midway between two of e4m3 arrives there exactly, in every dtype.
    power = -torch.frexp(largest).exponent.clamp(-126, 126)
    x, largest = torch.ldexp(x, power), torch.ldexp(largest, power).masked_fill(is_zero, 1)
    norm = x.square().sum(dim=-1, keepdim=True).masked_fill(is_zero, 1).sqrt()
    codes = (x * top / largest).to(torch.float8_e4m3fn).to(x.dtype)
    return codes * (largest / (top * norm))
