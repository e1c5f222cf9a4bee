"""InfoNCE over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from fastnce import ops, reference
from fastnce.distributed._exchange import Block, Exchange
from fastnce.distributed._losses import Options, expect_rows, make_plan
from fastnce.distributed._ranks import Fact, ranks_of
from fastnce.ops import _checks, _common
from fastnce.reference.normalize import accumulation_dtype


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
        temperature: positive float, or 0-d tensor, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        symmetric: the mean of the losses query to key and key to query (CLIP); without ``negative_keys`` only.
        in_batch_negatives: whether the other keys of all ranks are negatives; by default only without ``negative_keys``.
        reduction: ``"mean"`` over the queries of all ranks, ``"sum"``, or ``"none"`` for this rank's (N,).
        group: as ``torch.distributed`` has it; None is the default group. Alone, or without one, the plain op runs.
        strategy: see :mod:`fastnce.distributed`, like the next two.
        gradient_scale: ``"mean"`` or ``"sum"``.
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

        def losses(query: Tensor, key: Tensor) -> Tensor:
            exchange = plan.exchange if in_batch else None
            blocks = _Blocks(plan.kernels, bool(normalize), negatives, exchange)
            return _InfoNCE.apply(query, key, tau, blocks)

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


class _Blocks:
    """This rank's queries and positives against one block of keys after the other, by the kernels of :func:`fastnce.info_nce`.

    Every block has the positives too. A block's loss is ``log(1 + r)``, with r the block's other exponentials relative to the
    positive's, so that the blocks' r add up, and nothing cancels where the positive dominates.
    """

    def __init__(
        self,
        kernels: ModuleType,
        normalize: bool,
        negatives: Tensor | None,
        exchange: Exchange | None,
    ) -> None:
        self._kernels, self.negatives, self.exchange = kernels, negatives, exchange
        self._options = {"normalize": normalize, "symmetric": False, "self_logit": None}

    def forward(
        self, query: Tensor, key: Tensor, keys: Tensor | None, tau: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses and lse (N,) against ``keys`` (M, D), or the in-batch keys for None."""
        inputs = (query[None], key[None], keys, tau)
        options = self._options | {"in_batch": keys is None}
        if self._kernels is reference:
            losses = reference.info_nce(*inputs, **options)
            return losses[0], losses[0]
        losses, lse, _ = self._kernels.info_nce_forward(
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
    ) -> tuple[Tensor | None, ...]:
        """The gradients of ``(weights * losses).sum()`` for query, key, keys and temperature."""
        inputs = (query[None], key[None], keys, tau)
        options = self._options | {"in_batch": keys is None}
        if self._kernels is reference:
            grads = _reference_gradients(weights, inputs, options, needs)
        else:
            grads = self._kernels.info_nce_backward(
                weights[None], *inputs, lse[None], **options, needs=needs
            )
        grad_query, grad_key, grad_keys, grad_tau = grads
        return (
            None if grad_query is None else grad_query[0],
            None if grad_key is None else grad_key[0],
            grad_keys,
            grad_tau,
        )


def _reference_gradients(
    weights: Tensor, inputs: tuple, options: dict, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
            for x, need in zip(inputs, needs, strict=True)
        ]
        losses = reference.info_nce(*leaves, **options)
    wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(losses, wanted, weights[None]) if wanted else ())
    return tuple(next(found) if need else None for need in needs)


class _InfoNCE(torch.autograd.Function):
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
    def backward(ctx, grad: Tensor):
        query, key, tau, losses = ctx.saved_tensors
        blocks, needs = ctx.blocks, ctx.needs_input_grad
        sums = _Sums(query, key, tau)

        def compute(keys: Tensor | None, found: tuple[Tensor, Tensor] | None) -> Tensor | None:
            """Adds what a block gives to this rank's rows; returns the gradient of ``keys``."""
            if found is None:
                return None
            block_losses, lse = found
            weights = grad * torch.exp(block_losses - losses)
            needs_keys = keys is not None and needs[1] and keys is not blocks.negatives
            return sums.add(
                blocks.backward(
                    weights.to(block_losses.dtype),
                    query,
                    key,
                    keys,
                    ctx.tau if tau is None else tau,
                    lse,
                    (needs[0], needs[1], needs_keys, needs[2]),
                )
            )

        if blocks.negatives is not None and len(query) > 0:
            compute(blocks.negatives, ctx.found[-1])
        if blocks.exchange is not None:

            def step_gradient(step: int, block: Block) -> Tensor:
                (keys,) = block
                found = compute(keys if step > 0 else None, ctx.found[step])
                acc = accumulation_dtype(keys.dtype)
                # In-batch keys are this rank's own: their gradient is among the sums.
                return keys.new_zeros(keys.shape, dtype=acc) if found is None else found.to(acc)

            if needs[1]:
                sums.key += blocks.exchange.round_trip((key,), step_gradient)
            else:
                for step, (keys,) in blocks.exchange.trip((key,)):
                    compute(keys if step > 0 else None, ctx.found[step])
        return *sums.result(needs), None


class _Sums:
    """The gradients of this rank's rows and of the temperature, summed over the blocks."""

    def __init__(self, query: Tensor, key: Tensor, tau: Tensor | None) -> None:
        acc = accumulation_dtype(query.dtype)
        self._dtype, self._tau_dtype = query.dtype, None if tau is None else tau.dtype
        self.query = query.new_zeros(query.shape, dtype=acc)
        self.key = key.new_zeros(key.shape, dtype=acc)
        self.tau = query.new_zeros((), dtype=torch.float64)

    def add(self, grads: tuple[Tensor | None, ...]) -> Tensor | None:
        """Adds those of one block; returns that of the block's keys."""
        query, key, keys, tau = grads
        for total, part in ((self.query, query), (self.key, key), (self.tau, tau)):
            if part is not None:
                total += part
        return keys

    def result(self, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """For query, key and temperature, None where not needed."""
        return (
            self.query.to(self._dtype) if needs[0] else None,
            self.key.to(self._dtype) if needs[1] else None,
            self.tau.to(self._tau_dtype) if needs[2] else None,
        )
