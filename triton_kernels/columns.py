"""The columns of the matrix of similarities: whose they are, and into which blocks and parts rows and columns go."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from . import config
from . import launch as machine
from .launch import cdiv
from .rows import Rows
from .tiles import BOTH_SIDES, DETACHED, GIVEN, MASKED, MASKED_IN_BATCH


@dataclasses.dataclass
class Columns:
    """A set of columns for the rows of ``problems`` equal problems."""

    y: Rows
    kind: int
    problems: int = 1
    labels: Tensor | None = None
    x_labels: Tensor | None = None  # of the rows, if they are not the columns themselves
    # The guide's rows (R, G) and (C, G), contiguous, of rows and columns.
    guide: tuple[Tensor, Tensor] | None = None

    def tile(self, x: Rows, kind: str, rich: bool = False) -> config.Tile:
        """The tile for the rows ``x``."""
        device = x.x.device
        of_kind = (GIVEN.value, MASKED.value, MASKED_IN_BATCH.value)
        rich = rich or self.labels is not None or self.kind in of_kind
        rich = rich or (kind != "sums" and self.kind in (BOTH_SIDES.value, DETACHED.value))
        memory, accumulators = machine.shared_memory(device), machine.tensor_memory(device)
        return config.tile(kind, rich, x.operands, x.padded, memory, accumulators)

    @property
    def row_labels(self) -> Tensor | None:
        """The labels of the rows."""
        return self.labels if self.x_labels is None else self.x_labels

    def swapped(self, x: Rows) -> Columns:
        """The rows ``x`` as columns, for these as rows."""
        guide = None if self.guide is None else (self.guide[1], self.guide[0])
        labels = {"labels": self.row_labels, "x_labels": self.labels}
        return dataclasses.replace(self, y=x, **labels, guide=guide)

    def row_blocks(self, x: Rows, block: int) -> int:
        """Blocks of rows of all problems."""
        return self.problems * cdiv(len(x) // self.problems, block)

    def _width(self) -> int:
        return len(self.y) // self.problems

    def splits(self, x: Rows, tile: config.Tile, blocks: int | None = None) -> int:
        """Into how many parts the columns go, so that the programs for ``blocks`` of rows, all by default, fill the device."""
        wanted = config.PROGRAMS_PER_MULTIPROCESSOR * machine.multiprocessors(x.x.device)
        spare = wanted // (blocks or self.row_blocks(x, tile.m))
        return max(1, min(spare, cdiv(self._width(), tile.n)))

    def guide_arguments(self) -> dict[str, object]:
        """Those of ``tiles.left_in``."""
        x_guide, y_guide = self.guide or (None, None)
        depth = 0 if x_guide is None else x_guide.shape[1]
        return {"x_guide": x_guide, "y_guide": y_guide, "guide_depth": depth}

    def span_arguments(self, x: Rows) -> dict[str, object]:
        """The arguments of ``tiles.span``."""
        return {
            "rows": len(x) // self.problems,
            "columns": len(self.y) // self.problems,
            "total_rows": len(x),
        }
