"""Numbers that any language can make, for weights and inputs of golden values."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from fastnce.networks.style_generator import ConstantInput, GivenNoise, ModulatedConv2d
from fastnce.networks.stylegan2 import EqualConv2d, EqualLinear


def sines(*shape: int, step: float, start: float) -> Tensor:
    """sin(start + step * i) over the elements in C order, computed in fp64, rounded to fp32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(start + step * index).float().reshape(shape)


def hashed(*shape: int, k: int) -> Tensor:
    """Numbers from -1 to 1 in C order, in fp32: integer hashes of the place, counted from 1; `k` chooses the sequence."""
    # In 32 bits without sign the products wrap around, which is the remainder that the hash asks for.
    x = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)
    x *= np.uint32(2654435761)
    x += np.uint32((k + 1) * 97531)
    x ^= x >> np.uint32(15)
    x *= np.uint32(2246822519)
    x ^= x >> np.uint32(13)
    return torch.from_numpy((x / 2**31 - 1).astype(np.float32)).reshape(shape)


def fill(module: nn.Module, first: int = 0) -> nn.Module:
    """Sets the j-th parameter, counted from `first`, to `hashed(k=j)`, times sqrt(3 / fan-in) or, of one dimension, 0.1.

    The j-th vector of spectral norm becomes `hashed(k=1000 + j)` over its length.
    """
    buffers = dict(module.named_buffers())
    vectors = [x for name, x in buffers.items() if name.endswith(("weight_u", "weight_v"))]
    with torch.no_grad():
        for j, x in enumerate(module.parameters(), first):
            scale = 0.1 if x.ndim == 1 else math.sqrt(3 * len(x) / x.numel())
            x.copy_(scale * hashed(*x.shape, k=j))
        for j, x in enumerate(vectors):
            values = hashed(*x.shape, k=1000 + j).double()
            x.copy_(values / values.norm())
    return module


@torch.no_grad()
def fill_styles(module: nn.Module) -> nn.Module:
    """Sets the j-th parameter of a network of the ReStyle sheet as its `fill` says: by its layer, always from `hashed(k=j)`."""
    for j, (path, x) in enumerate(module.named_parameters()):
        owner, _, name = path.rpartition(".")
        values = hashed(*x.shape, k=j).to(x)
        x.copy_(_style_values(module.get_submodule(owner), owner, name, x, values))
    return module


def _style_values(layer: nn.Module, path: str, name: str, x: Tensor, h: Tensor) -> Tensor:
    if name == "bias":
        return 1 + 0.1 * h if path.endswith("modulation") else 0.1 * h
    if isinstance(layer, GivenNoise):
        return 0.1 + 0.05 * h
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return 1 + 0.1 * h
    if isinstance(layer, nn.PReLU):
        return 0.25 + 0.05 * h
    if isinstance(layer, EqualLinear | EqualConv2d | ModulatedConv2d | ConstantInput):
        return math.sqrt(3) * h / getattr(layer, "lr_mul", 1.0)
    return math.sqrt(3 * len(x) / x.numel()) * h
