"""The ranks of a process group, and their agreement before they exchange anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Every word that a fact can be, so that facts travel as numbers.
_WORDS = (
    *("info_nce", "nt_xent", "sup_con", "conditional_contrastive", "NegativeQueue.enqueue"),
    *("ring", "gather", "auto"),
    *("mean", "sum", "none", "published"),
    *("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16"),
)
_FACTS = 16  # numbers that each rank sends
_WORD_FACTS = ("dtype", "strategy", "reduction", "gradient_scale")

Fact = str | bool | int | float | Tensor


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
    facts: dict[str, Fact] = {"rows": 0}
    try:
        facts = validate()
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    numbers = torch.zeros(_FACTS, dtype=torch.float64, device=device)
    coded = [float(error is None), _number(op)]
    coded += [0.0 if isinstance(fact, Tensor) else _number(fact) for fact in facts.values()]
    numbers[: len(coded)] = torch.tensor(coded, dtype=torch.float64)
    for at, fact in enumerate(facts.values(), start=2):
        if isinstance(fact, Tensor):
            numbers[at] = fact.detach()
    gathered = [torch.empty_like(numbers) for _ in range(ranks.size)]
    with explained(ranks, op):
        dist.all_gather(gathered, numbers, group=ranks.group)
    if error is not None:
        raise error
    return _rows_of(op, list(facts), torch.stack(gathered).tolist())


def _rows_of(op: str, names: list[str], numbers: list[list[float]]) -> list[int]:
    """The rows in the ranks' ``numbers``; raises where anything else differs."""
    failed = [rank for rank, row in enumerate(numbers) if not row[0]]
    if failed:
        who = ", ".join(map(str, failed))
        raise RuntimeError(
            f"{op}: the arguments of rank {who} are invalid; its own error says how."
        )
    _expect_same(op, "the op", [row[1] for row in numbers], is_word=True)
    for at, name in enumerate(names, start=2):
        if name == "temperature":
            _expect_valid_temperature(op, [row[at] for row in numbers])
        if name != "rows":
            _expect_same(op, name, [row[at] for row in numbers], is_word=name in _WORD_FACTS)
    return [int(row[2 + names.index("rows")]) for row in numbers]


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


def _expect_same(op: str, name: str, values: list[float], *, is_word: bool) -> None:
    for rank, value in enumerate(values):
        if value != values[0]:
            first, other = (_WORDS[int(x)] if is_word else f"{x:.12g}" for x in (values[0], value))
            raise ValueError(
                f"{op}: ranks disagree on {name}: rank 0 has {first}, rank {rank} has {other}. "
                f"Every rank of the group must pass the same."
            )


def _number(fact: str | bool | int | float) -> float:
    return float(_WORDS.index(fact) if isinstance(fact, str) else fact)


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
