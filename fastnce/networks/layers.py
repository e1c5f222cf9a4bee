"""Building blocks shared by the convolutional networks: resampling, residual block, spectral norm, initialisation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.ops.blur_resample import blur_kernel, blur_resample
from fastnce.ops.conv3x3 import conv3x3
from fastnce.ops.instance_norm import instance_norm
from fastnce.ranks import ranks_of


def to_channels_last(module: nn.Module) -> None:
    """Puts the weights of convolutions into channels_last; state dicts still hold contiguous ones, as safetensors wants them."""
    module.to(memory_format=torch.channels_last)
    module.register_state_dict_post_hook(_make_contiguous)


def _make_contiguous(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for name, x in state.items():
        # Only with keep_vars=True do they require gradients, and then they have to be the parameters themselves.
        if name.startswith(prefix) and isinstance(x, Tensor) and not x.requires_grad:
            state[name] = x.contiguous()


def run_with_taps(
    layers: Iterable[nn.Module], x: Tensor, taps: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The last layer's output, and those of the layers `taps`."""
    features = []
    for index, layer in enumerate(layers):
        x = layer(x)
        if index in taps:
            features.append(x)
    return x, features


def checked_taps(name: str, taps: Sequence[int], count: int) -> list[int]:
    """`taps`, or a ValueError of network `name` unless they are ascending indices of its `count` layers."""
    taps = list(taps)
    if not taps or taps != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < count:
        raise ValueError(
            f"{name}: taps={taps} must be ascending, distinct layer indices from 0 to {count - 1} (this generator has {count} layers)."
        )
    return taps


class Downsample(nn.Module):
    """Halves height and width: 3x3 binomial blur `outer([1, 2, 1]) / 16`, stride 2, reflection padding 1.

    `(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))`. The filter is the persistent buffer `filt` (C, 1, 3, 3).
    H and W must be at least 2 (the padding reflects).
    """

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", blur_kernel(channels, halve=True))

    def forward(self, x: Tensor) -> Tensor:
        return blur_resample(x, self.filt, halve=True)


class Upsample(nn.Module):
    """Doubles height and width: transposed depthwise 4x4 filter `outer([1, 3, 3, 1]) / 16`, replication padding 1.

    `(B, C, H, W) -> (B, C, 2H, 2W)`. The filter is the persistent buffer `filt` (C, 1, 4, 4).
    """

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", blur_kernel(channels, halve=False))

    def forward(self, x: Tensor) -> Tensor:
        return blur_resample(x, self.filt, halve=False)


class Conv3x3(nn.Conv2d):
    """3x3 convolution that keeps the size, padded with zeros; with `reflect` with the mirror image, in this op itself."""

    def __init__(
        self, in_channels: int, out_channels: int, reflect: bool = False, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)
        self.reflect = reflect

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight, self.bias, reflect=self.reflect)


def conv_without_bias(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> nn.Conv2d:
    """Convolution with an odd kernel, padded so that stride 1 keeps the size: what comes before a norm."""
    if (kernel, stride) == (3, 1):
        return Conv3x3(in_channels, out_channels, bias=False)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class StridedConv1x1(nn.Conv2d):
    """1x1 convolution that keeps every `stride`-th position; no bias. Use it wherever a stride is above 1.

    On the CPU, few channels are computed in contiguous format whatever the format of input and weight is. On processors with
    AVX2 but without AVX-512, the oneDNN of torch 2.13 and 2.14 writes beyond its memory in the weight gradient of a
    channels-last layer with 2 to 6 input channels. The process aborts later, anywhere. Values are the same; the output's format
    is the computed one.

    Args:
        in_channels, out_channels: of the maps, (N, C, H, W) -> (N, C', ceil(H / stride), ceil(W / stride)).
        stride: of both axes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_channels >= 8:
            return super().forward(x)
        # Format is told by the strides. Those of axes of size 1 survive contiguous(), so they are made anew.
        n, c, h, w = x.shape
        x = x.contiguous().flatten().view(n, c, h, w)
        weight = self.weight.contiguous().flatten().view(-1, c, 1, 1)
        return F.conv2d(x, weight, stride=self.stride)


class InstanceNorm(nn.Module):
    """Instance norm without parameters, followed by leaky ReLU: `slope` 0 is ReLU, 1 leaves it out."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope
        self.eps = 1e-5

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)`; the sum with `residual`, if given."""
        return instance_norm(x, residual, eps=self.eps, slope=self.slope)


class BatchNormOfRanks(nn.BatchNorm2d):
    """Batch norm without parameters. In training mode its moments are of the batches of all ranks together.

    Every rank has to call it, in training mode or not like the others. Gradients are those of the sum of the ranks' losses, so
    that their mean over the ranks is that of the mean loss of the whole batch. The ranks are those of the default process group;
    alone, this is `nn.BatchNorm2d`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        ranks = ranks_of(None) if self.training else None
        if ranks is None:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        own = torch.cat([mean.new_tensor([x.numel() / len(mean)]), mean, variance])
        # One row for each rank.
        nothing = torch.zeros_like(own)
        rows = torch.stack([own if rank == ranks.rank else nothing for rank in range(ranks.size)])
        counts, moments = _SumOverRanks.apply(rows).split([1, 2 * len(mean)], dim=1)
        means, variances = moments.chunk(2, dim=1)
        share = counts / counts.sum()
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        self._follow(mean.detach(), variance.detach(), counts.detach().sum())
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        return torch.addcmul(shift[:, None, None], wide, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """The running statistics take a step."""
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


class _SumOverRanks(torch.autograd.Function):
    """Its gradient is summed over the ranks as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumOverRanks.apply(grad)


class ResnetBlock(nn.Module):
    """`x + f(x)`, f = reflection pad, 3x3 convolution, instance norm, ReLU, and the first three again. No ReLU after."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Identities stand for what the layer behind or before them does, so that the state-dict keys are the published ones.
        self.conv_block = nn.Sequential(
            nn.Identity(),
            Conv3x3(channels, channels, reflect=True),
            InstanceNorm(slope=0.0),
            nn.Identity(),
            nn.Identity(),
            Conv3x3(channels, channels, reflect=True),
            InstanceNorm(),
        )

    def forward(self, x: Tensor) -> Tensor:
        *inner, last_norm = self.conv_block
        y = x
        for layer in inner:
            y = layer(y)
        return last_norm(y, residual=x)


def spectral_norm(layer: nn.Module, eps: float = 1e-12) -> nn.Module:
    """Divides the layer's weight by its largest singular value, as estimated by one power iteration per training forward.

    The weight W is seen as a matrix (out, the rest). State-dict keys are `weight_orig` (W), `weight_u` and `weight_v`, as in
    published checkpoints. One iteration is made here: without it, a network in eval mode that was never trained would be
    divided by u^T W v of random u and v, a number near 0 of either sign.

    After a training forward `copy.deepcopy` refuses the layer (its `weight` is part of a graph): copy networks before.

    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018.
    """
    layer = nn.utils.spectral_norm(layer, eps=eps)
    _aim_spectral_norm(layer)
    return layer


@torch.no_grad()
def _aim_spectral_norm(layer: nn.Module) -> None:
    """One power iteration."""
    matrix = layer.weight_orig.flatten(1)
    layer.weight_v.copy_(F.normalize(matrix.t() @ layer.weight_u, dim=0))
    layer.weight_u.copy_(F.normalize(matrix @ layer.weight_v, dim=0))


def init_xavier(module: nn.Module, gain: float = 0.02, *, spectral: bool = True) -> None:
    """Xavier-normal weights and zero biases for every convolution and linear layer (CUT's initialisation).

    `spectral=False` leaves the weights under a spectral norm as they are, but not their biases.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if not hasattr(layer, "weight_orig"):
            nn.init.xavier_normal_(layer.weight, gain=gain)
        elif spectral:
            nn.init.xavier_normal_(layer.weight_orig, gain=gain)
            _aim_spectral_norm(layer)


FeatureLossInit = Literal["published", "xavier", "default"]


def init_feature_loss(name: str, network: nn.Module, init: FeatureLossInit) -> None:
    """The initialisations of the networks of Contrastive Feature Loss, which `name` says in errors.

    - "published": xavier-normal weights of gain 0.02 and zero biases, but PyTorch's own weights under a spectral norm. That is what
      the published code did on a GPU: its initialisation came too late for those. They begin about 25 times larger than with
    - "xavier", which is what its option says, and what it did on a CPU. The output is the same function of the weights'
      direction, but an Adam step of the same length turns small weights much further.
    - "default": PyTorch's own for all.
    """
    if init not in get_args(FeatureLossInit):
        raise ValueError(f"{name}: init={init!r} must be one of {get_args(FeatureLossInit)}.")
    if init != "default":
        init_xavier(network, spectral=init == "xavier")


def init_default(module: nn.Module) -> None:
    """PyTorch's own initialisation of every convolution and linear layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.reset_parameters()


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights and zero biases for convolutions and linear layers; weights around 1 for norms (pix2pix's initialisation)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, std)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, std)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
