"""Translation of an image tile by tile, with the result of the whole image and without its memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnce.errors import UserError
from fastnce.networks import ResnetGenerator, StyleGAN2Generator, UNetGenerator
from fastnce.networks.layers import InstanceNorm, ResnetBlock
from fastnce.networks.stylegan2 import ResBlock, UpsamplingStyledConv, fixed_noise

# How far a pixel reaches, rounded up to the grid of the smallest map. Encoder, in pixels of the image: 3 (7x7), 1 (3x3),
# 1 (blur), 2 and 2 (3x3 and blur on the half map). Decoder, in pixels of the quarter map: 1 (blur), 1/2 (3x3 on the half
# map), 1/2 (blur), 1/4 (3x3), 3/4 (7x7).
ENCODER_HALO, DECODER_HALO = 12, 4
# The same of SinCUT's generator, in pixels of the image: 1 (3x3), 2 (blur) and 2 (3x3 that halves) down, 2 (3x3 on the half map)
# and 2 (blur) up; and each residual block between them two 3x3 on the half map.
STYLEGAN2_HALO, STYLEGAN2_BLOCK_HALO = 12, 4


@torch.inference_mode()
def translate_in_tiles(generator: nn.Module, image: Tensor, tile: int) -> Tensor:
    """The translation of one image, computed in tiles; there is nothing to blend, as it is the same function.

    **ResNet generator.** What ties tiles together is instance norm, whose mean and variance are those of the whole image. Each
    is found by a pass over the tiles before the tiles are normalised with it: four passes over the encoder and three over the
    decoder, each computing its layers anew from the start, so that no map of full resolution is ever held. The residual blocks,
    whose maps have a quarter of the height and width, see the whole map at once. It takes about 1.5 times the multiply-adds of
    the untiled translation, and the memory that of the blocks, 64 bytes per pixel and map with 64 base channels, or of a tile.

    **SinCUT's generator** has no norm: one pass, and the memory of one tile beside the image and its result. Its noise is that
    of the whole image.

    A tile is computed with a margin as wide as the layers reach and without it written, so that its border values are those of
    the whole image. The result differs from the untiled one by the rounding of sums in another order.

    Args:
        generator: a `ResnetGenerator` or a `StyleGAN2Generator`.
        image: (1, C, H, W) in [-1, 1], on any device; H and W multiples of 4.
        tile: height and width of a tile in pixels, a multiple of 4.

    Returns:
        (1, C, H, W), on the device of `image`.

    Raises:
        UserError: another generator, or a `tile` that is too small or no multiple of 4.
    """
    check_tile(tile)
    device = next(generator.parameters()).device
    if isinstance(generator, StyleGAN2Generator):
        return _stylegan2_in_tiles(generator, image, tile, device)
    if isinstance(generator, UNetGenerator):
        raise UserError(
            f"tile={tile}: each pixel that a U-Net makes depends on the whole image, so it cannot be computed in tiles. "
            "Leave tile out, or translate at a smaller size."
        )
    if not isinstance(generator, ResnetGenerator):
        raise UserError(
            f"tile={tile} is for the ResNet generator and SinCUT's, got a {type(generator).__name__}. Leave tile out."
        )
    layers, first = generator.model, generator.first_block
    behind = first + sum(isinstance(layer, ResnetBlock) for layer in layers)
    features = _in_tiles(layers[:first], image, tile, ENCODER_HALO, device, device)
    for block in layers[first:behind]:
        features = block(features)
    return _in_tiles(layers[behind:], features, tile // 4, DECODER_HALO, device, image.device)


def check_tile(tile: int) -> None:
    """Raises UserError unless images can be computed in tiles of this size."""
    if tile < 16 or tile % 4:
        raise UserError(f"tile={tile} must be a multiple of 4 and at least 16. Use 512, say.")


class _Window(NamedTuple):
    """A tile of a map, and around it what is read to compute it, each by rows and columns (start, end)."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    outer_rows: tuple[int, int]
    outer_columns: tuple[int, int]

    def read(self, x: Tensor) -> Tensor:
        """The tile with its margin."""
        return x[:, :, slice(*self.outer_rows), slice(*self.outer_columns)]

    def inner(self, y: Tensor) -> Tensor:
        """The result computed from `read`, perhaps of another resolution, without the margin."""
        factor = y.shape[2] / (self.outer_rows[1] - self.outer_rows[0])
        top, bottom = (int((row - self.outer_rows[0]) * factor) for row in self.rows)
        left, right = (int((column - self.outer_columns[0]) * factor) for column in self.columns)
        return y[:, :, top:bottom, left:right]


def _windows(x: Tensor, tile: int, halo: int) -> list[_Window]:
    height, width = x.shape[2:]

    def along(size: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        spans = [(start, min(start + tile, size)) for start in range(0, size, tile)]
        return [((a, b), (max(a - halo, 0), min(b + halo, size))) for a, b in spans]

    return [
        _Window(rows, columns, outer_rows, outer_columns)
        for rows, outer_rows in along(height)
        for columns, outer_columns in along(width)
    ]


def _assembled(
    x: Tensor, windows: Iterable[_Window], pieces: Iterable[Tensor], device: torch.device
) -> Tensor:
    """The map whose tiles are `pieces`; it has the size of `x`, or another resolution."""
    whole = None
    for window, piece in zip(windows, pieces, strict=True):
        factor = piece.shape[2] / (window.rows[1] - window.rows[0])
        if whole is None:  # now that the number of channels is known
            height, width = (int(side * factor) for side in x.shape[2:])
            whole = piece.new_empty((1, piece.shape[1], height, width), device=device)
        top, left = int(window.rows[0] * factor), int(window.columns[0] * factor)
        whole[:, :, top : top + piece.shape[2], left : left + piece.shape[3]] = piece
    assert whole is not None, "an image has pixels"
    return whole


def _in_tiles(
    layers: nn.Sequential,
    x: Tensor,
    tile: int,
    halo: int,
    device: torch.device,
    result_device: torch.device,
) -> Tensor:
    """`layers(x)` on `result_device`, computed on `device` tile by tile."""
    windows = _windows(x, tile, halo)
    norms: dict[int, tuple[Tensor, Tensor]] = {}

    def pieces(count: int) -> Iterator[Tensor]:
        return (_piece(layers[:count], x, window, device, norms) for window in windows)

    for index, layer in enumerate(layers):
        if isinstance(layer, InstanceNorm):
            norms[index] = _scale_and_shift(pieces(index), layer.eps)
    return _assembled(x, windows, pieces(len(layers)), result_device)


def _piece(
    layers: nn.Sequential,
    x: Tensor,
    window: _Window,
    device: torch.device,
    norms: Mapping[int, tuple[Tensor, Tensor]],
) -> Tensor:
    """The part of `layers(x)` over a window of `x`; instance norms are replaced by their scale and shift in `norms`."""
    y = window.read(x).to(device)
    for index, layer in enumerate(layers):
        if index in norms:
            scale, shift = norms[index]
            y = F.leaky_relu(torch.addcmul(shift, y, scale), layer.slope)
        else:
            y = layer(y)
    return window.inner(y)


def _stylegan2_in_tiles(
    generator: StyleGAN2Generator, image: Tensor, tile: int, device: torch.device
) -> Tensor:
    layers = [*generator.encoder.convs, *generator.decoder.convs]
    blocks = sum(isinstance(layer, ResBlock) for layer in layers) - 1  # the first one halves
    windows = _windows(image, tile, STYLEGAN2_HALO + STYLEGAN2_BLOCK_HALO * blocks)
    noise = fixed_noise(*image.shape[2:])

    def piece(window: _Window) -> Tensor:
        y = window.read(image).to(device)
        for layer in layers:
            if isinstance(layer, UpsamplingStyledConv):
                y = layer.conv(y) + layer.noise.weight * window.read(noise).to(y)
                y = layer.activate(y)
            else:
                y = layer(y)
        return window.inner(y)

    return _assembled(image, windows, map(piece, windows), image.device)


def _scale_and_shift(pieces: Iterable[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Instance norm of a map given in pieces, as x * scale + shift: (1, C, 1, 1) each.

    Means and variances of the pieces are put together as Chan, Golub and LeVeque do.
    """
    count, mean, squares = 0, 0.0, 0.0
    for piece in pieces:
        added = piece.shape[2] * piece.shape[3]
        variance, average = (
            value.double() for value in torch.var_mean(piece, (2, 3), correction=0, keepdim=True)
        )
        difference, total = average - mean, count + added
        squares = squares + variance * added + difference.square() * (count * added / total)
        mean = mean + difference * (added / total)
        count = total
    scale = (squares / count + eps).rsqrt()
    return scale.float(), (-mean * scale).float()
