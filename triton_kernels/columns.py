"""The columns of the matrix of similarities: whose they are, and into which blocks and parts rows and columns go."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from . import config
from . import launch as machine
from .launch import cdiv
from .rows import Rows
from .tiles import BOTH_SIDES, DETACHED, GIVEN, MASKED


@dataclasses.dataclass
class Columns:
    """A set of columns for the rows of ``problems`` equal problems."""

    y: Rows
    kind: int
    problems: int = 1
    labels: Tensor | None = None
    x_labels: Tensor | None = None  # of the rows, if they are not the columns themselves
    # Of rows and columns, by which pairs are left out: int64 ids (R,) and (C,); the guide's (G, R) and (G, C), contiguous.
    ids: tuple[Tensor | None, Tensor | None] = (None, None)
    guide: tuple[Tensor | None, Tensor | None] = (None, None)

    def tile(self, x: Rows, kind: str, rich: bool = False) -> config.Tile:
        """The tile for the rows ``x``."""
        device = x.x.device
        rich = rich or self.labels is not None
        rich = rich or self.kind == GIVEN.value or self.kind >= MASKED.value
        rich = rich or (kind != "sums" and self.kind in (BOTH_SIDES.value, DETACHED.value))
        memory, accumulators = machine.shared_memory(device), machine.tensor_memory(device)
        return config.tile(kind, rich, x.operands, x.padded, memory, accumulators)

    @property
    def row_labels(self) -> Tensor | None:
        """The labels of the rows."""
        return self.labels if self.x_labels is None else self.x_labels

    def swapped(self, x: Rows) -> Columns:
        """The rows ``x`` as columns, for these as rows."""
        masks = {"ids": self.ids[::-1], "guide": self.guide[::-1]}
        return dataclasses.replace(self, y=x, labels=self.row_labels, x_labels=self.labels, **masks)

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

    def mask_arguments(self) -> dict[str, object]:
        """Those of ``tiles.left_in``."""
        (x_ids, y_ids), (x_guide, y_guide) = self.ids, self.guide
        depth = 0 if x_guide is None else x_guide.shape[0]
        ids = {"x_ids": x_ids, "y_ids": y_ids}
        return {**ids, "x_guide": x_guide, "y_guide": y_guide, "guide_depth": depth}

    def span_arguments(self, x: Rows) -> dict[str, object]:
        """The arguments of ``tiles.span``."""
        return {
            "rows": len(x) // self.problems,
            "columns": len(self.y) // self.problems,
            "total_rows": len(x),
        }
