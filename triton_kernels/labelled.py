"""Rows with labels: sums over all columns and over those of the row's label; and rows against one another, each but itself.

In the latter the gradient of a unit row gathers its own loss and those in which it is a column: ``sum_j (G_ij + G_ji) x^_j / t``. The
matrix of similarities is symmetric, so one pass finds both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import config
from .columns import Columns
from .gradients import Coefficients, RowGradients, both_products
from .launch import cdiv
from .parts import Parts, fold, new_parts
from .rows import Rows
from .sums import offset_kind, sum_exponentials, sums_tile


def self_sums(columns: Columns, temperature: float | Tensor, dtype: torch.dtype) -> Parts:
    """Sums over all other rows and over those with the same label; ``dtype`` of the inputs."""
    if not config.half_tiles(len(columns.y), columns.y.depth):
        return labelled_sums(columns.y, columns, temperature, dtype)
    return _half_of_the_tiles(columns, temperature, dtype)


def labelled_sums(
    x: Rows, columns: Columns, temperature: float | Tensor, dtype: torch.dtype
) -> Parts:
    """Sums over all columns that count for a row, and over those with its label; ``dtype`` of the inputs."""
    offset = offset_kind(temperature, x.normalize, dtype)
    splits = columns.splits(x, sums_tile(x, columns, offset, False, False))
    parts = new_parts(x, splits, labelled=True)
    sum_exponentials(x, columns, temperature, offset, parts)
    return parts


def _half_of_the_tiles(columns: Columns, temperature, dtype) -> Parts:
    """The sums from the tiles on and above the diagonal: what a tile above it adds to its rows, its mirror image would to its columns.

    N^2 D / 2 multiply-adds and N^2 / 2 exponentials less. For it each block of m rows leaves four numbers in fp32 for every column
    after its own, N^2 / 2m columns in all, which are written and read again: at m = 64 one byte for 2 D multiply-adds saved. On
    a GPU of 650 TFLOP/s and 4.8 TB/s that takes half the time of the products saved at D = 64, a sixteenth at D = 512. No
    number is shared between programs, so that nothing is atomic, and the order of all sums is fixed.
    """
    rows = columns.y
    offset = offset_kind(temperature, rows.normalize, dtype)
    tile = sums_tile(rows, columns, offset, False, False)
    blocks = columns.row_blocks(rows, tile.m)
    height = max(1, min(blocks, config.COLUMN_PARTS // (4 * len(rows))))
    # A block of rows has half the columns on average.
    splits = columns.splits(rows, tile, cdiv(height, 2))
    parts = new_parts(rows, splits + 1, labelled=True)
    by_block = new_parts(rows, height, labelled=True)
    for first in range(0, blocks, height):
        chosen = by_block[: min(height, blocks - first)]
        sum_exponentials(
            rows,
            columns,
            temperature,
            offset,
            parts[:splits],
            column_parts=chosen,
            block_range=(first, len(chosen.sum)),
            half=True,
        )
        fold(chosen, parts[splits:], columns.kind, first, half_block=tile.m)
    return parts


def self_products(
    columns: Columns,
    temperature: float | Tensor,
    of_losses: Tensor,
    of_rows: RowGradients | None,
    want_term: bool,
) -> Tensor | None:
    """Finishes the rows' gradients with ``sum_j (G_ij + G_ji) x^_j``, and returns the sum of ``G_ij z_ij`` over all pairs.

    All tiles, not half of them. Half would do with 1.5 products of N^2 D instead of 2: the similarities of half the tiles, and of
    each tile one for its rows and one for its columns. But where a block of m rows has been, the sums of all columns after its
    own, N D / 2 numbers in fp32 on average, have been read and written. That is 8 / m bytes for each multiply-add saved, at
    m = 64 eight times what the memory does in that time. Panels of coefficients have a thousand rows, and would gain an eighth at best.
    """
    if of_rows is None and not want_term:
        return None
    _, _, term = both_products(
        Coefficients(columns.y, columns, temperature, of_losses, of_losses),
        want_x=of_rows is not None,
        want_y=False,
        want_term=want_term,
        of_x=of_rows,
    )
    return None if term is None else term.sum()
