"""netF of CUT: one small MLP per feature map, from sampled patches to the space of the contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastnce.networks.layers import init_xavier


class PatchProjector(nn.Module):
    """`Linear(C_l, dim) - ReLU - Linear(dim, dim)` for each feature map l.

    The result is not L2-normalised: `fastnce.patch_nce` normalises. The MLPs are made from the known channel counts,
    so there is no lazy first forward. State-dict keys are `mlp_{l}.0.*` and `mlp_{l}.2.*` as in published checkpoints.

    Args:
        in_channels: channels C_l of each feature map, in the order of the taps.
        dim: width of the hidden layer and of the output.

    Example:
        >>> import torch
        >>> project = PatchProjector([3, 128])
        >>> [p.shape for p in project([torch.zeros(2, 64, 3), torch.zeros(2, 64, 128)])]
        [torch.Size([2, 64, 256]), torch.Size([2, 64, 256])]
    """

    def __init__(self, in_channels: Sequence[int], dim: int = 256) -> None:
        super().__init__()
        self.in_channels = list(in_channels)
        for index, channels in enumerate(self.in_channels):
            mlp = nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))
            self.add_module(f"mlp_{index}", mlp)
        init_xavier(self)

    def forward(self, patches: Sequence[Tensor]) -> list[Tensor]:
        """Projects `patches[l]` (B, S_l, C_l) to (B, S_l, dim), one entry per feature map."""
        if len(patches) != len(self.in_channels):
            raise ValueError(
                f"PatchProjector: got patches of {len(patches)} feature maps, expected {len(self.in_channels)} "
                f"(in_channels={self.in_channels})."
            )
        return [self.get_submodule(f"mlp_{index}")(x) for index, x in enumerate(patches)]
