"""The supervised contrastive loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import OverRanks
from fastnce.ops.labelled_lse import LabelledLSE, SameLabelSum
from fastnce.ranks import Fact
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Make, Op, Operator, Sample, declare


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Supervised contrastive loss, the L_out form (Khosla et al. 2020, https://arxiv.org/abs/2004.11362).

    .. math:: \ell_i = \log \sum_{a \ne i} e^{s_{ia} / \tau} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip} / \tau

    with the cosine s and the other samples :math:`P_i` of the class of i. Several views of an image are rows of their own with
    the same label. The published code multiplies by ``temperature / base_temperature`` (0.07); this is the loss itself.

    Args:
        features: (N, D); float64, float32, bfloat16 or float16. Normalisation is part of the op.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples that have a positive (0 if none has), ``"sum"``, or ``"none"`` for (N,), with 0
            for samples without a positive.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> loss = fastnce.sup_con(torch.randn(8, 32), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    """
    op = "sup_con"
    _checks.expect_rows(op, "features", features)
    labels = _checks.expect_labels(op, labels, features, "features")
    return _common.row_loss(op, plain, (features,), labels, temperature, reduction, backend)


def plain(features: Tensor, labels: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """``loss_i = log sum_{a != i} exp(s_ia / t) - mean_{p in P_i} s_ip / t`` (the L_out form).

    Args:
        features: (N, D).
        labels: (N,) int64; ``P_i`` are the other samples with the label of i.
        temperature: t, a float or a 0-d tensor.

    Returns:
        The losses (N,), 0 where ``P_i`` is empty, and whether each sample has a positive, (N,) bool.
    """
    features = normalize_rows(features.to(accumulation_dtype(features.dtype)))

    is_self = torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    is_positive = (labels[:, None] == labels[None, :]) & ~is_self  # (N, N)
    num_positives = is_positive.sum(dim=1)  # (N,)
    logits = over_temperature(features @ features.T, temperature)  # (N, N)

    lse = logits.masked_fill(is_self, -torch.inf).logsumexp(dim=1)
    positive = logits.masked_fill(~is_positive, 0).sum(dim=1) / num_positives.clamp(min=1)
    has_positive = num_positives > 0
    return (lse - positive).masked_fill(~has_positive, 0), has_positive


@torch.compiler.disable
def over_ranks(
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
    """``fastnce.sup_con`` of the samples of all ranks, exactly; positives may be on any rank.

    Args:
        features: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        labels: (N,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples of all ranks that have a positive (0 if none has), ``"sum"``, or ``"none"`` for
            this rank's (N,), with 0 for samples without a positive.
        group, strategy, gradient_scale, check: see ``fastnce.distributed``.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Examples:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> loss = fastnce.distributed.sup_con(torch.randn(4, 32), labels)
    """
    op = "sup_con"
    call = OverRanks(op, group, temperature, reduction, strategy, gradient_scale, check, backend)
    if call.alone:
        return sup_con(features, labels, **call.plain)

    def validate() -> dict[str, Fact]:
        _checks.expect_rows(op, "features", features, may_be_empty=True)
        _checks.expect_labels(op, labels, features, "features")
        return {"whether gradients are needed": _common.wants_grad(features, temperature)}

    call.agree("labelled_lse", features, validate)
    labels = labels.long()
    with _common.no_autocast(features):
        lse = LabelledLSE.apply(features, call.temperature, labels, call.exchange, call.kernels, 1)
        units = normalize_rows(features.to(accumulation_dtype(features.dtype)))
        counted = torch.cat([units, units.new_ones((len(units), 1))], dim=1)
        # (N, D + 1), each row's own included
        sums = SameLabelSum.apply(counted, labels, call.exchange)
        positives = sums[:, -1].detach() - 1
        to_positives = (units * (sums[:, :-1] - units)).sum(dim=1).double() / call.temperature
        losses = lse[:, 0] - to_positives / positives.clamp(min=1)
        has_positive = positives > 0
        losses = losses.where(has_positive, 0)
        return call.reduce(losses, has_positive, features.dtype)


def _samples(make: Make) -> Iterator[Sample]:
    features = make(34, 20)
    labels = torch.randint(8, (34,), generator=make.generator)
    labels[3] = 99  # a class of one
    labelled = {"features": features, "labels": labels.to(features.device)}
    yield Sample("mean", labelled)
    yield Sample("none", {**labelled, "reduction": "none"})
    yield Sample("temperature", {**labelled, "temperature": torch.tensor(0.2, requires_grad=True)})


def _losses(features: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = (features.shape[0],), accumulation_dtype(features.dtype)
    loss, lse = (features.new_empty(rows, dtype=dtype) for _ in range(2))
    return loss, features.new_empty(rows, dtype=torch.bool), lse


declare(
    Op(
        "sup_con",
        function=sup_con,
        over_ranks=over_ranks,
        samples=_samples,
    ),
    # has_positive (N,) bool: another row has the label; the loss of a row without is 0.
    # lse (N,) = log of the sum over j != i of exp(f_i . f_j / t); 0 for a single row.
    # The mean is over the rows that have a positive.
    Operator(
        "sup_con_forward(Tensor features, Tensor labels, Tensor? temperature_tensor, float temperature, bool bfloat16_products, float? grad_scale, "
        "bool mean, bool need_features, bool need_temperature) -> "
        "(Tensor loss, Tensor has_positive, Tensor lse, Tensor grad_features, Tensor grad_temperature)",
        _losses,
    ),
    Operator(
        "sup_con_backward(Tensor grad_loss, Tensor features, Tensor labels, Tensor? temperature_tensor, float temperature, "
        "Tensor lse, bool bfloat16_products, bool need_features, bool need_temperature) -> (Tensor grad_features, Tensor grad_temperature)"
    ),
    sup_con=plain,
)
