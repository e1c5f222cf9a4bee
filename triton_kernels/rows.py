"""Single rows: packing them with their norms before the products. The way back is in ``row_gradients``.

Rows are packed as ``x' = 2^e x``, contiguous and padded with zeros. The power of two is exact, and brings the largest element to
[1, 2), so that no product of rows of any size overflows. The unit row is ``x^ = scale x'``: scale multiplies products, not rows.
For similarities in fp8 there is a second copy of the rows, scaled to a largest magnitude of 448 and rounded to e4m3.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnce.precision import float32_products

from . import config
from .launch import INTERPRETED, cdiv, launch

FP8 = torch.float8_e4m3fn
_LARGEST = tl.constexpr(torch.finfo(FP8).max)
_INTERPRETED = tl.constexpr(INTERPRETED)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows; all leading dimensions are one."""

    x: Tensor  # (R, padded depth)
    scale: Tensor  # (R,) fp32: x^ = scale x'
    inverse: Tensor  # (R,) fp32: 1 / ||x||, 0 for a zero row; 1 where rows are not normalised
    depth: int
    normalize: bool
    rounded: Rows | None = None  # the same in fp8, for similarities
    deep: bool = False  # no tile of whole rows, whatever the depth

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, which: slice) -> Rows:
        parts = self.x[which], self.scale[which], self.inverse[which]
        rounded = None if self.rounded is None else self.rounded[which]
        return Rows(*parts, self.depth, self.normalize, rounded, self.deep)

    @property
    def padded(self) -> int:
        return self.x.shape[1]

    @property
    def for_similarity(self) -> Rows:
        """The rows that similarities multiply; the products of the gradients take the others."""
        return self if self.rounded is None else self.rounded

    @property
    def operands(self) -> str:
        """What similarities multiply, as the tables of ``config`` name it."""
        if self.rounded is not None:
            return "fp8"
        return "16 bits" if self.x.dtype.itemsize == 2 else input_precision(self.x)

    def chunk(self, largest: int) -> int:
        """The depth of a step where rows are not resident: no step goes beyond their end."""
        return min(largest, self.padded & -self.padded)

    @property
    def split(self) -> tuple[int, int]:
        """Head and tail of the depth where tiles of whole rows stay on the chip, else (0, 0)."""
        resident = not self.deep and self.depth <= config.RESIDENT_DEPTHS[self.operands]
        return config.split_depth(self.padded) if resident else (0, 0)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that rows are packed in: their own, but bf16 for fp32 where the user allows it."""
    medium = x.dtype == torch.float32 and float32_products(x.device.type) == "medium"
    return torch.bfloat16 if medium else x.dtype


def input_precision(x: Tensor) -> str:
    """How Triton multiplies tiles of ``x``, if they are of fp32: in fp32 or in tf32."""
    highest = x.dtype == torch.float32 and float32_products(x.device.type) == "highest"
    return "ieee" if highest else "tf32"


def pack(x: Tensor, normalize: bool, fp8: bool = False) -> Rows:
    """Rows (B, N, D) or (N, D), any strides; ``fp8`` with a copy for similarities."""
    rows, _, _ = _pack(x, None, normalize, fp8)
    return rows


def pack_pairs(
    x: Tensor, y: Tensor, normalize: bool, fp8: bool = False
) -> tuple[Rows, Rows, Tensor]:
    """Both, (B, N, D) or (N, D), in one launch, and the products of ``for_similarity``'s pairs (R,) fp32."""
    return _pack(x, y, normalize, fp8)


def _pack(x: Tensor, y: Tensor | None, normalize: bool, fp8: bool):
    x, y = (v.unsqueeze(0) if v is not None and v.dim() == 2 else v for v in (x, y))
    batch, count, depth = x.shape
    total, padded = batch * count, config.padded_depth(depth, fp8)
    packed_dtype = product_dtype(x)

    def new() -> Rows:
        scale, inverse = x.new_empty((2, total), dtype=torch.float32)
        packed = x.new_empty((total, padded), dtype=packed_dtype)
        rounded = None
        if fp8:
            codes = x.new_empty((total, padded), dtype=FP8)
            rounded = Rows(codes, torch.empty_like(scale), inverse, depth, normalize)
        return Rows(packed, scale, inverse, depth, normalize, rounded)

    first, second = new(), None if y is None else new()
    dot = None if y is None else x.new_empty((total,), dtype=torch.float32)
    block_d = min(128, triton.next_power_of_2(padded))
    block = max(1, 1024 // block_d)
    launch(
        _pack_kernel,
        (cdiv(total, block),),
        x=x,
        y=y,
        dot=dot,
        x_strides=x.stride(),
        y_strides=(0, 0, 0) if y is None else y.stride(),
        count=count,
        total=total,
        depth=depth,
        padded=padded,
        NORMALIZE=normalize,
        TF32=packed_dtype == torch.float32 and input_precision(x) == "tf32",
        PAIR=y is not None,
        BLOCK=block,
        BLOCK_D=block_d,
        **_outputs("", first),
        **_outputs("y_", second),
    )
    return first, second, dot


def _outputs(prefix: str, rows: Rows | None) -> dict[str, Tensor | None]:
    rounded = None if rows is None else rows.rounded
    return {
        f"{prefix}out": None if rows is None else rows.x,
        f"{prefix}scale": None if rows is None else rows.scale,
        f"{prefix}inverse": None if rows is None else rows.inverse,
        f"{prefix}codes": None if rounded is None else rounded.x,
        f"{prefix}code_scale": None if rounded is None else rounded.scale,
    }


@triton.jit
def largest_magnitude(x, stride, there, depth, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of each of the rows at ``x`` (BLOCK, 1)."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, depth, BLOCK_D):
        d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        chunk = tl.load(x + d * stride, mask=there[:, None] & (d < depth), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(chunk.to(tl.float32)), 1))
    return largest


@triton.jit
def power_of_two(largest):
    """2^e with largest * 2^e in [1, 2), as far as e fits."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    shifted = tl.minimum(tl.maximum(254 - exponent, 1), 254) << 23
    return shifted.to(tl.float32, bitcast=True)


@triton.jit
def inverse_root(squares):
    """1 / sqrt, 0 for 0, of sums in fp64: logits are as exact as the norms in them, and there are few norms."""
    root = tl.sqrt(tl.where(squares == 0, 1.0, squares))
    return tl.where(squares == 0, 0.0, 1.0 / root).to(tl.float32)


@triton.jit
def _codes(chunk, largest):
    """Rows whose largest magnitude becomes 448, to the nearest e4m3; in the reference's steps."""
    x = tl.div_rn(chunk * _LARGEST, largest[:, None])
    if _INTERPRETED:
        # Its conversion loses the carry of a rounding, so there is nothing left for it to round: with a number added whose last
        # bit is 2^-3 of the leading one of x, or of the least normal number 2^-6, fp32 rounds to that.
        leading = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        large = tl.maximum(leading, 0.015625) * 1572864.0  # 1.5 2^20
        x = (x + large) - large
    return x.to(tl.float8e4nv)


@triton.jit
def _powers(x, stride, there, depth, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of each row the power of two that it is multiplied by, and its largest magnitude then, 1 of a zero row."""
    largest = largest_magnitude(x, stride, there, depth, BLOCK, BLOCK_D)
    power = power_of_two(largest)
    return power, tl.where(largest == 0, 1.0, largest * power)


@triton.jit
def _to_tf32(x):
    """To the nearest number of 10 bits, away from zero in the middle; what matrix instructions would cut off is 0 then."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _pack_chunk(x, mask, power, largest, out, codes, at, inside, TF32: tl.constexpr):
    """Packs the elements at ``x``; returns those that similarities multiply, and the sums of the squares, in fp64.

    The product of a pair is of rounded elements as well: it is the same number as that of an equal row among the negatives.
    """
    chunk = tl.load(x, mask=mask, other=0.0).to(tl.float32) * power[:, None]
    wide = chunk.to(tl.float64)
    squares = tl.sum(wide * wide, 1)
    packed = chunk.to(out.dtype.element_ty)
    if TF32:
        packed = _to_tf32(packed)
    tl.store(out + at, packed, mask=inside)
    wide = packed.to(tl.float32).to(tl.float64)
    if codes is not None:
        code = _codes(chunk, largest)
        tl.store(codes + at, code, mask=inside)
        wide = code.to(tl.float32).to(tl.float64)
    return wide, squares


@triton.jit
def _store_scales(
    scale, inverse, code_scale, rows, there, squares, power, largest, NORMALIZE: tl.constexpr
):
    unit = power
    if NORMALIZE:
        unit = inverse_root(squares)
    tl.store(scale + rows, unit, mask=there)
    tl.store(inverse + rows, unit * power, mask=there)
    if code_scale is not None:
        tl.store(code_scale + rows, unit * (largest / _LARGEST), mask=there)


@triton.jit(do_not_specialize=["count", "total"])
def _pack_kernel(
    x,
    out,
    scale,
    inverse,
    codes,
    code_scale,
    y,
    y_out,
    y_scale,
    y_inverse,
    y_codes,
    y_code_scale,
    dot,
    x_strides,
    y_strides,
    count,
    total,
    depth,
    padded,
    NORMALIZE: tl.constexpr,
    TF32: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = rows < total
    x += (rows // count * x_strides[0] + rows % count * x_strides[1])[:, None]
    if PAIR:
        y += (rows // count * y_strides[0] + rows % count * y_strides[1])[:, None]

    x_power = tl.full((BLOCK,), 1.0, tl.float32)
    x_largest = x_power
    y_power, y_largest = x_power, x_power
    if NORMALIZE:
        x_power, x_largest = _powers(x, x_strides[2], there, depth, BLOCK, BLOCK_D)
        if PAIR:
            y_power, y_largest = _powers(y, y_strides[2], there, depth, BLOCK, BLOCK_D)

    x_squares = tl.zeros((BLOCK,), tl.float64)
    y_squares = tl.zeros((BLOCK,), tl.float64)
    products = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, padded, BLOCK_D):
        d = (begin + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        at = rows[:, None] * padded + d
        mask = there[:, None] & (d < depth)
        inside = there[:, None] & (d < padded)
        x_wide, squares = _pack_chunk(
            x + d * x_strides[2], mask, x_power, x_largest, out, codes, at, inside, TF32
        )
        x_squares += squares
        if PAIR:
            y_wide, squares = _pack_chunk(
                y + d * y_strides[2], mask, y_power, y_largest, y_out, y_codes, at, inside, TF32
            )
            y_squares += squares
            products += tl.sum(x_wide * y_wide, 1)

    _store_scales(scale, inverse, code_scale, rows, there, x_squares, x_power, x_largest, NORMALIZE)
    if PAIR:
        _store_scales(
            y_scale, y_inverse, y_code_scale, rows, there, y_squares, y_power, y_largest, NORMALIZE
        )
        tl.store(dot + rows, products.to(tl.float32), mask=there)


def pair_logits(x: Rows, y: Rows, products: Tensor, temperature: float | Tensor) -> Tensor:
    """The logits of the pairs of ``pack_pairs``, (R,)."""
    return products * x.for_similarity.scale * y.for_similarity.scale / temperature
