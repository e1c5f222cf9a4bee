"""``PatchNCELoss`` and ``PatchSampleF`` of the published CUT repository (``models/patchnce.py``, ``models/networks.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnce.ops.info_nce import info_nce
from fastnce.ops.patch_nce import SELF_LOGIT
from fastnce.ops.sample_patches import sample_patches
from fastnce.reference.normalize import accumulation_dtype

LIBRARY = ()  # it has no versions
STANDS_FOR = {"models.patchnce": ("PatchNCELoss",), "models.networks": ("PatchSampleF",)}


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


class PatchSampleF(nn.Module):
    """CUT's patches of feature maps, projected and normalised, as its class; positions are drawn by PyTorch.

    Args:
        use_mlp: whether a layer's patches go through two linear layers, which are made at the first call as ``mlp_0``, ...
        init_type: ``"normal"``: weights are drawn with the deviation ``init_gain``, biases are 0.
        init_gain: see ``init_type``.
        nc: the width of the linear layers.
        gpu_ids: changes nothing: the layers are made where the features are.

    Examples:
        >>> import torch
        >>> sampler, maps = PatchSampleF(use_mlp=True), [torch.randn(2, 8, 16, 16), torch.randn(2, 16, 8, 8)]
        >>> queries, ids = sampler(maps, num_patches=64)
        >>> keys, _ = sampler(maps, 64, ids)
    """

    def __init__(
        self,
        use_mlp: bool = False,
        init_type: str = "normal",
        init_gain: float = 0.02,
        nc: int = 256,
        gpu_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if init_type != "normal":
            raise ValueError(
                f"PatchSampleF: init_type must be 'normal', got {init_type!r}. Initialise the layers after the first call."
            )
        self.use_mlp, self.nc, self.init_gain, self.gpu_ids = use_mlp, nc, init_gain, gpu_ids
        self.mlp_init = False  # until the layers are there

    def create_mlp(self, feats: Sequence[Tensor]) -> None:
        """Makes the layers for feature maps (B, C, H, W)."""
        for index, x in enumerate(feats):
            mlp = nn.Sequential(
                nn.Linear(x.shape[1], self.nc), nn.ReLU(), nn.Linear(self.nc, self.nc)
            )
            for layer in (mlp[0], mlp[2]):
                nn.init.normal_(layer.weight, 0.0, self.init_gain)
                nn.init.zeros_(layer.bias)
            self.add_module(f"mlp_{index}", mlp.to(x.device))
        self.mlp_init = True

    def forward(
        self,
        feats: Sequence[Tensor],
        num_patches: int = 64,
        patch_ids: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each map unit rows (B * S, C), one image after another, and their positions (S,), the same for all images."""
        if self.use_mlp and not self.mlp_init:
            self.create_mlp(feats)
        patches, ids = sample_patches(list(feats), num_patches, patch_ids=patch_ids)
        rows = [x.flatten(0, 1) for x in patches]
        if self.use_mlp:
            rows = [self.get_submodule(f"mlp_{i}")(x) for i, x in enumerate(rows)]
        return [x / (x.norm(dim=1, keepdim=True) + 1e-7) for x in rows], ids
