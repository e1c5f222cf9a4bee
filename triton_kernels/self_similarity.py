"""What SupCon and 2C share: rows against one another, each but itself, with positives by label.

The gradient of a unit row gathers its own loss and those in which it is a column: ``sum_j (G_ij + G_ji) x^_j / t``. The matrix of
similarities is symmetric, so one pass finds both.
"""

from __future__ import annotations

from torch import Tensor

from . import tuning
from .columns import Columns
from .gradients import Products, both_products
from .rows import Rows
from .sums import Parts, new_parts, offset_kind, sum_exponentials, sums_tile


@tuning.tuned
def labelled_sums(rows: Rows, columns: Columns, temperature: float | Tensor, dtype) -> Parts:
    """Sums over all other rows and over those with the same label."""
    offset = offset_kind(temperature, rows.normalize, dtype)
    splits = columns.splits(rows, sums_tile(rows, columns, offset, False, False))
    parts = new_parts(rows, splits, labelled=True, term=False, product=False)
    sum_exponentials(rows, columns, temperature, offset, parts)
    return parts


def self_products(
    rows: Rows,
    columns: Columns,
    temperature: float | Tensor,
    statistics: Tensor,
    want_rows: bool,
    want_term: bool,
) -> tuple[Products | None, Tensor | None]:
    """``sum_j (G_ij + G_ji) x^_j`` by row, and the sum of ``G_ij z_ij`` over all pairs."""
    products, _, term = both_products(
        rows,
        columns,
        temperature,
        statistics,
        statistics,
        want_x=want_rows,
        want_y=False,
        want_term=want_term,
    )
    return products, None if term is None else 0.5 * term.sum()
