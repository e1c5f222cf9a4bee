"""``SupConLoss`` of the SupContrast repository, and of the many that have it from there (``losses.py``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ops.masked_info_nce import negatives_lse
from fastnce.ops.sup_con import sup_con

LIBRARY = ()  # it has no versions
STANDS_FOR = {"losses": ("SupConLoss",)}


class SupConLoss(nn.Module):
    """The supervised contrastive loss of several views, and SimCLR's, as SupContrast's class.

    Args:
        temperature: positive float.
        contrast_mode: ``"all"``: all views are anchors; ``"one"``: the first alone.
        base_temperature: the loss is multiplied by ``temperature / base_temperature``.

    Examples:
        >>> import torch
        >>> features = torch.nn.functional.normalize(torch.randn(8, 2, 16), dim=2)
        >>> loss = SupConLoss()(features, torch.arange(8) // 2)
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
    ) -> None:
        super().__init__()
        _checks.expect_choice("SupConLoss", "contrast_mode", contrast_mode, ("all", "one"))
        self.temperature, self.contrast_mode = temperature, contrast_mode
        self.base_temperature = base_temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The mean over all anchors; those without a positive count as 0.

        Args:
            features: (N, views, ...), whose products are taken as they are: normalise them first.
            labels: (N,) or (N, 1), numbers. Without labels or a mask the views of an image are its only positives.
            mask: (N, N), how much sample j is a positive of sample i; need not be symmetric.
        """
        op = "SupConLoss"
        if features.dim() < 3:
            raise ValueError(
                f"{op}: features must have the shape (N, views, ...), got {_checks.shape_of(features)}. "
                f"Use features.unsqueeze(1) for a single view."
            )
        count, views = features.shape[:2]
        features = features.reshape(count, views, -1)
        if labels is not None and mask is not None:
            raise ValueError(f"{op}: labels and mask both say what the positives are. Drop one.")
        rows = torch.cat(features.unbind(1))
        anchors = rows if self.contrast_mode == "all" else features[:, 0]
        ids = torch.arange(len(rows), device=rows.device)
        if mask is not None:
            losses = self._masked(features, anchors, rows, ids, mask)
        else:
            labels = ids[:count] if labels is None else _numbered(labels, count)
            losses = sup_con(
                anchors,
                labels.repeat(len(anchors) // count),
                rows,
                labels.repeat(views),
                ids=ids[: len(anchors)],
                reference_ids=ids,
                temperature=self.temperature,
                normalize=False,
                reduction="none",
            )
        return losses.mean() * (self.temperature / self.base_temperature)

    def _masked(
        self, features: Tensor, anchors: Tensor, rows: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        """The positives of an anchor are the rows that the mask gives, without itself: their sum is a product with the mask."""
        count, views = features.shape[:2]
        lse = negatives_lse(
            anchors,
            rows,
            ids[: len(anchors)],
            ids,
            op="SupConLoss",
            temperature=self.temperature,
            normalize=False,
        )
        mask = mask.to(lse)
        weight = views * mask.sum(dim=1) - mask.diagonal()
        of_all = mask @ features.to(lse).sum(dim=1)  # (N, D)
        repeats = len(anchors) // count
        weight, of_all = weight.repeat(repeats), of_all.repeat(repeats, 1)
        itself = mask.diagonal().repeat(repeats)[:, None] * anchors.to(lse)
        mean = (anchors.to(lse) * (of_all - itself)).sum(dim=1) / weight.clamp(min=1e-6)
        return (lse - mean / self.temperature).where(weight >= 1e-6, 0)


def _numbered(labels: Tensor, count: int) -> Tensor:
    """As (N,) int64; numbers of any dtype."""
    if labels.numel() != count:
        raise ValueError(
            f"SupConLoss: labels must be one for each of {count} samples, got {_checks.shape_of(labels)}."
        )
    labels = labels.reshape(count)
    return labels.unique(return_inverse=True)[1] if labels.is_floating_point() else labels.long()
