"""Layers of the class-conditional GANs: orthogonal and spectrally normalised ones, conditional norm, self-attention."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-4
SPECTRAL_EPS = 1e-6

DiscriminatorNorm = Literal["spectral", "batch", "none"]


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    bias: bool = True,
    spectral: bool,
) -> nn.Module:
    """Convolution, orthogonal at first, whose map keeps its size at stride 1 (odd kernel) or halves at 2 (kernel 4)."""
    padding = (kernel - 1) // 2
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=bias)
    return _prepared(layer, spectral)


def linear(in_dim: int, out_dim: int, *, bias: bool = True, spectral: bool) -> nn.Module:
    """Linear layer, orthogonal at first."""
    return _prepared(nn.Linear(in_dim, out_dim, bias=bias), spectral)


def embedding(num_classes: int, dim: int, *, spectral: bool) -> nn.Module:
    """One vector per class, orthogonal at first."""
    return _prepared(nn.Embedding(num_classes, dim), spectral)


def upsample_conv2d(in_channels: int, out_channels: int) -> nn.Module:
    """4x4 transposed convolution that doubles the map, orthogonal at first."""
    return _prepared(nn.ConvTranspose2d(in_channels, out_channels, 4, 2, 1), spectral=False)


def batch_norm(channels: int, *, affine: bool = True) -> nn.BatchNorm2d:
    """Batch norm with the eps of all these networks, 1e-4."""
    return nn.BatchNorm2d(channels, eps=NORM_EPS, affine=affine)


def discriminator_norm(channels: int, norm: DiscriminatorNorm) -> nn.Module:
    """Batch norm where `norm` says so; spectral norm is a matter of the convolutions."""
    return batch_norm(channels) if norm == "batch" else nn.Identity()


def one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Labels (N,) as rows (N, num_classes) of the dtype of `like`."""
    return F.one_hot(labels, num_classes).to(like.dtype)


def _prepared(layer: nn.Module, spectral: bool) -> nn.Module:
    nn.init.orthogonal_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer) if spectral else layer


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Divides the layer's weight by its largest singular value, as estimated by one power iteration per training forward.

    The weight W is seen as a matrix (out, the rest). State-dict keys are `weight_orig` (W), `weight_u` and `weight_v`, as in
    published checkpoints. One iteration is made here: without it, a network in eval mode that was never trained would be
    divided by u^T W v of random u and v, a number near 0 of either sign.

    After a training forward `copy.deepcopy` refuses the layer (its `weight` is part of a graph): copy networks before.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.
    """
    layer = nn.utils.spectral_norm(layer, eps=SPECTRAL_EPS)
    with torch.no_grad():
        matrix = layer.weight_orig.flatten(1)
        layer.weight_v.copy_(F.normalize(matrix.t() @ layer.weight_u, dim=0, eps=SPECTRAL_EPS))
        layer.weight_u.copy_(F.normalize(matrix @ layer.weight_v, dim=0, eps=SPECTRAL_EPS))
    return layer


class ConditionalBatchNorm(nn.Module):
    """`BN(x) * (1 + gain(c)) + bias(c)`: batch norm whose scale and shift are linear in a condition.

    `x` (N, C, H, W) and the condition `c` (N, condition_dim) -> (N, C, H, W). Gain and bias have no bias of their own.
    Keys: `bn.*`, `gain.*`, `bias.*`.

    Source: Dumoulin et al., "A Learned Representation For Artistic Style", ICLR 2017; in this form Brock et al., "Large
    Scale GAN Training for High Fidelity Natural Image Synthesis" (BigGAN), ICLR 2019.

    Args:
        channels: C.
        condition_dim: length of the condition.
        spectral: spectral norm on the two linear layers.
    """

    def __init__(self, channels: int, condition_dim: int, *, spectral: bool) -> None:
        super().__init__()
        self.bn = batch_norm(channels, affine=False)
        self.gain = linear(condition_dim, channels, bias=False, spectral=spectral)
        self.bias = linear(condition_dim, channels, bias=False, spectral=spectral)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain = 1 + self.gain(condition)[:, :, None, None]
        return self.bn(x) * gain + self.bias(condition)[:, :, None, None]


class SelfAttention(nn.Module):
    """`x + sigma * conv1x1_attn(attention)`: every position looks at the 2x2-pooled map. sigma is learnt and starts at 0.

    `(N, C, H, W) -> (N, C, H, W)`, C a multiple of 8, H and W at least 2. With theta, phi (C / 8 channels) and g (C / 2)
    1x1 convolutions of x, phi and g max-pooled: attention = softmax(theta^T phi) g^T, not scaled. All without bias.

    Source: Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019.

    Args:
        channels: C.
        spectral: spectral norm on the convolutions.
    """

    def __init__(self, channels: int, *, spectral: bool) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(
                f"SelfAttention: channels={channels} must be a multiple of 8. Choose base_channels so, or attention_after=0."
            )
        eighth, half = channels // 8, channels // 2
        self.conv1x1_theta = conv2d(channels, eighth, 1, bias=False, spectral=spectral)
        self.conv1x1_phi = conv2d(channels, eighth, 1, bias=False, spectral=spectral)
        self.conv1x1_g = conv2d(channels, half, 1, bias=False, spectral=spectral)
        self.conv1x1_attn = conv2d(half, channels, 1, bias=False, spectral=spectral)
        self.sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query = _positions(self.conv1x1_theta(x))  # (N, HW, C / 8)
        key = _positions(F.max_pool2d(self.conv1x1_phi(x), 2))  # (N, HW / 4, C / 8)
        value = _positions(F.max_pool2d(self.conv1x1_g(x), 2))  # (N, HW / 4, C / 2)
        weights = torch.softmax(query @ key.transpose(1, 2), dim=-1)  # (N, HW, HW / 4)
        attended = (weights @ value).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.sigma * self.conv1x1_attn(attended)


def _positions(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, HW, C); a view of a channels-last map."""
    return x.flatten(2).transpose(1, 2)
