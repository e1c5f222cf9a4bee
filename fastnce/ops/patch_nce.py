"""PatchNCE, the patchwise contrastive loss of CUT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastnce import backends
from fastnce.ops import _checks, _common
from fastnce.ops.info_nce import plain as info_nce
from fastnce.registry import Form, Make, Op, Operator, Sample, accumulation_dtype, declare

# CUT overwrites each patch's similarity with its own key among the negatives by this value before dividing by the temperature.
# It is no -inf: at a temperature near 1 the term exp(-10 / t) is part of the published loss.
SELF_LOGIT = -10.0


def patch_nce(
    query_features: Tensor | Sequence[Tensor],
    key_features: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.07,
    negatives: str = "image",
    backend: str | None = None,
) -> Tensor:
    r"""CUT's PatchNCE (Park et al. 2020, https://arxiv.org/abs/2007.15651), for one layer or all layers at once.

    .. math:: \ell_i = \log \Big( e^{-10 / \tau} + \sum_j e^{s_{ij} / \tau} \Big) - s_{ii} / \tau

    averaged over patches, images and layers; s is the cosine of a patch of the translated image with the patches of the input.
    Plain PyTorch for one layer: ``cross_entropy(cat([diagonal, similarity with -10 on its diagonal]) / temperature, 0)``.

    Args:
        query_features: (B, S, C), S patches of each of B images, already projected; float64, float32, bfloat16 or float16.
            Normalisation is part of the op. Or a list, one entry per layer, S and C may differ.
        key_features: like ``query_features``; patch s of image b is the positive of that query. Gradients are computed only
            if it requires them (CUT detaches it).
        temperature: positive float, or tensor of one element, which gets its gradient.
        negatives: ``"image"``: the other patches of the same image; ``"batch"``: those of all images.
        backend: one of ``fastnce.backends.available()``; None chooses.

    Returns:
        The loss, a scalar, float32 (float64 for float64 inputs).

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
    if negatives == "batch":
        pairs = [tuple(x.flatten(0, 1).unsqueeze(0) for x in pair) for pair in pairs]
    loss = None
    for layers in _common.alike([query for query, _ in pairs]):
        part = _weighted_sum(
            op,
            [pairs[layer] for layer in layers],
            len(pairs),
            _checks.expect_temperature(op, temperature, pairs[layers[0]][0]),
            backend,
        )
        loss = part if loss is None else loss + part
    return loss


def _weighted_sum(
    op: str,
    pairs: list[tuple[Tensor, Tensor]],
    count: int,
    temperature: float | Tensor,
    backend: str | None,
) -> Tensor:
    """The part of these layers, (B, N, D) each, of one device and dtype, in the mean over ``count`` layers."""
    queries, keys = ([pair[side] for pair in pairs] for side in (0, 1))
    kernels = backends.select(op, queries[0], backend, queries, keys)
    with _common.no_autocast(queries[0]):
        if kernels is backends.reference:
            return sum(
                info_nce(
                    query,
                    key,
                    None,
                    temperature,
                    normalize=True,
                    symmetric=False,
                    in_batch=True,
                    self_logit=SELF_LOGIT,
                ).sum()
                * _layer_weight(query, count)
                for query, key in zip(queries, keys, strict=True)
            )
        _checks.expect_fusable(op, queries[0])
        grad_now = _common.wants_grad(*queries, *keys, temperature)
        loss, _ = PatchNCEFunction.apply(
            kernels, count, grad_now, temperature, *_common.distinct((*queries, *keys))
        )
        return loss


def _form(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Form:
    name = "both gradients" if _common.wants_grad(*keys) else "keys fixed"
    work = sum(query.numel() * query.shape[-2] for query in queries)
    return Form(name, work, max(query.shape[-1] for query in queries))


def _layer_weight(query: Tensor, count: int) -> float:
    """That of each loss of a layer in the mean over ``count`` layers."""
    return 1 / (query.shape[0] * query.shape[1] * count)


class PatchNCEFunction(torch.autograd.Function):
    """Autograd of ``patch_nce``, all layers in one call of the kernels of any fused backend.

    The loss is reduced, so loss and gradients leave the forward together and the backward only scales them.
    """

    @staticmethod
    def forward(
        ctx,
        kernels: ModuleType,
        layers: int,
        grad_now: bool,
        temperature: float | Tensor,
        query: Tensor,  # by a name: of two rows after ctx, torch.compile would take ctx for left out
        *others: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        rows = (query, *others)
        count = len(rows) // 2
        ones = (1.0,) * count
        kernel_mean = _common.kernel_mean("mean", rows[0].dtype)
        kept = [_common.kept_scale(x) for x in rows[:count]]
        needs = ctx.needs_input_grad[4:]
        loss, (grad_queries, grad_keys, grad_temperature) = kernels.patch_nce_forward(
            list(rows[:count]),
            list(rows[count:]),
            temperature,
            self_logit=SELF_LOGIT,
            loss_scales=ones,
            grad_scales=kept if grad_now else (),
            loss_layers=layers,
            grad_layers=layers if kernel_mean else 0,
            needs=(needs[:count], needs[count:], ctx.needs_input_grad[3]),
        )
        ctx.factors = None
        if not kernel_mean:
            pairs = zip(rows[:count], kept, strict=True)
            ctx.factors = [_layer_weight(x, layers) / scale for x, scale in pairs] * 2
        handle = _common.handle(ctx, loss, grad_now)
        ctx.save_for_backward(handle, grad_temperature, *grad_queries, *grad_keys)
        return loss, handle

    @staticmethod
    @_common.first_derivative_only
    def backward(ctx, saved: tuple[Tensor | None, ...], grad_loss: Tensor, _: object):
        _, grad_temperature, *grads = saved
        if ctx.factors is None:
            return None, None, None, *_common.scaled((grad_temperature, *grads), grad_loss)
        (grad_temperature,) = _common.scaled((grad_temperature,), grad_loss)
        if torch.compiler.is_compiling() or len(set(ctx.factors)) > 1:
            scaled = [
                _common.scaled((grad,), grad_loss, factor)[0]
                for grad, factor in zip(grads, ctx.factors, strict=True)
            ]
        else:  # at once, where they are parts of one
            scaled = _common.scaled(grads, grad_loss, ctx.factors[0])
        return None, None, None, grad_temperature, *scaled


def _expect_one_device(op: str, queries: list[Tensor]) -> None:
    for layer, query in enumerate(queries):
        if query.device != queries[0].device:
            raise ValueError(
                f"{op}: query_features[{layer}] is on {query.device} but query_features[0] is on {queries[0].device}. "
                f"Move all layers to one device."
            )


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


def _samples(make: Make) -> Iterator[Sample]:
    tau = torch.tensor(0.5, requires_grad=True)
    query = make(2, 33, 20)
    pair = {"query_features": query, "key_features": make.similar(query)}
    yield Sample("image", pair)
    yield Sample("batch", {**pair, "negatives": "batch"})
    yield Sample("self_logit", {**pair, "temperature": torch.tensor(2.0, requires_grad=True)})
    yield Sample("detached", {**pair, "key_features": pair["key_features"].detach()})
    queries = [make(2, 16, 8), make(2, 33, 27), make(2, 5, 64)]
    layers = {
        "query_features": queries,
        "key_features": [make.similar(x).detach() for x in queries],
    }
    yield Sample("layers", {**layers, "temperature": tau})
    yield Sample("layers_batch", {**layers, "negatives": "batch"})


def _loss(queries: list[Tensor], **_: object) -> tuple[Tensor]:
    return (queries[0].new_empty((), dtype=accumulation_dtype(queries[0].dtype)),)


declare(
    Op("patch_nce", function=patch_nce, samples=_samples, form=_form),
    # The sum over layers of loss_scale * sum(loss), the losses those of info_nce_forward with normalize, in_batch and self_logit, of
    # queries[l], keys[l] (B, N, D), whose sizes may differ. If grad_scales is not empty, also the gradients: of layer l those of
    # grad_scale * sum(loss), of the temperature that of the loss returned. Where loss_layers is not 0, each layer's loss_scale is
    # divided by loss_layers times its rows (B * N); grad_layers does that to the grad_scales.
    Operator(
        "patch_nce_forward(Tensor[] queries, Tensor[] keys, Tensor? temperature_tensor, float temperature, float self_logit, "
        "bool bfloat16_products, float[] loss_scales, float[] grad_scales, int loss_layers, int grad_layers, "
        "bool[] need_queries, bool[] need_keys, bool need_temperature) -> "
        "(Tensor loss, Tensor[] grad_queries, Tensor[] grad_keys, Tensor grad_temperature)",
        _loss,
    ),
)
