"""InfoNCE over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import ops
from fastnce.distributed._info_nce_blocks import Blocks, GatheredInfoNCE, InfoNCE
from fastnce.distributed._losses import Options, expect_rows, make_plan
from fastnce.distributed._ranks import Fact, ranks_of
from fastnce.ops import _checks, _common


@torch.compiler.disable
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
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """:func:`fastnce.info_nce` of the queries and keys of all ranks, exactly: all keys of all ranks are negatives.

    Args:
        query: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        positive_key: (N, D); row i is the positive of query i.
        negative_keys: None, or (M, D), further negatives of this rank's queries, such as a queue that all ranks have. They get
            no gradient.
        temperature: positive float, or tensor of one element, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        symmetric: the mean of the losses query to key and key to query (CLIP); without ``negative_keys`` only.
        in_batch_negatives: whether the other keys of all ranks are negatives; by default only without ``negative_keys``.
        reduction: ``"mean"`` over the queries of all ranks, ``"sum"``, or ``"none"`` for this rank's (N,).
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
        >>> query = torch.randn(128, 64, requires_grad=True)
        >>> fastnce.distributed.info_nce(query, torch.randn(128, 64), symmetric=True).backward()
    """
    op = "info_nce"
    ranks = ranks_of(group)
    if ranks is None:
        return ops.info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=temperature,
            normalize=normalize,
            symmetric=symmetric,
            in_batch_negatives=in_batch_negatives,
            reduction=reduction,
            backend=backend,
        )
    in_batch = negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)
    options = Options(temperature, reduction, strategy, gradient_scale, check, backend)
    query, positive_key, negative_keys = _checks.same_dtype_under_autocast(
        query, positive_key, negative_keys
    )

    def validate() -> dict[str, Fact]:
        expect_rows(op, "query", query)
        expect_rows(op, "positive_key", positive_key)
        shape = tuple(query.shape)
        _checks.expect_shape(op, "positive_key", positive_key, shape, "the shape of query")
        _checks.expect_alike(op, "positive_key", positive_key, "query", query)
        if negative_keys is None and not in_batch:
            raise ValueError(
                f"{op}: in_batch_negatives=False leaves no negatives at all. Pass negative_keys, or drop it."
            )
        if negative_keys is not None:
            _check_negatives(op, query, negative_keys, symmetric)
        return options.validated(op, query) | {
            "normalize": bool(normalize),
            "symmetric": bool(symmetric),
            "in_batch_negatives": in_batch,
            "whether query needs a gradient": _common.wants_grad(query, temperature),
            "whether positive_key needs a gradient": _common.wants_grad(positive_key),
        }

    plan = make_plan(op, "info_nce", ranks, query, options, validate)
    tau = _checks.expect_temperature(op, temperature, query)
    negatives = None if negative_keys is None else negative_keys.detach()
    with _common.no_autocast(query):
        exchange = plan.exchange if in_batch else None
        blocks = Blocks(plan.kernels, bool(normalize), negatives, exchange)

        def losses(query: Tensor, key: Tensor) -> Tensor:
            if reduction == "none" or not blocks.fit_one_call():
                return InfoNCE.apply(query, key, tau, blocks)
            return GatheredInfoNCE.apply(
                query, key, tau, blocks, _common.wants_grad(query, key, tau)
            )

        one_way = losses(query, positive_key)
        both = 0.5 * (one_way + losses(positive_key, query)) if symmetric else one_way
        return plan.reduce(both, None, query.dtype)


def _check_negatives(op: str, query: Tensor, negatives: Tensor, symmetric: bool) -> None:
    _checks.expect_float_tensor(op, "negative_keys", negatives, (2,), "(M, D)")
    expected = (negatives.shape[0], query.shape[1])
    _checks.expect_shape(op, "negative_keys", negatives, expected, "query is", query)
    _checks.expect_alike(op, "negative_keys", negatives, "query", query)
    if _common.wants_grad(negatives):
        raise ValueError(
            f"{op}: negative_keys require a gradient, which they do not get over ranks. Pass negative_keys.detach()."
        )
    if symmetric:
        raise ValueError(
            f"{op}: symmetric=True has no meaning with negative_keys, which belong to the queries alone. Drop one."
        )
