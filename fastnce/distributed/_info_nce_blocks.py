"""InfoNCE of this rank's queries against the keys of all ranks, block by block or at once, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastnce import reference
from fastnce.distributed._exchange import Block, Exchange, Gather
from fastnce.ops import _common
from fastnce.reference.normalize import accumulation_dtype

Gradients = tuple[Tensor | None, ...]


class Blocks:
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

    def fit_one_call(self) -> bool:
        """Whether a fused backend can compute loss and gradients together, against all keys at once."""
        gathers = isinstance(self.exchange, Gather)
        return gathers and self.negatives is None and self._kernels is not reference

    def at_once(
        self,
        query: Tensor,
        key: Tensor,
        others: Tensor,
        tau: float | Tensor,
        needs: Sequence[bool] | None,
    ) -> tuple[Tensor, Gradients]:
        """Losses (N,) against own keys and ``others`` (M, D), and the gradients of their sum for query, key, others, temperature."""
        acc = accumulation_dtype(query.dtype)
        if len(query) == 0:
            inputs = (query, key, others, query.new_zeros((), dtype=acc))
            return query.new_zeros(0, dtype=acc), tuple(torch.zeros_like(x) for x in inputs)
        losses, _, (grad_query, grad_key, *rest) = self._kernels.info_nce_forward(
            query[None],
            key[None],
            others if len(others) > 0 else None,
            tau,
            **self._options,
            in_batch=True,
            grad_scale=None if needs is None else 1.0,
            needs=needs or (False,) * 4,
        )
        return losses[0], (_first(grad_query), _first(grad_key), *rest)

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
    ) -> Gradients:
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
        return _first(grad_query), _first(grad_key), grad_keys, grad_tau


def _first(grad: Tensor | None) -> Tensor | None:
    """Without the batch dimension of 1."""
    return None if grad is None else grad[0]


def _reference_gradients(
    weights: Tensor, inputs: tuple, options: dict, needs: Sequence[bool]
) -> Gradients:
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
            for x, need in zip(inputs, needs, strict=True)
        ]
        losses = reference.info_nce(*leaves, **options)
    wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(losses, wanted, weights[None]) if wanted else ())
    return tuple(next(found) if need else None for need in needs)


class InfoNCE(torch.autograd.Function):
    """Losses (N,) float64 of this rank's queries against the blocks of all ranks."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, tau: float | Tensor, blocks: Blocks) -> Tensor:
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


class GatheredInfoNCE(torch.autograd.Function):
    """The same losses, reduced later with one weight for all rows: their gradients come with them, and the backward scales these."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, tau: float | Tensor, blocks: Blocks, grad_now: bool
    ) -> Tensor:
        need_query, need_key, need_tau = ctx.needs_input_grad[:3]
        needs = (need_query, need_key, need_key, need_tau) if grad_now else None
        ctx.exchange = blocks.exchange
        losses, grads = blocks.at_once(query, key, blocks.exchange.others(key), tau, needs)
        losses = losses.double()
        ctx.save_for_backward(losses, *grads)
        return losses

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        weight = grad[0] if len(grad) > 0 else grad.new_zeros(())
        query, key, others, tau = _common.scaled(saved[1:], weight)
        if key is not None and ctx.needs_input_grad[1]:
            acc = accumulation_dtype(key.dtype)
            if others is None:  # no other rank has rows
                others = key[:0]
            key = ctx.exchange.give_back(key.to(acc), others.to(acc)).to(key.dtype)
        needs = ctx.needs_input_grad
        return query if needs[0] else None, key, tau if needs[2] else None, None, None


class _Sums:
    """The gradients of this rank's rows and of the temperature, summed over the blocks."""

    def __init__(self, query: Tensor, key: Tensor, tau: Tensor | None) -> None:
        acc = accumulation_dtype(query.dtype)
        self._dtype, self._tau_dtype = query.dtype, None if tau is None else tau.dtype
        self.query = query.new_zeros(query.shape, dtype=acc)
        self.key = key.new_zeros(key.shape, dtype=acc)
        self.tau = query.new_zeros((), dtype=torch.float64)

    def add(self, grads: Gradients) -> Tensor | None:
        """Adds those of one block; returns that of the block's keys."""
        query, key, keys, tau = grads
        for total, part in ((self.query, query), (self.key, key), (self.tau, tau)):
            if part is not None:
                total += part
        return keys

    def result(self, needs: Sequence[bool]) -> Gradients:
        """For query, key and temperature, None where not needed."""
        return (
            self.query.to(self._dtype) if needs[0] else None,
            self.key.to(self._dtype) if needs[1] else None,
            self.tau.to(self._tau_dtype) if needs[2] else None,
        )
