"""NT-Xent, SimCLR's loss, over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import ops
from fastnce.distributed._labelled_lse import LabelledLSE
from fastnce.distributed._losses import Options, expect_rows, make_plan
from fastnce.distributed._ranks import Fact, ranks_of
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype, normalize_rows


@torch.compiler.disable
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`fastnce.nt_xent` of the images of all ranks, exactly; both views of an image are on the same rank.

    Args:
        z1: (N, D), the first views of this rank's images; N may differ between ranks, and be 0 on some.
        z2: (N, D), the second views.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the views of all ranks, ``"sum"``, or ``"none"`` for this rank's (2N,), the rows of ``z1``
            first.
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
        >>> loss = fastnce.distributed.nt_xent(torch.randn(32, 128), torch.randn(32, 128))
    """
    op = "nt_xent"
    ranks = ranks_of(group)
    if ranks is None:
        return ops.nt_xent(z1, z2, temperature=temperature, reduction=reduction, backend=backend)
    options = Options(temperature, reduction, strategy, gradient_scale, check, backend)
    z1, z2 = _checks.same_dtype_under_autocast(z1, z2)

    def validate() -> dict[str, Fact]:
        expect_rows(op, "z1", z1)
        expect_rows(op, "z2", z2)
        _checks.expect_shape(op, "z2", z2, tuple(z1.shape), "the shape of z1")
        _checks.expect_alike(op, "z2", z2, "z1", z1)
        grad = _common.wants_grad(z1, z2, temperature)
        facts = options.validated(op, z1) | {"whether gradients are needed": grad}
        return facts | {"rows": 2 * len(z1)}

    plan = make_plan(op, "labelled_lse", ranks, z1, options, validate)
    tau = _checks.expect_temperature(op, temperature, z1)
    with _common.no_autocast(z1):
        rows = torch.cat([z1, z2])
        no_labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        # Without the positives, next to which nothing then cancels where they dominate.
        others = LabelledLSE.apply(rows, tau, no_labels, plan.exchange, plan.kernels, 2)[:, 0]
        dtype = accumulation_dtype(z1.dtype)
        units = normalize_rows(z1.to(dtype)) * normalize_rows(z2.to(dtype))
        positive = (units.sum(dim=1).double() / tau).repeat(2)
        losses = torch.logaddexp(others - positive, torch.zeros_like(positive))
        return plan.reduce(losses, None, z1.dtype)
