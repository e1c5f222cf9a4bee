"""InfoNCE's softmax in other shapes: numbers of rows, margins of the positive, hardness, label smoothing; and targets by index.

All of it is arithmetic of rows around ``masked_info_nce``. A number of a row, such as its temperature or its bias, becomes part of
the row. What changes the positive's logit alone changes d, the log-sum-exp of the negatives less that logit; the loss is
``log(1 + e^d)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnce.ops import _checks, _common
from fastnce.ops.masked_info_nce import (
    LEFT_OUT,
    WITHOUT_ID,
    Masks,
    left_in,
    rows_loss,
    weights_of,
    with_mask,
)
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Op, declare


class Softmax(NamedTuple):
    """Its shape, by the arguments of ``info_nce`` of these names; what is of rows has a batch dimension, as the rows have.

    Args:
        per_query: the temperature is (B, N).
        key_temperature: (B, N), positive.
        key_bias: (B, N), finite.
        negative_bias: (M,) or (B, N, M), finite: with the logarithms of the ``negative_weights``.
        margin, angular_margin, hardness, label_smoothing: numbers.
        no_weight: the negatives whose weight is 0, as ``negative_bias``; None: no such.
        targets: (N,), the rows of the key (1, M, D) that are the positives: all of its rows are candidates.
    """

    per_query: bool = False
    key_temperature: Tensor | None = None
    key_bias: Tensor | None = None
    negative_bias: Tensor | None = None
    margin: float = 0.0
    angular_margin: float = 0.0
    hardness: float = 0.0
    label_smoothing: float = 0.0
    no_weight: Tensor | None = None
    targets: Tensor | None = None

    @property
    def has_biases(self) -> bool:
        return self.key_bias is not None or self.negative_bias is not None

    @property
    def changes_positive(self) -> bool:
        return bool(self.margin or self.angular_margin or self.hardness)

    @property
    def changes_rows(self) -> bool:
        of_rows = self.per_query or self.key_temperature is not None or self.has_biases
        return bool(of_rows or self.hardness or self.label_smoothing)


def is_plain(temperature: object, *options: object) -> bool:
    """Whether the temperature is one number, and the options are None or 0: nothing to do here."""
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        return False
    return all(x is None or (isinstance(x, (float, int)) and x == 0) for x in options)


def softmax_of(
    op: str,
    rows: Sequence[Tensor | None],
    temperature: object,
    margin: float,
    angular_margin: float,
    hardness: float,
    label_smoothing: float,
    key_temperature: Tensor | None,
    key_bias: Tensor | None,
    negative_bias: Tensor | None = None,
    negative_weights: Tensor | None = None,
    *,
    normalize: bool,
    symmetric: bool = False,
    decoupled: bool = False,
    masked: bool,
) -> tuple[Softmax, float | Tensor]:
    """What the arguments of these names ask for; and the temperature.

    Args:
        op: the public function.
        rows: checked: queries (N, D) or (B, N, D); keys, of the same number of dimensions; None or negatives.
        temperature: not checked, like the following.
        masked: whether there are masks.
    """
    query, key, negatives = rows
    per_query = isinstance(temperature, Tensor) and temperature.numel() != 1
    if per_query:
        temperature = _checks.expect_numbers(
            op,
            "temperature",
            temperature,
            tuple(query.shape[:-1]),
            query,
            why="one for each query, or a tensor of one element",
            sign="positive",
            hint="Usual values are 0.05 to 1.",
        )
    else:
        temperature = _checks.expect_temperature(op, temperature, query)
    margin = _checks.expect_number_within(op, "margin", margin, -1e6, 1e6)
    angular_margin = _checks.expect_number_within(op, "angular_margin", angular_margin, 0, math.pi)
    hardness = _checks.expect_number_within(op, "hardness", hardness, 0, 1e6)
    label_smoothing = _checks.expect_number_within(op, "label_smoothing", label_smoothing, 0, 1)

    own = "temperature of one per query" if per_query else "key_temperature"
    several = per_query or key_temperature is not None
    _apart(op, own, several, "symmetric=True", symmetric, "Average two calls")
    _apart(op, own, several, "hardness", hardness > 0, "Drop one")
    for name, x in ("negative_bias", negative_bias), ("negative_weights", negative_weights):
        if x is not None and negatives is None:
            raise ValueError(f"{op}: {name} needs negative_keys, got None. Drop {name}.")
    _apart(
        op, "key_temperature", key_temperature is not None, "negative_keys", negatives is not None
    )
    if angular_margin > 0 and not normalize:
        raise ValueError(
            f"{op}: angular_margin needs the angles of normalize=True, got normalize=False. Use margin."
        )
    smoothed = label_smoothing > 0
    _apart(op, "label_smoothing", smoothed, "decoupled=True", decoupled)
    _apart(op, "label_smoothing", smoothed, "masks", masked)
    _apart(op, "label_smoothing", smoothed, "hardness", hardness > 0)
    _apart(op, "label_smoothing", smoothed, "negative_weights", negative_weights is not None)

    def numbers(name: str, x: Tensor | None, of: Tensor | None, **rules: str) -> Tensor | None:
        if x is None:
            return None
        x = _checks.expect_numbers(op, name, x, tuple(of.shape[:-1]), query, **rules)
        shared = of is negatives and of.dim() == 2
        return x if shared or query.dim() == 3 else x[None]

    key_temperature = numbers("key_temperature", key_temperature, key, sign="positive")
    hint = "Leave a key out with key_mask."
    key_bias = numbers("key_bias", key_bias, key, hint=hint)
    hint = "Leave a key out with negative_mask."
    negative_bias = numbers("negative_bias", negative_bias, negatives, hint=hint)
    no_weight = None
    if negative_weights is not None:
        if _common.wants_grad(negative_weights):
            raise ValueError(
                f"{op}: negative_weights require a gradient, which they do not get. Pass negative_weights.detach()."
            )
        weights = numbers("negative_weights", negative_weights, negatives, sign="not negative")
        no_weight = weights == 0
        bias = weights.masked_fill(no_weight, 1).log()
        negative_bias = bias if negative_bias is None else negative_bias + bias
        if _checks.is_on_host(no_weight) and not no_weight.any():
            no_weight = None
    if per_query and query.dim() == 2:
        temperature = temperature[None]
    found = (per_query, key_temperature, key_bias, negative_bias)
    shape = (margin, angular_margin, hardness, label_smoothing)
    return Softmax(*found, *shape, no_weight), temperature


def _apart(
    op: str, first: str, has_first: bool, second: str, has_second: bool, fix: str = "Drop one"
) -> None:
    if has_first and has_second:
        raise ValueError(f"{op}: {first} does not go with {second}. {fix}.")


def shaped_loss(
    op: str,
    rows: Sequence[Tensor | None],
    masks: Masks,
    weights: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    backend: str | None,
    *,
    softmax: Softmax,
    rank: bool = False,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    decoupled: bool,
) -> tuple[Tensor, Tensor | None]:
    """``rows_loss`` with the softmax in this shape; of its ranks nothing changes but that biases count.

    With ``targets`` the rows are the queries, the pool (1, M, D) and None; the masks are of the pool as negatives.
    """
    with _common.no_autocast(rows[0]):
        if softmax.no_weight is not None:
            ids = WITHOUT_ID if masks.negative_ids is None else masks.negative_ids
            ids = torch.where(softmax.no_weight, LEFT_OUT, ids)
            masks = masks._replace(negative_ids=ids)
        made, tau, normalizes = rows, temperature, normalize
        if softmax.changes_rows:
            query, key, negatives = rows
            kept = (query, key, left_in(negatives, masks.negative_ids))
            made = _logit_rows(kept, softmax, temperature, normalize)
            tau, normalizes = 1.0, False
        change = None
        if softmax.changes_positive:
            change = _change_of_positive(rows, softmax, temperature, normalize)
        if softmax.targets is not None:
            made = _with_targets(made, softmax.targets)
        options = {"normalize": normalizes, "in_batch": in_batch}
        if change is None:
            options |= {"symmetric": symmetric, "decoupled": decoupled, "rank": rank}
            losses, ranks = rows_loss(op, made, masks, weights, tau, reduction, backend, **options)
        else:
            options |= {"rank": rank, "decoupled": decoupled}
            losses, ranks = _changed(op, made, masks, tau, backend, change, **options)
            if symmetric:
                query, key, _ = made
                exchanged = Masks(masks.key_ids, masks.query_ids)
                others = _changed(
                    op, (key, query, None), exchanged, tau, backend, change, **options
                )
                of_keys, ranks_of_keys = others
                if masks.key_ids is not None:  # A key that is nobody's negative has none either.
                    out = masks.key_ids == LEFT_OUT
                    of_keys = of_keys.masked_fill(out, 0)
                    ranks_of_keys = ranks_of_keys.masked_fill(out, 0) if rank else None
                losses = 0.5 * (losses + of_keys)
                ranks = torch.stack([ranks, ranks_of_keys]) if rank else None
            losses = _common.reduced(losses, weights, reduction)
        if softmax.label_smoothing:
            more = _smoothing(made, softmax, in_batch, symmetric, change)
            losses = losses + _common.reduced(softmax.label_smoothing * more, weights, reduction)
        return losses, ranks


def _logit_rows(
    rows: Sequence[Tensor | None], softmax: Softmax, temperature: float | Tensor, normalize: bool
) -> tuple[Tensor | None, ...]:
    """Rows whose products are the logits: over their temperatures, with further columns for the biases."""
    query, key, negatives = _units(rows, normalize)
    if softmax.hardness:
        # A product of these has the value s, but s / t is what times 1 / t + hardness has a gradient of.
        share = 1 / (1 + softmax.hardness * temperature)
        share = share.detach() if isinstance(share, Tensor) else share
        query, key, negatives = (
            None if x is None else share * x + (1 - share) * x.detach()
            for x in (query, key, negatives)
        )
        query = over_temperature(query, temperature) + softmax.hardness * query
    else:
        query = over_temperature(
            query, temperature[..., None] if softmax.per_query else temperature
        )
    if softmax.key_temperature is not None:
        key = over_temperature(key, softmax.key_temperature[..., None])
    if softmax.has_biases:
        query = torch.cat([query, query.new_ones(()).expand(*query.shape[:-1], 2)], dim=-1)
        key = _with_bias(key, softmax.key_bias)
        negatives = None if negatives is None else _with_bias(negatives, softmax.negative_bias)
    return query, key, negatives


def _units(rows: Sequence[Tensor | None], normalize: bool) -> list[Tensor | None]:
    """In the dtype of the sums."""
    dtype = accumulation_dtype(rows[0].dtype)
    rows = [None if x is None else x.to(dtype) for x in rows]
    return [None if x is None else normalize_rows(x) for x in rows] if normalize else rows


def _with_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """Two columns whose sum it is: products that round their factors to bfloat16 keep it to 16 bits."""
    if bias is None:
        return torch.cat([x, x.new_zeros(()).expand(*x.shape[:-1], 2)], dim=-1)
    rounded = bias.detach().bfloat16().to(x.dtype)
    return torch.cat([x, rounded[..., None], (bias - rounded)[..., None]], dim=-1)


def _with_targets(rows: Sequence[Tensor | None], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the targets as keys, and the pool as negatives."""
    query, pool, _ = rows
    wide = pool.to(accumulation_dtype(pool.dtype))  # in which gradients of one row add up
    return query, wide.index_select(1, targets).to(pool.dtype), pool[0]


def _change_of_positive(
    rows: Sequence[Tensor | None], softmax: Softmax, temperature: float | Tensor, normalize: bool
) -> Tensor:
    """What is added to the positive's logit (B, N), relative to that of the rows that the loss is computed from."""
    query, key, _ = rows
    over = softmax.key_temperature
    dtype = accumulation_dtype(query.dtype)
    added = query.new_full(query.shape[:-1], -softmax.margin, dtype=dtype)
    if softmax.angular_margin or softmax.hardness:
        if softmax.targets is not None:
            _, key, _ = _with_targets(rows, softmax.targets)
        query, key = _units((query, key), normalize)
        similarity = (query * key).sum(dim=-1)
    if softmax.angular_margin:
        added = added + _turned(similarity, softmax.angular_margin) - similarity
    added = over_temperature(added, temperature)
    if over is not None:
        over = over if softmax.targets is None else over.index_select(1, softmax.targets)
        added = over_temperature(added, over)
    if softmax.hardness:
        without = Softmax(hardness=softmax.hardness)
        query, key, _ = _logit_rows((query, key, None), without, temperature, normalize=False)
        added = added + over_temperature(similarity, temperature) - (query * key).sum(dim=-1)
    return added


def _turned(cosine: Tensor, angle: float) -> Tensor:
    """``cos(theta + angle)``; of angles that this would take past pi, ``cos(theta) - angle sin(angle)``, which goes on falling."""
    # Where the sine is 0 its gradient is infinite: 0 is taken.
    sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).tiny).sqrt()
    turned = cosine * math.cos(angle) - sine * math.sin(angle)
    return torch.where(cosine > -math.cos(angle), turned, cosine - angle * math.sin(angle))


def _changed(
    op: str,
    rows: Sequence[Tensor | None],
    masks: Masks,
    temperature: float | Tensor,
    backend: str | None,
    change: Tensor,
    *,
    rank: bool,
    decoupled: bool,
    **options: bool,
) -> tuple[Tensor, Tensor | None]:
    """The losses (B, N) with the ``change`` of the positives' logits, and the ranks without."""
    d, ranks = rows_loss(
        op,
        rows,
        masks,
        None,
        temperature,
        "none",
        backend,
        rank=rank,
        keep_empty=True,
        symmetric=False,
        decoupled=True,
        **options,
    )
    d = d - change
    if decoupled:
        return d.masked_fill(d == -torch.inf, 0), ranks
    return -F.logsigmoid(-d), ranks


def _smoothing(
    rows: Sequence[Tensor | None],
    softmax: Softmax,
    in_batch: bool,
    symmetric: bool,
    change: Tensor | None,
) -> Tensor:
    """The positive's logit less the mean of all candidates', (B, N)."""
    query, key, negatives = rows
    positive = (query * key).sum(dim=-1)
    if softmax.targets is not None:
        total, count = negatives.sum(dim=-2), negatives.shape[-2]
    else:
        total = key.sum(dim=-2, keepdim=True) if in_batch else key
        count = key.shape[-2] if in_batch else 1
        if negatives is not None:
            total, count = total + negatives.sum(dim=-2), count + negatives.shape[-2]
    mean = (query * total).sum(dim=-1) / count
    if symmetric:
        mean = 0.5 * (mean + (key * query.sum(dim=-2, keepdim=True)).sum(dim=-1) / count)
    if change is not None:
        positive, mean = positive + change, mean + change / count
    return positive - mean


def contrastive_cross_entropy(
    query: Tensor,
    key: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    angular_margin: float = 0.0,
    key_temperature: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    weights: Tensor | None = None,
    return_rank: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy over a pool of keys, with the index of each query's own: InfoNCE of grouped passages, or of classes' proxies.

    .. math:: \ell_i = \log \sum_{j} \exp(s_{ij} / \tau) - s_{i\,t(i)} / \tau

    It is ``cross_entropy(normalize(query) @ normalize(key).T / temperature, targets)`` without the N x M matrix. With a margin it is
    CosFace's loss or ArcFace's, where the keys are the weights of the classes.

    Args:
        query: (N, D); float64, float32, bfloat16 or float16.
        key: (M, D), the pool. Several queries may have the same positive.
        targets: (N,) integers, the row of ``key`` that is the query's positive. All others are its negatives.
        temperature: as in ``info_nce``, also (N,).
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        reduction: ``"mean"`` over the queries that are not ignored (0 if all are), ``"sum"``, or ``"none"`` for (N,).
        ignore_index: a query of this target counts for nothing: its loss is 0, its rank -1.
        label_smoothing: this share of the target is spread evenly over the pool, as in ``torch.nn.functional.cross_entropy``.
        margin: taken from the similarity with the positive (CosFace, https://arxiv.org/abs/1801.09414).
        angular_margin: added to the angle between query and positive, in radians (ArcFace, https://arxiv.org/abs/1801.07698).
        key_temperature: (M,), by which the logits of each key are divided too.
        key_bias: (M,), added to the logits of each key, such as ``-log q`` of its sampling probability.
        key_ids: (M,) integers: a key of the id of the query's positive is no negative of it, such as a duplicate.
        key_mask: (M,) bool: False where a key is nobody's negative, such as padding.
        weights: (N,) floats, a weight for each loss; ``"mean"`` divides by their sum. No gradient.
        return_rank: the result is ``(loss, rank)`` with how many negatives have a larger logit than the positive, (N,) int64.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs). With ``return_rank`` also the ranks.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, targets or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> query, passages = torch.randn(32, 64), torch.randn(32 * 8, 64)  # the first of 8 is the positive
        >>> loss = fastnce.contrastive_cross_entropy(query, passages, 8 * torch.arange(32))
    """
    op = "contrastive_cross_entropy"
    query, key = _checks.same_dtype_under_autocast(query, key)
    _checks.expect_rows(op, "query", query)
    _checks.expect_rows(op, "key", key)
    _checks.expect_shape(op, "key", key, (key.shape[0], query.shape[1]), "query is", query)
    _checks.expect_alike(op, "key", key, "query", query)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    targets = _checks.expect_labels(op, targets, query, "query", "targets")
    ignored = targets == ignore_index
    targets = targets.masked_fill(ignored, 0)
    if _checks.is_on_host(targets):
        wrong = (targets < 0) | (targets >= len(key))
        if wrong.any():
            raise ValueError(
                f"{op}: targets must be rows of key, from 0 to {len(key) - 1}, or ignore_index={ignore_index}, "
                f"got {targets[wrong][0].item()}."
            )
    softmax, temperature = softmax_of(
        op,
        (query, key, None),
        temperature,
        margin,
        angular_margin,
        0.0,
        label_smoothing,
        key_temperature,
        key_bias,
        normalize=normalize,
        masked=key_ids is not None or key_mask is not None,
    )
    counts = (~ignored).to(accumulation_dtype(query.dtype))
    weights = weights_of(op, weights, query)
    weights = counts[None] if weights is None else counts * weights
    pool = (len(key),)
    ids = torch.arange(len(key), device=key.device)
    if key_ids is not None:
        ids = _checks.expect_labels(op, key_ids, key, "key", "key_ids")
    of_pool = with_mask(op, "key_mask", ids, key_mask, key, pool)
    masks = Masks(ids.index_select(0, targets)[None], None, of_pool)
    loss, rank = shaped_loss(
        op,
        (query[None], key[None], None),
        masks,
        weights,
        temperature,
        reduction,
        backend,
        softmax=softmax._replace(targets=targets),
        rank=return_rank,
        normalize=bool(normalize),
        symmetric=False,
        in_batch=False,
        decoupled=False,
    )
    loss = loss[0] if reduction == "none" else loss
    return (loss, rank[0].masked_fill(ignored, -1)) if return_rank else loss


declare(
    Op(
        "contrastive_cross_entropy",
        runs=("masked_info_nce_forward", "masked_info_nce_backward"),
        function=contrastive_cross_entropy,
    )
)
