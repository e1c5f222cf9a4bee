"""InfoNCE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import OverRanks
from fastnce.ops.masked_info_nce import masks_of, rows_loss, weights_of
from fastnce.ranks import Block, Exchange, Fact, Gather
from fastnce.reference.normalize import (
    accumulation_dtype,
    normalize_rows,
    over_temperature,
    rounded_unit_rows,
)
from fastnce.registry import Form, Make, Op, Operator, Sample, declare

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
        query_ids: (N,) or (B, N) integers, as ``query`` has rows: a key of the same id is no negative of the query, such as a
            duplicate, or another sample of its label. The query's own positive always stays. No matrix is made of this.
        key_ids: the ids of the rows of ``positive_key`` as negatives of other queries; by default ``query_ids``.
        negative_ids: those of ``negative_keys``, (M,), (N, M) or (B, N, M). None of these is left out by default.
        key_mask: bool, in the shape of ``query_ids``: False where a row of ``positive_key`` is nobody's negative.
        negative_mask: bool, in the shape of ``negative_ids``: False where there is no key, as in rows of different lengths.
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
            top-1 accuracy is ``(rank == 0).float().mean()``.
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
    temperature = _checks.expect_temperature(op, temperature, query)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    in_batch = negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)
    _check_use_of_negatives(op, negative_keys, in_batch, symmetric)
    if similarity_dtype is not None:
        _check_similarity_dtype(op, similarity_dtype, normalize, negative_keys)

    named = {"query_ids": query_ids, "key_ids": key_ids, "negative_ids": negative_ids}
    named |= {"key_mask": key_mask, "negative_mask": negative_mask, "guide": guide}
    plain_call = all(x is None for x in (*named.values(), weights)) and not (
        decoupled or return_rank
    )
    masks = None
    if not plain_call:
        if similarity_dtype is not None:
            raise ValueError(f"{op}: similarity_dtype goes with no mask, weight or rank. Drop one.")
        if symmetric and guide is not None:
            raise ValueError(
                f"{op}: guide has a threshold for each query, symmetric=True none for each key. Drop one, or average two calls."
            )
        margins = {"guide_margin": guide_margin, "relative_margin": relative_margin}
        masks = masks_of(op, query, negative_keys, in_batch, **named, **margins)
        weights = weights_of(op, weights, query)

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
        loss, rank = rows_loss(
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
                op, kernels, rows, None, temperature, reduction, operators=name, **options
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
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``fastnce.info_nce`` of the queries and keys of all ranks, exactly: all keys of all ranks are negatives.

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
    if call.alone:
        options |= {"in_batch_negatives": in_batch_negatives}
        return info_nce(query, positive_key, negative_keys, **options, **call.plain)
    in_batch = negative_keys is None if in_batch_negatives is None else bool(in_batch_negatives)
    query, positive_key, negative_keys = _checks.same_dtype_under_autocast(
        query, positive_key, negative_keys
    )

    def validate() -> dict[str, Fact]:
        _checks.expect_rows(op, "query", query, may_be_empty=True)
        _checks.expect_rows(
            op, "positive_key", positive_key, may_be_empty=True, like=query, like_name="query"
        )
        _check_use_of_negatives(op, negative_keys, in_batch, symmetric)
        if negative_keys is not None:
            _checks.expect_float_tensor(op, "negative_keys", negative_keys, (2,), "(M, D)")
            _check_negatives(op, query, negative_keys)
        if _common.wants_grad(negative_keys):
            raise ValueError(
                f"{op}: negative_keys require a gradient, which they do not get over ranks. Pass negative_keys.detach()."
            )
        return {
            "normalize": bool(normalize),
            "symmetric": bool(symmetric),
            "in_batch_negatives": in_batch,
            "whether query needs a gradient": _common.wants_grad(query, temperature),
            "whether positive_key needs a gradient": _common.wants_grad(positive_key),
        }

    rows = (query, positive_key, negative_keys)
    call.agree(op, query, validate, of_form=(rows, bool(symmetric)))
    tau = call.temperature
    negatives = None if negative_keys is None else negative_keys.detach()
    with _common.no_autocast(query):
        blocks = _Blocks(
            call.kernels, bool(normalize), negatives, call.exchange if in_batch else None
        )

        def losses(query: Tensor, key: Tensor) -> Tensor:
            if reduction == "none" or not blocks.fit_one_call:
                return _BlocksFunction.apply(query, key, tau, blocks)
            grad_now = _common.wants_grad(query, key, tau)
            return _GatheredFunction.apply(query, key, tau, blocks, grad_now)

        one_way = losses(query, positive_key)
        both = 0.5 * (one_way + losses(positive_key, query)) if symmetric else one_way
        return call.reduce(both, None, query.dtype)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """This rank's queries and positives against one block of keys after the other.

    Every block has the positives too. A block's loss is ``log(1 + r)``, with r the block's other exponentials relative to the
    positive's, so that the blocks' r add up, and nothing cancels where the positive dominates.

    Args:
        kernels: the backend.
        normalize: as in ``info_nce``.
        negatives: (M, D), one more block.
        exchange: None: other ranks' keys are no negatives.
    """

    kernels: ModuleType
    normalize: bool
    negatives: Tensor | None
    exchange: Exchange | None

    @property
    def fit_one_call(self) -> bool:
        """Whether a fused backend can compute loss and gradients together, against all keys at once."""
        gathers = isinstance(self.exchange, Gather)
        return gathers and self.negatives is None and self.kernels is not backends.reference

    def options(self, in_batch: bool) -> dict[str, object]:
        """Of the kernels."""
        return {
            "normalize": self.normalize,
            "symmetric": False,
            "in_batch": in_batch,
            "self_logit": None,
        }

    def forward(
        self, query: Tensor, key: Tensor, keys: Tensor | None, tau: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses and lse (N,) against ``keys`` (M, D), or the in-batch keys for None."""
        inputs, options = (query[None], key[None], keys, tau), self.options(keys is None)
        if self.kernels is backends.reference:
            losses = lse = plain(*inputs, **options)
        else:
            losses, lse, _ = self.kernels.info_nce_forward(
                *inputs, **options, grad_scale=None, needs=(False,) * 4
            )
        return losses[0], lse[0]

    def backward(
        self,
        weights: Tensor,
        query: Tensor,
        key: Tensor,
        keys: Tensor | None,
        tau: float | Tensor,
        lse: Tensor,
        needs: Sequence[bool],
    ) -> Gradients:
        """The gradients of ``(weights * losses).sum()`` for query, key, keys and temperature."""
        inputs, options = (query[None], key[None], keys, tau), self.options(keys is None)
        if self.kernels is backends.reference:
            function = functools.partial(plain, **options)
            grads = _common.gradients(function, inputs, needs, weights[None])
        else:
            grads = self.kernels.info_nce_backward(
                weights[None], *inputs, lse[None], **options, needs=needs
            )
        grad_query, grad_key, *others = grads
        return _first(grad_query), _first(grad_key), *others


def _first(grad: Tensor | None) -> Tensor | None:
    """Without the batch dimension of 1."""
    return None if grad is None else grad[0]


class _BlocksFunction(torch.autograd.Function):
    """Losses (N,) float64 of this rank's queries against the blocks of all ranks."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, tau: float | Tensor, blocks: _Blocks) -> Tensor:
        found = []  # the blocks' losses and lse
        if blocks.exchange is not None:
            for step, (keys,) in blocks.exchange.trip((key,)):
                if len(query) > 0 and len(keys) > 0:
                    found.append(blocks.forward(query, key, keys if step > 0 else None, tau))
                else:
                    found.append(None)
        if blocks.negatives is not None and len(query) > 0:
            found.append(blocks.forward(query, key, blocks.negatives, tau))
        losses = query.new_zeros(len(query), dtype=torch.float64)
        if len(query) > 0:
            each = torch.stack([x[0] for x in found if x is not None]).double()
            ratios = each + torch.log(-torch.expm1(-each))  # log r
            losses = torch.logaddexp(ratios.logsumexp(dim=0), losses)
        ctx.blocks, ctx.found = blocks, found
        ctx.tau = None if isinstance(tau, Tensor) else tau
        ctx.save_for_backward(query, key, tau if ctx.tau is None else None, losses)
        return losses

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        query, key, tau, losses = saved
        blocks, needs = ctx.blocks, ctx.needs_input_grad
        acc = accumulation_dtype(query.dtype)
        # Of query, key and temperature, over all blocks.
        sums = [x.new_zeros(x.shape, dtype=acc) for x in (query, key)]
        sums.append(query.new_zeros((), dtype=torch.float64))

        def add(keys: Tensor | None, found: tuple[Tensor, Tensor] | None) -> Tensor | None:
            """Adds what a block gives to this rank's rows; returns the gradient of ``keys``."""
            if found is None:
                return None
            block_losses, lse = found
            weights = (grad * torch.exp(block_losses - losses)).to(block_losses.dtype)
            needs_keys = keys is not None and needs[1] and keys is not blocks.negatives
            of_query, of_key, of_keys, of_tau = blocks.backward(
                weights,
                query,
                key,
                keys,
                ctx.tau if tau is None else tau,
                lse,
                (needs[0], needs[1], needs_keys, needs[2]),
            )
            for total, part in zip(sums, (of_query, of_key, of_tau), strict=True):
                if part is not None:
                    total += part
            return of_keys

        def step_gradient(step: int, block: Block) -> Tensor:
            (keys,) = block
            found = add(keys if step > 0 else None, ctx.found[step])
            # In-batch keys are this rank's own: their gradient is among the sums.
            return keys.new_zeros(keys.shape, dtype=acc) if found is None else found.to(acc)

        if blocks.negatives is not None and len(query) > 0:
            add(blocks.negatives, ctx.found[-1])
        if blocks.exchange is not None and needs[1]:
            sums[1] += blocks.exchange.round_trip((key,), step_gradient)
        elif blocks.exchange is not None:
            for step, (keys,) in blocks.exchange.trip((key,)):
                add(keys if step > 0 else None, ctx.found[step])
        likes = (query, key, tau)
        grads = [
            x.to(y.dtype) if n else None for x, y, n in zip(sums, likes, needs[:3], strict=True)
        ]
        return *grads, None


class _GatheredFunction(torch.autograd.Function):
    """The same losses, reduced later with one weight for all rows: their gradients come with them, and the backward scales these."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, tau: float | Tensor, blocks: _Blocks, grad_now: bool
    ) -> Tensor:
        need_query, need_key, need_tau = ctx.needs_input_grad[:3]
        ctx.exchange = blocks.exchange
        acc = accumulation_dtype(query.dtype)
        others = blocks.exchange.others(key)
        if len(query) == 0:
            losses = query.new_zeros(0, dtype=acc)
            grads = [torch.zeros_like(x) for x in (query, key, others)]
            grads.append(query.new_zeros((), dtype=acc))
        else:
            losses, _, grads = blocks.kernels.info_nce_forward(
                query[None],
                key[None],
                others if len(others) > 0 else None,
                tau,
                **blocks.options(in_batch=True),
                grad_scale=_common.kept_scale(query) if grad_now else None,
                needs=(need_query, need_key, need_key, need_tau),
            )
            losses, grads = losses[0], (_first(grads[0]), _first(grads[1]), *grads[2:])
        losses = losses.double()
        ctx.factor = 1 / _common.kept_scale(query)
        ctx.save_for_backward(losses, *grads)
        return losses

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        weight = grad[0] if len(grad) > 0 else grad.new_zeros(())
        query, key, others, tau = _common.scaled(saved[1:], weight, ctx.factor)
        needs = ctx.needs_input_grad
        if key is not None and needs[1]:
            acc = accumulation_dtype(key.dtype)
            if others is None:  # no other rank has rows
                others = key[:0]
            key = ctx.exchange.give_back(key.to(acc), others.to(acc)).to(key.dtype)
        return query if needs[0] else None, key, tau if needs[2] else None, None, None


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
