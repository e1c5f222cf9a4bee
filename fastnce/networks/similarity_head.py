"""SimDCL's networks: from the sampled patches of an image to one vector."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastnce.networks.layers import init_normal


class SimilarityHead(nn.Module):
    """The published MappingF: `(B, num_layers, num_patches, dim) -> (B, out_dim)`, of length 1.

    The projected patches of each layer are taken as a channel of an image: 3x3 convolution with stride 2 to `out_dim`
    channels, ReLU, mean over all positions, linear, ReLU, linear. At least 3 patches and 3 dimensions.

    Source: Han et al., "Dual Contrastive Learning for Unsupervised Image-to-Image Translation", CVPRW 2021.

    Args:
        num_layers: feature maps that patches were sampled from.
        out_dim: length of the vectors.

    Example:
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
