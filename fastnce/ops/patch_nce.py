"""PatchNCE, the patchwise contrastive loss of CUT and of Contrastive Feature Loss."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ops.masked_info_nce import Masks, rows_loss, weights_of
from fastnce.reference.normalize import accumulation_dtype, normalize_rows, over_temperature
from fastnce.registry import Form, Make, Op, Operator, Sample, declare

# CUT overwrites each patch's similarity with its own key among the negatives by this value before dividing by the temperature.
# It is no -inf: at a temperature near 1 the term exp(-10 / t) is part of the published loss.
SELF_LOGIT = -10.0


def patch_nce(
    query_features: Tensor | Sequence[Tensor],
    key_features: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    negatives: str = "image",
    symmetric: bool = False,
    query_negatives: bool = False,
    detach_keys: bool = False,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    weights: Tensor | Sequence[Tensor] | None = None,
    ids: Tensor | Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    r"""CUT's PatchNCE (Park et al. 2020, https://arxiv.org/abs/2007.15651), for one layer or all layers at once.

    .. math:: \ell_i = \log \Big( m e^{-10 / \tau} + \sum_j e^{s_{ij} / \tau} + \Big[ \sum_{j \ne i} e^{c_{ij} / \tau} \Big] \Big)
        - s_{ii} / \tau

    averaged over patches, images and layers; s is the cosine of a patch of the translated image with the patches of the input.
    The bracket, cosines c of queries with one another, is there with ``query_negatives``, and m is then 2, otherwise 1.
    Plain PyTorch for one layer: ``cross_entropy(cat([diagonal, similarity with -10 on its diagonal]) / temperature, 0)``.

    Contrastive Feature Loss (Andonian et al. 2021, https://arxiv.org/abs/2111.06934) as published is twice this with
    ``symmetric``, ``query_negatives`` and ``detach_keys``: it adds up both directions.

    Args:
        query_features: (B, S, C), S patches of each of B images, already projected; float64, float32, bfloat16 or float16.
            Normalisation is part of the op. Or a list, one entry per layer, S and C may differ.
        key_features: like ``query_features``; patch s of image b is the positive of that query. Gradients are computed only
            if it requires them (CUT detaches it).
        temperature: positive float, or tensor of one element, which gets its gradient.
        negatives: ``"image"``: the other patches of the same image; ``"batch"``: those of all images.
        symmetric: the mean of the losses query to key and key to query, in which the two change roles altogether.
        query_negatives: the other queries of the same image, or batch, are negatives too; gradients flow to both of a pair.
        detach_keys: no gradient flows to keys, in either direction: neither as negatives nor as positives. Without
            ``symmetric`` that is ``key_features.detach()``; with it, each side learns from its own direction alone.
        layer_weights: one positive float per layer in the place of 1 / L: the loss is their sum with the layers' means.
        reduction: ``"mean"``, or ``"none"`` for the loss of each patch.
        weights: floats (B, S), or a list of one such tensor per layer: each patch's in the mean of its layer, which is divided by
            their sum; ``"none"`` is multiplied by them. No gradient.
        ids: integers (B, S), or a list of one such tensor per layer: patches of the same id, such as of one segment, are no
            negatives of each other. With ``negatives="batch"`` those of other images too. No matrix is made of this.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, a scalar, float32 (float64 for float64 inputs). Unreduced (B, S), or a list of these, one per layer.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or options that do not fit together.
        RuntimeError: the requested backend cannot run this.

    Examples:
        >>> import torch, fastnce
        >>> layers = [torch.randn(2, 64, 256) for _ in range(4)]
        >>> fastnce.patch_nce(layers, layers).item() < 0.1
        True
    """
    op = "patch_nce"
    queries, keys = _as_layers(op, query_features, key_features)
    _checks.expect_choice(op, "negatives", negatives, ("image", "batch"))
    single = isinstance(query_features, Tensor)
    pairs = [
        _checked(op, query, key, "" if single else f"[{layer}]")
        for layer, (query, key) in enumerate(zip(queries, keys, strict=True))
    ]
    _expect_one_device(op, [query for query, _ in pairs])
    of_layers = _expect_layer_weights(op, layer_weights, len(pairs))
    _checks.expect_choice(op, "reduction", reduction, ("mean", "none"))
    if reduction == "none" and layer_weights is not None:
        raise ValueError(
            f"{op}: layer_weights are for the mean over layers, which reduction='none' leaves to you. Drop one of the two."
        )
    options = {
        "symmetric": bool(symmetric),
        "query_negatives": bool(query_negatives),
        "detach_keys": bool(detach_keys and symmetric),
    }
    if detach_keys and not symmetric:
        pairs = [(query, key.detach()) for query, key in pairs]
    if reduction == "none" or weights is not None or ids is not None:
        given = zip(
            pairs,
            _given_by_layer(op, "weights", weights, len(pairs), single),
            _given_by_layer(op, "ids", ids, len(pairs), single),
            strict=True,
        )
        more = {"in_all": negatives == "batch", "temperature": temperature, "backend": backend}
        losses, totals = [], []
        for layer, (pair, *of_patches) in enumerate(given):
            suffix = "" if single else f"[{layer}]"
            found = _losses_of_layer(op, suffix, *pair, *of_patches, **more, **options)
            losses.append(found[0])
            totals.append(found[1])
        if reduction == "none":
            return losses[0] if single else losses
        count = len(pairs) if layer_weights is None else 1
        return sum(
            x.sum() / total * (w / count)
            for x, total, w in zip(losses, totals, of_layers, strict=True)
        )
    if negatives == "batch":
        pairs = [tuple(x.flatten(0, 1).unsqueeze(0) for x in pair) for pair in pairs]
    loss = None
    for layers in _common.alike([query for query, _ in pairs]):
        part = _weighted_sum(
            op,
            [pairs[layer] for layer in layers],
            [of_layers[layer] for layer in layers],
            len(pairs) if layer_weights is None else 1,
            options,
            _checks.expect_temperature(op, temperature, pairs[layers[0]][0]),
            backend,
        )
        loss = part if loss is None else loss + part
    return loss


def _weighted_sum(
    op: str,
    pairs: list[tuple[Tensor, Tensor]],
    weights: list[float],
    count: int,
    options: dict[str, bool],
    temperature: float | Tensor,
    backend: str | None,
) -> Tensor:
    """``sum_l weights[l] / count * (mean loss of layer l)`` of layers (B, N, D) of one device and dtype."""
    queries, keys = ([pair[side] for pair in pairs] for side in (0, 1))
    kernels = backends.select(op, queries[0], backend, queries, keys, options)
    with _common.no_autocast(queries[0]):
        if kernels is backends.reference:
            return sum(
                plain(query, key, temperature, self_logit=SELF_LOGIT, **options).sum()
                * (weight * _row_weight(query, count))
                for query, key, weight in zip(queries, keys, weights, strict=True)
            )
        _checks.expect_fusable(op, queries[0])
        grad_now = _common.wants_grad(*queries, *keys, temperature)
        rows = _common.distinct((*queries, *keys))
        loss, _ = PatchNCEFunction.apply(
            kernels, options, weights, count, grad_now, temperature, *rows
        )
        return loss


def _form(queries: Sequence[Tensor], keys: Sequence[Tensor], options: dict[str, bool]) -> Form:
    words = [name for name in ("symmetric", "query_negatives") if options[name]]
    name = ", ".join(words).replace("_", " ")
    if not name:
        name = "both gradients" if _common.wants_grad(*keys) else "keys fixed"
    work = sum(query.numel() * query.shape[-2] for query in queries)
    return Form(name, work, max(query.shape[-1] for query in queries))


def _row_weight(query: Tensor, count: int) -> float:
    """That of each loss of a layer in the mean over ``count`` layers."""
    return 1 / (query.shape[0] * query.shape[1] * count)


def plain(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor,
    *,
    self_logit: float,
    symmetric: bool = False,
    query_negatives: bool = False,
    detach_keys: bool = False,
) -> Tensor:
    """``loss_i = log (sum_j exp(q_i.k_j / t) + sum_{j != i} exp(q_i.q_j / t) + m exp(c / t)) - q_i.k_i / t``, one per query.

    Args:
        query: (B, N, D).
        key: (B, N, D); row i is the positive of query i.
        temperature: t, a float or a 0-d tensor.
        self_logit: c.
        symmetric: the mean of this loss and the one with query and key exchanged.
        query_negatives: the second sum is there, and m is 2 instead of 1: one c is in the place of its diagonal.
        detach_keys: k gets no gradient, in each direction.

    Returns:
        (B, N), fp32 (fp64 for fp64 inputs).
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = (normalize_rows(x.to(dtype)) for x in (query, key))

    def one_way(q: Tensor, k: Tensor) -> Tensor:
        k = k.detach() if detach_keys else k
        columns = [q @ k.mT]
        if query_negatives:
            itself = torch.eye(q.shape[-2], dtype=torch.bool, device=q.device)
            columns.append((q @ q.mT).masked_fill(itself, self_logit))
        columns.append(torch.full_like(q[..., :1], self_logit))
        logits = over_temperature(torch.cat(columns, dim=-1), temperature)
        positive = logits[..., : q.shape[-2]].diagonal(dim1=-2, dim2=-1)
        return logits.logsumexp(dim=-1) - positive

    if not symmetric:
        return one_way(query, key)
    return 0.5 * (one_way(query, key) + one_way(key, query))


def _losses_of_layer(
    op: str,
    suffix: str,
    query: Tensor,
    key: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    *,
    in_all: bool,
    temperature: float | Tensor,
    backend: str | None,
    **options: bool,
) -> tuple[Tensor, Tensor | int]:
    """Weights times losses (B, S) of a layer's patches, and what their sum is divided by for the mean."""
    shape = tuple(query.shape[:2])
    weights = weights_of(op, weights, query, f"weights{suffix}")
    if ids is not None:
        name = f"query_features{suffix}"
        ids = _checks.expect_labels(op, ids, query, name, f"ids{suffix}", shape)
    if in_all:
        query, key = (x.flatten(0, 1).unsqueeze(0) for x in (query, key))
        ids = None if ids is None else ids.flatten().unsqueeze(0)
    temperature = _checks.expect_temperature(op, temperature, query)
    losses = _one_by_one(op, query, key, ids, temperature, backend, **options).view(shape)
    if weights is None:
        return losses, losses.numel()
    total = weights.sum()
    return losses * weights, total.masked_fill(total == 0, 1)


def _one_by_one(
    op: str,
    query: Tensor,
    key: Tensor,
    ids: Tensor | None,
    temperature: float | Tensor,
    backend: str | None,
    *,
    symmetric: bool,
    query_negatives: bool,
    detach_keys: bool,
) -> Tensor:
    """The losses of ``plain``, (B, N), of which patches of the same ids are left out.

    ``loss_i = log(1 + exp(d_i))``, with d the log of all other exponentials less the positive's logit: of the decoupled losses of
    ``masked_info_nce``, which keep no matrix, and the constants.
    """
    masks = Masks(query_ids=ids, key_ids=ids)

    def others(q: Tensor, k: Tensor) -> Tensor:
        options = {"normalize": True, "symmetric": False, "in_batch": True, "decoupled": True}
        rows = (q, k, None)
        found, _ = rows_loss(
            op, rows, masks, None, temperature, "none", backend, keep_empty=True, **options
        )
        return found

    def one_way(q: Tensor, k: Tensor) -> Tensor:
        k = k.detach() if detach_keys else k
        rows, positive = others(q, k), cosine(q, k)
        constant = over_temperature(SELF_LOGIT - positive, temperature)
        found = torch.logaddexp(rows, constant)
        if (
            query_negatives
        ):  # less the logit of the positive, in the place of that of the query itself
            rows = others(q, q) + over_temperature(cosine(q, q).detach() - positive, temperature)
            found = torch.logaddexp(found, torch.logaddexp(rows, constant))
        return torch.logaddexp(found, torch.zeros_like(found))

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        a, b = (normalize_rows(x.to(accumulation_dtype(x.dtype))) for x in (a, b))
        return (a * b).sum(dim=-1)

    with _common.no_autocast(query):
        if not symmetric:
            return one_way(query, key)
        return 0.5 * (one_way(query, key) + one_way(key, query))


class PatchNCEFunction(torch.autograd.Function):
    """Autograd of ``patch_nce``, all layers in one call of the kernels of any fused backend.

    The loss is reduced, so loss and gradients leave the forward together and the backward only scales them.
    """

    @staticmethod
    def forward(
        ctx,
        kernels: ModuleType,
        options: dict[str, bool],
        weights: list[float],
        layers: int,
        grad_now: bool,
        temperature: float | Tensor,
        query: Tensor,  # by a name: of two rows after ctx, torch.compile would take ctx for left out
        *others: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        rows = (query, *others)
        count = len(rows) // 2
        kernel_mean = _common.kernel_mean("mean", rows[0].dtype)
        kept = [_common.kept_scale(x) for x in rows[:count]]
        grad_scales = kept
        if kernel_mean:
            grad_scales = [w * scale for w, scale in zip(weights, kept, strict=True)]
        needs = ctx.needs_input_grad[6:]
        loss, (grad_queries, grad_keys, grad_temperature) = kernels.patch_nce_forward(
            list(rows[:count]),
            list(rows[count:]),
            temperature,
            self_logit=SELF_LOGIT,
            **options,
            loss_scales=weights,
            grad_scales=grad_scales if grad_now else (),
            loss_layers=layers,
            grad_layers=layers if kernel_mean else 0,
            needs=(needs[:count], needs[count:], ctx.needs_input_grad[5]),
        )
        ctx.factors = None
        if not kernel_mean:
            each = zip(weights, rows[:count], kept, strict=True)
            ctx.factors = [w * _row_weight(x, layers) / scale for w, x, scale in each] * 2
        handle = _common.handle(ctx, loss, grad_now)
        ctx.save_for_backward(handle, grad_temperature, *grad_queries, *grad_keys)
        return loss, handle

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, _: object):
        _, grad_temperature, *grads = saved
        if ctx.factors is None:
            return *(None,) * 5, *_common.scaled((grad_temperature, *grads), grad_loss)
        (grad_temperature,) = _common.scaled((grad_temperature,), grad_loss)
        if torch.compiler.is_compiling() or len(set(ctx.factors)) > 1:
            scaled = [
                _common.scaled((grad,), grad_loss, factor)[0]
                for grad, factor in zip(grads, ctx.factors, strict=True)
            ]
        else:  # at once, where they are parts of one
            scaled = _common.scaled(grads, grad_loss, ctx.factors[0])
        return *(None,) * 5, grad_temperature, *scaled


def _expect_one_device(op: str, queries: list[Tensor]) -> None:
    for layer, query in enumerate(queries):
        if query.device != queries[0].device:
            raise ValueError(
                f"{op}: query_features[{layer}] is on {query.device} but query_features[0] is on {queries[0].device}. "
                f"Move all layers to one device."
            )


def _expect_layer_weights(op: str, weights: object, count: int) -> list[float]:
    """One for each of ``count`` layers; ones where none are given."""
    if weights is None:
        return [1.0] * count
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        got = len(weights) if isinstance(weights, (list, tuple)) else type(weights).__name__
        raise ValueError(
            f"{op}: layer_weights must be a list of one float per layer, {count} here, got {got}. Leave it out for 1 / L each."
        )
    for layer, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(
                f"{op}: layer_weights[{layer}] must be a float, got {type(weight).__name__}."
            )
        if not 0 < weight < math.inf:
            raise ValueError(
                f"{op}: layer_weights[{layer}] must be positive and finite, got {weight}. Leave that layer out for 0."
            )
    return [float(weight) for weight in weights]


def _given_by_layer(op: str, name: str, given: object, count: int, single: bool) -> list:
    """One tensor (B, S) for each of ``count`` layers, or None."""
    if given is None:
        return [None] * count
    if single:
        return [given]
    if not isinstance(given, (list, tuple)) or len(given) != count:
        got = len(given) if isinstance(given, (list, tuple)) else type(given).__name__
        raise ValueError(
            f"{op}: {name} must be a list of one tensor (B, S) per layer, {count} here, got {got}."
        )
    return list(given)


def _as_layers(op: str, queries: object, keys: object) -> tuple[list, list]:
    if isinstance(queries, Tensor) and isinstance(keys, Tensor):
        return [queries], [keys]
    for name, value in (("query_features", queries), ("key_features", keys)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                f"{op}: query_features and key_features must both be tensors (B, S, C) or both be lists of them, one per layer; "
                f"{name} is {type(value).__name__}."
            )
    if not queries or len(queries) != len(keys):
        raise ValueError(
            f"{op}: query_features and key_features must have the same number of layers, at least one; "
            f"got {len(queries)} and {len(keys)}."
        )
    return list(queries), list(keys)


def _checked(op: str, query: Tensor, key: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
    query, key = _checks.same_dtype_under_autocast(query, key)
    query_name, key_name = f"query_features{suffix}", f"key_features{suffix}"
    _checks.expect_float_tensor(op, query_name, query, (3,), "(B, S, C)")
    _checks.expect_float_tensor(op, key_name, key, (3,), "(B, S, C)")
    _checks.expect_shape(op, key_name, key, tuple(query.shape), f"the shape of {query_name}")
    _checks.expect_alike(op, key_name, key, query_name, query)
    return query, key


_NEGATIVES = {"query_negatives": True}
_FORMS: dict[str, dict[str, object]] = {
    "negatives": _NEGATIVES,
    "both": {"symmetric": True},
    "both_detached": {"symmetric": True, "detach_keys": True},
    "both_negatives": {"symmetric": True, **_NEGATIVES},
    "both_negatives_detached": {"symmetric": True, **_NEGATIVES, "detach_keys": True},
}


def _samples(make: Make) -> Iterator[Sample]:
    tau = torch.tensor(0.5, requires_grad=True)
    query = make(2, 33, 20)
    pair = {"query_features": query, "key_features": make.similar(query)}
    yield Sample("image", pair)
    yield Sample("batch", {**pair, "negatives": "batch"})
    yield Sample("self_logit", {**pair, "temperature": torch.tensor(2.0, requires_grad=True)})
    yield Sample("detached", {**pair, "key_features": pair["key_features"].detach()})
    # Where the constants count, and the two of query negatives are told from one.
    warm = {**pair, "temperature": torch.tensor(2.0, requires_grad=True)}
    for name, options in _FORMS.items():
        yield Sample(name, {**warm, **options})
    queries = [make(2, 16, 8), make(2, 33, 27), make(2, 5, 64)]
    layers = {
        "query_features": queries,
        "key_features": [make.similar(x).detach() for x in queries],
    }
    yield Sample("layers", {**layers, "temperature": tau})
    yield Sample("layers_batch", {**layers, "negatives": "batch"})
    weighted = {**layers, "temperature": tau, "layer_weights": [0.5, 0.125, 0.25]}
    yield Sample("weights", weighted)
    published = {**weighted, "key_features": [make.similar(x) for x in queries]}
    yield Sample("weights_both_negatives_detached", published | _FORMS["both_negatives_detached"])
    yield Sample("batch_both_negatives", {**pair, **_FORMS["both_negatives"], "negatives": "batch"})
    ids = [torch.arange(x.shape[0] * x.shape[1], device=make.device) % 5 for x in (query, *queries)]
    ids = [x.view(y.shape[:2]) for x, y in zip(ids, (query, *queries), strict=True)]
    heavy = [make(*x.shape, grad=False).abs() for x in ids]
    marked = {"ids": ids[0], "weights": heavy[0], "reduction": "none"}
    yield Sample("masked_none", {**warm, **_FORMS["both_negatives_detached"], **marked})
    yield Sample("masked_layers", {**weighted, "ids": ids[1:], "weights": heavy[1:]})


def _loss(queries: list[Tensor], **_: object) -> tuple[Tensor]:
    return (queries[0].new_empty((), dtype=accumulation_dtype(queries[0].dtype)),)


declare(
    Op("patch_nce", function=patch_nce, samples=_samples, form=_form),
    # The sum over layers of loss_scale * sum(loss), the losses those of ``plain`` of queries[l], keys[l] (B, N, D), whose sizes may
    # differ. ``detach_keys`` is for symmetric losses alone. If grad_scales is not empty, also the gradients: of layer l those of
    # grad_scale * sum(loss), of the temperature that of the loss returned. Where loss_layers is not 0, each layer's loss_scale is
    # divided by loss_layers times its rows (B * N); grad_layers does that to the grad_scales.
    Operator(
        "patch_nce_forward(Tensor[] queries, Tensor[] keys, Tensor? temperature_tensor, float temperature, float self_logit, "
        "bool symmetric, bool query_negatives, bool detach_keys, bool bfloat16_products, float[] loss_scales, "
        "float[] grad_scales, int loss_layers, int grad_layers, bool[] need_queries, bool[] need_keys, bool need_temperature) -> "
        "(Tensor loss, Tensor[] grad_queries, Tensor[] grad_keys, Tensor grad_temperature)",
        _loss,
    ),
    patch_nce=plain,
)
