"""``PatchNCELoss`` of the published CUT repository (``models/patchnce.py``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastnce.ops.info_nce import info_nce
from fastnce.ops.patch_nce import SELF_LOGIT
from fastnce.reference.normalize import accumulation_dtype

LIBRARY = ()  # it has no versions
STANDS_FOR = {"models.patchnce": ("PatchNCELoss",)}


class PatchNCELoss(nn.Module):
    """CUT's loss of one layer, a number for each patch, as its class.

    Args:
        opt: with ``batch_size``, ``nce_T`` and ``nce_includes_all_negatives_from_minibatch``, as CUT's options.

    Examples:
        >>> import torch, types
        >>> opt = types.SimpleNamespace(batch_size=2, nce_T=0.07, nce_includes_all_negatives_from_minibatch=False)
        >>> patches = torch.nn.functional.normalize(torch.randn(2, 2 * 256, 64), dim=2)
        >>> loss = PatchNCELoss(opt)(*patches).mean()
    """

    def __init__(self, opt: object) -> None:
        super().__init__()
        self.opt = opt

    def forward(self, feat_q: Tensor, feat_k: Tensor) -> Tensor:
        """The losses (P,) of the patches (P, C) of all images, one image after another; ``feat_k`` gets no gradient.

        Products are taken as they are: CUT's ``PatchSampleF`` normalises the patches.
        """
        together = self.opt.nce_includes_all_negatives_from_minibatch
        images = 1 if together else self.opt.batch_size
        if len(feat_q) % images:
            raise ValueError(
                f"PatchNCELoss: feat_q has {len(feat_q)} rows, which are no multiple of opt.batch_size={images}. "
                f"Drop the last, smaller batch."
            )
        temperature, key = self.opt.nce_T, feat_k.detach()
        losses = info_nce(
            feat_q.view(images, -1, feat_q.shape[1]),
            key.view(images, -1, key.shape[1]),
            temperature=temperature,
            normalize=False,
            reduction="none",
        ).flatten()
        # In the place of each patch's own key among the negatives is a constant.
        wide = accumulation_dtype(feat_q.dtype)
        positive = (feat_q.to(wide) * key.to(wide)).sum(dim=1)
        return torch.logaddexp(losses, (SELF_LOGIT - positive) / temperature)
