"""InfoNCE."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends, reference
from fastnce.ops import _checks, _common


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    in_batch_negatives: bool | None = None,
    reduction: str = "mean",
    similarity_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""InfoNCE, the contrastive cross-entropy (van den Oord et al. 2018, https://arxiv.org/abs/1807.03748).

    .. math:: \ell_i = \log \sum_{j} \exp(s_{ij} / \tau) - s_{ii} / \tau

    with the cosine :math:`s` of query i with its own positive key and with all its negatives. Without ``negative_keys`` it is
    ``cross_entropy(normalize(query) @ normalize(positive_key).T / temperature, arange(N))``, with no N x N matrix on a fused
    backend.

    Args:
        query: (N, D) or (B, N, D); float64, float32, bfloat16 or float16. With a batch dimension, in-batch negatives come
            from the same batch element only.
        positive_key: the shape of ``query``; row i is the positive of query i.
        negative_keys: None for the other rows of ``positive_key``; (M, D) shared by all queries, such as a queue; or
            (N, M, D) / (B, N, M, D), each query's own.
        temperature: positive float, or tensor of one element, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products. An all-zero row has cosine 0 with everything
            and gradient 0.
        symmetric: the mean of the losses query to key and key to query (CLIP); in-batch negatives only.
        in_batch_negatives: whether the other rows of ``positive_key`` are negatives; by default only without
            ``negative_keys``.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for the shape of ``query`` without D.
        similarity_dtype: None, or ``torch.float8_e4m3fn``: all cosines, the positives' too, are products of rows rounded to
            e4m3 (each scaled to a largest magnitude of 448), accumulated in float32. A cosine is then off by about
            ``0.04 / sqrt(D)``; docs/precision.md has the bounds and what they do to the loss. Gradients ignore the rounding:
            they multiply the coefficients of this loss with the rows as they were. Needs ``normalize=True`` and no
            negatives of each query's own. The backends know it as the op ``"info_nce_fp8"``.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Example:
        >>> import torch, fastnce
        >>> query = torch.randn(128, 64, requires_grad=True)
        >>> fastnce.info_nce(query, torch.randn(128, 64)).backward()
        >>> query.grad.shape
        torch.Size([128, 64])
    """
    op = "info_nce"
    query, positive_key, negative_keys = _checks.same_dtype_under_autocast(
        query, positive_key, negative_keys
    )
    _checks.expect_float_tensor(op, "query", query, (2, 3), "(N, D) or (B, N, D)")
    _checks.expect_float_tensor(op, "positive_key", positive_key, (2, 3), "(N, D) or (B, N, D)")
    _checks.expect_shape(op, "positive_key", positive_key, tuple(query.shape), "the shape of query")
    _checks.expect_alike(op, "positive_key", positive_key, "query", query)
    if negative_keys is not None:
        _check_negatives(op, query, negative_keys)
    temperature = _checks.expect_temperature(op, temperature, query)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    in_batch = negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)
    if negative_keys is None and not in_batch:
        raise ValueError(
            f"{op}: in_batch_negatives=False leaves no negatives at all. Pass negative_keys, or drop in_batch_negatives."
        )
    if symmetric and negative_keys is not None:
        raise ValueError(
            f"{op}: symmetric=True has no meaning with negative_keys, which belong to the queries alone. "
            f"Drop one, or average two calls."
        )

    if similarity_dtype is not None:
        _check_similarity_dtype(op, similarity_dtype, normalize, negative_keys)

    batched = query.dim() == 3
    if not batched:
        query, positive_key = query.unsqueeze(0), positive_key.unsqueeze(0)
        if negative_keys is not None and negative_keys.dim() == 3:
            negative_keys = negative_keys.unsqueeze(0)
    loss = info_nce_reduced(
        op,
        query,
        positive_key,
        negative_keys,
        temperature,
        normalize=bool(normalize),
        symmetric=bool(symmetric),
        in_batch=in_batch,
        self_logit=None,
        **({} if similarity_dtype is None else {"similarity_dtype": similarity_dtype}),
        reduction=reduction,
        backend=backend,
    )
    return loss.squeeze(0) if reduction == "none" and not batched else loss


def _check_negatives(op: str, query: Tensor, negatives: Tensor) -> None:
    shape = "(M, D), (N, M, D) or (B, N, M, D)"
    _checks.expect_float_tensor(op, "negative_keys", negatives, (2, 3, 4), shape)
    own = query.dim() + 1
    if negatives.dim() not in (2, own):
        expected = "(M, D) or (N, M, D)" if own == 3 else "(M, D) or (B, N, M, D)"
        raise ValueError(
            f"{op}: negative_keys must have the shape {expected} for a query of shape {_checks.shape_of(query)}, "
            f"got {_checks.shape_of(negatives)}."
        )
    size, dim = negatives.shape[-2], query.shape[-1]
    expected = (size, dim) if negatives.dim() == 2 else (*query.shape[:-1], size, dim)
    _checks.expect_shape(op, "negative_keys", negatives, expected, "query is", query)
    _checks.expect_alike(op, "negative_keys", negatives, "query", query)


def _check_similarity_dtype(
    op: str, dtype: object, normalize: bool, negatives: Tensor | None
) -> None:
    if dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{op}: similarity_dtype must be None or torch.float8_e4m3fn, got {dtype!r}. "
            f"None multiplies in the dtype of the inputs: convert those for another, e.g. query.bfloat16()."
        )
    if not normalize:
        raise ValueError(
            f"{op}: similarity_dtype={dtype} needs normalize=True, got normalize=False: its error is that of cosines. "
            f"Drop one of the two."
        )
    if negatives is not None and negatives.dim() > 2:
        raise ValueError(
            f"{op}: similarity_dtype={dtype} needs negative_keys of shape (M, D) or None, got {_checks.shape_of(negatives)}: "
            f"each query's own negatives are no matrix product. Drop similarity_dtype."
        )


def info_nce_reduced(
    op: str,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    reduction: str,
    backend: str | None,
    **options: bool | float | torch.dtype | None,
) -> Tensor:
    """The losses (B, N), their sum or mean; inputs validated, (B, N, D).

    ``options`` are those of :func:`fastnce.reference.info_nce`.
    """
    rounded = options.get("similarity_dtype") is not None
    kernels = backends.select(f"{op}_fp8" if rounded else op, query, backend)
    with _common.no_autocast(query):
        if kernels is reference:
            losses = reference.info_nce(query, key, negatives, temperature, **options)
            if reduction == "none":
                return losses
            return losses.sum() * _common.row_weight(losses.numel(), reduction)
        _checks.expect_fusable(op, query)
        grad_now = reduction != "none" and _common.wants_grad(query, key, negatives, temperature)
        loss, _ = InfoNCEFunction.apply(
            *_common.distinct((query, key, negatives)),
            temperature,
            kernels,
            reduction,
            grad_now,
            options,
        )
        return loss


class InfoNCEFunction(torch.autograd.Function):
    """Autograd of :func:`info_nce` over the kernels of any fused backend.

    A reduced loss gives every row the same, known weight, so the kernels return loss and gradients together and the backward
    only scales them. Unreduced, the backward recomputes the similarities from the saved log-sum-exp.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        temperature: float | Tensor,
        kernels: ModuleType,
        reduction: str,
        grad_now: bool,
        options: dict,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[:4]
        kernel_mean = _common.kernel_mean(reduction, query.dtype)
        losses, lse, grads = kernels.info_nce_forward(
            query,
            key,
            negatives,
            temperature,
            **options,
            grad_scale=1.0 if grad_now else None,
            mean=kernel_mean,
            needs=needs,
        )
        ctx.reduced = reduction != "none"
        if ctx.reduced:
            weight = _common.row_weight(losses.numel(), reduction)
            ctx.factor = 1.0 if kernel_mean else weight
            handle = _common.handle(ctx, query, grad_now)
            ctx.save_for_backward(handle, *grads)
            return losses.sum() * weight, handle
        ctx.kernels, ctx.options, ctx.needs = kernels, options, needs
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(query, key, negatives, lse, saved)
        return losses, None

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, _: object):
        nothing = (None,) * 4
        if ctx.reduced:
            return *_common.scaled(saved[1:], grad_loss, ctx.factor), *nothing
        query, key, negatives, lse, temperature = saved
        temperature = ctx.temperature if temperature is None else temperature
        grads = ctx.kernels.info_nce_backward(
            grad_loss, query, key, negatives, temperature, lse, **ctx.options, needs=ctx.needs
        )
        return *grads, *nothing
