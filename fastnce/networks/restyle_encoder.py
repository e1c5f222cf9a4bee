"""The encoders of pSp, e4e and ReStyle, from an image to a generator's latent codes, and e4e's discriminator of such codes.

State-dict keys are those of the published checkpoints, without the prefix `encoder.`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks.layers import StridedConv1x1, conv_without_bias
from fastnce.networks.resnet_encoder import RESNETS, BasicBlock
from fastnce.networks.stylegan2 import EqualLinear
from fastnce.networks.weights import load_strictly, read_state_dict

EncoderKind = Literal["ir-se50", "resnet34", "fpn-ir-se50", "fpn-resnet34", "small"]
Head = Literal["psp", "e4e"]

SLOPE = 0.01  # of the leaky ReLU between the convolutions of a `MapToStyle`


class SqueezeExcitation(nn.Module):
    """Scales channels by what their means say: `x * sigmoid(fc2(relu(fc1(mean(x)))))`, (B, C, H, W) to the same."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class IRUnit(nn.Module):
    """`f(x) + shortcut(x)`, f = norm, conv3, PReLU, conv3 with the stride, norm, squeeze-excitation; no activation behind the sum.

    The shortcut is a 1x1 convolution with the stride and a norm or, where the channels stay, every `stride`-th pixel.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if in_channels != out_channels:
            self.shortcut_layer = nn.Sequential(
                StridedConv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            conv_without_bias(in_channels, out_channels, 3),
            nn.PReLU(out_channels),
            conv_without_bias(out_channels, out_channels, 3, stride),
            nn.BatchNorm2d(out_channels),
            SqueezeExcitation(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


def ir_se50_layers(in_channels: int) -> OrderedDict[str, nn.Module]:
    """The stem `input_layer` and the 24 units of `body` of IR-SE50, the ArcFace network; four of the units halve the size."""
    units = nn.Sequential()
    before = 64
    for channels, count in ((64, 3), (128, 4), (256, 14), (512, 3)):
        for index in range(count):
            units.append(IRUnit(before, channels, 1 if index else 2))
            before = channels
    return OrderedDict(input_layer=_stem(in_channels, 64), body=units)


def _resnet34_layers(in_channels: int) -> OrderedDict[str, nn.Module]:
    """ResNet-34 with its blocks as one list, PReLU in the stem and no max-pool."""
    blocks = nn.Sequential()
    before = 64
    for stage, count in enumerate(RESNETS["resnet34"][0]):
        width = 64 * 2**stage
        for index in range(count):
            blocks.append(BasicBlock(before, width, 2 if stage and index == 0 else 1))
            before = width
    conv = conv_without_bias(in_channels, 64, 7, 2)
    return OrderedDict(conv1=conv, bn1=nn.BatchNorm2d(64), relu=nn.PReLU(64), body=blocks)


def _small_layers(in_channels: int) -> OrderedDict[str, nn.Module]:
    """Ours, for images of 16 or 32 pixels on a CPU.

    With group norms: the steps of ReStyle see images that differ, and one set of a batch norm's running statistics fits none of them.
    """
    blocks = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 64, 2))
    layers = OrderedDict(input_layer=_stem(in_channels, 16), body=blocks)
    for layer in layers.values():
        _put_group_norms(layer)
    return layers


def _put_group_norms(module: nn.Module) -> None:
    """In the place of batch norms, for each 8 channels."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(child.num_features // 8, child.num_features))
        else:
            _put_group_norms(child)


def _stem(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        conv_without_bias(in_channels, width, 3), nn.BatchNorm2d(width), nn.PReLU(width)
    )


class MapToStyle(nn.Module):
    """One code of a map: (B, `in_channels`, S, S) to (B, `dim`).

    log2(S) times a 3x3 convolution of stride 2 and leaky ReLU 0.01, which leave one position, then an `EqualLinear`. In an
    encoder several of them may run as one: see `grouped_styles`.
    """

    def __init__(self, in_channels: int, dim: int, side: int) -> None:
        super().__init__()
        widths = [in_channels] + [dim] * int(math.log2(side))
        self.convs = nn.Sequential()
        for before in widths[:-1]:
            self.convs.append(nn.Conv2d(before, dim, 3, stride=2, padding=1))
            self.convs.append(nn.LeakyReLU(SLOPE))
        self.linear = EqualLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        _expect_one_position(x)
        return self.linear(x.flatten(1))


# Above this width separate convolutions are faster on a CPU: grouped ones have to copy all weights together first.
_GROUPED_UP_TO = 128


def styles_of(blocks: Sequence[MapToStyle], x: Tensor) -> Tensor:
    """`torch.stack([block(x) for block in blocks], dim=1)`, (B, C, S, S) to (B, blocks, dim); grouped, but for wide ones on a CPU."""
    if x.device.type == "cpu" and x.shape[1] > _GROUPED_UP_TO:
        return torch.stack([block(x) for block in blocks], dim=1)
    return grouped_styles(blocks, x)


def grouped_styles(blocks: Sequence[MapToStyle], x: Tensor) -> Tensor:
    """The same as one network of grouped layers.

    The first convolutions are one with the channels of all, as they read the same map. Each block keeps its own parameters,
    so that those of blocks that did not run have no gradient, and optimisers leave them alone.
    """
    groups = 1
    for layers in zip(*(block.convs[::2] for block in blocks), strict=True):
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        x = F.leaky_relu(F.conv2d(x, weight, bias, stride=2, padding=1, groups=groups), SLOPE)
        groups = len(blocks)
    _expect_one_position(x)
    linears = [block.linear for block in blocks]
    weight = torch.stack([linear.weight for linear in linears]) * linears[0].scale
    rows = x.reshape(len(x), len(blocks), -1).transpose(0, 1)  # (blocks, B, dim)
    bias = torch.stack([linear.bias for linear in linears])
    return torch.baddbmm(bias[:, None], rows, weight.mT).transpose(0, 1)


def _expect_one_position(x: Tensor) -> None:
    if x.shape[2:] != (1, 1):
        raise ValueError(
            f"the encoder's last maps have {x.shape[2]}x{x.shape[3]} positions, expected one: the images are too large for it. "
            "The published encoders take up to 256x256 pixels, the small one 32x32."
        )


@dataclass(frozen=True)
class _Kind:
    """An encoder: its layers, the units whose maps it reads, their channels, and the side of the last map."""

    layers: Callable[[int], OrderedDict[str, nn.Module]]
    taps: tuple[int, ...]
    channels: tuple[int, ...]
    side: int
    pyramid: bool = False


_KINDS = {
    "ir-se50": _Kind(ir_se50_layers, (23,), (512,), 16),
    "resnet34": _Kind(_resnet34_layers, (15,), (512,), 16),
    "fpn-ir-se50": _Kind(ir_se50_layers, (6, 20, 23), (128, 256, 512), 16, pyramid=True),
    "fpn-resnet34": _Kind(_resnet34_layers, (6, 12, 15), (128, 256, 512), 16, pyramid=True),
    "small": _Kind(_small_layers, (1,), (64,), 4),
}
# Styles that a pyramid takes from the coarse map and from the one above; the others come from the finest.
_COARSE, _MIDDLE = 3, 7


class StyleEncoder(nn.Module):
    """The codes of an image: (B, `in_channels`, H, W) in [-1, 1] to (B, `num_styles`, `latent_dim`).

    Each code s_i is a `MapToStyle` of a map of the body. A psp head gives w_i = s_i. An e4e head gives w_0 = s_0 and
    w_i = s_0 + s_i, of which the stage keeps the first ones: w_i = w_0 for i > `stage`, and the s_i are not computed. Nothing is
    added to them: the mean latent is the caller's.

    Without a pyramid all codes read the last map. With one, as in the first pSp and e4e, codes 0-2 read it, 3-6 the map of
    twice its size, and the others that of four times, each the sum of the body's own and the coarser one.

    Source: Richardson et al., "Encoding in Style", CVPR 2021 (pSp); Tov et al., "Designing an Encoder for StyleGAN Image
    Manipulation", SIGGRAPH 2021 (e4e); the one map of Alaluf et al., "ReStyle", ICCV 2021. Made by `build_encoder`.

    Attributes:
        stage: of an e4e head, 0 to `num_styles`; the last two mean all, which is what it starts with.
    """

    body: nn.Sequential

    def __init__(
        self, kind: EncoderKind, num_styles: int, in_channels: int, head: Head, latent_dim: int
    ) -> None:
        super().__init__()
        self.kind, self.head = kind, head
        self.num_styles, self.in_channels, self.latent_dim = num_styles, in_channels, latent_dim
        self.stage = num_styles
        self._built = built = _KINDS[kind]
        for name, layer in built.layers(in_channels).items():
            self.add_module(name, layer)
        sides = [built.side] * num_styles
        if built.pyramid:
            sides = [
                built.side * (1 + (i >= _COARSE) + 2 * (i >= _MIDDLE)) for i in range(num_styles)
            ]
        width = built.channels[-1]
        self.styles = nn.ModuleList(MapToStyle(width, latent_dim, side) for side in sides)
        if built.pyramid:
            self.latlayer1 = nn.Conv2d(built.channels[1], width, 1)
            self.latlayer2 = nn.Conv2d(built.channels[0], width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"StyleEncoder: x must have shape (B, in_channels={self.in_channels}, H, W), got {tuple(x.shape)}. "
                "A ReStyle encoder sees the image and its reconstruction: twice the channels of an image."
            )
        if self.head == "psp":
            return self._styles(x, self.num_styles)
        count = min(self.stage + 1, self.num_styles)
        styles = self._styles(x, count)
        first = styles[:, :1]
        rest = first.expand(-1, self.num_styles - count, -1)
        return torch.cat([first, first + styles[:, 1:], rest], dim=1)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of the body that the styles read, the largest first."""
        for name, layer in self.named_children():
            if name == "body":
                break
            x = layer(x)
        found = []
        for index, unit in enumerate(self.body):
            x = unit(x)
            if index in self._built.taps:
                found.append(x)
        return found

    def _styles(self, x: Tensor, count: int) -> Tensor:
        """The first `count` codes of the styles, (B, count, latent_dim)."""
        *finer, last = self.maps(x)
        if self.kind == "small":
            last = F.adaptive_avg_pool2d(last, self._built.side)
        blocks: list[MapToStyle] = list(self.styles)  # type: ignore[arg-type]
        rows, start = [], 0
        for stop, read in self._readings(last, finer):
            rows.append(styles_of(blocks[start : min(stop, count)], read))
            start = stop
            if start >= count:
                break
        return torch.cat(rows, dim=1)

    def _readings(self, last: Tensor, finer: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The maps that the styles read, each with the first style that does not read it, computed when asked for."""
        if not self._built.pyramid:
            yield self.num_styles, last
            return
        yield _COARSE, last
        middle = _enlarged_plus(last, self.latlayer1(finer[1]))
        yield _MIDDLE, middle
        yield self.num_styles, _enlarged_plus(middle, self.latlayer2(finer[0]))

    def load_body(
        self, weights: Path | str, further_channels: Literal["normal", "zeros"] = "normal"
    ) -> None:
        """Starts the stem and the body from a network of 3-channel images.

        Args:
            weights: for IR-SE50 that of ArcFace as pSp and ReStyle name it, for ResNet-34 torchvision's. The layers behind the
                body are left out.
            further_channels: the first convolution's weights for input channels from the fourth on: N(0, 1), as published, or 0.

        Raises:
            UserError: no such file, one of another network, or fewer than 3 input channels.
        """
        path = Path(weights)
        is_ir = "ir-se50" in self.kind
        expected = (
            "Expected ArcFace's weights of IR-SE50, with the names input_layer.0.weight, body.0.res_layer.0.weight and so on."
            if is_ir
            else "Expected torchvision's ImageNet weights of ResNet-34, with the names conv1.weight, layer1.0.conv1.weight and so on."
        )
        if self.kind == "small" or self.in_channels < 3:
            raise UserError(
                f"{path}: an encoder {self.kind} of {self.in_channels} input channels has no published weights to start from. "
                "Leave them out."
            )
        state = read_state_dict(path, expected)
        state = _behind_left_out(state, "output_layer.") if is_ir else _one_list(state)
        own = nn.Module()
        for name, layer in self.named_children():
            if name not in ("styles", "latlayer1", "latlayer2"):
                own.add_module(name, layer)
        first = "input_layer.0.weight" if is_ir else "conv1.weight"
        if not is_ir:
            state = {"relu.weight": own.state_dict()["relu.weight"]} | state
        if first in state and self.in_channels > 3 and state[first].shape[1:2] == (3,):
            read = state[first]
            further = read.new_zeros(len(read), self.in_channels - 3, *read.shape[2:])
            if further_channels == "normal":
                further.normal_()
            state[first] = torch.cat([read, further], dim=1)
        load_strictly(own, state, path, expected)


def _enlarged_plus(coarse: Tensor, fine: Tensor) -> Tensor:
    size = fine.shape[2:]
    return F.interpolate(coarse, size, mode="bilinear", align_corners=True) + fine


def _behind_left_out(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not name.startswith(prefix)}


def _one_list(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names of a ResNet-34 with the stages' blocks counted through, and without its last layer."""
    counts = RESNETS["resnet34"][0]
    renamed = {}
    for name, x in _behind_left_out(state, "fc.").items():
        stage, _, rest = name.partition(".")
        if stage in ("layer1", "layer2", "layer3", "layer4"):
            index, _, rest = rest.partition(".")
            name = f"body.{sum(counts[: int(stage[-1]) - 1]) + int(index)}.{rest}"
        renamed[name] = x
    return renamed


def build_encoder(
    kind: EncoderKind,
    num_styles: int,
    in_channels: int,
    head: Head = "psp",
    latent_dim: int = 512,
) -> StyleEncoder:
    """A freshly initialised encoder: see `StyleEncoder`.

    Args:
        kind: "ir-se50" for faces and "resnet34" for other domains, the encoders of ReStyle, for images of 256x256 pixels; the
            same with "fpn-", those of pSp and e4e; "small", ours for images of 16 or 32 pixels.
        num_styles: codes of an image, one for each style of the generator.
        in_channels: of the input; for ReStyle those of the image and of its reconstruction together, 6 for RGB.
        head: "psp", or "e4e", whose codes are offsets from the first.
        latent_dim: length of a code.

    Raises:
        ValueError: an unknown kind or head, or a number below 1.

    Examples:
        >>> import torch
        >>> build_encoder("small", 6, 6, latent_dim=64)(torch.zeros(2, 6, 16, 16)).shape
        torch.Size([2, 6, 64])
    """
    for name, value, known in (("kind", kind, EncoderKind), ("head", head, Head)):
        if value not in get_args(known):
            raise ValueError(f"build_encoder: {name}={value!r} must be one of {get_args(known)}.")
    if min(num_styles, in_channels, latent_dim) < 1:
        raise ValueError(
            f"build_encoder: num_styles={num_styles}, in_channels={in_channels}, latent_dim={latent_dim}: expected numbers of "
            "at least 1."
        )
    return StyleEncoder(kind, num_styles, in_channels, head, latent_dim)


class LatentDiscriminator(nn.Module):
    """e4e's: one logit for each code, high for those of the generator's mapping, (..., `latent_dim`) to (..., 1).

    Four linear layers with leaky ReLU 0.2 between them.
    """

    def __init__(self, latent_dim: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        for _ in range(3):
            self.mlp.append(nn.Linear(latent_dim, latent_dim))
            self.mlp.append(nn.LeakyReLU(0.2))
        self.mlp.append(nn.Linear(latent_dim, 1))

    def forward(self, w: Tensor) -> Tensor:
        return self.mlp(w)
