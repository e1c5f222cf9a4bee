"""How the rows of all ranks reach every rank, and how their gradients find home.

Both exchanges offer the same two trips. A *block* is a tuple of tensors with one row per sample of a rank, or of several ranks:

- ``trip(block)`` yields ``(step, block)``: first one's own (step 0), then all others.
- ``round_trip(block, compute)`` does the same, and sums over all ranks what ``compute(step, block)`` returns for one's own block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce.distributed._ranks import Ranks, explained

Block = tuple[Tensor, ...]
Compute = Callable[[int, Block], Tensor]


class Exchange:
    """What :class:`Ring` and :class:`Gather` share.

    Args:
        op: the public function, for errors.
        ranks: who takes part.
        rows: of each rank.
    """

    def __init__(self, op: str, ranks: Ranks, rows: list[int]) -> None:
        self.op, self.ranks, self.rows = op, ranks, rows

    def trip(self, block: Block) -> Iterator[tuple[int, Block]]:
        raise NotImplementedError

    def round_trip(self, block: Block, compute: Compute) -> Tensor:
        raise NotImplementedError


class Ring(Exchange):
    """Blocks go from rank to rank; the next one arrives while this one is computed. Memory: two blocks, and two sums of gradients."""

    def trip(self, block: Block) -> Iterator[tuple[int, Block]]:
        for step in range(self.ranks.size):
            arriving = self._pass_on(step, block)
            yield step, block
            if arriving is not None:
                block = arriving()

    def round_trip(self, block: Block, compute: Compute) -> Tensor:
        """The sums go with their blocks, one step behind; after the last step they are back with the owner."""
        arriving_sum: Callable[[], Block] | None = None
        for step in range(self.ranks.size):
            arriving = self._pass_on(step, block)
            total = compute(step, block)
            if arriving_sum is not None:
                total += arriving_sum()[0]
            arriving_sum = self._send((total,), self._rows_at(step + 1), tag=1)
            if arriving is not None:
                block = arriving()
        return arriving_sum()[0]

    def _rows_at(self, step: int) -> int:
        """Of the block that is here at ``step``."""
        return self.rows[(self.ranks.rank - step) % self.ranks.size]

    def _pass_on(self, step: int, block: Block) -> Callable[[], Block] | None:
        """Sends the block of ``step`` on; the result waits for the next one. None at the last step."""
        if step + 1 == self.ranks.size:
            return None
        return self._send(block, self._rows_at(step + 1), tag=2)

    def _send(self, block: Block, rows: int, tag: int) -> Callable[[], Block]:
        """Begins to send ``block`` to the next rank and to receive one of ``rows`` rows; the result waits for both."""
        ranks = self.ranks
        following = ranks.global_rank((ranks.rank + 1) % ranks.size)
        previous = ranks.global_rank((ranks.rank - 1) % ranks.size)
        received = tuple(x.new_empty((rows, *x.shape[1:])) for x in block)
        messages = []
        for part, (x, y) in enumerate(zip(block, received, strict=True)):
            tags = {"group": ranks.group, "tag": 8 * tag + part}
            if x.numel() > 0:
                messages.append(dist.P2POp(dist.isend, x.contiguous(), following, **tags))
            if y.numel() > 0:
                messages.append(dist.P2POp(dist.irecv, y, previous, **tags))
        with explained(ranks, self.op):
            works = dist.batch_isend_irecv(messages) if messages else []

        def wait() -> Block:
            with explained(ranks, self.op):
                for work in works:
                    work.wait()
            messages.clear()  # which kept alive what was being sent
            return received

        return wait


class Gather(Exchange):
    """Every rank gets all blocks at once: one message per tensor instead of one per rank. Memory: the blocks of all ranks."""

    def trip(self, block: Block) -> Iterator[tuple[int, Block]]:
        yield 0, block
        yield 1, tuple(self.others(x) for x in block)

    def round_trip(self, block: Block, compute: Compute) -> Tensor:
        own = compute(0, block)
        others = compute(1, tuple(self.others(x) for x in block))
        return self.give_back(own, others)

    def all_rows(self, x: Tensor) -> Tensor:
        """The rows of all ranks, in the order of the ranks."""
        return torch.cat(self._gathered(x))

    def others(self, x: Tensor) -> Tensor:
        """The rows of all other ranks, in the order of the ranks."""
        parts = self._gathered(x)
        return torch.cat(parts[: self.ranks.rank] + parts[self.ranks.rank + 1 :])

    def _gathered(self, x: Tensor) -> list[Tensor]:
        """The rows of each rank."""
        padded = self._padded(x)
        gathered = [torch.empty_like(padded) for _ in self.rows]
        with explained(self.ranks, self.op):
            dist.all_gather(gathered, padded, group=self.ranks.group)
        return [y[:rows] for y, rows in zip(gathered, self.rows, strict=True)]

    def give_back(self, own: Tensor, others: Tensor) -> Tensor:
        """Each rank's part goes to it; the sum over all ranks of what is for this one."""
        rank = self.ranks.rank
        parts = list(others.split(self.rows[:rank] + self.rows[rank + 1 :]))
        parts.insert(rank, own)
        parts = [self._padded(x) for x in parts]
        total = torch.empty_like(parts[0])
        with explained(self.ranks, self.op):
            dist.reduce_scatter(total, parts, group=self.ranks.group)
        return total[: len(own)]

    def _padded(self, x: Tensor) -> Tensor:
        """As many rows as any rank has, for in these collectives all messages have one size."""
        missing = max(self.rows) - len(x)
        if missing > 0:
            x = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))])
        return x.contiguous()


EXCHANGES = {"ring": Ring, "gather": Gather}
