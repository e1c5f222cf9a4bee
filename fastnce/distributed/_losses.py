"""What the losses over ranks share: their options, agreed on by all ranks, and the reduction, which sets the gradients' scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import backends
from fastnce.distributed._exchange import EXCHANGES, Exchange
from fastnce.distributed._ranks import Fact, Ranks, agree, explained
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype

STRATEGIES = ("auto", "ring", "gather")
GRADIENT_SCALES = ("mean", "sum")  # and "published", of one loss; see Plan.reduce

# What "auto" lets a rank gather, in bytes of the rows of all ranks. Up to here two messages beat one per rank, and the memory is
# nothing beside a model's; docs/distributed.md counts it.
_GATHER_BYTES = 64 << 20


@dataclass(frozen=True)
class Options:
    """The keyword arguments that all losses over ranks have."""

    temperature: float | Tensor
    reduction: str
    strategy: str
    gradient_scale: str
    check: bool
    backend: str | None

    def validated(
        self, op: str, rows: Tensor, gradient_scales: tuple[str, ...] = GRADIENT_SCALES
    ) -> dict[str, Fact]:
        """Checks them; returns what must be the same on all ranks, with D, dtype and number of ``rows`` (N, D)."""
        temperature = _checks.expect_temperature(op, self.temperature, rows)
        _checks.expect_choice(op, "reduction", self.reduction, _common.REDUCTIONS)
        _checks.expect_choice(op, "strategy", self.strategy, STRATEGIES)
        _checks.expect_choice(op, "gradient_scale", self.gradient_scale, gradient_scales)
        return {
            "rows": len(rows),
            "D": rows.shape[1],
            "dtype": str(rows.dtype),
            "temperature": temperature,
            "reduction": self.reduction,
            "strategy": self.strategy,
            "gradient_scale": self.gradient_scale,
        }


@dataclass(frozen=True)
class Plan:
    """How the ranks compute one loss together: the exchange of their rows, the kernels, and the gradients' scale."""

    ranks: Ranks
    exchange: Exchange
    kernels: ModuleType
    options: Options

    def reduce(self, losses: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The mean or sum over all ranks of ``losses`` (N,) or of the ``valid`` ones; or this rank's losses, for "none"."""
        loss = _Reduce.apply(losses, valid, self, self._gradient_factor())
        return loss.to(accumulation_dtype(dtype))

    def _gradient_factor(self) -> float:
        """What rank r's rows get, relative to ``d(sum over all ranks of gradient * losses)/drow``.

        An average over ranks has to be the gradient of the mean over ranks of what the ranks go backward from. A reduced loss
        is the same on all, so that this mean is the loss itself; of the losses of one's own rows each rank makes another number,
        and the sum of these is what ``gradient * losses`` adds up to.
        """
        scale, size = self.options.gradient_scale, self.ranks.size
        if self.options.reduction == "none":
            return 1 / size if scale == "published" else 1.0
        return float(size) if scale == "mean" else 1.0


def make_plan(
    op: str,
    kernel_op: str,
    ranks: Ranks,
    rows: Tensor,
    options: Options,
    validate: Callable[[], dict[str, Fact]],
) -> Plan:
    """The plan of all ranks for one call, once they agree.

    Args:
        op: the public function.
        kernel_op: the op of the backends that computes its blocks.
        ranks: who takes part.
        rows: (N, D), what travels.
        options: of the call.
        validate: checks all arguments of the op on this rank; see :func:`fastnce.distributed._ranks.agree`.
    """

    def valid() -> dict[str, Fact]:
        facts = validate()
        # A rank that lacks the backend must say so before the others wait for its rows.
        backends.select(kernel_op, rows, options.backend)
        return facts

    device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
    counts = agree(ranks, op, device, valid, check=options.check)
    if sum(counts) == 0:
        raise ValueError(f"{op}: no rank has any row. Pass at least one row on one rank.")
    strategy = options.strategy
    if strategy == "auto":
        size = sum(counts) * rows.shape[1] * rows.element_size()
        strategy = "gather" if size <= _GATHER_BYTES else "ring"
    kernels = backends.select(kernel_op, rows, options.backend)
    return Plan(ranks, EXCHANGES[strategy](op, ranks, counts), kernels, options)


def expect_rows(op: str, name: str, x: object) -> None:
    """``x`` is a floating-point tensor (N, D); N may be 0, for a rank may have no rows."""
    if isinstance(x, Tensor) and x.dim() == 2 and len(x) == 0:
        x = x.new_empty((1, x.shape[1]))
    _checks.expect_float_tensor(op, name, x, (2,), "(N, D)")


class _Reduce(torch.autograd.Function):
    """Where the gradients get their scale: everything before it differentiates the sum over ranks of ``gradient * losses``."""

    @staticmethod
    def forward(ctx, losses: Tensor, valid: Tensor | None, plan: Plan, factor: float) -> Tensor:
        reduction = plan.options.reduction
        ctx.factor, ctx.none, ctx.rows = factor, reduction == "none", losses.shape
        if ctx.none:
            return losses.clone()
        count = losses.new_tensor(len(losses)) if valid is None else valid.sum().to(losses.dtype)
        sums = torch.stack([losses.sum(), count]).double()
        with explained(plan.ranks, plan.exchange.op):
            dist.all_reduce(sums, group=plan.ranks.group)
        weight = 1 / sums[1].clamp(min=1) if reduction == "mean" else torch.ones_like(sums[1])
        ctx.save_for_backward(weight)
        return (sums[0] * weight).to(losses.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.none:
            return grad * ctx.factor, None, None, None
        (weight,) = ctx.saved_tensors
        return (grad * (weight * ctx.factor)).expand(ctx.rows), None, None, None
