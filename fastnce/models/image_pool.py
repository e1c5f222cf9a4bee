"""Earlier translations for a discriminator to see again."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """Keeps up to `size` images and gives, for each new one, with probability 1/2 an older one in its place.

    Until the pool is full every image is kept and given back as it came. Then, for each image, either the image itself is
    given back and not kept, or a random older one is, whose place the new one takes.

    The images are part of the state dict (as extra state, for their number and sizes change), and choices are drawn from
    torch's default generator, whose state a checkpoint of the training holds: a continued run makes the same ones.

    Source: Shrivastava et al., "Learning from Simulated and Unsupervised Images through Adversarial Training", CVPR 2017;
    with single images as in CycleGAN (Zhu et al., ICCV 2017).

    Args:
        size: images to keep; 0 gives every image back as it came.

    Example:
        >>> pool = ImagePool(1)
        >>> first, second = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
        >>> pool(first).mean().item(), len(pool.images)
        (0.0, 1)
        >>> bool(pool(second).mean().item() in (0.0, 1.0))
        True
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """For `images` (N, C, H, W), of one size in all calls, as many old and new ones; without gradient."""
        if self.size == 0:
            return images.detach()
        return torch.stack([self._exchange(image) for image in images.detach()])

    def _exchange(self, image: Tensor) -> Tensor:
        if len(self.images) < self.size:
            self.images.append(image.clone())
            return image
        if torch.rand(()).item() < 0.5:
            return image
        place = int(torch.randint(self.size, ()))
        old, self.images[place] = self.images[place], image.clone()
        return old.to(image)  # after loading a checkpoint it is still on the CPU

    def get_extra_state(self) -> list[Tensor]:
        """The images, for the state dict."""
        return list(self.images)

    def set_extra_state(self, state: list[Tensor]) -> None:
        """Takes the images from a state dict."""
        self.images = list(state)
