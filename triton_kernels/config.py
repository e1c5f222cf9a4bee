"""Tile sizes and thresholds, as data.

The values follow from registers and shared memory, which the compile tests check; none has been timed on a GPU yet.
"""

from __future__ import annotations

import dataclasses

# Up to here a tile of rows stays on the chip, and the gradient's product is made where the similarities are. Beyond, the
# similarities' coefficients of a panel of rows go through memory, and the other products are the library's. By what multiplies:
# fp32 takes twice the registers of 16 bits, and without tensor cores ("ieee") both operands lie in registers whole.
RESIDENT_DEPTH = 256
RESIDENT_DEPTHS = {"fp8": RESIDENT_DEPTH, "16 bits": RESIDENT_DEPTH, "tf32": 128, "ieee": 64}
# A product's accumulator has no more columns than the tallest tile has rows. Where tensor cores keep it in registers, Triton
# then gives each warp rows of its own; else each reads all rows, and the similarities are made twice.
WIDEST_HEAD = 128
# Coefficients of a panel, in elements: 3/4 of those of the packed rows and columns, between 32 MiB and 512 MiB in bf16. More
# are better, for each panel reads and writes all sums of the columns' gradient once. But both gradients are to take less than 4
# times the inputs. The packed rows are 1 of these, in fp8 as well 1/2 more, those sums 1, and the first gradient 1/2.
PANEL_ELEMENTS = (1 << 24, 1 << 28)
# Elements of a product that is made to be added elsewhere: 16 MiB in fp32, so that it stays in the cache.
ADDED_ELEMENTS = 1 << 22
# Sums of columns by blocks of rows that are kept before they are folded, in elements: 64 MiB.
COLUMN_PARTS = 1 << 24
# Rows against themselves: from this depth, and from this many multiply-adds of all pairs, half the tiles (see labelled).
HALF_TILES = (64, 1 << 32)
# Programs that a grid should have for each multiprocessor, before columns are split among programs.
PROGRAMS_PER_MULTIPROCESSOR = 2
# exp(z - offset) with this much of exp's range above the offset 1 / t - EXPONENT_TOP ...
EXPONENT_TOP = 40.0
# ... has a normal float for every cosine while 1 / t does not exceed this; those of rows in fp8 reach 1.13. Beyond, the
# running maximum.
LARGEST_FIXED_LOGIT = 59.0


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, depth of a step (where rows are not resident), warps and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int
    d: int = 64

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# The tile of a pass by what multiplies, in ascending depth: the largest padded depth, and (m, n, warps, stages), or with d.
# The passes are "sums": similarities alone; "products": and one product with them; "panel": coefficients into memory.
# An entry "... rich" goes before where a pass has more to keep in registers: labels, given coefficients, the temperature's
# gradient, or a running maximum. "fp8" has the rows in fp8, and where there are products, in 16 bits beside.
_Table = dict[tuple[str, str], tuple[tuple[int, Tile], ...]]
_ANY = 1 << 30


def _table(*entries: tuple[str, str, int, tuple]) -> _Table:
    table: _Table = {}
    for kind, operands, depth, tile in entries:
        table[kind, operands] = (*table.get((kind, operands), ()), (depth, Tile(*tile)))
    return table


# fp32, the same on every GPU.
_FLOAT32 = _table(
    ("sums", "ieee", _ANY, (32, 32, 4, 2, 32)),
    ("products", "ieee", _ANY, (32, 32, 4, 2)),
    ("panel", "ieee", _ANY, (32, 32, 4, 3, 32)),
    ("sums", "tf32", 128, (64, 32, 4, 3)),
    ("sums", "tf32", _ANY, (64, 64, 8, 3, 32)),
    ("products", "tf32", _ANY, (128, 16, 8, 3)),
    ("panel", "tf32", _ANY, (64, 64, 8, 3, 32)),
)
# For 228 KiB of shared memory and asynchronous products: Hopper. Of tiles of one size, tall ones leave a thread fewer columns to
# keep sums and labels of: where square ones spill registers, they do not.
LARGE = _FLOAT32 | _table(
    ("sums", "fp8", _ANY, (128, 64, 8, 3)),
    ("products", "fp8", 128, (128, 64, 8, 3)),
    ("products", "fp8", _ANY, (64, 64, 8, 3)),
    ("panel", "fp8", _ANY, (128, 64, 8, 3)),
    ("sums", "16 bits", 256, (128, 64, 8, 3)),
    ("sums", "16 bits", _ANY, (256, 64, 8, 3)),
    ("sums rich", "16 bits", 128, (64, 64, 8, 3)),
    ("sums rich", "16 bits", _ANY, (128, 32, 8, 3)),
    ("products", "16 bits", _ANY, (128, 64, 8, 3)),
    ("products rich", "16 bits", 128, (128, 64, 8, 3)),
    ("products rich", "16 bits", _ANY, (128, 32, 8, 3)),
    ("panel", "16 bits", _ANY, (128, 128, 8, 3)),
    ("panel rich", "16 bits", _ANY, (128, 64, 8, 3)),
)
# Where products accumulate in tensor memory: data-centre Blackwell. What becomes of a product comes through registers all at
# once, beside the factors: smaller tiles, or registers spill.
TENSOR_MEMORY = LARGE | _table(
    ("products", "fp8", 128, (128, 64, 8, 2)),
    ("products", "fp8", _ANY, (64, 64, 8, 3)),
    ("sums", "tf32", 128, (128, 16, 8, 3)),
    ("sums", "tf32", _ANY, (64, 64, 8, 3, 32)),
    ("sums", "16 bits", _ANY, (128, 64, 8, 3)),
    ("sums rich", "16 bits", _ANY, (64, 32, 8, 2)),
    ("products", "16 bits", 128, (128, 64, 8, 3)),
    ("products", "16 bits", _ANY, (64, 64, 8, 2)),
    ("products rich", "16 bits", _ANY, (128, 32, 8, 3)),
    ("panel", "16 bits", _ANY, (128, 64, 8, 3)),
    ("panel rich", "16 bits", _ANY, (64, 64, 8, 3)),
)
# For the 100 KiB or more of the other GPUs since Ampere, and products that keep their operands in registers.
COMPACT = _FLOAT32 | _table(
    ("sums", "fp8", 256, (64, 64, 4, 2)),
    ("sums", "fp8", _ANY, (128, 64, 8, 3)),
    ("products", "fp8", 128, (128, 32, 8, 3)),
    ("products", "fp8", _ANY, (128, 16, 8, 3)),
    ("panel", "fp8", _ANY, (128, 64, 8, 3)),
    ("sums", "16 bits", 128, (128, 64, 8, 3)),
    ("sums", "16 bits", 256, (64, 32, 4, 3)),
    ("sums", "16 bits", _ANY, (128, 64, 8, 3)),
    ("sums rich", "16 bits", 128, (64, 64, 8, 3)),
    ("sums rich", "16 bits", 256, (64, 32, 4, 3)),
    ("sums rich", "16 bits", _ANY, (64, 64, 8, 3)),
    ("products", "16 bits", 128, (128, 32, 8, 3)),
    ("products", "16 bits", _ANY, (128, 16, 8, 3)),
    ("panel", "16 bits", _ANY, (128, 64, 8, 3)),
)


def tile(
    kind: str, rich: bool, operands: str, depth: int, shared_memory: int, tensor_memory: bool
) -> Tile:
    """The tile of a pass over rows of ``depth`` padded elements.

    Args:
        kind: of the pass, "sums", "products" or "panel".
        rich: whether it has more to keep.
        operands: what multiplies, "fp8", "16 bits", "tf32" or "ieee".
        depth: padded.
        shared_memory: bytes of a multiprocessor.
        tensor_memory: whether products accumulate there.
    """
    table = LARGE if shared_memory >= 228 * 1024 else COMPACT
    if tensor_memory:
        table = TENSOR_MEMORY
    key = kind, operands
    if rich:
        key = next(k for k in ((f"{kind} rich", operands), key) if k in table)
    return next(found for limit, found in table[key] if depth <= limit)


def split_depth(depth: int, least: int = 16) -> tuple[int, int]:
    """Powers of two (head, tail) that hold a ``depth`` of at most ``RESIDENT_DEPTH``, with fewer than 64 to spare.

    Neither is smaller than ``least``, but for a tail of 0, or larger than ``WIDEST_HEAD``. The split of their sum is the same.
    """
    head = least
    while head < depth:
        if head >= 2 * least and head + head // 2 >= depth:
            return head, head // 2
        if head == WIDEST_HEAD:
            return head, head
        head *= 2
    return head, 0


def padded_depth(depth: int, fp8: bool = False) -> int:
    """The depth to which rows of ``depth`` elements are padded with zeros; matrix instructions take 32 elements in fp8 at a time."""
    if depth > RESIDENT_DEPTH:
        return -(-depth // 64) * 64
    return sum(split_depth(depth, 32 if fp8 else 16))


def panel_elements(rows: int, columns: int, depth: int) -> int:
    """How many coefficients of a panel there may be."""
    least, most = PANEL_ELEMENTS
    return max(least, min(most, (rows + columns) * depth * 3 // 4))


def half_tiles(rows: int, depth: int) -> bool:
    """Whether half the tiles pay for the sums of rows against themselves."""
    least_depth, least_work = HALF_TILES
    return depth >= least_depth and rows * rows * depth >= least_work
