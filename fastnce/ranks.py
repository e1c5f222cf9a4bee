"""The ranks of a process group: what they agree on before they exchange anything, and how their rows reach one another."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_MESSAGE_BYTES = 2048  # of the facts that each rank sends

Fact = str | bool | int | float | Tensor
Block = tuple[Tensor, ...]
Compute = Callable[[int, Block], Tensor]


@dataclass(frozen=True)
class Ranks:
    """A process group of more than one rank, seen from one of them.

    Args:
        group: as ``torch.distributed`` takes it; None is the default group.
        rank: of this process, within the group.
        size: how many ranks.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def global_rank(self, rank: int) -> int:
        """The rank in the default group, by which point-to-point messages are addressed."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def ranks_of(group: dist.ProcessGroup | None) -> Ranks | None:
    """The ranks of ``group``; None without ``torch.distributed``, or where this process is alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    size = dist.get_world_size(group)
    if size == 1:
        return None
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "group: this process is not one of its ranks. Call only on the group's own ranks."
        )
    return Ranks(group, rank, size)


def agree(
    ranks: Ranks,
    op: str,
    device: torch.device,
    validate: Callable[[], dict[str, Fact]],
    *,
    check: bool,
) -> list[int]:
    """The rows of every rank, once all ranks have valid arguments that fit together.

    Args:
        ranks: who.
        op: the public function, which must be the same everywhere.
        device: where the group can exchange tensors.
        validate: checks this rank's arguments; returns ``rows`` and whatever must be the same everywhere, by name.
        check: False takes the agreement for granted, the number of rows included, and exchanges nothing.

    Raises:
        ValueError: ranks disagree; on every rank, naming what and who.
        RuntimeError: another rank's arguments were invalid; that rank raises its own error.
    """
    if not check:
        return [int(validate()["rows"])] * ranks.size
    error: Exception | None = None
    facts: dict[str, Fact] = {}
    try:
        found = validate()
        facts = {k: x.item() if isinstance(x, Tensor) else x for k, x in found.items()}
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    text = json.dumps({"the op": op, **facts} if error is None else None).encode()
    message = bytearray(text.ljust(_MESSAGE_BYTES))
    message = torch.frombuffer(message, dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(message) for _ in range(ranks.size)]
    with explained(ranks, op):
        dist.all_gather(gathered, message, group=ranks.group)
    if error is not None:
        raise error
    return _rows_of(op, [json.loads(bytes(x.tolist())) for x in gathered])


def _rows_of(op: str, facts: list[dict[str, Fact] | None]) -> list[int]:
    """The rows in the ranks' ``facts``; raises where anything else differs."""
    failed = [rank for rank, of_rank in enumerate(facts) if of_rank is None]
    if failed:
        who = ", ".join(map(str, failed))
        raise RuntimeError(
            f"{op}: the arguments of rank {who} are invalid; its own error says how."
        )
    for name in facts[0]:
        values = [of_rank.get(name) for of_rank in facts]
        if name == "temperature":
            _expect_valid_temperature(op, values)
        if name != "rows":
            _expect_same(op, name, values)
    return [int(of_rank["rows"]) for of_rank in facts]


def _expect_valid_temperature(op: str, values: list[float]) -> None:
    """Here the host has the numbers of tensors too. NaN differs from itself: it must not reach the comparison."""
    invalid = [
        f"rank {rank} has {value:.12g}"
        for rank, value in enumerate(values)
        if not 0 < value < math.inf
    ]
    if invalid:
        raise ValueError(
            f"{op}: temperature must be positive and finite: {', '.join(invalid)}. "
            "Look for the step whose gradients were not finite, or keep a learnable temperature in bounds."
        )


def _expect_same(op: str, name: str, values: list[Fact]) -> None:
    for rank, value in enumerate(values):
        if value != values[0]:
            first, other = (
                x if isinstance(x, str) or x is None else f"{x:.12g}" for x in (values[0], value)
            )
            raise ValueError(
                f"{op}: ranks disagree on {name}: rank 0 has {first}, rank {rank} has {other}. "
                f"Every rank of the group must pass the same."
            )


@contextlib.contextmanager
def explained(ranks: Ranks, op: str) -> Iterator[None]:
    """Errors of the communication inside the block say what they usually mean."""
    try:
        yield
    except RuntimeError as error:  # also DistBackendError and DistNetworkError
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"{op}: rank {ranks.rank} lost the other ranks: one of them has ended, or did not come within the group's timeout. "
            f"Its own output says why. ({line})"
        ) from error


class Exchange:
    """How the rows of all ranks reach every rank, and how their gradients find home.

    Both exchanges offer the same two trips. A *block* is a tuple of tensors with one row per sample of a rank, or of several ranks.

    Args:
        op: the public function, for errors.
        ranks: who takes part.
        rows: of each rank.
    """

    def __init__(self, op: str, ranks: Ranks, rows: list[int]) -> None:
        self.op, self.ranks, self.rows = op, ranks, rows

    def trip(self, block: Block) -> Iterator[tuple[int, Block]]:
        """``(step, block)``: first one's own (step 0), then all others."""
        raise NotImplementedError

    def round_trip(self, block: Block, compute: Compute) -> Tensor:
        """The same trip; sums over all ranks what ``compute(step, block)`` returns for one's own block."""
        raise NotImplementedError

    def by_owner(self, step: int, x: Tensor) -> list[tuple[int, Tensor]]:
        """``(rank, rows)`` of the ranks whose rows are in a block's tensor at ``step``."""
        raise NotImplementedError

    def to_owners(self, parts: list[Tensor]) -> Tensor:
        """Each rank gets its part (N,) of all ranks' ``parts``: (ranks, N), in the order of the ranks."""
        ranks, rows = self.ranks, self.rows
        found = parts[0].new_empty((ranks.size, rows[ranks.rank]))
        sizes = [rows[ranks.rank]] * ranks.size, list(rows)
        with explained(ranks, self.op):
            dist.all_to_all_single(found.view(-1), torch.cat(parts), *sizes, group=ranks.group)
        return found


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

    def by_owner(self, step: int, x: Tensor) -> list[tuple[int, Tensor]]:
        return [((self.ranks.rank - step) % self.ranks.size, x)]

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

    def by_owner(self, step: int, x: Tensor) -> list[tuple[int, Tensor]]:
        rank = self.ranks.rank
        if step == 0:
            return [(rank, x)]
        others = [other for other in range(self.ranks.size) if other != rank]
        return list(zip(others, x.split([self.rows[other] for other in others]), strict=True))

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
