"""The supervised contrastive loss over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import ops
from fastnce.distributed._labelled_lse import LabelledLSE, SameLabelSum
from fastnce.distributed._losses import Options, expect_rows, make_plan
from fastnce.distributed._ranks import Fact, ranks_of
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype, normalize_rows


@torch.compiler.disable
def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`fastnce.sup_con` of the samples of all ranks, exactly; positives may be on any rank.

    Args:
        features: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples of all ranks that have a positive (0 if none has), ``"sum"``, or ``"none"`` for
            this rank's (N,), with 0 for samples without a positive.
        group: as ``torch.distributed`` has it; None is the default group. Alone, or without one, the plain op runs.
        strategy: see :mod:`fastnce.distributed`, like the next two.
        gradient_scale: ``"mean"`` or ``"sum"``; with ``reduction="none"`` both leave one's own ``losses.mean()`` for DDP to average.
        check: whether the ranks compare their arguments first.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit together, here or between ranks.
        RuntimeError: another rank's arguments are invalid, or it has ended.

    Example:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> loss = fastnce.distributed.sup_con(torch.randn(4, 32), labels)
    """
    op = "sup_con"
    ranks = ranks_of(group)
    if ranks is None:
        return ops.sup_con(
            features, labels, temperature=temperature, reduction=reduction, backend=backend
        )
    options = Options(temperature, reduction, strategy, gradient_scale, check, backend)

    def validate() -> dict[str, Fact]:
        expect_rows(op, "features", features)
        _checks.expect_labels(op, labels, features, "features")
        grad = _common.wants_grad(features, temperature)
        return options.validated(op, features) | {"whether gradients are needed": grad}

    plan = make_plan(op, "labelled_lse", ranks, features, options, validate)
    tau = _checks.expect_temperature(op, temperature, features)
    labels = labels.long()
    with _common.no_autocast(features):
        lse = LabelledLSE.apply(features, tau, labels, plan.exchange, plan.kernels, 1)
        units = normalize_rows(features.to(accumulation_dtype(features.dtype)))
        counted = torch.cat([units, units.new_ones((len(units), 1))], dim=1)
        sums = SameLabelSum.apply(
            counted, labels, plan.exchange
        )  # (N, D + 1), each row's own included
        positives = sums[:, -1].detach() - 1
        to_positives = (units * (sums[:, :-1] - units)).sum(dim=1).double() / tau
        losses = lse[:, 0] - to_positives / positives.clamp(min=1)
        has_positive = positives > 0
        losses = losses.where(has_positive, 0)
        return plan.reduce(losses, has_positive, features.dtype)
