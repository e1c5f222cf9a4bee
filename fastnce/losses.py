"""The losses as modules: constructor arguments are the options of the op, ``forward`` takes its tensors.

``temperature`` may be a float; an ``nn.Parameter`` of one element, which is trained with the module; or another tensor of one
element, a buffer: it moves with the module and is in its ``state_dict``, which loads without it, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnce import ops
from fastnce.ops import _checks


class _Loss(nn.Module):
    """Holds the options that are passed on to an op."""

    def __init__(self, temperature: float | Tensor, **options: object) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.options = options

    def extra_repr(self) -> str:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            # One that is elsewhere, or in parts, has no number to show.
            here = type(temperature) in (Tensor, nn.Parameter) and temperature.device.type != "meta"
            number = f"{temperature.item():g}" if here and temperature.numel() == 1 else "..."
            shown = f"{type(temperature).__name__}({number})"
        else:
            shown = repr(temperature)
        return ", ".join([f"temperature={shown}", *_shown(self.options)])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        if "temperature" in self._buffers:  # which checkpoints of older versions lack
            state_dict.setdefault(f"{prefix}temperature", self.temperature)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _shown(options: dict[str, object]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items() if value is not None]


class InfoNCELoss(_Loss):
    """:func:`fastnce.info_nce` as a module.

    Example:
        >>> import torch
        >>> loss = InfoNCELoss(temperature=0.1)(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        symmetric: bool = False,
        in_batch_negatives: bool | None = None,
        reduction: str = "mean",
        similarity_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            symmetric=symmetric,
            in_batch_negatives=in_batch_negatives,
            reduction=reduction,
            similarity_dtype=similarity_dtype,
            backend=backend,
        )

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """The loss of ``query``, ``positive_key`` (N, D) or (B, N, D), and negatives as in :func:`fastnce.info_nce`."""
        return ops.info_nce(
            query, positive_key, negative_keys, temperature=self.temperature, **self.options
        )


class PatchNCELoss(_Loss):
    """:func:`fastnce.patch_nce` as a module.

    Example:
        >>> import torch
        >>> loss = PatchNCELoss()(torch.randn(1, 256, 64), torch.randn(1, 256, 64))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        negatives: str = "image",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature, negatives=negatives, backend=backend)

    def forward(
        self,
        query_features: Tensor | Sequence[Tensor],
        key_features: Tensor | Sequence[Tensor],
    ) -> Tensor:
        """The loss of patches (B, S, C), or of lists of them, one per layer."""
        return ops.patch_nce(
            query_features, key_features, temperature=self.temperature, **self.options
        )


class NTXentLoss(_Loss):
    """:func:`fastnce.nt_xent` as a module.

    Example:
        >>> import torch
        >>> loss = NTXentLoss()(torch.randn(8, 16), torch.randn(8, 16))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction, backend=backend)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views (N, D) each."""
        return ops.nt_xent(z1, z2, temperature=self.temperature, **self.options)


class SupConLoss(_Loss):
    """:func:`fastnce.sup_con` as a module.

    Example:
        >>> import torch
        >>> loss = SupConLoss()(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction, backend=backend)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``features`` (N, D) with ``labels`` (N,)."""
        return ops.sup_con(features, labels, temperature=self.temperature, **self.options)


class ConditionalContrastiveLoss(_Loss):
    """:func:`fastnce.conditional_contrastive` as a module.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> loss = ConditionalContrastiveLoss()(torch.randn(4, 8), torch.randn(2, 8)[labels], labels)
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction, backend=backend)

    def forward(self, embeddings: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``embeddings`` and each sample's own ``proxies`` (N, D), with ``labels`` (N,)."""
        return ops.conditional_contrastive(
            embeddings, proxies, labels, temperature=self.temperature, **self.options
        )


class CLIPLoss(nn.Module):
    """CLIP's loss (Radford et al. 2021, https://arxiv.org/abs/2103.00020): symmetric InfoNCE of images and texts.

    Example:
        >>> import torch
        >>> logit_scale = torch.nn.Parameter(torch.tensor(2.66))
        >>> loss = CLIPLoss()(torch.randn(8, 16), torch.randn(8, 16), logit_scale.exp())
    """

    def __init__(self, *, normalize: bool = True, backend: str | None = None) -> None:
        super().__init__()
        self.options = {"normalize": normalize, "backend": backend}

    def extra_repr(self) -> str:
        return ", ".join(_shown(self.options))

    def forward(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
        """The loss of ``image`` and ``text`` (N, D), whose cosines are multiplied by ``logit_scale`` (already exponentiated).

        ``logit_scale``: positive float, or tensor of one element and any dtype, which gets its gradient.
        """
        _checks.expect_tensor("CLIPLoss", "image", image, "(N, D)")
        temperature = _checks.expect_scale("CLIPLoss", logit_scale, image)
        return ops.info_nce(image, text, temperature=temperature, symmetric=True, **self.options)
