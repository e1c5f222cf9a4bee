"""The contrastive loss functions of solo-learn (``solo.losses``)."""

from __future__ import annotations

from torch import Tensor

from fastnce.ops.info_nce import info_nce
from fastnce.ops.info_nce import over_ranks as info_nce_over_ranks
from fastnce.ops.sup_con import over_ranks as sup_con_over_ranks

LIBRARY = ()  # compared with its equations
STANDS_FOR = {"solo.losses": ("simclr_loss_func", "mocov2plus_loss_func", "nnclr_loss_func")}


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """The log of the sum over a row's positives, which have its index; the mean over this rank's rows.

    Args:
        z: (N, D), all views of all images.
        indexes: (N,) integers: of images, or labels.
        temperature: positive float.

    Examples:
        >>> import torch
        >>> loss = simclr_loss_func(torch.randn(8, 16), torch.arange(4).repeat(2))
    """
    return sup_con_over_ranks(
        z, indexes, temperature=temperature, positives="sum", reduction="none"
    ).mean()


def mocov2plus_loss_func(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1
) -> Tensor:
    """The loss of ``query`` (N, D), whose positives are ``key`` (N, D), among ``queue`` (D, K); products as they are.

    Examples:
        >>> import torch
        >>> query, key = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> loss = mocov2plus_loss_func(query, key, torch.nn.functional.normalize(torch.randn(16, 64), dim=0))
    """
    return info_nce(query, key, queue.T, temperature=temperature, normalize=False)


moco_loss_func = mocov2plus_loss_func  # its name in older versions


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss of nearest neighbours ``nn`` (N, D) among the predictions ``p`` (N, D) of all ranks; the mean over this rank's.

    Examples:
        >>> import torch
        >>> loss = nnclr_loss_func(*torch.randn(2, 8, 16))
    """
    return info_nce_over_ranks(nn, p, temperature=temperature, reduction="none").mean()
