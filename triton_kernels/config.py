"""Tile sizes and thresholds, as data.

The values follow from registers and shared memory, which the compile tests check; none has been timed on a GPU yet.
"""

from __future__ import annotations

import dataclasses

import torch

# Up to here a tile of rows stays on the chip, and the gradient's product is made where the similarities are. Beyond, the
# similarities' coefficients of a panel of rows go through memory, and the other products are the library's.
RESIDENT_DEPTH = 256
# Likewise for fp32 without tensor cores, whose operands lie in registers whole.
RESIDENT_DEPTH_IEEE = 64
# Coefficients of a panel, in elements: 128 Mi, so 256 MiB in bf16.
PANEL_ELEMENTS = 1 << 27
# Rows whose column sums are kept by blocks, before they are added up.
COLUMN_SUM_ROWS = 16384
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


# (pass, bytes of an element) -> (largest padded depth, tile, tile where tiles of that size would not fill the device), in
# ascending order. The passes are "sums": similarities alone; "products": and one product with them; "panel": coefficients into
# memory. Where a pass has more to keep in registers (labels, given coefficients, the temperature's gradient, a running
# maximum; fp32 without tensor cores), its entry "... rich" goes before; and "... fp8" where it has the rows in fp8 beside.
Table = dict[tuple[str, int], tuple[tuple[int, Tile, Tile], ...]]
# For 228 KiB of shared memory and asynchronous products: Hopper and data-centre Blackwell.
LARGE: Table = {
    ("sums", 2): (
        (RESIDENT_DEPTH, Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        (1 << 30, Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
    ),
    ("sums rich", 2): ((1 << 30, Tile(64, 64, 8, 3), Tile(64, 64, 8, 2)),),
    ("products", 2): (
        (128, Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        (RESIDENT_DEPTH, Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
    ),
    ("products rich", 2): (
        (128, Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
        (RESIDENT_DEPTH, Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
    ),
    ("products fp8", 2): (
        (128, Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
        (RESIDENT_DEPTH, Tile(64, 64, 8, 3), Tile(64, 32, 8, 2)),
    ),
    ("panel", 2): ((1 << 30, Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),),
    ("sums", 1): (
        (RESIDENT_DEPTH, Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        (1 << 30, Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
    ),
    ("panel", 1): ((1 << 30, Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),),
    ("panel rich", 2): ((1 << 30, Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),),
    ("sums", 4): (
        (64, Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)),
        (128, Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
        (RESIDENT_DEPTH, Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (1 << 30, Tile(64, 64, 8, 3, 32), Tile(32, 32, 4, 3, 32)),
    ),
    ("products", 4): (
        (64, Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)),
        (128, Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
        (RESIDENT_DEPTH, Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    ),
    ("panel", 4): ((1 << 30, Tile(64, 64, 8, 3, 32), Tile(32, 32, 4, 3, 32)),),
    ("sums rich", 4): ((1 << 30, Tile(32, 32, 4, 2, 32), Tile(32, 32, 4, 2, 32)),),
    ("products rich", 4): ((RESIDENT_DEPTH_IEEE, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),),
    ("panel rich", 4): ((1 << 30, Tile(32, 32, 4, 3, 32), Tile(32, 32, 4, 3, 32)),),
}
# For the 100 KiB or more of the other GPUs since Ampere, and products that keep their operands in registers.
COMPACT: Table = {
    ("sums", 2): (
        (128, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        (RESIDENT_DEPTH, Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        (1 << 30, Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ),
    ("sums rich", 2): (
        (128, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        (RESIDENT_DEPTH, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        (1 << 30, Tile(64, 64, 8, 3), Tile(64, 64, 8, 3)),
    ),
    ("products", 2): (
        (64, Tile(64, 32, 4, 3), Tile(64, 32, 4, 2)),
        (128, Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        (RESIDENT_DEPTH, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    ),
    ("panel", 2): ((1 << 30, Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),),
    ("sums", 1): (
        (RESIDENT_DEPTH, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        (1 << 30, Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ),
    ("panel", 1): ((1 << 30, Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),),
    ("sums", 4): (
        (64, Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)),
        (128, Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
        (RESIDENT_DEPTH, Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
        (1 << 30, Tile(64, 64, 8, 3, 32), Tile(32, 32, 4, 3, 32)),
    ),
    ("products", 4): (
        (64, Tile(64, 64, 8, 2), Tile(32, 32, 4, 2)),
        (128, Tile(32, 32, 8, 2), Tile(32, 32, 4, 2)),
        (RESIDENT_DEPTH, Tile(32, 16, 8, 2), Tile(32, 16, 8, 2)),
    ),
    ("panel", 4): ((1 << 30, Tile(64, 64, 8, 3, 32), Tile(32, 32, 4, 3, 32)),),
    ("sums rich", 4): ((1 << 30, Tile(32, 32, 4, 2, 32), Tile(32, 32, 4, 2, 32)),),
    ("products rich", 4): ((RESIDENT_DEPTH_IEEE, Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),),
    ("panel rich", 4): ((1 << 30, Tile(32, 32, 4, 3, 32), Tile(32, 32, 4, 3, 32)),),
}


def tiles(
    kind: str, rich: bool, dtype: torch.dtype, depth: int, shared_memory: int, fp8: bool = False
) -> tuple[Tile, Tile]:
    """The tile of a pass over rows of ``depth`` padded elements, and the one for small problems.

    Args:
        kind: of the pass, "sums", "products" or "panel".
        rich: whether it has more to keep.
        dtype: of the packed rows.
        depth: padded.
        shared_memory: bytes of a multiprocessor.
        fp8: whether there is a copy of the rows in fp8 beside.
    """
    table, size = LARGE if shared_memory >= 228 * 1024 else COMPACT, dtype.itemsize
    names = [f"{kind} fp8"] * fp8 + [f"{kind} rich"] * rich + [kind]
    rows = next(table[name, size] for name in names if (name, size) in table)
    return next((tile, small) for limit, tile, small in rows if depth <= limit)


def split_depth(depth: int, least: int = 16) -> tuple[int, int]:
    """Powers of two (head, tail) that hold a ``depth`` of at most ``RESIDENT_DEPTH``, with fewer than 64 to spare.

    Neither is smaller than ``least``, but for a tail of 0. The split of their sum is the same.
    """
    head = least
    while head < depth:
        if head >= 2 * least and head + head // 2 >= depth:
            return head, head // 2
        head *= 2
    return head, 0


def padded_depth(depth: int, fp8: bool = False) -> int:
    """What rows of ``depth`` elements are padded to with zeros; matrix instructions take 32 elements in fp8 at a time."""
    if depth > RESIDENT_DEPTH:
        return -(-depth // 64) * 64
    return sum(split_depth(depth, 32 if fp8 else 16))
