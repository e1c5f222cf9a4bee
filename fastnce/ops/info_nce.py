"""InfoNCE."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import (
    accumulation_dtype,
    normalize_rows,
    over_temperature,
    rounded_unit_rows,
)
from fastnce.registry import Make, Op, Operator, Sample, declare


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
        similarity_dtype=similarity_dtype,
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

    ``options`` are those of :func:`plain`.
    """
    dtype = options.pop("similarity_dtype", None)
    name = op if dtype is None else f"{op}_fp8"
    kernels = backends.select(name, query, backend)
    rows = (query, key, negatives)
    with _common.no_autocast(query):
        if kernels is not backends.reference:
            name = "info_nce" if dtype is None else "info_nce_fp8"
            return _common.row_loss(name, kernels, rows, None, temperature, reduction, **options)
        losses = plain(*rows, temperature, **options, similarity_dtype=dtype)
        if reduction == "none":
            return losses
        return losses.sum() * _common.row_weight(losses.numel(), reduction)


def plain(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    self_logit: float | None,
    similarity_dtype: torch.dtype | None = None,
) -> Tensor:
    """``loss_i = log sum_j exp(s_ij / t) - s_ip / t``, one per query.

    With ``similarity_dtype=torch.float8_e4m3fn`` every s, the positive's too, is the product of rows that
    :func:`~fastnce.reference.normalize.rounded_unit_rows` has rounded. Gradients take no notice of the rounding: they are
    ``sum_j G_ij k_j`` over the rows as they were, with the coefficients G of the rounded similarities.

    Args:
        query: (B, N, D).
        key: (B, N, D); row i is the positive of query i.
        negatives: None, (M, D) shared by all queries, or (B, N, M, D) each query's own.
        temperature: t, a float or a 0-d tensor.
        normalize: s is the cosine instead of the dot product.
        symmetric: the mean of this loss and the one with query and key exchanged.
        in_batch: the other keys of the same batch element are negatives too.
        self_logit: a further constant s in every row's sum.
        similarity_dtype: None, or torch.float8_e4m3fn for normalised rows without negatives of each query's own.

    Returns:
        (B, N), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    negatives = None if negatives is None else negatives.to(dtype)
    rows = (query, key, negatives)
    if normalize:
        query, key, negatives = (x if x is None else normalize_rows(x) for x in rows)
    columns = _similarities(query, key, negatives, in_batch)
    if similarity_dtype is not None:
        rounded = (x if x is None else rounded_unit_rows(x) for x in rows)
        values = _similarities(*rounded, in_batch)
        columns = [s + (v - s).detach() for s, v in zip(columns, values, strict=True)]
    if self_logit is not None:
        columns.append(torch.full_like(columns[0][..., :1], self_logit))

    logits = over_temperature(torch.cat(columns, dim=-1), temperature)
    positive = logits[..., 0]
    if in_batch:  # of the square part alone: torch.export cannot tell the shorter side of the whole
        positive = logits[..., : query.shape[-2]].diagonal(dim1=-2, dim2=-1)
    lse = logits.logsumexp(dim=-1)
    if symmetric:
        lse = 0.5 * (lse + logits.logsumexp(dim=-2))
    return lse - positive


def _similarities(
    query: Tensor, key: Tensor, negatives: Tensor | None, in_batch: bool
) -> list[Tensor]:
    """Products of each query with the keys, (B, N, N) or with its own alone (B, N, 1), and with negatives (B, N, M)."""
    columns = [query @ key.mT if in_batch else (query * key).sum(dim=-1, keepdim=True)]
    if negatives is not None and negatives.dim() == 2:
        columns.append(query @ negatives.T)
    elif negatives is not None:
        columns.append((negatives @ query.unsqueeze(-1)).squeeze(-1))
    return columns


def _samples(make: Make) -> Iterator[Sample]:
    query = make(33, 20)
    pair = {"query": query, "positive_key": make.similar(query)}
    tau = torch.tensor(0.1, requires_grad=True)
    yield Sample("in_batch", pair)
    yield Sample("symmetric", {**pair, "symmetric": True, "temperature": tau})
    yield Sample("none", {**pair, "reduction": "none", "temperature": tau})
    yield Sample("symmetric_none", {**pair, "symmetric": True, "reduction": "none"})
    queue = {**pair, "negative_keys": make(70, 20)}
    yield Sample("queue", {**queue, "temperature": tau})
    yield Sample("queue_none", {**queue, "reduction": "none"})
    yield Sample("queue_in_batch", {**queue, "in_batch_negatives": True, "reduction": "sum"})
    own = {**pair, "negative_keys": make(33, 9, 20)}
    yield Sample("own", {**own, "reduction": "none", "temperature": tau})
    yield Sample("own_in_batch", {**own, "in_batch_negatives": True, "temperature": tau})
    small = make(8, 6)
    dot = {"query": small, "positive_key": make.similar(small), "normalize": False}
    yield Sample("dot", {**dot, "temperature": torch.tensor(1.5, requires_grad=True)})
    yield Sample("dot_symmetric", {**dot, "symmetric": True, "temperature": 1.5})
    query = make(3, 17, 24)
    batched = {"query": query, "positive_key": make.similar(query)}
    yield Sample("batched", {**batched, "temperature": tau})
    yield Sample("batched_symmetric", {**batched, "symmetric": True, "reduction": "none"})
    yield Sample("batched_queue", {**batched, "negative_keys": make(40, 24)})
    yield Sample("batched_own", {**batched, "negative_keys": make(3, 17, 5, 24)})


def _losses(query: Tensor, symmetric: bool, **_: object) -> tuple[Tensor, Tensor]:
    rows, dtype = tuple(query.shape[:2]), accumulation_dtype(query.dtype)
    lse = query.new_empty((2, *rows) if symmetric else rows, dtype=dtype)
    return query.new_empty(rows, dtype=dtype), lse


def _operators(name: str) -> tuple[Operator, Operator]:
    """Of queries and keys (B, N, D), and negatives None, (M, D) shared or (B, N, M, D) each query's own.

    Row (b, i) has the logits of query i with key j for all j (``in_batch``) or with key i alone, with its negatives, and the constant
    ``self_logit``, all divided by the temperature; rows are L2-normalised first if ``normalize``. The results are loss (B, N), with
    ``symmetric`` the mean with the loss of the columns, and lse (B, N) of the rows, or (2, B, N) of rows and columns.
    """
    inputs = (
        "Tensor query, Tensor key, Tensor? negatives, Tensor? temperature_tensor, float temperature"
    )
    options = (
        "bool normalize, bool symmetric, bool in_batch, float? self_logit, bool bfloat16_products"
    )
    needs = "bool need_query, bool need_key, bool need_negatives, bool need_temperature"
    grads = "Tensor grad_query, Tensor grad_key, Tensor grad_negatives, Tensor grad_temperature"
    return (
        Operator(
            f"{name}_forward({inputs}, {options}, float? grad_scale, bool mean, {needs}) -> "
            f"(Tensor loss, Tensor lse, {grads})",
            _losses,
        ),
        Operator(
            f"{name}_backward(Tensor grad_loss, {inputs}, Tensor lse, {options}, {needs}) -> ({grads})"
        ),
    )


declare(
    Op("info_nce", function=info_nce, samples=_samples, typical="queue_in_batch"),
    *_operators("info_nce"),
    info_nce=plain,
)
# The same with similarity_dtype=torch.float8_e4m3fn.
declare(Op("info_nce_fp8", "info_nce"), *_operators("info_nce_fp8"))
