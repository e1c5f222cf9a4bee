"""The ops as a compiled library registers them with PyTorch, seen from Python: a backend's functions, for any namespace.

The operators themselves are described in ``csrc/common/schemas.h`` and ``csrc/ops.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


class Operators:
    """The functions of a backend over the operators of ``torch.ops.<namespace>``; see :mod:`fastnce.backends`."""

    def __init__(self, namespace: str) -> None:
        self._ops = getattr(torch.ops, namespace)

    def info_nce_forward(
        self,
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
        mean: bool = False,
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
            mean: ``grad_scale`` is divided by the number of rows, B * N.
            needs: whether query, key, negatives and temperature need a gradient.

        Returns:
            losses (B, N); lse (B, N), or (2, B, N) if ``symmetric``; the four gradients, None where not needed.
        """
        loss, lse, *grads = self._ops.info_nce_forward(
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
            mean,
            *needs,
        )
        return loss, lse, _needed(grads, needs if grad_scale is not None else ())

    def info_nce_backward(
        self,
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
        grads = self._ops.info_nce_backward(
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
        self,
        queries: list[Tensor],
        keys: list[Tensor],
        temperature: float | Tensor,
        *,
        self_logit: float,
        loss_scales: Sequence[float],
        grad_scales: Sequence[float] | None,
        mean_of: tuple[int, int] = (0, 0),
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
            mean_of: where not 0, the ``loss_scales``, and the ``grad_scales``, are divided by this number of layers times the
                layer's rows, B * N.
            needs: which queries, which keys, and whether the temperature need a gradient.

        Returns:
            the loss; the gradients of the queries and of the keys, None where not needed; the gradient of the returned loss with
            respect to the temperature, or None.
        """
        need_queries, need_keys, need_temperature = needs
        loss, grad_queries, grad_keys, grad_temperature = self._ops.patch_nce_forward(
            queries,
            keys,
            *_temperature(temperature),
            self_logit,
            _bfloat16_products(queries[0]),
            loss_scales,
            grad_scales or (),
            *mean_of,
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
        self,
        embeddings: Tensor,
        proxies: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        *,
        grad_scale: float | None,
        mean: bool = False,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Losses (N,), lse (2, N) = [log den, log num] and, if ``grad_scale`` is given, the gradients, as in InfoNCE.

        Args:
            embeddings: (N, D), any strides.
            proxies: (N, D), each sample's own class proxy.
            labels: (N,) int64.
            temperature: a float or a 0-d tensor.
            grad_scale: d L / d loss of every row, or None for no gradients now.
            mean: ``grad_scale`` is divided by the number of rows.
            needs: whether embeddings, proxies and temperature need a gradient.
        """
        loss, lse, *grads = self._ops.conditional_contrastive_forward(
            embeddings, proxies, labels, *_temperature(temperature), grad_scale, mean, *needs
        )
        return loss, lse, _needed(grads, needs if grad_scale is not None else ())

    def conditional_contrastive_backward(
        self,
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
        grads = self._ops.conditional_contrastive_backward(
            grad_loss, embeddings, proxies, labels, *_temperature(temperature), lse, *needs
        )
        return _needed(grads, needs)

    def sup_con_forward(
        self,
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
        loss, has_positive, lse, *grads = self._ops.sup_con_forward(
            features, labels, *_temperature(temperature), grad_scale, mean, *needs
        )
        return loss, has_positive, lse, _needed(grads, needs if grad_scale is not None else ())

    def sup_con_backward(
        self,
        grad_loss: Tensor,
        features: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        lse: Tensor,
        *,
        needs: Sequence[bool],
    ) -> Gradients:
        """The gradients of ``(grad_loss * losses).sum()`` from the ``lse`` of the forward."""
        grads = self._ops.sup_con_backward(
            grad_loss, features, labels, *_temperature(temperature), lse, *needs
        )
        return _needed(grads, needs)

    def labelled_lse_forward(
        self,
        x: Tensor,
        y: Tensor,
        x_labels: Tensor,
        y_labels: Tensor,
        temperature: float | Tensor,
        *,
        own: bool,
    ) -> Tensor:
        """(N, 2) float64, see :func:`fastnce.reference.labelled_lse_forward`."""
        return self._ops.labelled_lse_forward(
            x, y, x_labels, y_labels, *_temperature(temperature), own
        )

    def labelled_lse_backward(
        self,
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
        return self._ops.labelled_lse_backward(
            x, y, x_labels, y_labels, *_temperature(temperature), x_state, y_state, own
        )

    def sample_patches_forward(
        self, features: list[Tensor], patch_ids: list[Tensor], normalize: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Patches (B, S, C) of each map (B, C, H, W), and their inverse norms (B, S), [] unless ``normalize``."""
        return self._ops.sample_patches_forward(features, patch_ids, normalize)

    def sample_patches_backward(
        self,
        grad_patches: list[Tensor],
        patches: list[Tensor],
        inverse_norms: list[Tensor],
        patch_ids: list[Tensor],
        feature_likes: list[Tensor],
        normalize: bool,
    ) -> list[Tensor]:
        """The gradient of each map, laid out like ``feature_likes``; ``patches`` may be [] unless ``normalize``."""
        return self._ops.sample_patches_backward(
            grad_patches, patches, inverse_norms, patch_ids, feature_likes, normalize
        )

    def sample_patches_add_(
        self,
        maps: list[Tensor],
        grad_patches: list[Tensor],
        patches: list[Tensor],
        inverse_norms: list[Tensor],
        patch_ids: list[Tensor],
        normalize: bool,
    ) -> None:
        """Adds what :func:`sample_patches_backward` returns to ``maps``, which must not overlap in memory, in place."""
        self._ops.sample_patches_add_(
            maps, grad_patches, patches, inverse_norms, patch_ids, normalize
        )

    def pairwise_cosine_similarity_forward(
        self, x: Tensor, y: Tensor | None, temperature: float | Tensor
    ) -> Tensor:
        """The cosines of all rows of x (..., N, D) with those of y (..., M, D), or with its own, divided by ``temperature``."""
        return self._ops.pairwise_cosine_similarity_forward(
            x, y, *_temperature(temperature), _bfloat16_products(x)
        )

    def pairwise_cosine_similarity_backward(
        self,
        grad: Tensor,
        x: Tensor,
        y: Tensor | None,
        temperature: float | Tensor,
        *,
        needs: Sequence[bool],
    ) -> Gradients:
        """The gradients of x (of both its uses where ``y`` is None), of y and of the temperature; ``grad`` may have any strides."""
        grads = self._ops.pairwise_cosine_similarity_backward(
            grad, x, y, *_temperature(temperature), _bfloat16_products(x), *needs
        )
        return _needed(grads, needs)


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
