"""InfoNCE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import OverRanks
from fastnce.ops.labelled_lse import BothLSE
from fastnce.ops.masked_info_nce import WITHOUT_ID, Masks, masks_of, rows_loss, weights_of
from fastnce.ops.masked_info_nce import plain as masked_plain
from fastnce.ops.softmax_shapes import is_plain, shaped_loss, softmax_of
from fastnce.ranks import Block, Exchange, Fact, Gather
from fastnce.reference.normalize import (
    accumulation_dtype,
    normalize_rows,
    over_temperature,
    rounded_unit_rows,
)
from fastnce.registry import LEFT_OUT, Form, Make, Op, Operator, Sample, declare

Gradients = tuple[Tensor | None, ...]


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
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    guide: Sequence[Tensor] | None = None,
    guide_margin: float = 0.0,
    relative_margin: bool = False,
    weights: Tensor | None = None,
    decoupled: bool = False,
    return_rank: bool = False,
    margin: float = 0.0,
    angular_margin: float = 0.0,
    hardness: float = 0.0,
    label_smoothing: float = 0.0,
    key_temperature: Tensor | None = None,
    key_bias: Tensor | None = None,
    negative_bias: Tensor | None = None,
    negative_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
        temperature: positive float, tensor of one element, or (N,) / (B, N), one for each query; tensors get their gradients.
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
        query_ids: (N,) or (B, N) integers, as ``query`` has rows: a key of the same id is no negative of the query, such as a
            duplicate, or another sample of its label. The query's own positive always stays. No matrix is made of this.
        key_ids: the ids of the rows of ``positive_key`` as negatives of other queries; by default ``query_ids``.
        negative_ids: those of ``negative_keys``, (M,), (N, M) or (B, N, M). None of these is left out by default.
        key_mask: bool, in the shape of ``query_ids``: False where a row of ``positive_key`` is nobody's negative.
        negative_mask: bool, in the shape of ``negative_ids``: False where there is no key, as in rows of different lengths.
            What is there, NaN included, reaches nothing.
        guide: another model's rows of ``(query, positive_key)``, or of ``(query, positive_key, negative_keys)``, shared, in any
            dimension: what it finds more similar to the query than its positive is no negative (GISTEmbed,
            https://arxiv.org/abs/2402.16829). What is as similar, such as a duplicate, stays. They get no gradient.
        guide_margin: taken from the guide's cosine with the positive before it is compared; with ``relative_margin`` this share
            of it.
        relative_margin: see ``guide_margin``.
        weights: floats in the shape of ``query_ids``, a weight for each loss; ``"mean"`` divides by their sum. No gradient.
        decoupled: the positive is not in the sum (Yeh et al. 2021, https://arxiv.org/abs/2110.06848). The loss of a query without
            negatives is 0; with ``symmetric`` also that of one whose key has none.
        return_rank: the result is ``(loss, rank)`` with how many negatives are more similar to the query than its positive, int64:
            top-1 accuracy is ``(rank == 0).float().mean()``. Biases count, margins and hardness do not.
        margin: taken from the similarity with the positive, before the temperature (CosFace, https://arxiv.org/abs/1801.09414).
        angular_margin: added to the angle between query and positive, in radians (ArcFace, https://arxiv.org/abs/1801.07698).
            Of angles that this would take past pi, the cosine less ``angular_margin * sin(angular_margin)`` is taken instead.
        hardness: this times the similarity, without gradient, is added to the logits of the negatives.
        label_smoothing: this share of the target is spread evenly over all candidates, the positive among them, as in
            ``torch.nn.functional.cross_entropy``. Not with masks.
        key_temperature: positive, in the shape of ``query_ids``: the logits of each row of ``positive_key`` are divided by its own
            too. Only without ``negative_keys``. Gets its gradient.
        key_bias: finite, in the shape of ``query_ids``: added to the logits of each row of ``positive_key``, also as positive, such
            as ``-log q`` of its sampling probability (Yi et al. 2019, https://doi.org/10.1145/3298689.3346996). Gets its gradient.
        negative_bias: the same of ``negative_keys``, in the shape of ``negative_ids``.
        negative_weights: not negative, in the shape of ``negative_ids``: the exponential of each negative is multiplied by it. No
            gradient.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs). With ``return_rank`` also the ranks, in the shape of ``query`` without D;
        with ``symmetric`` two of these, of queries among the other keys and of keys among the other queries.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
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
    numbers = (margin, angular_margin, hardness, label_smoothing)
    of_rows = (key_temperature, key_bias, negative_bias, negative_weights)
    plain_softmax = is_plain(temperature, *numbers, *of_rows)
    if plain_softmax:
        temperature = _checks.expect_temperature(op, temperature, query)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    in_batch = negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)
    _check_use_of_negatives(op, negative_keys, in_batch, symmetric)
    if similarity_dtype is not None:
        _check_similarity_dtype(op, similarity_dtype, normalize, negative_keys)

    named = {"query_ids": query_ids, "key_ids": key_ids, "negative_ids": negative_ids}
    named |= {"key_mask": key_mask, "negative_mask": negative_mask, "guide": guide}
    masked = any(x is not None for x in named.values())
    masks, loss_of = None, rows_loss
    if masked or weights is not None or decoupled or return_rank or not plain_softmax:
        if similarity_dtype is not None:
            raise ValueError(
                f"{op}: similarity_dtype goes with no mask, weight or rank, and no other shape of the softmax. Drop one."
            )
        margins = {"guide_margin": guide_margin, "relative_margin": relative_margin}
        masks = masks_of(op, query, negative_keys, in_batch, symmetric, **named, **margins)
        weights = weights_of(op, weights, query)
        if not plain_softmax:
            softmax, temperature = softmax_of(
                op,
                (query, positive_key, negative_keys),
                temperature,
                *numbers,
                *of_rows,
                normalize=normalize,
                symmetric=symmetric,
                decoupled=decoupled,
                masked=masked,
            )
            loss_of = functools.partial(shaped_loss, softmax=softmax)

    batched = query.dim() == 3
    if not batched:
        query, positive_key = query.unsqueeze(0), positive_key.unsqueeze(0)
        if negative_keys is not None and negative_keys.dim() == 3:
            negative_keys = negative_keys.unsqueeze(0)
    rows = (query, positive_key, negative_keys)
    options = {
        "normalize": bool(normalize),
        "symmetric": bool(symmetric),
        "in_batch": in_batch,
    }
    if masks is not None:
        loss, rank = loss_of(
            op,
            rows,
            masks,
            weights,
            temperature,
            reduction,
            backend,
            rank=return_rank,
            decoupled=bool(decoupled),
            **options,
        )
        loss = loss.squeeze(0) if reduction == "none" and not batched else loss
        if not return_rank:
            return loss
        return loss, rank if batched else rank.squeeze(1 if symmetric else 0)
    options["self_logit"] = None
    name = op if similarity_dtype is None else f"{op}_fp8"
    kernels = backends.select(name, query, backend, rows, bool(symmetric))
    with _common.no_autocast(query):
        if kernels is not backends.reference:
            loss = _common.fused_row_loss(
                op, kernels, rows, (), temperature, reduction, operators=name, **options
            )
        else:
            loss = plain(*rows, temperature, **options, similarity_dtype=similarity_dtype)
            if reduction != "none":
                loss = loss.sum() * _common.row_weight(loss.numel(), reduction)
    return loss.squeeze(0) if reduction == "none" and not batched else loss


def _form(rows: Sequence[Tensor | None], symmetric: bool) -> Form:
    query, key, negatives = rows
    columns = query.shape[-2] if negatives is None else negatives.shape[-2]
    if negatives is not None and negatives.dim() > 2:
        name = "own negatives"
    elif symmetric:
        name = "symmetric"
    else:
        name = "both gradients" if _common.wants_grad(key, negatives) else "keys fixed"
    return Form(name, query.numel() * columns, query.shape[-1])


def _check_use_of_negatives(
    op: str, negatives: Tensor | None, in_batch: bool, symmetric: bool
) -> None:
    if negatives is None and not in_batch:
        raise ValueError(
            f"{op}: in_batch_negatives=False leaves no negatives at all. Pass negative_keys, or drop in_batch_negatives."
        )
    if symmetric and negatives is not None:
        raise ValueError(
            f"{op}: symmetric=True has no meaning with negative_keys, which belong to the queries alone. "
            f"Drop one, or average two calls."
        )


def _check_negatives(op: str, query: Tensor, negatives: Tensor, may_be_empty: bool = False) -> None:
    shape = "(M, D), (N, M, D) or (B, N, M, D)"
    _checks.expect_float_tensor(op, "negative_keys", negatives, (2, 3, 4), shape, may_be_empty)
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
    ``fastnce.reference.normalize.rounded_unit_rows`` has rounded. Gradients take no notice of the rounding: they are
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


@torch.compiler.disable
def over_ranks(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    symmetric: bool = False,
    in_batch_negatives: bool | None = None,
    negatives_of: str = "own",
    reduction: str = "mean",
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    guide: Sequence[Tensor] | None = None,
    guide_margin: float = 0.0,
    relative_margin: bool = False,
    weights: Tensor | None = None,
    decoupled: bool = False,
    return_rank: bool = False,
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``fastnce.info_nce`` of the queries and keys of all ranks, exactly: all keys of all ranks are negatives.

    Args:
        query: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        positive_key: (N, D); row i is the positive of query i.
        negative_keys: None; (M, D), further negatives, such as a queue that all ranks have, or this rank's hard negatives; or
            (N, M, D), each query's own.
        temperature: positive float, or tensor of one element, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        symmetric: the mean of the losses query to key and key to query (CLIP); without ``negative_keys`` only.
        in_batch_negatives: whether the other keys of all ranks are negatives; by default only without ``negative_keys``.
        negatives_of: whose negatives ``negative_keys`` are: ``"own"``, of this rank's queries; or ``"all"``, of the queries of all
            ranks. Those are (M, D), where M may differ between ranks, and be 0 on some.
        reduction: ``"mean"`` over the queries of all ranks, ``"sum"``, or ``"none"`` for this rank's (N,).
        query_ids, key_ids, negative_ids, key_mask, negative_mask: as in ``fastnce.info_nce``, of this rank's rows. Ids are the
            same or not on whatever ranks they are.
        guide, guide_margin, relative_margin: as there, of this rank's rows.
        weights: (N,) floats, a weight for each loss; ``"mean"`` divides by the sum of those of all ranks. No gradient.
        decoupled: the positive is not in the sum. The loss of a query without negatives is 0.
        return_rank: the result is ``(loss, rank)`` with how many negatives of all ranks are more similar to each of this rank's
            queries than its positive: int64 (N,), or with ``symmetric`` (2, N), also of keys among the other queries.
        group, strategy, gradient_scale, check: see ``fastnce.distributed``.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Examples:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> query = torch.randn(128, 64, requires_grad=True)
        >>> fastnce.distributed.info_nce(query, torch.randn(128, 64), symmetric=True).backward()
    """
    op = "info_nce"
    call = OverRanks(op, group, temperature, reduction, strategy, gradient_scale, check, backend)
    options = {"normalize": normalize, "symmetric": symmetric}
    named = {"query_ids": query_ids, "key_ids": key_ids, "negative_ids": negative_ids}
    named |= {"key_mask": key_mask, "negative_mask": negative_mask, "guide": guide}
    margins = {"guide_margin": guide_margin, "relative_margin": relative_margin}
    if call.alone:
        _check_whose(op, negatives_of, negative_keys)
        options |= {"in_batch_negatives": in_batch_negatives, **named, **margins}
        options |= {"weights": weights, "decoupled": decoupled, "return_rank": return_rank}
        return info_nce(query, positive_key, negative_keys, **options, **call.plain)
    in_batch = negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)
    query, positive_key, negative_keys = _checks.same_dtype_under_autocast(
        query, positive_key, negative_keys
    )
    masked = decoupled or return_rank or any(x is not None for x in named.values())
    shared = negatives_of == "all"
    masks = None

    def validate() -> dict[str, Fact]:
        nonlocal masks, weights
        _checks.expect_rows(op, "query", query, may_be_empty=True)
        _checks.expect_rows(
            op, "positive_key", positive_key, may_be_empty=True, like=query, like_name="query"
        )
        _check_use_of_negatives(op, negative_keys, in_batch, symmetric)
        if negative_keys is not None:
            _check_negatives(op, query, negative_keys, may_be_empty=True)
        _check_whose(op, negatives_of, negative_keys)
        if masked:
            masks = masks_of(op, query, negative_keys, in_batch, symmetric, **named, **margins)
        weights = weights_of(op, weights, query)
        given = [name for name, x in (*named.items(), ("weights", weights)) if x is not None]
        of_negatives = len(negative_keys) if shared else 0
        return {
            "rows": of_negatives + (len(query) if in_batch or not shared else 0),
            "normalize": bool(normalize),
            "symmetric": bool(symmetric),
            "in_batch_negatives": in_batch,
            "negatives_of": negatives_of,
            "the masks and weights given": ", ".join(given) or "none",
            "the guide's D": 0 if guide is None else guide[0].shape[-1],
            "decoupled": bool(decoupled),
            "return_rank": bool(return_rank),
            "whether query needs a gradient": _common.wants_grad(query, temperature),
            "whether positive_key needs a gradient": _common.wants_grad(positive_key),
            "whether negative_keys need a gradient": _common.wants_grad(negative_keys),
        }

    rows = (query, positive_key, negative_keys)
    # Of bfloat16 rows the other operator makes products in fp32 on the CPU: five of them take longer than both directions.
    wide = isinstance(query, Tensor) and query.dtype in (torch.float32, torch.float64)
    one_pass = symmetric and normalize and not masked and wide
    kernel_op, of_form = ("masked_info_nce", (rows,)) if masked else (op, (rows, bool(symmetric)))
    if one_pass:
        kernel_op, of_form = "labelled_lse", None
    call.agree(kernel_op, query, validate, of_form=of_form)
    tau = call.temperature
    blocks = _Blocks(
        call.kernels,
        call.exchange if in_batch or shared else None,
        masks,
        normalize=bool(normalize),
        in_batch=in_batch,
        shared=shared,
        decoupled=bool(decoupled),
        rank=bool(return_rank),
    )
    if negative_keys is not None and negative_keys.dim() == 3:
        negative_keys = negative_keys.unsqueeze(0)
    one_weight = reduction != "none" and weights is None and not (symmetric and masked)

    def losses(query: Tensor, key: Tensor, blocks: _Blocks) -> tuple[Tensor, Tensor | None]:
        inputs = (query, key, negative_keys, tau)
        if not (one_weight and blocks.fit_one_call(negative_keys)):
            return _BlocksFunction.apply(*inputs, blocks)
        return _GatheredFunction.apply(*inputs, blocks, _common.wants_grad(*inputs))

    with _common.no_autocast(query):
        if one_pass:
            found, rank = _symmetric(query, positive_key, tau, call), None
        else:
            found, rank = losses(query, positive_key, blocks)
        if symmetric and not one_pass:
            reverse, reverse_rank = losses(positive_key, query, blocks.reverse())
            found = 0.5 * (found + reverse)
            rank = torch.stack([rank, reverse_rank]) if return_rank else None
        if decoupled:
            found = found.masked_fill(found == -torch.inf, 0)
        if weights is not None:
            weights = weights.squeeze(0)
            found = found * weights
        loss = call.reduce(found, weights, query.dtype)
    return (loss, rank) if return_rank else loss


def _symmetric(query: Tensor, key: Tensor, tau: float | Tensor, call: OverRanks) -> Tensor:
    """(N,) float64: the mean of both directions' losses of unit rows, with every product of queries and keys for both."""
    lse = BothLSE.apply(query, key, tau, call.exchange, call.kernels)
    dtype = accumulation_dtype(query.dtype)
    units = normalize_rows(query.to(dtype)) * normalize_rows(key.to(dtype))
    positive = units.sum(dim=1).double() / tau
    ratios = lse - positive[:, None]
    return torch.logaddexp(ratios, torch.zeros_like(ratios)).mean(dim=1)


def _check_whose(op: str, negatives_of: object, negatives: Tensor | None) -> None:
    _checks.expect_choice(op, "negatives_of", negatives_of, ("own", "all"))
    if negatives_of == "all" and (negatives is None or negatives.dim() != 2):
        got = None if negatives is None else _checks.shape_of(negatives)
        raise ValueError(
            f"{op}: negatives_of='all' needs negative_keys of shape (M, D), got {got}. A rank without any passes (0, D)."
        )


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """This rank's queries and positives against one block of other keys after the other.

    A block is rows, with ``masks`` their ids, and with a guide its rows. With r the exponentials of a block relative to the
    positive's, its loss is ``log(1 + r)``; with ``masks`` it is decoupled, ``log r``. The blocks' r add up, and nothing cancels
    where the positive dominates.

    Args:
        kernels: the backend.
        exchange: None: other ranks' rows are no negatives.
        masks: of this rank's rows; None: the op without masks computes the blocks.
        normalize, in_batch, decoupled, rank: as in ``info_nce``.
        shared: the negatives of this rank are those of all ranks' queries.
        left_out: (N,) bool, of queries that have no negatives: in reverse, keys that are nobody's.
    """

    kernels: ModuleType
    exchange: Exchange | None
    masks: Masks | None
    normalize: bool
    in_batch: bool
    shared: bool
    decoupled: bool
    rank: bool
    left_out: Tensor | None = None

    def reverse(self) -> _Blocks:
        """Of the keys against the queries."""
        if self.masks is None:
            return self
        query_ids, key_ids, *_ = self.masks
        left_out = None if key_ids is None else key_ids[0] == LEFT_OUT
        masks = Masks() if query_ids is None else Masks(key_ids, query_ids)
        return dataclasses.replace(self, masks=masks, left_out=left_out)

    def fit_one_call(self, negatives: Tensor | None) -> bool:
        """Whether a fused backend can compute loss and gradients together, against all keys at once."""
        gathers = isinstance(self.exchange, Gather) and (negatives is None or self.shared)
        return gathers and self.kernels is not backends.reference

    def own(self, negatives: Tensor | None) -> Block | None:
        """This rank's negatives as a block."""
        masks = self.masks or Masks()
        return self._block(negatives, masks.negative_ids, masks.guide_negatives)

    def travelling(self, key: Tensor, negatives: Tensor | None) -> Block:
        """The block of other ranks' queries: what this rank has of keys, and then of negatives."""
        masks = self.masks or Masks()
        keys = self._block(key, _first(masks.key_ids), _first(masks.guide_key))
        if not self.shared:
            return keys
        return _joined(keys, self.own(negatives)) if self.in_batch else self.own(negatives)

    def _block(self, rows: Tensor | None, ids: Tensor | None, guide: Tensor | None) -> Block | None:
        if rows is None or self.masks is None:
            return None if rows is None else (rows,)
        if ids is None:
            ids = rows.new_full(rows.shape[:-1], WITHOUT_ID, dtype=torch.int64)
        return (rows, ids) if guide is None else (rows, ids, guide)

    def trip(self, key: Tensor, negatives: Tensor | None) -> Iterator[tuple[int, Block]]:
        """``(step, block)``: this rank's at step 0, then those of others."""
        if self.exchange is None:
            return iter([(0, (key[:0],))])
        return self.exchange.trip(self.travelling(key, negatives))

    def gives_back(self, needs: Sequence[bool]) -> bool:
        """Whether any gradient is for another rank; ``needs`` are of query, key and negatives."""
        return self.exchange is not None and (
            self.in_batch and needs[1] or self.shared and needs[2]
        )

    def _inputs(
        self, query: Tensor, key: Tensor, block: Block | None, first: bool, decoupled: bool = True
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], dict[str, object]] | None:
        """Rows, masks and options of the kernels; None where no query has a negative."""
        in_batch = self.in_batch and first
        if block is not None and block[0].shape[-2] == 0:
            block = None
        if len(query) == 0 or (block is None and not in_batch):
            return None
        negatives, ids, guide = (*(block or ()), None, None, None)[:3]
        rows = (query[None], key[None], negatives)
        options = {"normalize": self.normalize, "symmetric": False, "in_batch": in_batch}
        if self.masks is None:
            return rows, (), {**options, "self_logit": None}
        of_keys = {} if in_batch else {"key_ids": None, "guide_key": None}
        masks = self.masks._replace(negative_ids=ids, guide_negatives=guide, **of_keys)
        return rows, masks, {**options, "decoupled": decoupled}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        tau: float | Tensor,
        block: Block | None,
        first: bool,
        *,
        decoupled: bool = True,
        scale: float | None = None,
        needs: Sequence[bool] = (False,) * 4,
    ) -> tuple[Tensor, Tensor, Tensor | None, Gradients] | None:
        """Losses (N,) against a block, and the keys in batch if it is the ``first``; lse, ranks, and gradients of scale * losses.

        None where no query has a negative.
        """
        found = self._inputs(query, key, block, first, decoupled)
        if found is None:
            return None
        rows, masks, options = found
        needs = _present(rows, needs)
        if self.kernels is backends.reference:
            losses, ranks = _plain(masks, options)(*rows, tau)
            lse, grads = losses, ()
        elif self.masks is None:
            ranks = None
            losses, lse, grads = self.kernels.info_nce_forward(
                *rows, tau, **options, grad_scale=scale, needs=needs
            )
        else:
            weights = None
            if scale is not None:
                dtype = accumulation_dtype(query.dtype)
                weights = query.new_full((1, len(query)), scale, dtype=dtype)
            losses, lse, ranks, grads = self.kernels.masked_info_nce_forward(
                *rows, *masks, weights, tau, **options, rank=self.rank, needs=needs
            )
        losses, ranks = losses[0], ranks[0] if self.rank else None
        if self.left_out is not None:
            losses = losses.masked_fill(self.left_out, -torch.inf)
            ranks = ranks.masked_fill(self.left_out, 0) if self.rank else None
        return losses, lse, ranks, grads

    def backward(
        self,
        weights: Tensor,
        query: Tensor,
        key: Tensor,
        tau: float | Tensor,
        block: Block | None,
        first: bool,
        lse: Tensor,
        needs: Sequence[bool],
    ) -> Gradients:
        """The gradients of ``(weights * losses).sum()`` for query, key, the block's rows and temperature."""
        rows, masks, options = self._inputs(query, key, block, first)
        needs, inputs = _present(rows, needs), (*rows, tau)
        if self.kernels is backends.reference:
            function = _plain(masks, options)
            grads = _common.gradients(lambda *x: function(*x)[0], inputs, needs, weights[None])
        else:
            op = "info_nce" if self.masks is None else "masked_info_nce"
            grads = getattr(self.kernels, f"{op}_backward")(
                weights[None], *rows, *masks, tau, lse, **options, needs=needs
            )
        grad_query, grad_key, *others = grads
        return _first(grad_query), _first(grad_key), *others


def _plain(masks: Masks | tuple[()], options: dict[str, object]) -> Callable:
    """``(query, key, negatives, temperature)`` -> losses, and ranks if there are masks."""
    if masks:
        return lambda *x: masked_plain(*x[:3], masks, x[3], **options)
    return lambda *x: (plain(*x, **options), None)


def _present(rows: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[bool, ...]:
    """Which gradients are needed of the negatives that there are."""
    return (*needs[:2], needs[2] and rows[2] is not None, needs[3])


def _joined(*blocks: Block) -> Block:
    """One block with the rows of all."""
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _first(x: Tensor | None) -> Tensor | None:
    """Without the batch dimension of 1."""
    return None if x is None else x[0]


class _BlocksFunction(torch.autograd.Function):
    """Losses (N,) float64 of this rank's queries against the blocks of all ranks, decoupled -inf without negatives; and ranks."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        tau: float | Tensor,
        blocks: _Blocks,
    ) -> tuple[Tensor, Tensor | None]:
        own = blocks.own(negatives)
        ratios = query.new_full((len(query),), -torch.inf, dtype=torch.float64)  # log r
        ranks = torch.zeros_like(ratios, dtype=torch.int64) if blocks.rank else None
        found = []  # the blocks' losses and lse
        for step, block in blocks.trip(key, negatives):
            block = block if step > 0 else own
            answer = blocks.forward(query, key, tau, block, first=step == 0)
            found.append(answer and answer[:2])
            if answer is None:
                continue
            each = answer[0].double()
            if blocks.masks is None:
                each = each + torch.log(-torch.expm1(-each))
            ratios = torch.logaddexp(ratios, each)
            if ranks is not None:
                ranks += answer[2]
        losses = ratios
        if not blocks.decoupled:
            losses = torch.logaddexp(ratios, torch.zeros_like(ratios))
        ctx.blocks, ctx.found = blocks, found
        ctx.tau = None if isinstance(tau, Tensor) else tau
        ctx.save_for_backward(query, key, negatives, tau if ctx.tau is None else None, losses)
        if ranks is not None:
            ctx.mark_non_differentiable(ranks)
        return losses, ranks

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor, *_: object):
        query, key, negatives, tau, losses = saved
        tau = ctx.tau if tau is None else tau
        blocks, needs = ctx.blocks, ctx.needs_input_grad[:4]
        acc = accumulation_dtype(query.dtype)
        own, gives_back = blocks.own(negatives), blocks.gives_back(needs)
        losses = losses.masked_fill(losses == -torch.inf, 0)  # so that the shares below are 0
        # Of query, key, negatives and temperature, over all blocks.
        rows = (query, key, negatives)
        sums = [None if x is None else x.new_zeros(x.shape, dtype=acc) for x in rows]
        sums.append(query.new_zeros((), dtype=torch.float64))

        def step_gradient(step: int, block: Block) -> Tensor:
            """Adds what a block gives to this rank's rows; returns the gradient of the rows of another."""
            of_block = None
            if ctx.found[step] is not None:
                block_losses, lse = ctx.found[step]
                weights = (grad * torch.exp(block_losses - losses)).to(block_losses.dtype)
                needed = (needs[0], needs[1], gives_back if step > 0 else needs[2], needs[3])
                given = block if step > 0 else own
                grads = blocks.backward(weights, query, key, tau, given, step == 0, lse, needed)
                if step > 0:
                    grads, of_block = (*grads[:2], None, grads[3]), grads[2]
                for total, part in zip(sums, grads, strict=True):
                    if part is not None:
                        total += part
            return (
                block[0].new_zeros(block[0].shape, dtype=acc)
                if of_block is None
                else of_block.to(acc)
            )

        if gives_back:
            travelling = blocks.travelling(key, negatives)
            home = blocks.exchange.round_trip(travelling, step_gradient)
            of_keys, of_negatives = home.tensor_split((len(key) if blocks.in_batch else 0,))
            sums[1][: len(of_keys)] += of_keys
            if blocks.shared:
                sums[2] += of_negatives
        else:
            for step, block in blocks.trip(key, negatives):
                step_gradient(step, block)
        likes = (query, key, negatives, tau)
        grads = [x.to(y.dtype) if n else None for x, y, n in zip(sums, likes, needs, strict=True)]
        return *grads, None


class _GatheredFunction(torch.autograd.Function):
    """The same losses, reduced later with one weight for all rows: their gradients come with them, and the backward scales these."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        tau: float | Tensor,
        blocks: _Blocks,
        grad_now: bool,
    ) -> tuple[Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[:4]
        gives_back = blocks.gives_back(needs)
        block = tuple(map(blocks.exchange.others, blocks.travelling(key, negatives)))
        if blocks.shared:
            block = _joined(blocks.own(negatives), block)
        found = blocks.forward(
            query,
            key,
            tau,
            block,
            first=True,
            decoupled=blocks.decoupled,
            scale=_common.kept_scale(query) if grad_now else None,
            needs=(needs[0], needs[1] or gives_back and blocks.in_batch, gives_back, needs[3]),
        )
        if found is None:
            losses = query.new_zeros(len(query), dtype=torch.float64)
            ranks = torch.zeros_like(losses, dtype=torch.int64) if blocks.rank else None
            grads = [torch.zeros_like(x) for x in (query, key, block[0], losses.sum())]
        else:
            losses, _, ranks, grads = found
            losses = losses.double().masked_fill(losses == -torch.inf, 0)
            grads = (_first(grads[0]), _first(grads[1]), *grads[2:])
        ctx.blocks, ctx.gives_back = blocks, gives_back
        ctx.negatives = len(negatives) if blocks.shared else 0
        ctx.factor = 1 / _common.kept_scale(query)
        ctx.save_for_backward(losses, *grads)
        if ranks is not None:
            ctx.mark_non_differentiable(ranks)
        return losses, ranks

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor, *_: object):
        weight = grad[0] if len(grad) > 0 else grad.new_zeros(())
        query, key, block, tau = _common.scaled(saved[1:], weight, ctx.factor)
        blocks, needs, negatives = ctx.blocks, ctx.needs_input_grad, None
        if ctx.gives_back:
            if block is None:  # there are no rows but the keys in batch
                block = key[:0]
            negatives, others = block.tensor_split((ctx.negatives,))
            own = torch.cat([key, negatives]) if blocks.in_batch else negatives
            acc = accumulation_dtype(own.dtype)
            home = blocks.exchange.give_back(own.to(acc), others.to(acc)).to(own.dtype)
            if blocks.in_batch:
                key, negatives = home.tensor_split((len(key),))
            else:
                negatives = home
        grads = (query, key, negatives, tau)
        return *(x if need else None for x, need in zip(grads, needs, strict=False)), None, None


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
    yield from _masked_samples(make, pair, queue["negative_keys"], own["negative_keys"])


def _masked_samples(
    make: Make, pair: dict[str, object], shared: Tensor, own: Tensor
) -> Iterator[Sample]:
    """Of 33 queries, 70 shared negatives and 9 of each."""
    tau = torch.tensor(0.1, requires_grad=True)
    numbers = torch.arange(33 * 9, device=make.device)
    ids = {"query_ids": numbers[:33] % 7}
    weighted = ids | {"key_mask": numbers[:33] % 5 > 0, "weights": make(33, grad=False).abs()}
    yield Sample("masked", {**pair, **weighted})
    more = {"symmetric": True, "reduction": "none", "temperature": tau}
    yield Sample("masked_symmetric_none", {**pair, **weighted, **more})
    guide = [make(count, 4, grad=False) for count in (33, 33, 70)]
    more = {"negative_keys": shared, "negative_ids": numbers[:70] % 11, "guide": guide}
    yield Sample("masked_queue", {**pair, **ids, **more, "decoupled": True, "reduction": "sum"})
    more = {"negative_keys": own, "negative_mask": (numbers % 3 > 0).view(33, 9)}
    more |= {"in_batch_negatives": True, "decoupled": True, "reduction": "none"}
    yield Sample("masked_own_none", {**pair, **ids, **more})


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
    Op(
        "info_nce",
        function=info_nce,
        over_ranks=over_ranks,
        samples=_samples,
        form=_form,
    ),
    *_operators("info_nce"),
    info_nce=plain,
)
# The same with similarity_dtype=torch.float8_e4m3fn.
declare(Op("info_nce_fp8", form=_form), *_operators("info_nce_fp8"))
