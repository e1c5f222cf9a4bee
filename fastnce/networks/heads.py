"""Small networks between an encoder's features and a contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from fastnce.networks.layers import init_normal, init_xavier

Projection = Literal["mlp", "linear", "identity"]


class PatchProjector(nn.Module):
    """netF of CUT: `Linear(C_l, dim) - ReLU - Linear(dim, dim)` for each feature map l; or `Linear(C_l, dim)`, or nothing.

    The result is not L2-normalised: `fastnce.patch_nce` normalises. The MLPs are made from the known channel counts,
    so there is no lazy first forward. State-dict keys are `mlp_{l}.0.*` and `mlp_{l}.2.*` as in published checkpoints; of linear
    layers `mlp_{l}.*`.

    Args:
        in_channels: channels C_l of each feature map, in the order of the taps.
        dim: width of the hidden layer and of the output.
        projection: "mlp", "linear", or "identity", which has no parameters and keeps the C_l.

    Examples:
        >>> import torch
        >>> project = PatchProjector([3, 128])
        >>> [p.shape for p in project([torch.zeros(2, 64, 3), torch.zeros(2, 64, 128)])]
        [torch.Size([2, 64, 256]), torch.Size([2, 64, 256])]
    """

    def __init__(
        self, in_channels: Sequence[int], dim: int = 256, projection: Projection = "mlp"
    ) -> None:
        super().__init__()
        if projection not in get_args(Projection):
            raise ValueError(
                f"PatchProjector: projection={projection!r} must be one of {get_args(Projection)}."
            )
        self.in_channels = list(in_channels)
        for index, channels in enumerate(self.in_channels):
            self.add_module(f"mlp_{index}", _projection(channels, dim, projection))
        init_xavier(self)

    def forward(self, patches: Sequence[Tensor]) -> list[Tensor]:
        """Projects `patches[l]` (B, S_l, C_l) to (B, S_l, dim), (B, S_l, C_l) with "identity", one entry per feature map."""
        if len(patches) != len(self.in_channels):
            raise ValueError(
                f"PatchProjector: got patches of {len(patches)} feature maps, expected {len(self.in_channels)} "
                f"(in_channels={self.in_channels})."
            )
        return [self._layer(index)(x) for index, x in enumerate(patches)]

    def _layer(self, index: int) -> nn.Module:
        return self.get_submodule(f"mlp_{index}")


class CriticProjector(PatchProjector):
    """netH of Contrastive Feature Loss: the same with the state-dict keys `mlps.{l}.0.*` of its checkpoints."""

    def __init__(
        self, in_channels: Sequence[int], dim: int = 256, projection: Projection = "mlp"
    ) -> None:
        super().__init__(in_channels, dim, projection)
        layers = [self._modules.pop(f"mlp_{index}") for index in range(len(self.in_channels))]
        self.mlps = nn.ModuleList(layers)

    def _layer(self, index: int) -> nn.Module:
        return self.mlps[index]


def _projection(channels: int, dim: int, projection: Projection) -> nn.Module:
    if projection == "identity":
        return nn.Identity()
    if projection == "linear":
        return nn.Linear(channels, dim)
    return nn.Sequential(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim))


class SimilarityHead(nn.Module):
    """The published MappingF: `(B, num_layers, num_patches, dim) -> (B, out_dim)`, of length 1.

    The projected patches of each layer are taken as a channel of an image: 3x3 convolution with stride 2 to `out_dim`
    channels, ReLU, mean over all positions, linear, ReLU, linear. At least 3 patches and 3 dimensions.

    Source: Han et al., "Dual Contrastive Learning for Unsupervised Image-to-Image Translation", CVPRW 2021.

    Args:
        num_layers: feature maps that patches were sampled from.
        out_dim: length of the vectors.

    Examples:
        >>> import torch
        >>> SimilarityHead(4)(torch.randn(2, 4, 256, 256)).norm(dim=1).allclose(torch.ones(2))
        True
    """

    def __init__(self, num_layers: int, out_dim: int = 64) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(num_layers, out_dim, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(out_dim, out_dim),
            nn.ReLU(),
            nn.Linear(out_dim, out_dim),
        )
        init_normal(self)

    def forward(self, patches: Tensor) -> Tensor:
        """The vector of each image's patches."""
        return F.normalize(self.model(patches), dim=1)


class ProjectionHead(nn.Sequential):
    """Linear, ReLU, Linear: (N, `in_dim`) to (N, `out_dim`); not normalised, the losses do that.

    The head of SimCLR, MoCo v2 and SupCon. Its parameters are `0.weight`, `0.bias`, `2.weight`, `2.bias`.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
