"""The supervised contrastive loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import OverRanks
from fastnce.ops.labelled_lse import LabelledLSE, SameLabelSum
from fastnce.ops.masked_info_nce import (
    LEFT_OUT,
    Masks,
    negatives_lse,
    rows_loss,
    weights_of,
    with_mask,
)
from fastnce.ops.positive_pairs import positive_pairs
from fastnce.ranks import Fact
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Make, Op, Operator, Sample, declare

POSITIVES = ("mean", "each", "sum")


def sup_con(
    features: Tensor,
    labels: Tensor,
    reference_features: Tensor | None = None,
    reference_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    positives: str = "mean",
    ids: Tensor | None = None,
    reference_ids: Tensor | None = None,
    reference_mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Supervised contrastive loss, the L_out form (Khosla et al. 2020, https://arxiv.org/abs/2004.11362), and its other forms.

    .. math:: \ell_i = \log \sum_{a \ne i} e^{s_{ia} / \tau} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip} / \tau

    with the cosine s and the other samples :math:`P_i` of the class of i. Several views of an image are rows of their own with
    the same label. The published code multiplies by ``temperature / base_temperature`` (0.07); this is the loss itself.

    Args:
        features: (N, D); float64, float32, bfloat16 or float16. Normalisation is part of the op.
        labels: (N,) integers.
        reference_features: (M, D), the rows that ``features`` are compared with instead of one another, such as texts or a
            memory. None of them is left out but by ids.
        reference_labels: (M,) integers.
        temperature: positive float, or tensor of one element, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        positives: what is made of several positives. ``"mean"`` as above. ``"each"``: a term for each positive against the
            negatives alone, :math:`\log (1 + \sum_n e^{(s_{in} - s_{ip}) / \tau})` with the rows n of other labels
            (pytorch-metric-learning's NT-Xent). ``"sum"``: the log of the sum of the positives' exponentials instead of their mean
            (the L_in form without its 1 / P). On a GPU the host waits once for the last two, and once more in their backward.
        ids: (N,) integers: rows of the same id are the same sample, of one label, and neither positive nor negative, such as
            duplicates, or one's own copy in a memory. Without ``reference_features`` each row is left out of its own sums in
            any case.
        reference_ids: (M,), those of ``reference_features``; the least int64 is that of a row that counts for nothing.
        reference_mask: (M,) bool, False where a row counts for nothing, such as padding.
        weights: (N,) floats, a weight for each row's loss; ``"mean"`` divides by what then counts. No gradient.
        reduction: ``"mean"`` over the samples that have a positive (0 if none has), with ``"each"`` over the pairs of a sample
            and a positive; ``"sum"``; or ``"none"`` for (N,), with 0 for samples without a positive, and with ``"each"`` the
            mean over the sample's positives.
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
        >>> image, text, labels = torch.randn(8, 32), torch.randn(8, 32), torch.arange(8) // 2
        >>> loss = fastnce.sup_con(image, labels, text, labels)
    """
    op = "sup_con"
    features, reference_features = _checks.same_dtype_under_autocast(features, reference_features)
    _checks.expect_rows(op, "features", features)
    labels = _checks.expect_labels(op, labels, features, "features")
    _checks.expect_choice(op, "positives", positives, POSITIVES)
    references = (reference_features, reference_labels, reference_ids, reference_mask)
    if positives == "mean" and normalize and all(x is None for x in (*references, ids, weights)):
        return _common.row_loss(op, plain, (features,), labels, temperature, reduction, backend)
    temperature = _checks.expect_temperature(op, temperature, features)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    weights = weights_of(op, weights, features)
    compared = _compared(op, features, labels, ids, *references)
    with _common.no_autocast(features):
        form = _mean_of_positives if positives == "mean" else _several_positives
        options = {"normalize": bool(normalize), "backend": backend}
        if positives != "mean":
            options["each"] = positives == "each"
        return form(compared, weights, temperature, reduction, **options)


class _Compared(NamedTuple):
    """Samples and the rows that they are compared with, in the dtype of the sums.

    Args:
        query: (N, D).
        key: (M, D).
        query_classes: (N,) int64, -1 where no key has the label.
        key_classes: (M,) int64, from 0 to M - 1.
        query_ids: (N,) int64, or None.
        key_ids: (M,) int64, ``LEFT_OUT`` for keys that count for nothing, or None.
    """

    query: Tensor
    key: Tensor
    query_classes: Tensor
    key_classes: Tensor
    query_ids: Tensor | None
    key_ids: Tensor | None


def _compared(
    op: str,
    features: Tensor,
    labels: Tensor,
    ids: Tensor | None,
    reference_features: Tensor | None,
    reference_labels: Tensor | None,
    reference_ids: Tensor | None,
    reference_mask: Tensor | None,
) -> _Compared:
    if ids is not None:
        ids = _checks.expect_labels(op, ids, features, "features", "ids")
    rows = features.to(accumulation_dtype(features.dtype))
    if reference_features is None:
        given = (reference_labels, reference_ids, reference_mask)
        for name, x in zip(("labels", "ids", "mask"), given, strict=True):
            if x is not None:
                raise ValueError(
                    f"{op}: reference_{name} without reference_features has no rows. Pass these, or drop it."
                )
        ids = torch.arange(len(labels), device=labels.device) if ids is None else ids
        classes, _ = _numbered(labels, labels)
        return _Compared(rows, rows, classes, classes, ids, ids)
    _checks.expect_float_tensor(op, "reference_features", reference_features, (2,), "(M, D)")
    count, dim = len(reference_features), features.shape[1]
    _checks.expect_shape(
        op, "reference_features", reference_features, (count, dim), "features are", features
    )
    _checks.expect_alike(op, "reference_features", reference_features, "features", features)
    if reference_labels is None:
        raise ValueError(f"{op}: reference_labels is None. Pass the labels of reference_features.")
    if (ids is None) != (reference_ids is None):
        name = "reference_ids" if reference_ids is None else "ids"
        raise ValueError(f"{op}: ids of one side alone are never the same. Pass {name} too.")
    found = {"labels": reference_labels, "ids": reference_ids}
    for name, x in found.items():
        if x is not None:
            found[name] = _checks.expect_labels(
                op, x, features, "features", f"reference_{name}", (count,)
            )
    key_ids = with_mask(
        op, "reference_mask", found["ids"], reference_mask, reference_features, (count,)
    )
    key_classes, query_classes = _numbered(found["labels"], labels)
    return _Compared(
        rows, reference_features.to(rows.dtype), query_classes, key_classes, ids, key_ids
    )


def _numbered(of_keys: Tensor, of_queries: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from 0 to M - 1, the same for the same, of keys (M,); and of queries (N,), -1 for what no key has."""
    order = of_keys.sort().values
    keys, queries = torch.searchsorted(order, of_keys), torch.searchsorted(order, of_queries)
    known = order[queries.clamp(max=len(order) - 1)] == of_queries
    return keys, queries.where(known, -1)


def _sums(x: Tensor, of_keys: Tensor, of_queries: Tensor) -> Tensor:
    """(N, C): the sum of the rows of ``x`` (M, C) that have the query's number, 0 for -1."""
    sums = torch.zeros_like(x).index_add(0, of_keys, x)
    return sums[of_queries.clamp(min=0)].masked_fill((of_queries < 0)[:, None], 0)


def _mean_of_positives(
    compared: _Compared,
    weights: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    *,
    normalize: bool,
    backend: str | None,
) -> Tensor:
    """The decoupled loss of each sample with the mean of its positives as its key, which need not have length 1."""
    query, key, query_classes, key_classes, query_ids, key_ids = compared
    if normalize:
        same = key is query
        query = normalize_rows(query)
        key = query if same else normalize_rows(key)
    counted = torch.cat([key, key.new_ones((len(key), 1))], dim=1)
    if key_ids is not None:
        counted = counted.masked_fill((key_ids == LEFT_OUT)[:, None], 0)
    sums = _sums(counted, key_classes, query_classes)
    if query_ids is not None:
        key_numbers, query_numbers = _numbered(key_ids, query_ids)
        # Of the class and the id together.
        count = len(key) + 1
        both = key_classes * count + key_numbers + 1, query_classes * count + query_numbers + 1
        sums = sums - _sums(counted, *_numbered(*both))
    counts = sums[:, -1].detach()
    mean = sums[:, :-1] / counts.clamp(min=1)[:, None]
    shares = (counts > 0).to(query.dtype)[None]
    loss, _ = rows_loss(
        "sup_con",
        (query[None], mean[None], key),
        Masks(None if query_ids is None else query_ids[None], None, key_ids),
        shares if weights is None else shares * weights,
        temperature,
        reduction,
        backend,
        normalize=False,
        symmetric=False,
        in_batch=False,
        decoupled=True,
    )
    return loss.squeeze(0) if reduction == "none" else loss


def _several_positives(
    compared: _Compared,
    weights: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    *,
    normalize: bool,
    each: bool,
    backend: str | None,
) -> Tensor:
    """Of each pair with a positive, or of the sum of the positives, against the rows of other labels."""
    query, key, query_classes, key_classes, query_ids, key_ids = compared
    negative = key_classes
    if key_ids is not None:
        left_out = key_ids == LEFT_OUT
        negative = key_classes.masked_fill(left_out, LEFT_OUT)
        key_classes = key_classes.masked_fill(left_out, -2)  # nobody's
    others = negatives_lse(
        query,
        key,
        query_classes,
        negative,
        op="sup_con",
        temperature=temperature,
        normalize=normalize,
        backend=backend,
    )
    kernels = backends.select("masked_info_nce", query, backend, (query[None], None, key))
    if normalize:
        same = key is query
        query = normalize_rows(query)
        key = query if same else normalize_rows(key)
    losses, counts = positive_pairs(
        query,
        key,
        query_classes,
        key_classes,
        query_ids,
        None if query_ids is None else key_ids,
        others,
        temperature,
        each=each,
        matrix=kernels is backends.reference,
    )
    terms = (counts if each else counts > 0).to(losses.dtype)
    if reduction == "none":
        losses = losses / terms.clamp(min=1)
    if weights is not None:
        losses, terms = losses * weights[0], terms * weights[0]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = terms.sum()
    return losses.sum() / total.masked_fill(total == 0, 1)


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
    *references: Tensor | None,
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
    **options: object,
) -> Tensor:
    """``fastnce.sup_con`` of the samples of all ranks, exactly; positives may be on any rank.

    Against rows that are the same on all ranks, such as a labelled ``NegativeQueue``, each rank's samples are on their own:
    there the plain op is the loss.

    Args:
        features: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        labels: (N,) integers.
        references: the other rows of ``fastnce.sup_con``, where this process is alone.
        temperature: positive float, or tensor of one element, which gets its gradient.
        reduction: ``"mean"`` over the samples of all ranks that have a positive (0 if none has), ``"sum"``, or ``"none"`` for
            this rank's (N,), with 0 for samples without a positive.
        group, strategy, gradient_scale, check: see ``fastnce.distributed``.
        backend: one of ``fastnce.backends.available()``; None chooses.
        options: the others of ``fastnce.sup_con``, where this process is alone.

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
        return sup_con(features, labels, *references, **options, **call.plain)

    def validate() -> dict[str, Fact]:
        names = ("reference_features", "reference_labels")
        call.expect_default(dict(zip(names, references, strict=False)) | options)
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
