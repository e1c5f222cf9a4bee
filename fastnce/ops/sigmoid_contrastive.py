"""The sigmoid loss of pairs (SigLIP)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ops._over_ranks import OverRanks
from fastnce.ops.masked_info_nce import with_mask
from fastnce.ranks import Block, Exchange, Fact
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import LEFT_OUT, Form, Make, Op, Operator, Sample, declare


def sigmoid_contrastive(
    query: Tensor,
    key: Tensor,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    normalize: bool = True,
    paired: bool | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""SigLIP's loss: every pair is classified by itself (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

    .. math:: \ell_i = -\sum_j \log \sigma\big( y_{ij} (a\, s_{ij} + b) \big)

    with the cosine :math:`s`, the ``scale`` a, the ``bias`` b, and :math:`y_{ij}` 1 where key j is a positive of query i, else -1.
    The published loss is the mean over the queries, with a = 10 and b = -10 in the beginning.

    Args:
        query: (N, D); float64, float32, bfloat16 or float16.
        key: (M, D).
        query_labels: (N,) integers, with ``key_labels``: a query's positives are the keys of its label, none or several.
        key_labels: (M,) integers.
        scale: positive float, or tensor of one element and any shape, which gets its gradient. One that is trained is best kept
            as a logarithm: pass ``log_scale.exp()``.
        bias: float, or tensor of one element and any shape, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products. An all-zero row has cosine 0 with everything
            and gradient 0.
        paired: key i is the positive of query i, and further keys are nobody's; by default only without labels. With False and
            no labels all pairs are negatives: a block of a larger matrix.
        query_ids: (N,) integers: a key of the same id is no negative of the query, such as a duplicate. The pair counts for
            nothing, unless it is a positive. No matrix is made of this.
        key_ids: (M,) integers; by default ``query_ids``, if key i is the positive of query i and there are no further keys.
        key_mask: (M,) bool, False where there is no key, such as padding: it is nobody's negative, and nobody's positive,
            whatever is in it.
        reduction: ``"mean"`` over the queries, ``"sum"``, or ``"none"`` for (N,).
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> image, text = torch.randn(2, 128, 64, requires_grad=True)
        >>> fastnce.sigmoid_contrastive(image, text, scale=10.0, bias=-10.0).backward()
    """
    op = "sigmoid_contrastive"
    query, key = _checks.same_dtype_under_autocast(query, key)
    labels, paired = _checked(op, query, key, query_labels, key_labels, paired)
    temperature = _checks.expect_scale(op, scale, query, "scale")
    temperature = _checks.expect_temperature(op, temperature, query)
    bias = _checks.expect_bias(op, bias, query)
    _checks.expect_choice(op, "reduction", reduction, _common.REDUCTIONS)
    options = {"paired": paired, "normalize": bool(normalize)}
    others = (labels, *_ids(op, query, key, paired, query_ids, key_ids, key_mask))
    key = _without_padding(key, key_mask)
    kernels = backends.select(op, query, backend, (query, key))
    with _common.no_autocast(query):
        if kernels is not backends.reference:
            rows = (query, key, bias)
            return _common.fused_row_loss(
                op, kernels, rows, others, temperature, reduction, **options
            )
        loss = plain(query, key, bias, *others, temperature, **options)
        if reduction == "none":
            return loss
        return loss.sum() * _common.row_weight(loss.numel(), reduction)


def _form(rows: Sequence[Tensor]) -> Form:
    query, key = rows
    return Form("any", query.numel() * key.shape[0], query.shape[1])


def _checked(
    op: str,
    query: Tensor,
    key: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    paired: bool | None,
    may_be_empty: bool = False,
) -> tuple[Tensor, bool]:
    """The labels of queries and keys (N + M,), or (0,) without; and whether key i is the positive of query i."""
    _checks.expect_rows(op, "query", query, may_be_empty=may_be_empty)
    _checks.expect_rows(op, "key", key, may_be_empty=may_be_empty)
    _checks.expect_shape(op, "key", key, (key.shape[0], query.shape[1]), "query is", query)
    _checks.expect_alike(op, "key", key, "query", query)
    if (query_labels is None) != (key_labels is None):
        missing = "query_labels" if query_labels is None else "key_labels"
        raise ValueError(f"{op}: {missing} is None. Pass the labels of both sides, or of neither.")
    if query_labels is not None:
        if paired:
            raise ValueError(
                f"{op}: paired=True has no meaning with labels, which say what a positive is. Drop one."
            )
        sides = ("query", query_labels, query), ("key", key_labels, key)
        labels = [_checks.expect_labels(op, x, y, n, f"{n}_labels") for n, x, y in sides]
        return torch.cat(labels), False
    paired = True if paired is None else bool(paired)
    if paired and key.shape[0] < query.shape[0]:
        raise ValueError(
            f"{op}: key must have a row for each query, whose shape is {_checks.shape_of(query)}, got {_checks.shape_of(key)}. "
            f"Pass paired=False if no pair is a positive, or the labels of both sides."
        )
    return query.new_empty(0, dtype=torch.int64), paired


def _ids(
    op: str,
    query: Tensor,
    key: Tensor,
    paired: bool,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Of queries and keys, int64, ``LEFT_OUT`` of keys that the mask leaves out; None where there are none."""
    if query_ids is None and key_ids is not None:
        raise ValueError(f"{op}: key_ids need the ids of the queries too. Pass query_ids.")
    if query_ids is not None:
        query_ids = _checks.expect_labels(op, query_ids, query, "query", "query_ids")
        if key_ids is None and not (paired and key.shape[0] == query.shape[0]):
            raise ValueError(
                f"{op}: query_ids need the ids of the keys too, unless key i is the positive of query i. Pass key_ids."
            )
        key_ids = query_ids if key_ids is None else key_ids
        key_ids = _checks.expect_labels(op, key_ids, key, "key", "key_ids")
    shape = (key.shape[0],)
    return query_ids, with_mask(op, "key_mask", key_ids, key_mask, query, shape)


def _without_padding(key: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where there is no key: what is there, such as NaN, would reach gradients as a product with 0."""
    return key if mask is None else key.masked_fill(~mask.unsqueeze(1), 0)


def plain(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    labels: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    temperature: float | Tensor,
    *,
    paired: bool,
    normalize: bool,
) -> Tensor:
    """``loss_i = -sum_{j left in} log sigmoid(y_ij (s_ij / t + b))``.

    Args:
        query: (N, D).
        key: (M, D).
        bias: b, 0-d.
        labels: (N + M,) int64 of queries and keys, those of a positive are the same; or (0,).
        query_ids: (N,) int64; a pair of the same ids that is no positive is left out. None: no ids are the same.
        key_ids: (M,) int64, ``LEFT_OUT`` of keys that are left out as positives too; None: no pair is left out.
        temperature: t, the inverse of the scale, a float or a 0-d tensor.
        paired: without labels, key i is the positive of query i; else nothing is.
        normalize: s is the cosine instead of the dot product.

    Returns:
        (N,), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    if normalize:
        query, key = normalize_rows(query), normalize_rows(key)
    logits = over_temperature(query @ key.T, temperature) + bias  # (N, M)
    if len(labels) > 0:
        is_positive = labels[: len(query), None] == labels[None, len(query) :]
    else:
        is_positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device) & paired
    losses = -F.logsigmoid(torch.where(is_positive, logits, -logits))
    if key_ids is not None:
        out = key_ids == LEFT_OUT
        if query_ids is not None:
            out = out | ((query_ids[:, None] == key_ids) & ~is_positive)
        losses = losses.masked_fill(out, 0)
    return losses.sum(dim=1)


@torch.compiler.disable
def over_ranks(
    query: Tensor,
    key: Tensor,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    normalize: bool = True,
    paired: bool | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    gradient_scale: str = "mean",
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """``fastnce.sigmoid_contrastive`` of the queries and keys of all ranks, exactly.

    Args:
        query: (N, D), this rank's; N may differ between ranks, and be 0 on some.
        key: (M, D), this rank's; so may M.
        query_labels: (N,) integers, with ``key_labels``: positives are the keys of all ranks that have the query's label.
        key_labels: (M,) integers.
        scale: positive float, or tensor of one element, which gets its gradient.
        bias: float, or tensor of one element, which gets its gradient.
        normalize: L2-normalise all rows (cosine); otherwise plain dot products.
        paired: key i of a rank is the positive of its query i; by default only without labels. False: all pairs are negatives.
        query_ids, key_ids, key_mask: of this rank's rows, as in ``fastnce.sigmoid_contrastive``; ids mean the same on all ranks.
        reduction: ``"mean"`` over the queries of all ranks, ``"sum"``, or ``"none"`` for this rank's (N,).
        group, strategy, gradient_scale, check: see ``fastnce.distributed``.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The same loss on every rank (``"none"``: this rank's losses), float32 (float64 for float64 inputs).

    Examples:
        >>> import torch, fastnce.distributed  # one process: the plain op
        >>> image, text = torch.randn(2, 128, 64, requires_grad=True)
        >>> fastnce.distributed.sigmoid_contrastive(image, text, scale=10.0, bias=-10.0).backward()
    """
    op = "sigmoid_contrastive"
    call = OverRanks(op, group, scale, reduction, strategy, gradient_scale, check, backend)
    if call.alone:
        options = {"normalize": normalize, "paired": paired}
        options |= {"query_ids": query_ids, "key_ids": key_ids, "key_mask": key_mask}
        options |= {"reduction": reduction, "backend": backend}
        return sigmoid_contrastive(
            query, key, query_labels, key_labels, scale=scale, bias=bias, **options
        )
    query, key = _checks.same_dtype_under_autocast(query, key)

    ids: tuple[Tensor | None, Tensor | None] = (None, None)

    def validate() -> dict[str, Fact]:
        nonlocal bias, paired, ids
        by_labels = query_labels is not None
        paired = _checked(op, query, key, query_labels, key_labels, paired, may_be_empty=True)[1]
        ids = _ids(op, query, key, paired, query_ids, key_ids, key_mask)
        call.temperature = _checks.expect_scale(op, scale, query, "scale")
        bias = _checks.expect_bias(op, bias, query)
        return {
            "normalize": bool(normalize),
            "paired": paired,
            "whether there are labels": by_labels,
            "whether there are ids": ids[0] is not None,
            "whether there are ids or a key_mask": ids[1] is not None,
            "bias": bias.detach(),
            "whether gradients are needed": _common.wants_grad(query, key, scale, bias),
            "whether key needs a gradient": _common.wants_grad(key),
        }

    call.agree(op, key, validate, of_form=((query, key),))
    labels = (query_labels, key_labels) if query_labels is not None else None
    key = _without_padding(key, key_mask)
    with _common.no_autocast(query):
        blocks = _Blocks(call.kernels, call.exchange, labels, ids, paired, bool(normalize))
        inputs = (query, key, bias, call.temperature)
        one_weight = reduction != "none" and call.kernels is not backends.reference
        grad_now = one_weight and _common.wants_grad(*inputs)
        losses = _BlocksFunction.apply(*inputs, blocks, grad_now)
        if reduction == "none":
            return call.reduce(losses[:-1], None, query.dtype)
        counts = torch.ones_like(losses)
        counts[-1] = 0
        return call.reduce(losses, counts, query.dtype)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """This rank's queries against one block of keys after the other, whose losses add up.

    Args:
        kernels: the backend.
        exchange: by which keys travel.
        labels: of this rank's queries and keys, or None.
        ids: as of ``plain``.
        paired, normalize: as in ``sigmoid_contrastive``.
    """

    kernels: ModuleType
    exchange: Exchange
    labels: tuple[Tensor, Tensor] | None
    ids: tuple[Tensor | None, Tensor | None]
    paired: bool
    normalize: bool

    def travelling(self, key: Tensor) -> Block:
        labels = () if self.labels is None else (self.labels[1].long(),)
        return (key, *labels, *(() if self.ids[1] is None else (self.ids[1],)))

    def _call(
        self, query: Tensor, bias: Tensor, tau: float | Tensor, step: int, block: Block
    ) -> tuple[tuple[Tensor | float | None, ...], dict[str, bool]]:
        """The inputs and the options of ``plain``."""
        labels = query.new_empty(0, dtype=torch.int64)
        if self.labels is not None:
            labels = torch.cat([self.labels[0].long(), block[1]])
        key_ids = None if self.ids[1] is None else block[-1]
        options = {"paired": self.paired and step == 0, "normalize": self.normalize}
        return (query, block[0], bias, labels, self.ids[0], key_ids, tau), options

    def forward(
        self,
        query: Tensor,
        bias: Tensor,
        tau: float | Tensor,
        step: int,
        block: Block,
        scale: float | None,
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Losses (N,) of the block that is here at ``step``; with a ``scale`` also the gradients of ``scale * losses``."""
        inputs, options = self._call(query, bias, tau, step, block)
        if self.kernels is backends.reference:
            return (plain(*inputs, **options),)
        needs = (False,) * 4 if scale is None else needs
        losses, grads = self.kernels.sigmoid_contrastive_forward(
            *inputs, **options, grad_scale=scale, needs=needs
        )
        return losses, *grads

    def gradients(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor,
        tau: float | Tensor,
        needs: Sequence[bool],
        of_block: Callable[[int, Block], Sequence[Tensor | None]],
    ) -> tuple[Tensor | None, ...]:
        """Of query, key, bias and temperature, over all blocks: ``of_block(step, block)`` has a block's."""
        acc = accumulation_dtype(query.dtype)
        # Of query, bias and temperature.
        sums = [query.new_zeros(query.shape, dtype=acc)]
        sums += [query.new_zeros((), dtype=torch.float64) for _ in range(2)]

        def step_gradient(step: int, block: Block) -> Tensor:
            """Adds what a block gives to this rank; returns the gradient of its keys."""
            keys = block[0]
            if len(query) == 0 or len(keys) == 0:
                return keys.new_zeros(keys.shape, dtype=acc)
            of_query, of_keys, *others = of_block(step, block)
            for total, part in zip(sums, (of_query, *others), strict=True):
                if part is not None:
                    total += part
            return keys if of_keys is None else of_keys.to(acc)

        travelling = self.travelling(key)
        of_key = None
        if needs[1]:
            of_key = self.exchange.round_trip(travelling, step_gradient)
        else:
            for step, block in self.exchange.trip(travelling):
                step_gradient(step, block)
        found = zip((sums[0], of_key, *sums[1:]), (query, key, bias, tau), needs, strict=False)
        return tuple(x.to(like.dtype) if need else None for x, like, need in found)

    def backward(
        self,
        weights: Tensor,
        query: Tensor,
        bias: Tensor,
        tau: float | Tensor,
        step: int,
        block: Block,
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Of ``(weights * losses).sum()`` for query, the block's keys, bias and temperature."""
        inputs, options = self._call(query, bias, tau, step, block)
        weights = weights.to(accumulation_dtype(query.dtype))
        if self.kernels is backends.reference:
            function, (*of_rows, of_tau) = functools.partial(plain, **options), needs
            needs = (*of_rows, False, False, False, of_tau)
            found = _common.gradients(function, inputs, needs, weights)
            return (*found[:3], found[-1])
        return self.kernels.sigmoid_contrastive_backward(weights, *inputs, **options, needs=needs)


class _BlocksFunction(torch.autograd.Function):
    """Losses (N + 1,) float64 of this rank's queries against the keys of all ranks, and a 0.

    Where all losses get one weight, the gradients come with them, with three products, and the backward scales these. The 0 is
    there for the weight, which the keys of a rank without queries need too. Otherwise the backward makes the similarities again.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        bias: Tensor,
        tau: float | Tensor,
        blocks: _Blocks,
        grad_now: bool,
    ) -> Tensor:
        losses = query.new_zeros(len(query) + 1, dtype=torch.float64)

        def step(step: int, block: Block, scale: float | None = None) -> Sequence[Tensor | None]:
            needs = ctx.needs_input_grad[:4]
            found, *grads = blocks.forward(query, bias, tau, step, block, scale, needs)
            losses[:-1] += found
            return grads

        ctx.blocks, ctx.tau = blocks, None if isinstance(tau, Tensor) else tau
        ctx.factor, ctx.grad_now = 1 / _common.kept_scale(query), grad_now
        saved = (query, key, bias, tau if ctx.tau is None else None)
        if grad_now:
            of_block = functools.partial(step, scale=_common.kept_scale(query))
            gradients = blocks.gradients(query, key, bias, tau, ctx.needs_input_grad, of_block)
            saved = (losses, *gradients)  # a result, which leads to the inputs
        else:
            for at, block in blocks.exchange.trip(blocks.travelling(key)):
                if len(query) > 0 and len(block[0]) > 0:
                    step(at, block)
        ctx.save_for_backward(*saved)
        return losses

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad: Tensor):
        if ctx.grad_now:
            return *_common.scaled(saved[1:], grad[-1], ctx.factor), None, None
        query, key, bias, tau = saved
        tau = ctx.tau if tau is None else tau
        needs = ctx.needs_input_grad[:4]

        def of_block(step: int, block: Block) -> Sequence[Tensor | None]:
            return ctx.blocks.backward(grad[:-1], query, bias, tau, step, block, needs)

        return *ctx.blocks.gradients(query, key, bias, tau, needs, of_block), None, None


def _samples(make: Make) -> Iterator[Sample]:
    query = make(33, 20)
    pair = {"query": query, "key": make.similar(query)}
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    yield Sample("pairs", {**pair, "scale": 5.0, "bias": -3.0})
    yield Sample("trained", {**pair, "scale": scale, "bias": bias})
    yield Sample("none", {**pair, "scale": scale, "bias": bias, "reduction": "none"})
    more = {"query": query, "key": make(70, 20), "scale": torch.tensor([3.0], requires_grad=True)}
    yield Sample("more_keys", more)
    yield Sample("negatives", {**more, "paired": False, "bias": -1.0, "reduction": "sum"})
    query_labels, key_labels = (
        torch.randint(5, (n,), generator=make.generator).to(query.device) for n in (33, 70)
    )
    labelled = {**more, "query_labels": query_labels, "key_labels": key_labels.int()}
    yield Sample("labels", {**labelled, "bias": torch.tensor([-0.5], requires_grad=True)})
    query_ids, key_ids = (torch.arange(n, device=query.device) // 3 for n in (33, 70))
    masks = {"query_ids": query_ids, "key_ids": key_ids, "key_mask": key_ids % 5 > 0}
    yield Sample("ids", {**more, **masks, "bias": bias})
    yield Sample("labels_ids", {**labelled, **masks, "bias": bias, "reduction": "none"})
    yield Sample("labels_none", {**labelled, "bias": bias, "reduction": "none"})
    yield Sample("dot", {**pair, "scale": 0.5, "bias": bias, "normalize": False})


def _losses(query: Tensor, **_: object) -> tuple[Tensor]:
    return (query.new_empty(query.shape[:1], dtype=accumulation_dtype(query.dtype)),)


_INPUTS = (
    "Tensor query, Tensor key, Tensor bias, Tensor labels, Tensor? query_ids, Tensor? key_ids, "
    "Tensor? temperature_tensor, float temperature"
)
_OPTIONS = "bool paired, bool normalize"
_NEEDS = "bool need_query, bool need_key, bool need_bias, bool need_temperature"
_GRADS = "Tensor grad_query, Tensor grad_key, Tensor grad_bias, Tensor grad_temperature"

declare(
    Op(
        "sigmoid_contrastive",
        function=sigmoid_contrastive,
        over_ranks=over_ranks,
        samples=_samples,
        form=_form,
    ),
    # The arguments are those of ``plain``, and keys that are left out are zeros; loss (N,).
    Operator(
        f"sigmoid_contrastive_forward({_INPUTS}, {_OPTIONS}, float? grad_scale, bool mean, {_NEEDS}) -> "
        f"(Tensor loss, {_GRADS})",
        _losses,
    ),
    Operator(
        f"sigmoid_contrastive_backward(Tensor grad_loss, {_INPUTS}, {_OPTIONS}, {_NEEDS}) -> ({_GRADS})"
    ),
    sigmoid_contrastive=plain,
)
