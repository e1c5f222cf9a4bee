"""The Triton backend: the kernels of ``triton_kernels``, loaded where they can run, and registered for torch.compile.

Called eagerly, an op goes straight to the kernels. While torch.compile traces, it becomes one of ``torch.ops.fastnce_triton``, with
the same arguments as the compiled library's operators, which the compiler does not look into.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastnce.backends import fakes, operators
from fastnce.backends.triton_schemas import SCHEMAS

Gradients = operators.Gradients


def _load() -> tuple[ModuleType | None, str]:
    """The kernels, or why they are not there. Triton is not imported where nothing could run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed. Run: pip install triton"
    if not interpreted and not torch.cuda.is_available():
        return None, "the Triton kernels need a GPU, and this torch sees none"
    kernels = importlib.import_module("fastnce.triton_kernels")
    reason = kernels.available()
    return (kernels, "ok") if reason == "ok" else (None, reason)


def available() -> str:
    """``"ok"``, or why no kernel can run on this machine."""
    return _STATUS


def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device_type``."""
    return _STATUS if _KERNELS is None else _KERNELS.supports(op, device_type, dtype)


# The functions of the backend. The kernels document them; what follows is how they look as operators.


def info_nce_forward(
    query, key, negatives, temperature, *, grad_scale, mean=False, needs, **options
):
    if not torch.compiler.is_compiling():
        grad_scale = _of_mean(grad_scale, mean, query)
        return _KERNELS.info_nce_forward(
            query, key, negatives, temperature, **options, grad_scale=grad_scale, needs=needs
        )
    loss, lse, *grads = torch.ops.fastnce_triton.info_nce_forward(
        query,
        key,
        negatives,
        *_temperature(temperature),
        options["normalize"],
        options["symmetric"],
        options["in_batch"],
        options["self_logit"],
        options.get("similarity_dtype") is not None,
        grad_scale,
        mean,
        *needs,
    )
    return loss, lse, _needed(grads, needs, grad_scale)


def _info_nce_forward(
    q, k, n, tau, t, normalize, symmetric, in_batch, self_logit, fp8, scale, mean, *needs
):
    loss, lse, grads = _KERNELS.info_nce_forward(
        q,
        k,
        n,
        t if tau is None else tau,
        normalize=normalize,
        symmetric=symmetric,
        in_batch=in_batch,
        self_logit=self_logit,
        similarity_dtype=torch.float8_e4m3fn if fp8 else None,
        grad_scale=_of_mean(scale, mean, q),
        needs=needs,
    )
    return loss, lse, *_filled(grads, q, loss)


def info_nce_backward(grad_loss, query, key, negatives, temperature, lse, *, needs, **options):
    if not torch.compiler.is_compiling():
        return _KERNELS.info_nce_backward(
            grad_loss, query, key, negatives, temperature, lse, **options, needs=needs
        )
    grads = torch.ops.fastnce_triton.info_nce_backward(
        grad_loss,
        query,
        key,
        negatives,
        *_temperature(temperature),
        lse,
        options["normalize"],
        options["symmetric"],
        options["in_batch"],
        options["self_logit"],
        options.get("similarity_dtype") is not None,
        *needs,
    )
    return _needed(grads, needs)


def _info_nce_backward(
    g, q, k, n, tau, t, lse, normalize, symmetric, in_batch, self_logit, fp8, *needs
):
    grads = _KERNELS.info_nce_backward(
        g,
        q,
        k,
        n,
        t if tau is None else tau,
        lse,
        normalize=normalize,
        symmetric=symmetric,
        in_batch=in_batch,
        self_logit=self_logit,
        similarity_dtype=torch.float8_e4m3fn if fp8 else None,
        needs=needs,
    )
    return _filled(grads, q, lse)


def patch_nce_forward(
    queries, keys, temperature, *, self_logit, loss_scales, grad_scales, mean_of=(0, 0), needs
) -> tuple[Tensor, Gradients, Gradients, Tensor | None]:
    if not torch.compiler.is_compiling():
        return _KERNELS.patch_nce_forward(
            queries,
            keys,
            temperature,
            self_logit=self_logit,
            loss_scales=_of_means(loss_scales, mean_of[0], queries),
            grad_scales=_of_means(grad_scales, mean_of[1], queries),
            needs=needs,
        )
    loss, grad_queries, grad_keys, grad_temperature = torch.ops.fastnce_triton.patch_nce_forward(
        queries,
        keys,
        *_temperature(temperature),
        self_logit,
        loss_scales,
        grad_scales or (),
        *mean_of,
        *needs,
    )
    return (
        loss,
        _needed(grad_queries, needs[0], grad_scales),
        _needed(grad_keys, needs[1], grad_scales),
        grad_temperature if needs[2] and grad_scales else None,
    )


def _patch_nce_forward(
    queries, keys, tau, t, self_logit, loss_scales, grad_scales, loss_layers, grad_layers, *needs
):
    loss, *grads, dt = _KERNELS.patch_nce_forward(
        queries,
        keys,
        t if tau is None else tau,
        self_logit=self_logit,
        loss_scales=_of_means(loss_scales, loss_layers, queries),
        grad_scales=_of_means(grad_scales or None, grad_layers, queries),
        needs=needs,
    )
    # The layers' gradients share memory, which an operator's results must not.
    found = [[queries[0].new_empty(0) if g is None else g.clone() for g in of] for of in grads]
    return loss, *found, loss.new_empty(0) if dt is None else dt


def conditional_contrastive_forward(
    embeddings, proxies, labels, temperature, *, grad_scale, mean=False, needs
) -> tuple[Tensor, Tensor, Gradients]:
    if not torch.compiler.is_compiling():
        grad_scale = _of_mean(grad_scale, mean, embeddings)
        return _KERNELS.conditional_contrastive_forward(
            embeddings, proxies, labels, temperature, grad_scale=grad_scale, needs=needs
        )
    loss, lse, *grads = torch.ops.fastnce_triton.conditional_contrastive_forward(
        embeddings, proxies, labels, *_temperature(temperature), grad_scale, mean, *needs
    )
    return loss, lse, _needed(grads, needs, grad_scale)


def _conditional_contrastive_forward(e, p, labels, tau, t, scale, mean, *needs):
    scale = _of_mean(scale, mean, e)
    loss, lse, grads = _KERNELS.conditional_contrastive_forward(
        e, p, labels, t if tau is None else tau, grad_scale=scale, needs=needs
    )
    return loss, lse, *_filled(grads, e, loss)


def conditional_contrastive_backward(
    grad_loss, embeddings, proxies, labels, temperature, lse, *, needs
) -> Gradients:
    if not torch.compiler.is_compiling():
        return _KERNELS.conditional_contrastive_backward(
            grad_loss, embeddings, proxies, labels, temperature, lse, needs=needs
        )
    grads = torch.ops.fastnce_triton.conditional_contrastive_backward(
        grad_loss, embeddings, proxies, labels, *_temperature(temperature), lse, *needs
    )
    return _needed(grads, needs)


def _conditional_contrastive_backward(g, e, p, labels, tau, t, lse, *needs):
    grads = _KERNELS.conditional_contrastive_backward(
        g, e, p, labels, t if tau is None else tau, lse, needs=needs
    )
    return _filled(grads, e, lse)


def sup_con_forward(
    features, labels, temperature, *, grad_scale, mean, needs
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    if not torch.compiler.is_compiling():
        return _KERNELS.sup_con_forward(
            features, labels, temperature, grad_scale=grad_scale, mean=mean, needs=needs
        )
    loss, has_positive, lse, *grads = torch.ops.fastnce_triton.sup_con_forward(
        features, labels, *_temperature(temperature), grad_scale, mean, *needs
    )
    return loss, has_positive, lse, _needed(grads, needs, grad_scale)


def _sup_con_forward(features, labels, tau, t, scale, mean, *needs):
    loss, has_positive, lse, grads = _KERNELS.sup_con_forward(
        features, labels, t if tau is None else tau, grad_scale=scale, mean=mean, needs=needs
    )
    return loss, has_positive, lse, *_filled(grads, features, loss)


def sup_con_backward(grad_loss, features, labels, temperature, lse, *, needs) -> Gradients:
    if not torch.compiler.is_compiling():
        return _KERNELS.sup_con_backward(grad_loss, features, labels, temperature, lse, needs=needs)
    grads = torch.ops.fastnce_triton.sup_con_backward(
        grad_loss, features, labels, *_temperature(temperature), lse, *needs
    )
    return _needed(grads, needs)


def _sup_con_backward(g, features, labels, tau, t, lse, *needs):
    temperature = t if tau is None else tau
    grads = _KERNELS.sup_con_backward(g, features, labels, temperature, lse, needs=needs)
    return _filled(grads, features, lse)


def sample_patches_forward(features, patch_ids, normalize) -> tuple[list[Tensor], list[Tensor]]:
    return _operator("sample_patches_forward")(features, patch_ids, normalize)


def sample_patches_backward(*arguments) -> list[Tensor]:
    return _operator("sample_patches_backward")(*arguments)


def sample_patches_add_(*arguments) -> None:
    _KERNELS.sample_patches_add_(*arguments)


def _operator(name: str) -> Callable:
    """The operator, or what it runs."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastnce_triton, name)
    return _OPERATORS[name]


def pairwise_cosine_similarity_forward(x, y, temperature) -> Tensor:
    y = x if y is None else y
    return _operator("pairwise_cosine_similarity_forward")(x, y, *_temperature(temperature))


def _pairwise_cosine_similarity_forward(x, y, tau, t):
    return _KERNELS.pairwise_cosine_similarity_forward(x, y, t if tau is None else tau)


def pairwise_cosine_similarity_backward(grad, x, y, temperature, *, needs) -> Gradients:
    if y is None:
        need_x, _, need_temperature = needs
        both = (need_x, need_x, need_temperature)
        first, second, term = pairwise_cosine_similarity_backward(
            grad, x, x, temperature, needs=both
        )
        return (first + second if need_x else None), None, term
    if not torch.compiler.is_compiling():
        return _KERNELS.pairwise_cosine_similarity_backward(grad, x, y, temperature, needs=needs)
    grads = torch.ops.fastnce_triton.pairwise_cosine_similarity_backward(
        grad, x, y, *_temperature(temperature), *needs
    )
    return _needed(grads, needs)


def _pairwise_cosine_similarity_backward(grad, x, y, tau, t, *needs):
    grads = _KERNELS.pairwise_cosine_similarity_backward(
        grad, x, y, t if tau is None else tau, needs=needs
    )
    return _filled(grads, x, x.new_empty(0, dtype=torch.float32))


def labelled_lse_forward(x, y, x_labels, y_labels, temperature, *, own) -> Tensor:
    return _operator("labelled_lse_forward")(
        x, y, x_labels, y_labels, *_temperature(temperature), own
    )


def _labelled_lse_forward(*arguments):
    *block, tau, t, own = arguments
    return _KERNELS.labelled_lse_forward(*block, t if tau is None else tau, own=own)


def labelled_lse_backward(
    x, y, x_labels, y_labels, temperature, x_state, y_state, *, own
) -> tuple[Tensor, Tensor]:
    return _operator("labelled_lse_backward")(
        x, y, x_labels, y_labels, *_temperature(temperature), x_state, y_state, own
    )


def _labelled_lse_backward(*arguments):
    *block, tau, t, x_state, y_state, own = arguments
    temperature = t if tau is None else tau
    return _KERNELS.labelled_lse_backward(*block, temperature, x_state, y_state, own=own)


def _of_mean(scale: float | None, mean: bool, rows: Tensor) -> float | None:
    """``scale``, for the mean over the rows of ``rows`` (..., D) instead of their sum."""
    return scale / rows.shape[:-1].numel() if mean and scale is not None else scale


def _of_means(
    scales: Sequence[float] | None, layers: int, rows: Sequence[Tensor]
) -> Sequence[float] | None:
    if not layers or scales is None:
        return scales
    return [scale / (x.shape[:-1].numel() * layers) for scale, x in zip(scales, rows, strict=True)]


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        # A float that a compiler keeps variable comes in float64.
        return temperature.float(), 0.0
    return None, float(temperature)


def _filled(grads: Gradients, like: Tensor, like_scalar: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors alone: empty ones for gradients that nobody needs, the temperature's last."""
    empty = [like.new_empty(0)] * (len(grads) - 1) + [like_scalar.new_empty(0)]
    return tuple(e.clone() if g is None else g for g, e in zip(grads, empty, strict=True))


def _needed(grads: Sequence[Tensor], needs: Sequence[bool], scale: object = True) -> Gradients:
    now = scale is not None
    return tuple(g if need and now else None for g, need in zip(grads, needs, strict=True))


def _fake_pairwise_forward(x, y, tau, t):
    return x.new_empty((*x.shape[:-1], y.shape[-2]))


def _fake_pairwise_backward(grad, x, y, tau, t, need_x, need_y, need_temperature):
    def like(v, need):
        return v.new_empty(v.shape if need else (0,))

    scalar = x.new_empty(() if need_temperature else (0,), dtype=torch.float32)
    return like(x, need_x), like(y, need_y), scalar


_OPERATORS: dict[str, Callable] = {
    "info_nce_forward": _info_nce_forward,
    "info_nce_backward": _info_nce_backward,
    "patch_nce_forward": _patch_nce_forward,
    "conditional_contrastive_forward": _conditional_contrastive_forward,
    "conditional_contrastive_backward": _conditional_contrastive_backward,
    "sup_con_forward": _sup_con_forward,
    "sup_con_backward": _sup_con_backward,
    "sample_patches_forward": lambda *arguments: _KERNELS.sample_patches_forward(*arguments),
    "sample_patches_backward": lambda *arguments: _KERNELS.sample_patches_backward(*arguments),
    "pairwise_cosine_similarity_forward": _pairwise_cosine_similarity_forward,
    "pairwise_cosine_similarity_backward": _pairwise_cosine_similarity_backward,
    "labelled_lse_forward": _labelled_lse_forward,
    "labelled_lse_backward": _labelled_lse_backward,
}


def _without_precision(name: str, position: int) -> Callable:
    """The compiled library's operators have one argument more, which says whether products may round to bfloat16.

    Those of info_nce have as many: where the library is told so, Triton's are told whether similarities round to fp8.
    """
    fake = fakes.FAKES[name]
    return lambda *arguments: fake(*arguments[:position], False, *arguments[position:])


_FAKES = fakes.FAKES | {
    "patch_nce_forward": _without_precision("patch_nce_forward", 5),
    "pairwise_cosine_similarity_forward": _fake_pairwise_forward,
    "pairwise_cosine_similarity_backward": _fake_pairwise_backward,
}


def _register() -> torch.library.Library:
    library = torch.library.Library("fastnce_triton", "DEF")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, _OPERATORS[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastnce_triton::{name}", _FAKES[name], lib=library)
    return library


_KERNELS, _STATUS = _load()
_LIBRARY = None if _KERNELS is None else _register()
