"""Shared by the losses over ranks: their options, agreed on by all ranks, and the reduction, which sets the gradients' scale."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ranks import EXCHANGES, Fact, agree, explained, ranks_of
from fastnce.registry import OPS, accumulation_dtype

STRATEGIES = ("auto", "ring", "gather")
GRADIENT_SCALES = ("mean", "sum")  # and "published", of one loss; see OverRanks.reduce

# What "auto" lets a rank gather, in bytes of the rows of all ranks. Up to here two messages beat one per rank, and the memory is
# nothing beside a model's; docs/distributed.md counts it.
_GATHER_BYTES = 64 << 20


@dataclass
class OverRanks:
    """One call of a loss over ranks; the arguments are those that all of these losses have.

    Once the ranks ``agree``, ``temperature`` is checked, and there are the ``exchange`` of their rows and the ``kernels``.
    """

    op: str
    group: dist.ProcessGroup | None
    temperature: float | Tensor
    reduction: str
    strategy: str
    gradient_scale: str
    check: bool
    backend: str | None

    def __post_init__(self) -> None:
        self.ranks = ranks_of(self.group)
        self.alone = self.ranks is None
        # Of the plain op, which then runs.
        self.plain = {
            "temperature": self.temperature,
            "reduction": self.reduction,
            "backend": self.backend,
        }

    def expect_default(self, options: dict[str, object]) -> None:
        """What the plain op alone has is not asked for."""
        known = inspect.signature(OPS[self.op].function).parameters
        for name, value in options.items():
            if name not in known or isinstance(value, Tensor) or value != known[name].default:
                raise ValueError(
                    f"{self.op}: there is no {name} over ranks. Drop it, or call fastnce.{self.op} with this rank's rows."
                )

    def agree(
        self,
        kernel_op: str,
        rows: Tensor,
        validate: Callable[[], dict[str, Fact]],
        gradient_scales: tuple[str, ...] = GRADIENT_SCALES,
        of_form: tuple | None = None,
    ) -> None:
        """Waits until all ranks have valid arguments that fit together.

        Args:
            kernel_op: the op of the backends that computes its blocks.
            rows: (N, D), what travels.
            validate: checks this rank's other arguments; returns what else must be the same on all ranks, and ``rows`` if there
                are more than in ``rows``.
            gradient_scales: what ``gradient_scale`` may be.
            of_form: what the form of ``kernel_op`` is found by; None: ``rows`` alone.
        """

        def facts() -> dict[str, Fact]:
            others = validate()
            self.temperature = _checks.expect_temperature(self.op, self.temperature, rows)
            _checks.expect_choice(self.op, "reduction", self.reduction, _common.REDUCTIONS)
            _checks.expect_choice(self.op, "strategy", self.strategy, STRATEGIES)
            _checks.expect_choice(self.op, "gradient_scale", self.gradient_scale, gradient_scales)
            # A rank that lacks the backend must say so before the others wait for its rows.
            found_by = ((rows,),) if of_form is None else of_form
            self.kernels = backends.select(kernel_op, rows, self.backend, *found_by, called=self.op)
            return {
                "rows": len(rows),
                "D": rows.shape[1],
                "dtype": str(rows.dtype),
                "temperature": self.temperature,
                "reduction": self.reduction,
                "strategy": self.strategy,
                "gradient_scale": self.gradient_scale,
            } | others

        device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        counts = agree(self.ranks, self.op, device, facts, check=self.check)
        if sum(counts) == 0:
            raise ValueError(f"{self.op}: no rank has any row. Pass at least one row on one rank.")
        strategy = self.strategy
        if strategy == "auto":
            size = sum(counts) * rows.shape[1] * rows.element_size()
            strategy = "gather" if size <= _GATHER_BYTES else "ring"
        self.exchange = EXCHANGES[strategy](self.op, self.ranks, counts)

    def reduce(self, losses: Tensor, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The sum over all ranks of ``losses`` (N,), divided by that of ``counts`` (N,) for the mean; for "none", this rank's.

        What each loss counts is its weight, or whether it is one; None: 1.
        """
        loss = _Reduce.apply(losses, counts, self, self._gradient_factor())
        return loss.to(accumulation_dtype(dtype))

    def _gradient_factor(self) -> float:
        """The gradient of rank r's rows, relative to ``d(sum over all ranks of gradient * losses)/drow``.

        An average over ranks has to be the gradient of the mean over ranks of what the ranks go backward from. A reduced loss
        is the same on all, so that this mean is the loss itself; of the losses of one's own rows each rank makes another number,
        and the sum of these is what ``gradient * losses`` adds up to.
        """
        if self.reduction == "none":
            return 1 / self.ranks.size if self.gradient_scale == "published" else 1.0
        return float(self.ranks.size) if self.gradient_scale == "mean" else 1.0


class _Reduce(torch.autograd.Function):
    """Where the gradients get their scale: everything before it differentiates the sum over ranks of ``gradient * losses``."""

    @staticmethod
    def forward(ctx, losses: Tensor, counts: Tensor | None, call: OverRanks, factor: float):
        ctx.factor, ctx.none, ctx.rows = factor, call.reduction == "none", losses.shape
        if ctx.none:
            return losses.clone()
        count = losses.new_tensor(len(losses)) if counts is None else counts.sum().to(losses.dtype)
        sums = torch.stack([losses.sum(), count]).double()
        with explained(call.ranks, call.op):
            dist.all_reduce(sums, group=call.ranks.group)
        mean = call.reduction == "mean"
        weight = 1 / sums[1].masked_fill(sums[1] == 0, 1) if mean else torch.ones_like(sums[1])
        ctx.save_for_backward(weight)
        return (sums[0] * weight).to(losses.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.none:
            return grad * ctx.factor, None, None, None
        (weight,) = ctx.saved_tensors
        return (grad * (weight * ctx.factor)).expand(ctx.rows), None, None, None
