"""The compiled backend: the kernels of ``csrc/``, as torch.ops.fastnce.*.

The library is loaded once, when this module is imported, if it is there. Where it is not, :func:`available` says why and
everything else of the package works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnce import build

_OPS = (
    "info_nce",
    "patch_nce",
    "conditional_contrastive",
    "sample_patches",
    "tap_patches",
    "nt_xent",
    "sup_con",
    "pairwise_cosine_similarity",
    "labelled_lse",
)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu",)

Gradients = tuple[Tensor | None, ...]


def available() -> str:
    """``"ok"``, or why the compiled library is not loaded and what to do about it."""
    return _STATUS


def supports(op: str, device_type: str, dtype: torch.dtype) -> str:
    """``"ok"``, or why ``op`` cannot run here on tensors of ``dtype`` on ``device_type``."""
    if _STATUS != "ok":
        return _STATUS
    if op not in _OPS:
        return f"{op} has no compiled kernel yet"
    if device_type not in _DEVICES:
        return f"the compiled kernels run on {', '.join(_DEVICES)} tensors"
    if dtype not in _DTYPES:
        return "the compiled kernels take float64, float32, bfloat16 and float16"
    return "ok"


def info_nce_forward(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    *,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    self_logit: float | None,
    grad_scale: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """Losses, log-sum-exp and, if ``grad_scale`` is given, the gradients of ``grad_scale * losses.sum()``.

    Args:
        query: (B, N, D), any strides.
        key: (B, N, D); row i is the positive of query i.
        negatives: None, (M, D) shared by all queries, or (B, N, M, D) each query's own.
        temperature: a float or a 0-d tensor.
        normalize: L2-normalise all rows.
        symmetric: the mean of the losses of rows and of columns.
        in_batch: all keys of the batch element are columns, else only a query's own.
        self_logit: a further constant logit, before the division by the temperature.
        grad_scale: d L / d loss of every row, or None for no gradients now.
        needs: whether query, key, negatives and temperature need a gradient.

    Returns:
        losses (B, N); lse (B, N), or (2, B, N) if ``symmetric``; the four gradients, None where not needed.
    """
    loss, lse, *grads = torch.ops.fastnce.info_nce_forward(
        query,
        key,
        negatives,
        *_temperature(temperature),
        normalize,
        symmetric,
        in_batch,
        self_logit,
        _bfloat16_products(query),
        grad_scale,
        *needs,
    )
    return loss, lse, _needed(grads, needs if grad_scale is not None else ())


def info_nce_backward(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    normalize: bool,
    symmetric: bool,
    in_batch: bool,
    self_logit: float | None,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward; ``grad_loss`` (B, N), any strides."""
    grads = torch.ops.fastnce.info_nce_backward(
        grad_loss,
        query,
        key,
        negatives,
        *_temperature(temperature),
        lse,
        normalize,
        symmetric,
        in_batch,
        self_logit,
        _bfloat16_products(query),
        *needs,
    )
    return _needed(grads, needs)


def patch_nce_forward(
    queries: list[Tensor],
    keys: list[Tensor],
    temperature: float | Tensor,
    *,
    self_logit: float,
    loss_scales: Sequence[float],
    grad_scales: Sequence[float] | None,
    needs: tuple[Sequence[bool], Sequence[bool], bool],
) -> tuple[Tensor, Gradients, Gradients, Tensor | None]:
    """InfoNCE of several layers in one call: ``sum_l loss_scales[l] * losses_l.sum()`` and its gradients.

    Args:
        queries: (B, N, D) of each layer, one dtype, sizes may differ; normalised, in-batch negatives.
        keys: like ``queries``.
        temperature: a float or a 0-d tensor.
        self_logit: a further constant logit, before the division by the temperature.
        loss_scales: the weight of each layer's losses in the result.
        grad_scales: d L / d loss of every row of each layer, or None for no gradients now.
        needs: which queries, which keys, and whether the temperature need a gradient.

    Returns:
        the loss; the gradients of the queries and of the keys, None where not needed; the gradient of the returned loss with
        respect to the temperature, or None.
    """
    need_queries, need_keys, need_temperature = needs
    loss, grad_queries, grad_keys, grad_temperature = torch.ops.fastnce.patch_nce_forward(
        queries,
        keys,
        *_temperature(temperature),
        self_logit,
        _bfloat16_products(queries[0]),
        loss_scales,
        grad_scales or (),
        need_queries,
        need_keys,
        need_temperature,
    )
    if grad_scales is None:
        need_queries = need_keys = ()
        need_temperature = False
    return (
        loss,
        _needed(grad_queries, need_queries),
        _needed(grad_keys, need_keys),
        grad_temperature if need_temperature else None,
    )


def conditional_contrastive_forward(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """Losses (N,), lse (2, N) = [log den, log num] and, if ``grad_scale`` is given, the gradients, as in InfoNCE.

    Args:
        embeddings: (N, D), any strides.
        proxies: (N, D), each sample's own class proxy.
        labels: (N,) int64.
        temperature: a float or a 0-d tensor.
        grad_scale: d L / d loss of every row, or None for no gradients now.
        needs: whether embeddings, proxies and temperature need a gradient.
    """
    loss, lse, *grads = torch.ops.fastnce.conditional_contrastive_forward(
        embeddings, proxies, labels, *_temperature(temperature), grad_scale, *needs
    )
    return loss, lse, _needed(grads, needs if grad_scale is not None else ())


def conditional_contrastive_backward(
    grad_loss: Tensor,
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward."""
    grads = torch.ops.fastnce.conditional_contrastive_backward(
        grad_loss, embeddings, proxies, labels, *_temperature(temperature), lse, *needs
    )
    return _needed(grads, needs)


def sup_con_forward(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    *,
    grad_scale: float | None,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Losses, has_positive and lse, all (N,), and, if ``grad_scale`` is given, the gradients, as in InfoNCE.

    Args:
        features: (N, D), any strides.
        labels: (N,) int64.
        temperature: a float or a 0-d tensor.
        grad_scale: d L / d loss of every row that has a positive, or None for no gradients now.
        mean: ``grad_scale`` is divided by the number of those rows.
        needs: whether features and temperature need a gradient.
    """
    loss, has_positive, lse, *grads = torch.ops.fastnce.sup_con_forward(
        features, labels, *_temperature(temperature), grad_scale, mean, *needs
    )
    return loss, has_positive, lse, _needed(grads, needs if grad_scale is not None else ())


def sup_con_backward(
    grad_loss: Tensor,
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    lse: Tensor,
    *,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward."""
    grads = torch.ops.fastnce.sup_con_backward(
        grad_loss, features, labels, *_temperature(temperature), lse, *needs
    )
    return _needed(grads, needs)


def labelled_lse_forward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    *,
    own: bool,
) -> Tensor:
    """(N, 2) float64, see :func:`fastnce.reference.labelled_lse_forward`."""
    return torch.ops.fastnce.labelled_lse_forward(
        x, y, x_labels, y_labels, *_temperature(temperature), own
    )


def labelled_lse_backward(
    x: Tensor,
    y: Tensor,
    x_labels: Tensor,
    y_labels: Tensor,
    temperature: float | Tensor,
    x_state: Tensor,
    y_state: Tensor,
    *,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and the temperature, see :func:`fastnce.reference.labelled_lse_backward`."""
    return torch.ops.fastnce.labelled_lse_backward(
        x, y, x_labels, y_labels, *_temperature(temperature), x_state, y_state, own
    )


def sample_patches_forward(
    features: list[Tensor], patch_ids: list[Tensor], normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Patches (B, S, C) of each map (B, C, H, W), and their inverse norms (B, S), [] unless ``normalize``."""
    return torch.ops.fastnce.sample_patches_forward(features, patch_ids, normalize)


def sample_patches_backward(
    grad_patches: list[Tensor],
    patches: list[Tensor],
    inverse_norms: list[Tensor],
    patch_ids: list[Tensor],
    feature_likes: list[Tensor],
    normalize: bool,
) -> list[Tensor]:
    """The gradient of each map, laid out like ``feature_likes``; ``patches`` may be [] unless ``normalize``."""
    return torch.ops.fastnce.sample_patches_backward(
        grad_patches, patches, inverse_norms, patch_ids, feature_likes, normalize
    )


def sample_patches_add_(
    maps: list[Tensor],
    grad_patches: list[Tensor],
    patches: list[Tensor],
    inverse_norms: list[Tensor],
    patch_ids: list[Tensor],
    normalize: bool,
) -> None:
    """Adds what :func:`sample_patches_backward` returns to ``maps``, which must not overlap in memory, in place."""
    torch.ops.fastnce.sample_patches_add_(
        maps, grad_patches, patches, inverse_norms, patch_ids, normalize
    )


def pairwise_cosine_similarity_forward(
    x: Tensor, y: Tensor | None, temperature: float | Tensor
) -> Tensor:
    """The cosines of all rows of x (..., N, D) with those of y (..., M, D), or with its own, divided by ``temperature``."""
    return torch.ops.fastnce.pairwise_cosine_similarity_forward(
        x, y, *_temperature(temperature), _bfloat16_products(x)
    )


def pairwise_cosine_similarity_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    temperature: float | Tensor,
    *,
    needs: Sequence[bool],
) -> Gradients:
    """The gradients of x (of both its uses where ``y`` is None), of y and of the temperature; ``grad`` may have any strides."""
    grads = torch.ops.fastnce.pairwise_cosine_similarity_backward(
        grad, x, y, *_temperature(temperature), _bfloat16_products(x), *needs
    )
    return _needed(grads, needs)


def instruction_set() -> str:
    """``portable``, ``avx2``, ``avx512`` or ``avx512bf16``: the processor's widest, or what ``FASTNCE_CPU_ISA`` asks for.

    Raises:
        RuntimeError: ``FASTNCE_CPU_ISA`` is unknown, or not of this processor.
    """
    return torch.ops.fastnce.instruction_set()


def fma_peak(seconds: float = 0.05, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of multiply-adds in registers on all threads: what no product of this processor exceeds.

    Of the instruction set that the kernels use, and measured now: other processes lower it.

    Args:
        seconds: how long; half of it again goes before, for the clock frequency.
        dtype: of the factors: float64, float32, or bfloat16 where the processor multiplies it; otherwise float32.
    """
    known = (torch.float64, torch.bfloat16)
    name = str(dtype if dtype in known else torch.float32).removeprefix("torch.")
    return torch.ops.fastnce.fma_peak(seconds, name)


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return temperature, 0.0
    return None, float(temperature)


def _bfloat16_products(x: Tensor) -> bool:
    """Whether products may round their factors to bfloat16, which costs bfloat16 inputs nothing."""
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and _medium_precision())


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question; the answer is compiled in
def _medium_precision() -> bool:
    return torch.get_float32_matmul_precision() == "medium"


def _needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    wanted = tuple(needs) or (False,) * len(grads)
    return tuple(grad if need else None for grad, need in zip(grads, wanted, strict=True))


# What the ops return, in shapes and dtypes alone: for torch.compile and meta tensors.


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _gradient_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(x.shape if needed else (0,))


def _scalar_like(x: Tensor, needed: bool) -> Tensor:
    return x.new_empty(() if needed else (0,), dtype=_acc(x))


def _fake_info_nce_gradients(query, key, negatives, needs) -> tuple[Tensor, ...]:
    need_query, need_key, need_negatives, need_temperature = needs
    need_negatives = need_negatives and negatives is not None
    return (
        _gradient_like(query, need_query),
        _gradient_like(key, need_key),
        _gradient_like(negatives if need_negatives else query, need_negatives),
        _scalar_like(query, need_temperature),
    )


def _fake_info_nce_forward(
    query,
    key,
    negatives,
    temperature_tensor,
    temperature,
    normalize,
    symmetric,
    in_batch,
    self_logit,
    bfloat16_products,
    grad_scale,
    *needs,
):
    rows = tuple(query.shape[:2])
    loss = query.new_empty(rows, dtype=_acc(query))
    lse = query.new_empty((2, *rows) if symmetric else rows, dtype=_acc(query))
    needs = needs if grad_scale is not None else (False,) * 4
    return loss, lse, *_fake_info_nce_gradients(query, key, negatives, needs)


def _fake_info_nce_backward(
    grad_loss,
    query,
    key,
    negatives,
    temperature_tensor,
    temperature,
    lse,
    normalize,
    symmetric,
    in_batch,
    self_logit,
    bfloat16_products,
    *needs,
):
    return _fake_info_nce_gradients(query, key, negatives, needs)


def _fake_patch_nce_forward(
    queries,
    keys,
    temperature_tensor,
    temperature,
    self_logit,
    bfloat16_products,
    loss_scales,
    grad_scales,
    need_queries,
    need_keys,
    need_temperature,
):
    now = len(grad_scales) > 0

    def gradients(rows, needs):
        return [_gradient_like(x, now and need) for x, need in zip(rows, needs, strict=True)]

    return (
        _scalar_like(queries[0], True),
        gradients(queries, need_queries),
        gradients(keys, need_keys),
        _scalar_like(queries[0], now and need_temperature),
    )


def _fake_conditional_contrastive_gradients(embeddings, proxies, needs) -> tuple[Tensor, ...]:
    return (
        _gradient_like(embeddings, needs[0]),
        _gradient_like(proxies, needs[1]),
        _scalar_like(embeddings, needs[2]),
    )


def _fake_conditional_contrastive_forward(
    embeddings, proxies, labels, temperature_tensor, temperature, grad_scale, *needs
):
    rows = embeddings.shape[0]
    loss = embeddings.new_empty((rows,), dtype=_acc(embeddings))
    lse = embeddings.new_empty((2, rows), dtype=_acc(embeddings))
    needs = needs if grad_scale is not None else (False,) * 3
    return loss, lse, *_fake_conditional_contrastive_gradients(embeddings, proxies, needs)


def _fake_conditional_contrastive_backward(
    grad_loss, embeddings, proxies, labels, temperature_tensor, temperature, lse, *needs
):
    return _fake_conditional_contrastive_gradients(embeddings, proxies, needs)


def _fake_sup_con_gradients(features, needs) -> tuple[Tensor, ...]:
    return _gradient_like(features, needs[0]), _scalar_like(features, needs[1])


def _fake_sup_con_forward(
    features, labels, temperature_tensor, temperature, grad_scale, mean, *needs
):
    rows = features.shape[0]
    loss, lse = (features.new_empty((rows,), dtype=_acc(features)) for _ in range(2))
    has_positive = features.new_empty((rows,), dtype=torch.bool)
    needs = needs if grad_scale is not None else (False,) * 2
    return loss, has_positive, lse, *_fake_sup_con_gradients(features, needs)


def _fake_sup_con_backward(
    grad_loss, features, labels, temperature_tensor, temperature, lse, *needs
):
    return _fake_sup_con_gradients(features, needs)


def _fake_pairwise_cosine_similarity_forward(
    x, y, temperature_tensor, temperature, bfloat16_products
):
    columns = x if y is None else y
    return x.new_empty((*x.shape[:-1], columns.shape[-2]))


def _fake_pairwise_cosine_similarity_backward(
    grad, x, y, temperature_tensor, temperature, bfloat16_products, *needs
):
    need_x, need_y, need_temperature = needs
    need_y = need_y and y is not None
    return (
        _gradient_like(x, need_x),
        _gradient_like(y if need_y else x, need_y),
        _scalar_like(x, need_temperature),
    )


def _fake_sample_patches_forward(features, patch_ids, normalize):
    pairs = list(zip(features, patch_ids, strict=True))
    patches = [x.new_empty((x.shape[0], ids.shape[0], x.shape[1])) for x, ids in pairs]
    norms = [x.new_empty((x.shape[0], ids.shape[0]), dtype=_acc(x)) for x, ids in pairs]
    return patches, norms if normalize else []


def _fake_sample_patches_backward(
    grad_patches, patches, inverse_norms, patch_ids, feature_likes, normalize
):
    return [torch.empty_like(x) for x in feature_likes]


def _fake_sample_patches_add_(maps, grad_patches, patches, inverse_norms, patch_ids, normalize):
    return None


def _fake_labelled_lse_forward(x, y, x_labels, y_labels, temperature_tensor, temperature, own):
    return x.new_empty((x.shape[0], 2), dtype=torch.float64)


def _fake_labelled_lse_backward(
    x, y, x_labels, y_labels, temperature_tensor, temperature, x_state, y_state, own
):
    return x.new_empty(x.shape, dtype=_acc(x)), x.new_empty((), dtype=torch.float64)


FAKES: dict[str, Callable] = {
    "info_nce_forward": _fake_info_nce_forward,
    "info_nce_backward": _fake_info_nce_backward,
    "patch_nce_forward": _fake_patch_nce_forward,
    "conditional_contrastive_forward": _fake_conditional_contrastive_forward,
    "conditional_contrastive_backward": _fake_conditional_contrastive_backward,
    "sup_con_forward": _fake_sup_con_forward,
    "sup_con_backward": _fake_sup_con_backward,
    "pairwise_cosine_similarity_forward": _fake_pairwise_cosine_similarity_forward,
    "pairwise_cosine_similarity_backward": _fake_pairwise_cosine_similarity_backward,
    "labelled_lse_forward": _fake_labelled_lse_forward,
    "labelled_lse_backward": _fake_labelled_lse_backward,
    "sample_patches_forward": _fake_sample_patches_forward,
    "sample_patches_backward": _fake_sample_patches_backward,
    "sample_patches_add_": _fake_sample_patches_add_,
}


def _load() -> str:
    try:
        library = build.find_library()
        if library is None:
            return "the native library is not built. Run: fastnce build"
        if not build.is_current(library):
            return f"{library} was built from other sources. Run: fastnce build"
        torch.ops.load_library(library)
        for op, fake in FAKES.items():
            torch.library.register_fake(f"fastnce::{op}", fake)
    except (OSError, RuntimeError) as error:
        # A library for another processor or an older torch; reported, for the rest works without it.
        reason = str(error).strip().splitlines()[0]
        return f"the native library cannot be loaded: {reason}. Run: fastnce build"
    return "ok"


_STATUS = _load()
