"""``InfoNCE`` and ``info_nce`` of info-nce-pytorch."""

from __future__ import annotations

from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ops.info_nce import info_nce as op

LIBRARY = ("info-nce-pytorch", "0.1.4")  # compared with
STANDS_FOR = {"info_nce": ("InfoNCE", "info_nce")}

_DIMENSIONS = {"unpaired": 2, "paired": 3}


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE of cosines: ``fastnce.info_nce``, whose temperature is 0.1 by default here.

    Args:
        query: (N, D).
        positive_key: (N, D).
        negative_keys: None for the other positive keys; (M, D) shared by all queries; (N, M, D) each query's own.
        temperature: positive float, or tensor of one element.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for (N,).
        negative_mode: ``"unpaired"`` for (M, D), ``"paired"`` for (N, M, D).

    Examples:
        >>> import torch
        >>> loss = info_nce(torch.randn(32, 128), torch.randn(32, 128))
    """
    if negative_keys is not None:
        _checks.expect_choice("info_nce", "negative_mode", negative_mode, tuple(_DIMENSIONS))
        if negative_keys.dim() != _DIMENSIONS[negative_mode]:
            raise ValueError(
                f"info_nce: negative_mode={negative_mode!r} needs negative_keys of {_DIMENSIONS[negative_mode]} dimensions, "
                f"got {_checks.shape_of(negative_keys)}. (M, D) are unpaired, (N, M, D) paired."
            )
    return op(query, positive_key, negative_keys, temperature=temperature, reduction=reduction)


class InfoNCE(nn.Module):
    """``info_nce`` as a module.

    Examples:
        >>> import torch
        >>> loss = InfoNCE(negative_mode="paired")(*torch.randn(2, 32, 128), torch.randn(32, 6, 128))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        self.temperature, self.reduction, self.negative_mode = temperature, reduction, negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """See ``info_nce``."""
        options = (self.temperature, self.reduction, self.negative_mode)
        return info_nce(query, positive_key, negative_keys, *options)
