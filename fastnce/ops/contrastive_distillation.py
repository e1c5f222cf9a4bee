"""The contrastive cross-entropy with a teacher's softmax for the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnce import backends
from fastnce.blocks import tiles
from fastnce.ops import _checks, _common
from fastnce.ops.info_nce import info_nce
from fastnce.ops.masked_info_nce import negatives_lse, weights_of
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Op, declare


def contrastive_distillation(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    teacher_temperature: float | Tensor | None = None,
    normalize: bool = True,
    symmetric: bool = False,
    reduction: str = "mean",
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The cross-entropy of the softmax over the keys with the teacher's, which is that of its own rows.

    .. math:: \ell_i = -\sum_j p_{ij} \log \frac{e^{s_{ij} / \tau}}{\sum_l e^{s_{il} / \tau}}, \qquad
        p_{ij} = \frac{e^{\hat s_{ij} / \hat\tau}}{\sum_l e^{\hat s_{il} / \hat\tau}}

    with the cosines s of the student's rows and :math:`\hat s` of the teacher's. It is open_clip's loss of distillation with
    ``symmetric=True``; with a queue's keys it is SEED's (Fang et al. 2021, https://arxiv.org/abs/2101.04731). Neither matrix is made.

    Args:
        query: (N, D), the student's; float64, float32, bfloat16 or float16.
        key: (M, D), the student's.
        teacher_query: (N, E), of the same samples. The teacher's rows get no gradient.
        teacher_key: (M, E).
        temperature: positive float, or tensor of one element, which gets its gradient.
        teacher_temperature: of the teacher's cosines, without gradient; by default ``temperature``.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        symmetric: the mean of the losses query to key and key to query, of as many keys as queries.
        reduction: ``"mean"`` over the queries, ``"sum"``, or ``"none"`` for (N,).
        weights: (N,) floats, a weight for each loss; ``"mean"`` divides by their sum. No gradient.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs). It is at least the entropy of the teacher's softmax.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> image, text = torch.randn(2, 32, 64, requires_grad=True)
        >>> teacher_image, teacher_text = torch.randn(2, 32, 128)
        >>> loss = fastnce.contrastive_distillation(image, text, teacher_image, teacher_text, symmetric=True)
    """
    op = "contrastive_distillation"
    query, key = _checks.same_dtype_under_autocast(query, key)
    teacher_query, teacher_key = _checks.same_dtype_under_autocast(teacher_query, teacher_key)
    given = {"query": query, "key": key}
    given |= {"teacher_query": teacher_query, "teacher_key": teacher_key}
    for name, x in given.items():
        _checks.expect_rows(op, name, x)
    _checks.expect_shape(op, "key", key, (len(key), query.shape[1]), "query is", query)
    _checks.expect_alike(op, "key", key, "query", query)
    depth = teacher_query.shape[1]
    of_student = "a row for each of the student's"
    for name, x, like in ("query", teacher_query, query), ("key", teacher_key, key):
        _checks.expect_shape(op, f"teacher_{name}", x, (len(like), depth), of_student)
    _checks.expect_alike(op, "teacher_key", teacher_key, "teacher_query", teacher_query)
    if teacher_query.device != query.device:
        raise ValueError(
            f"{op}: teacher_query is on {teacher_query.device} but query is on {query.device}. "
            f"Move the teacher's rows to {query.device}."
        )
    square = len(key) == len(query)
    if symmetric and not square:
        raise ValueError(
            f"{op}: symmetric=True needs as many keys as queries, got {len(key)} and {len(query)}. Drop symmetric."
        )
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    temperature = _checks.expect_temperature(op, temperature, query)
    of_teacher = temperature
    if teacher_temperature is not None:
        of_teacher = _checks.expect_temperature(op, teacher_temperature, query)
    of_losses = weights_of(op, weights, query)
    of_losses = None if of_losses is None else of_losses[0]
    kernels = backends.select("info_nce", query, backend, (query, key, None), symmetric, called=op)
    options = {"temperature": temperature, "normalize": normalize, "backend": backend}
    with _common.no_autocast(query):
        rows = (query, key, teacher_query.detach(), teacher_key.detach())
        units = [x.to(accumulation_dtype(query.dtype)) for x in rows]
        units = [normalize_rows(x) for x in units] if normalize else units
        left, right, *teacher = units
        mean = plain if kernels is backends.reference else Mean.apply
        expected = (left * mean(*teacher, right, of_teacher)).sum(dim=-1)
        if symmetric:
            others = (right * mean(*reversed(teacher), left, of_teacher)).sum(dim=-1)
            expected = 0.5 * (expected + others)
        if square:  # InfoNCE is the log-sum-exp less the pair's logit.
            loss = info_nce(
                query, key, symmetric=symmetric, reduction=reduction, weights=weights, **options
            )
            more = (left * right).sum(dim=-1) - expected
            return loss + _common.reduced(over_temperature(more, temperature), of_losses, reduction)
        losses = negatives_lse(query, key, op=op, **options) - over_temperature(
            expected, temperature
        )
        return _common.reduced(losses, of_losses, reduction)


def plain(x: Tensor, y: Tensor, values: Tensor, temperature: float | Tensor) -> Tensor:
    """``sum_j p_ij v_j``, p the softmax of ``x_i . y_j / t``: (N, E), (M, E), (M, D) -> (N, D)."""
    t = temperature.detach() if isinstance(temperature, Tensor) else temperature
    return torch.softmax((x / t) @ y.T, dim=-1) @ values


class Mean(torch.autograd.Function):
    """``plain``, a block of rows at a time. Only the values get a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, values: Tensor, temperature: float | Tensor) -> Tensor:
        x = x / temperature
        out = values.new_empty(len(x), values.shape[1])
        for _, part in tiles.blocks(1, len(x), len(y), x):
            torch.mm(torch.softmax(x[part] @ y.T, dim=-1), values, out=out[part])
        ctx.save_for_backward(x, y)
        return out

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor, Tensor], grad: Tensor):
        x, y = saved
        of_values = grad.new_zeros(len(y), grad.shape[1])
        with _common.no_autocast(x):  # in which a backward may be called, too
            for _, part in tiles.blocks(1, len(x), len(y), x):
                of_values.addmm_(torch.softmax(x[part] @ y.T, dim=-1).T, grad[part])
        return None, None, of_values, None


declare(
    Op(
        "contrastive_distillation",
        runs=("info_nce_forward", "info_nce_backward"),
        function=contrastive_distillation,
    )
)
