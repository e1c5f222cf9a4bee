"""InfoNCE with pairs left out, a weight per query, the positive out of the sum, and its rank: what the plain op has no arguments for.

The backends know it as an op of its own, ``"masked_info_nce"``: what ``info_nce`` costs does not depend on it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import LEFT_OUT, Form, Op, Operator, declare

# The id of keys that have none.
WITHOUT_ID = LEFT_OUT + 1


class Masks(NamedTuple):
    """Which pairs of a query and a key are left out of the sums. The positives of a query's own number never are.

    A pair is left out if the ids of both are the same, if that of the key is ``LEFT_OUT``, or if the product of the guide's rows is
    positive: these are of any dimension, and the last column has the threshold.

    Args:
        query_ids: (B, N) int64; None: no ids are the same.
        key_ids: (B, N) int64, of the rows of ``key``; None: none of these is left out by ids.
        negative_ids: (M,) or (B, N, M) int64, as ``negatives`` has rows.
        guide_query: (B, N, G) in the dtype of the sums; None: no guide.
        guide_key: (B, N, G), if the keys are in batch.
        guide_negatives: (M, G), of shared negatives.
    """

    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    negative_ids: Tensor | None = None
    guide_query: Tensor | None = None
    guide_key: Tensor | None = None
    guide_negatives: Tensor | None = None


def plain(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    masks: Masks,
    temperature: float | Tensor,
    *,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    """``loss_i = log (sum_{j left in} exp(s_ij / t) [+ exp(s_ip / t)]) - s_ip / t``, one per query, and the rank of the positive.

    Args:
        query: (B, N, D).
        key: (B, N, D); row i is the positive p of query i.
        negatives: None, (M, D) shared by all queries, or (B, N, M, D) each query's own.
        masks: which negatives are left out.
        temperature: t, a float or a 0-d tensor.
        normalize: s is the cosine instead of the dot product.
        symmetric: the mean of this loss and the one with query and key exchanged, in which the same pairs are left out.
        in_batch: the other keys of the same batch element are negatives too.
        decoupled: the positive is not in the sum; the loss is -inf where nothing is.

    Returns:
        (B, N), fp32 (fp64 for fp64 inputs); and how many negatives of the query are more similar than its positive, int64 (B, N),
        or with ``symmetric`` (2, B, N): also how many other queries are more similar to its key.
    """
    dtype = accumulation_dtype(query.dtype)
    rows = [
        x if x is None else x.to(dtype)
        for x in (query, key, left_in(negatives, masks.negative_ids))
    ]
    query, key, negatives = (normalize_rows(x) if normalize and x is not None else x for x in rows)
    positive = over_temperature((query * key).sum(dim=-1), temperature)  # (B, N)
    logits, left_out = [], []
    if in_batch:
        own = torch.eye(query.shape[-2], dtype=torch.bool, device=query.device)
        logits.append(query @ key.mT)
        left_out.append(_left_out(masks, masks.key_ids, masks.guide_key, logits[0]) | own)
    if negatives is not None:
        shared = negatives.dim() == 2
        found = query @ negatives.T if shared else (negatives @ query[..., None]).squeeze(-1)
        logits.append(found)
        left_out.append(_left_out(masks, masks.negative_ids, masks.guide_negatives, found))
    out = torch.cat(left_out, dim=-1)
    z = over_temperature(torch.cat(logits, dim=-1), temperature).masked_fill(out, -torch.inf)
    losses = _loss(z, out, positive, decoupled)
    rank = (z > positive[..., None]).sum(dim=-1)
    if symmetric:
        losses = 0.5 * (losses + _loss(z.mT, out.mT, positive, decoupled))
        rank = torch.stack([rank, (z > positive[..., None, :]).sum(dim=-2)])
    return losses, rank


def left_in(keys: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """Zeros in the rows of padding: what is there, such as NaN, would reach gradients as a product with 0."""
    if keys is None or ids is None:
        return keys
    return keys.masked_fill((ids == LEFT_OUT).unsqueeze(-1), 0)


def _left_out(masks: Masks, ids: Tensor | None, guide: Tensor | None, like: Tensor) -> Tensor:
    """Of the keys that have these ids and this guide; in the shape of ``like``, (B, N, M)."""
    out = torch.zeros_like(like, dtype=torch.bool)
    if ids is not None:
        ids = ids if ids.dim() == 3 else ids.view(-1, 1, ids.shape[-1])
        out = out | (ids == LEFT_OUT)
        if masks.query_ids is not None:
            out = out | (ids == masks.query_ids[..., None])
    if guide is not None:
        out = out | (masks.guide_query @ guide.mT > 0)
    return out


def _loss(z: Tensor, left_out: Tensor, positive: Tensor, decoupled: bool) -> Tensor:
    """(B, N) of logits (B, N, M), -inf where left out."""
    empty = left_out.all(dim=-1)
    # Of no logits at all, autograd's gradient would be NaN.
    others = z.masked_fill(empty[..., None], 0).logsumexp(dim=-1).masked_fill(empty, -torch.inf)
    return others - positive if decoupled else torch.logaddexp(others, positive) - positive


def masks_of(
    op: str,
    query: Tensor,
    negatives: Tensor | None,
    in_batch: bool,
    symmetric: bool = False,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    negative_mask: Tensor | None = None,
    guide: Sequence[Tensor] | None = None,
    guide_margin: float = 0.0,
    relative_margin: bool = False,
) -> Masks:
    """The masks that the arguments of ``info_nce`` of these names ask for, of checked rows (B, N, D) or (N, D)."""
    rows = tuple(query.shape[:-1])
    columns = None if negatives is None else tuple(negatives.shape[:-1])
    _expect_used(op, in_batch, "key_ids", key_ids, "key_mask", key_mask)
    _expect_used(
        op, negatives is not None, "negative_ids", negative_ids, "negative_mask", negative_mask
    )
    for name, ids in (("key_ids", key_ids), ("negative_ids", negative_ids)):
        if ids is not None and query_ids is None:
            raise ValueError(f"{op}: {name} need the ids of the queries too. Pass query_ids.")
    if query_ids is not None and not in_batch and negative_ids is None:
        raise ValueError(
            f"{op}: query_ids leave nothing out without the ids of the negatives. Pass negative_ids too."
        )
    query_ids = _ids(op, "query_ids", query_ids, query, rows)
    if in_batch:
        key_ids = query_ids if key_ids is None else _ids(op, "key_ids", key_ids, query, rows)
        key_ids = with_mask(op, "key_mask", key_ids, key_mask, query, rows)
    if columns is not None:
        negative_ids = _ids(op, "negative_ids", negative_ids, query, columns)
        negative_ids = with_mask(op, "negative_mask", negative_ids, negative_mask, query, columns)
    guides: tuple[Tensor | None, ...] = (None, None, None)
    if guide is not None and symmetric:
        raise ValueError(
            f"{op}: guide has a threshold for each query, symmetric=True none for each key. Drop one, or average two calls."
        )
    if guide is not None:
        guides = _guide(op, guide, guide_margin, relative_margin, query, in_batch, columns)
    found = (query_ids, key_ids, negative_ids, *guides)
    if query.dim() == 3:
        return Masks(*found)
    # Of negatives only those of each query's own have a batch dimension.
    shared = columns is None or len(columns) == 1
    return Masks(
        *(
            x if x is None or (i in (2, 5) and shared) else x.unsqueeze(0)
            for i, x in enumerate(found)
        )
    )


def weights_of(
    op: str, weights: Tensor | None, query: Tensor, name: str = "weights"
) -> Tensor | None:
    """The weights of the losses of ``query``, (N, D) or (B, N, D), as (B, N) in the dtype of the sums."""
    if weights is None:
        return None
    words = "(N,)" if query.dim() == 2 else "(B, N)"
    _checks.expect_float_tensor(op, name, weights, (1, 2), words, may_be_empty=True)
    _checks.expect_shape(op, name, weights, tuple(query.shape[:-1]), "one for each loss")
    if _common.wants_grad(weights):
        raise ValueError(
            f"{op}: {name} require a gradient, which they do not get. Pass {name}.detach(), or multiply reduction='none'."
        )
    weights = weights.to(query.device, accumulation_dtype(query.dtype))
    return weights if weights.dim() == 2 else weights.unsqueeze(0)


def _expect_used(op: str, used: bool, *names_and_values: object) -> None:
    for name, value in zip(names_and_values[::2], names_and_values[1::2], strict=True):
        if value is not None and not used:
            of = "negative_keys" if name.startswith("negative") else "in-batch negatives"
            raise ValueError(f"{op}: {name} are of {of}, which this call has not. Drop {name}.")


def _ids(
    op: str, name: str, ids: Tensor | None, query: Tensor, shape: tuple[int, ...]
) -> Tensor | None:
    """As int64 of this shape."""
    return None if ids is None else _checks.expect_labels(op, ids, query, "query", name, shape)


def with_mask(
    op: str,
    name: str,
    ids: Tensor | None,
    mask: Tensor | None,
    query: Tensor,
    shape: tuple[int, ...],
) -> Tensor | None:
    """The ids, ``LEFT_OUT`` where the mask is False."""
    if mask is None:
        return ids
    _checks.expect_tensor(op, name, mask, shape)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be bool, True for keys that count, got {mask.dtype}.")
    _checks.expect_shape(op, name, mask, shape, "one for each key")
    _checks.expect_beside(op, name, mask, "query", query)
    ids = mask.new_full(shape, WITHOUT_ID, dtype=torch.int64) if ids is None else ids
    return ids.masked_fill(~mask, LEFT_OUT)


def _guide(
    op: str,
    guide: Sequence[Tensor],
    margin: float,
    relative: bool,
    query: Tensor,
    in_batch: bool,
    columns: tuple[int, ...] | None,
) -> tuple[Tensor | None, ...]:
    """The guide's rows with the threshold as their last column: a pair's product is its cosine above the threshold."""
    count = 2 if columns is None else 3
    if not isinstance(guide, (list, tuple)) or len(guide) != count:
        words = "query, positive_key" + (", negative_keys" if count == 3 else "")
        got = len(guide) if isinstance(guide, (list, tuple)) else type(guide).__name__
        raise ValueError(
            f"{op}: guide must be a tuple of the guide's rows of ({words}), got {got}."
        )
    known = isinstance(margin, numbers.Real) and not isinstance(margin, bool)
    if not known or not -math.inf < margin < math.inf:
        raise ValueError(f"{op}: guide_margin must be a finite float, got {margin!r}.")
    if columns is not None and len(columns) > 1:
        raise ValueError(
            f"{op}: guide needs negative_keys of shape (M, D) or None. Mask each query's own with negative_mask."
        )
    shapes = [tuple(query.shape[:-1])] * 2 + [columns]
    for i, (x, rows) in enumerate(zip(guide, shapes, strict=False)):
        name = f"guide[{i}]"
        dims, shape = (len(rows) + 1,), (*rows, "G")
        _checks.expect_float_tensor(op, name, x, dims, shape, may_be_empty=True)
        expected = (*rows, guide[0].shape[-1])
        _checks.expect_shape(op, name, x, expected, "one row for each of ours")
        _checks.expect_alike(op, name, x, "guide[0]", guide[0])
    dtype = accumulation_dtype(query.dtype)
    units = [normalize_rows(x.detach().to(query.device, dtype)) for x in guide]
    of_positive = (units[0] * units[1]).sum(dim=-1, keepdim=True)
    threshold = of_positive * (1 - margin) if relative else of_positive - margin
    # What is as similar, such as a duplicate, stays, in whatever order the kernels add up.
    threshold = threshold + 8 * torch.finfo(dtype).eps
    columns_of = [torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) for x in units[1:]]
    of_keys = columns_of[0] if in_batch else None
    return torch.cat([units[0], -threshold], dim=-1), of_keys, *(columns_of[1:] or [None])


def rows_loss(
    op: str,
    rows: Sequence[Tensor | None],
    masks: Masks,
    weights: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    backend: str | None,
    *,
    rank: bool = False,
    keep_empty: bool = False,
    **options: bool,
) -> tuple[Tensor, Tensor | None]:
    """The losses of checked queries, keys and negatives, their sum or mean; and, if asked for, the positives' ranks.

    Args:
        op: the public function.
        rows: as of ``plain``.
        masks: as of ``plain``.
        weights: (B, N), of each loss; the mean is divided by their sum. None: 1.
        temperature: checked.
        reduction: checked.
        backend: as the public functions take it.
        rank: whether the second result is wanted.
        keep_empty: unreduced decoupled losses of queries without negatives are -inf instead of 0.
        options: normalize, symmetric, in_batch and decoupled.
    """
    query, reduced = rows[0], reduction != "none"
    kernels = backends.select("masked_info_nce", query, backend, rows, called=op)
    dtype = accumulation_dtype(query.dtype)
    with _common.no_autocast(query):
        shares = None  # of the losses in the reduced one
        if reduced or weights is not None:
            shares = query.new_ones(query.shape[:2], dtype=dtype)
            shares = shares if weights is None else shares * weights.detach()
        if reduction == "mean":
            total = shares.sum()
            shares = shares / total.masked_fill(total == 0, 1)
        if kernels is backends.reference:
            losses, ranks = plain(*rows, masks, temperature, **options)
            if not keep_empty:
                losses = losses.masked_fill(losses == -torch.inf, 0)
            losses = losses if shares is None else losses * shares
            return losses.sum() if reduced else losses, ranks if rank else None
        _checks.expect_fusable(op, query)
        grad_now = reduced and _common.wants_grad(*rows, temperature)
        options = {"kernels": kernels, "rank": rank, "grad_now": grad_now, **options}
        options["keep_empty"] = keep_empty
        given = shares if reduced else None
        tensors = _common.distinct((*rows, *masks))
        found = MaskedFunction.apply(options, temperature, given, *tensors)
        loss = found[0] if reduced or weights is None else found[0] * shares
        return loss, found[2] if rank else None


class MaskedFunction(torch.autograd.Function):
    """Autograd of ``masked_info_nce`` over the kernels of any fused backend; see ``_common.RowLossFunction``.

    With the shares of the losses in the reduced one the result is their sum, otherwise (B, N), where the loss of a query without
    any negative is 0; then a handle; then the ranks.
    """

    @staticmethod
    def forward(
        ctx,
        options: dict,
        temperature: float | Tensor,
        shares: Tensor | None,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None,
        *masks: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        options = dict(options)
        kernels, grad_now = options.pop("kernels"), options.pop("grad_now")
        keep_empty = options.pop("keep_empty")
        needs = (*ctx.needs_input_grad[3:6], ctx.needs_input_grad[1])
        ctx.factor = 1.0
        weights = shares if grad_now else None
        if weights is not None and query.dtype == torch.float16:
            # The gradient of a mean would underflow; see ``_common.kernel_mean``.
            kept, largest = _common.kept_scale(query), weights.abs().amax()
            ctx.factor = largest / kept
            weights = weights * (kept / largest.masked_fill(largest == 0, 1))
        inputs = (query, key, negatives, *masks)
        losses, lse, ranks, grads = kernels.masked_info_nce_forward(
            *inputs, weights, temperature, **options, needs=needs
        )
        ctx.mark_non_differentiable(ranks)
        ctx.reduced = shares is not None
        if options["decoupled"] and not keep_empty:
            losses = losses.masked_fill(losses == -torch.inf, 0)
        if ctx.reduced:
            shared = _common.handle(ctx, query, grad_now)
            factor = ctx.factor if isinstance(ctx.factor, Tensor) else None
            ctx.save_for_backward(shared, factor, *grads)
            return (losses * shares).sum(), shared, ranks
        options.pop("rank")
        ctx.backward_of, ctx.options, ctx.needs = kernels.masked_info_nce_backward, options, needs
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        saved = temperature if ctx.temperature is None else None
        ctx.save_for_backward(lse, saved, *inputs)
        return losses, None, ranks

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, *_: object):
        if ctx.reduced:
            _, factor, *grads = saved
            grads = _common.scaled(grads, grad_loss if factor is None else grad_loss * factor)
        else:
            lse, temperature, *inputs = saved
            temperature = ctx.temperature if temperature is None else temperature
            grads = ctx.backward_of(
                grad_loss, *inputs, temperature, lse, **ctx.options, needs=ctx.needs
            )
        *of_rows, of_temperature = grads
        return None, of_temperature, None, *of_rows, *(None,) * len(Masks._fields)


def negatives_lse(
    query: Tensor,
    negatives: Tensor,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    *,
    op: str,
    temperature: float | Tensor,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``log sum_j exp(s_ij / t)`` over the negatives whose ids differ, from which every loss of a softmax follows.

    Args:
        query: (N, D).
        negatives: (M, D).
        query_ids: (N,) int64.
        negative_ids: (M,) int64.
        op: the public function.
        temperature: t, checked.
        normalize: s is the cosine instead of the dot product.
        backend: as the public functions take it.

    Returns:
        (N,), fp32 (fp64 for fp64 inputs), with gradients to the rows and the temperature; -inf where nothing is left.
    """
    rows = (query[None], torch.zeros_like(query)[None], negatives)
    query_ids = None if query_ids is None else query_ids[None]
    masks = Masks(query_ids, None, negative_ids)
    # Next to a positive of zeros, whose logit is 0, the decoupled loss is the sum.
    options = {"normalize": normalize, "symmetric": False, "in_batch": False, "decoupled": True}
    found, _ = rows_loss(
        op, rows, masks, None, temperature, "none", backend, keep_empty=True, **options
    )
    return found[0]


def _form(rows: Sequence[Tensor | None]) -> Form:
    query, _, negatives = rows
    columns = query.shape[-2] if negatives is None else negatives.shape[-2]
    own = negatives is not None and negatives.dim() > 2
    name = "own negatives" if own else "any"
    return Form(name, query.numel() * columns, query.shape[-1])


def _results(query: Tensor, symmetric: bool, rank: bool, **_: object) -> tuple[Tensor, ...]:
    rows, dtype = tuple(query.shape[:2]), accumulation_dtype(query.dtype)
    both = (2, *rows) if symmetric else rows
    loss, lse = query.new_empty(rows, dtype=dtype), query.new_empty(both, dtype=dtype)
    return loss, lse, query.new_empty(both if rank else (0,), dtype=torch.int64)


_ROWS = "Tensor query, Tensor key, Tensor? negatives"
_MASKS = ", ".join(f"Tensor? {name}" for name in Masks._fields)
_TAU = "Tensor? temperature_tensor, float temperature"
_OPTIONS = "bool normalize, bool symmetric, bool in_batch, bool decoupled, bool bfloat16_products"
_NEEDS = "bool need_query, bool need_key, bool need_negatives, bool need_temperature"
_GRADS = "Tensor grad_query, Tensor grad_key, Tensor grad_negatives, Tensor grad_temperature"

declare(
    # Rows, masks and options as of ``plain``. weights (B, N): also the gradients of the sum of weights times losses, of which
    # those of a query without negatives are 0 if ``decoupled``. lse (B, N): of what is in the sums, -inf where nothing is; with
    # ``symmetric`` (2, B, N), of rows and columns. rank: as of ``plain``, or (0,) where it is not asked for.
    Op("masked_info_nce", form=_form),
    Operator(
        f"masked_info_nce_forward({_ROWS}, {_MASKS}, Tensor? weights, {_TAU}, {_OPTIONS}, bool rank, {_NEEDS}) -> "
        f"(Tensor loss, Tensor lse, Tensor rank, {_GRADS})",
        _results,
    ),
    Operator(
        f"masked_info_nce_backward(Tensor grad_loss, {_ROWS}, {_MASKS}, {_TAU}, Tensor lse, {_OPTIONS}, {_NEEDS}) -> ({_GRADS})"
    ),
    masked_info_nce=plain,
)
