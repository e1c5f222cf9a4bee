"""The losses of open_clip (``open_clip_torch``), whose models normalise their rows: they are taken as they come."""

from __future__ import annotations

import functools

import torch.distributed as dist
from torch import Tensor, nn

from fastnce.ops import _checks
from fastnce.ops.info_nce import info_nce
from fastnce.ops.info_nce import over_ranks as info_nce_over_ranks
from fastnce.ops.sigmoid_contrastive import over_ranks as sigmoid_contrastive_over_ranks
from fastnce.ops.sigmoid_contrastive import sigmoid_contrastive

LIBRARY = ("open_clip_torch", "3.3.0")  # compared with
STANDS_FOR = {"open_clip.loss": ("ClipLoss", "SigLipLoss")}


def _expect_ranks(op: str, world_size: int) -> None:
    """Their ranks are those of the default group."""
    here = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size not in (1, here):
        raise ValueError(
            f"{op}: world_size={world_size}, but torch.distributed has {here} ranks. Initialise it first, or pass its size."
        )


def _output(name: str, loss: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
    return {name: loss} if output_dict else loss


class ClipLoss(nn.Module):
    """CLIP's loss as ``open_clip.ClipLoss``, also over ranks, with the gradients of each way to gather.

    Args:
        local_loss: over ranks, the loss of this rank's rows; else that of all rows.
        gather_with_grad: over ranks, gradients flow to the rows of other ranks. Without, the towers' gradients are smaller
            by the number of ranks than those of the loss, and the scale's are not.
        cache_labels: changes nothing: there are no labels.
        rank: changes nothing: ``torch.distributed`` knows it.
        world_size: 1, or the number of ranks of the default group.
        use_horovod: False.

    Examples:
        >>> import torch
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
        >>> loss = ClipLoss()(image_features=image, text_features=text, logit_scale=torch.tensor(14.3))
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "ClipLoss: use_horovod=True: ranks reach each other by torch.distributed. Use it, or keep open_clip's ClipLoss."
            )
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of unit rows (N, D), whose products are multiplied by ``logit_scale`` (already exponentiated).

        ``logit_bias`` changes no softmax: its gradient is 0. The result is float32 (float64 for float64 rows), or with
        ``output_dict`` ``{"contrastive_loss": ...}``.
        """
        loss = self._loss(image_features, text_features, logit_scale)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # DDP expects a gradient for every parameter
        return _output("contrastive_loss", loss, output_dict)

    def _loss(self, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        _expect_ranks("ClipLoss", self.world_size)
        temperature = _checks.expect_scale("ClipLoss", scale, image)
        if self.world_size == 1:
            return info_nce(image, text, temperature=temperature, symmetric=True, normalize=False)
        over_ranks = functools.partial(
            info_nce_over_ranks, temperature=temperature, normalize=False
        )
        if self.gather_with_grad and self.local_loss:
            return over_ranks(image, text, symmetric=True, reduction="none").mean()
        if self.gather_with_grad:
            return over_ranks(image, text, symmetric=True)
        if self.local_loss:
            to_text = over_ranks(image, text.detach(), reduction="none")
            to_image = over_ranks(text, image.detach(), reduction="none")
            return (to_text.mean() + to_image.mean()) / 2
        # Every rank has the whole gradient of the scale, and adds its own rows' share of the towers'.
        if isinstance(temperature, Tensor):
            times = self.world_size - 1
            temperature = temperature + times * (temperature - temperature.detach())
        return over_ranks(
            image, text, symmetric=True, temperature=temperature, gradient_scale="sum"
        )


class SigLipLoss(nn.Module):
    """SigLIP's loss as ``open_clip.loss.SigLipLoss``; over ranks the loss of this rank's images with all texts.

    Args:
        cache_labels: changes nothing: there are no labels.
        rank: changes nothing: ``torch.distributed`` knows it.
        world_size: 1, or the number of ranks of the default group.
        dist_impl: None, ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``, which changes nothing.

    Examples:
        >>> import torch
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
        >>> loss = SigLipLoss()(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or "bidir"
        known = ("bidir", "shift", "reduce", "gather")
        _checks.expect_choice("SigLipLoss", "dist_impl", self.dist_impl, known)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of unit rows (N, D): their pairs' sum over N. ``logit_scale`` is already exponentiated."""
        _expect_ranks("SigLipLoss", self.world_size)
        rows = (image_features, text_features)
        options = {"scale": logit_scale, "bias": 0.0 if logit_bias is None else logit_bias}
        options["normalize"] = False
        if self.world_size == 1:
            loss = sigmoid_contrastive(*rows, **options)
        else:
            loss = sigmoid_contrastive_over_ranks(*rows, **options, reduction="none").mean()
        return _output("contrastive_loss", loss, output_dict)
