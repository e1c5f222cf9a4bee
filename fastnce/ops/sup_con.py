"""The supervised contrastive loss."""

from __future__ import annotations

from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common


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
        temperature: positive float, or 0-d tensor, which gets its gradient.
        reduction: ``"mean"`` over the samples that have a positive (0 if none has), ``"sum"``, or ``"none"`` for (N,), with 0
            for samples without a positive.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> loss = fastnce.sup_con(torch.randn(8, 32), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    """
    op = "sup_con"
    _checks.expect_float_tensor(op, "features", features, (2,), "(N, D)")
    labels = _checks.expect_labels(op, labels, features, "features")
    return sup_con_reduced(op, features, labels, temperature, reduction, backend)


def sup_con_reduced(
    op: str,
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    reduction: str,
    backend: str | None,
) -> Tensor:
    """:func:`sup_con` of validated features (N, D) and labels (N,) int64, under the name ``op``."""
    temperature = _checks.expect_temperature(op, temperature, features)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    kernels = backends.select(op, features, backend)
    with _common.no_autocast(features):
        losses, has_positive = kernels.sup_con(features, labels, temperature)
        if reduction == "mean":
            return losses.sum() / has_positive.sum().clamp(min=1)
        return _common.reduce(losses, reduction)
